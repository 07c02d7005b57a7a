"""Registry of models: creates a model by name or from a config. No other module of ``models`` takes a config (``CfgNode``)."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import cswin, deit, pvt, pvt_v2, swin
from .backbone import Backbone
from .preprocessing import Preprocessing
from .windows import to_pair

if TYPE_CHECKING:  # users of the installed models need no yacs
    from yacs.config import CfgNode

# Model name -> constructor with the arguments of that model size.
MODELS: dict[str, partial[Backbone]] = {
    name: partial(constructor, **size)
    for constructor, sizes in (
        (swin.SwinTransformer, swin.SIZES),
        (pvt.PyramidVisionTransformer, pvt.SIZES),
        (pvt_v2.PyramidVisionTransformerV2, pvt_v2.SIZES),
        (cswin.CSwinTransformer, cswin.SIZES),
        (deit.DeiT, deit.SIZES),
    )
    for name, size in sizes.items()
}


def list_models() -> list[str]:
    """Model names accepted by ``create_model``, sorted."""
    return sorted(MODELS)


def create_model(name: str, *, num_classes: int = 1000, img_size: int | tuple[int, int] | None = None, **kwargs) -> nn.Module:
    """Create a model by name, with random weights.

    As in timm, ``drop_rate`` is the dropout before the classifier. The config key MODEL.DROP_RATE, the dropout of
    embeddings, projections and MLPs, corresponds to ``pos_drop_rate`` and ``proj_drop_rate``.

    Args:
        name: one of ``list_models()``.
        num_classes: number of outputs of the head; 0 to return pooled features instead of logits.
        img_size: native input size in pixels, an integer or (height, width); by default 384 for models named *_384, else 224.
        kwargs: further arguments of the model's constructor.

    Raises:
        ValueError: an unknown name (the message suggests the nearest one), or an argument with an invalid value.
        TypeError: an argument that the model's constructor does not accept.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}{_suggest_nearest(name, MODELS)} (list_models() returns all names)")
    if "pretrained" in kwargs:
        raise TypeError(f"create_model has no argument 'pretrained'; use timm.create_model({name!r}, pretrained=...) instead")
    if img_size is not None:
        kwargs["img_size"] = img_size
    return MODELS[name](num_classes=num_classes, **kwargs)


def build_model(cfg: "CfgNode") -> nn.Module:
    """Create the model that the MODEL and DATA sections of a config describe.

    The evaluation transform of the config is stored in the model's ``pretrained_cfg``, so that
    ``timm.data.resolve_model_data_config(model)`` returns it.

    Raises:
        ValueError: an unknown MODEL.TYPE; the message suggests the nearest one.
    """
    name, arguments = build_arguments(cfg)
    model = MODELS[name](**arguments)
    model.pretrained_cfg = model.default_cfg = _build_data_config(model, cfg)
    return model


def build_arguments(cfg: "CfgNode") -> tuple[str, dict]:
    """Model name and ``create_model`` arguments for a config, as JSON-serialisable values.

    Raises:
        ValueError: an unknown MODEL.TYPE; the message suggests the nearest one.
    """
    model_type = cfg.MODEL.TYPE
    if model_type not in REGISTERED_NAMES:
        raise ValueError(f"MODEL.TYPE={model_type!r} is not a model{_suggest_nearest(model_type, REGISTERED_NAMES)}")
    name = REGISTERED_NAMES[model_type]
    return name, _shared_arguments(cfg) | FAMILY_ARGUMENTS[MODELS[name].func](cfg)


def build_preprocessing(cfg: "CfgNode") -> Preprocessing:
    """Build the evaluation preprocessing."""
    return Preprocessing(
        img_size=to_pair(cfg.DATA.IMG_SIZE, "DATA.IMG_SIZE"),
        crop_mode=cfg.TEST.CROP_MODE if cfg.TEST.CROP else "none",
        crop_pct=cfg.TEST.CROP_PCT,
        interpolation=cfg.TEST.INTERPOLATION or cfg.DATA.INTERPOLATION,
        mean=tuple(cfg.DATA.MEAN),
        std=tuple(cfg.DATA.STD),
        exif=cfg.DATA.EXIF,
    )


def _build_data_config(model: Backbone, cfg: "CfgNode") -> dict:
    """timm's ``pretrained_cfg`` of a model, with the evaluation transform of ``cfg``."""
    preprocessing = build_preprocessing(cfg)
    return {
        "architecture": cfg.MODEL.NAME,
        "num_classes": cfg.MODEL.NUM_CLASSES,
        "input_size": (model.in_chans, *preprocessing.img_size),
        "fixed_input_size": False,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        **preprocessing.timm_options(),
        "first_conv": model.first_conv,
        "classifier": "head",
    }


def nearest_model(state_dict: Mapping[str, Tensor]) -> str:
    """Name of the model with the entries and shapes most similar to those of a state dict; "" if none is similar."""
    stored = {(name, value.shape) for name, value in state_dict.items()}
    best, similarity = "", 0.5  # minimum Jaccard index of the entries
    for name in list_models():
        own = _list_entries(name)
        if len(stored & own) / len(stored | own) > similarity:
            best, similarity = name, len(stored & own) / len(stored | own)
    return best


@cache
def _list_entries(name: str) -> set[tuple[str, torch.Size]]:
    """Names and shapes of the entries of a model's state dict."""
    return {(entry, value.shape) for entry, value in create_model(name, device="meta").state_dict().items()}


def _suggest_nearest(name: str, names) -> str:
    """End of an error message that suggests the name most similar to ``name``; "" if none is similar."""
    matches = get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f": did you mean {matches[0]!r}?" if matches else ""


def _shared_arguments(cfg: "CfgNode") -> dict:
    return {
        "img_size": cfg.DATA.IMG_SIZE,
        "num_classes": cfg.MODEL.NUM_CLASSES,
        "proj_drop_rate": cfg.MODEL.DROP_RATE,
        "drop_path_rate": cfg.MODEL.DROP_PATH_RATE,
        "attn_type": cfg.MODEL.LA.ATTN_TYPE,
        "linear": {
            "focusing_factor": cfg.MODEL.LA.FOCUSING_FACTOR,
            "kernel_size": cfg.MODEL.LA.KERNEL_SIZE,
            "kind": cfg.MODEL.LA.KIND,
            "focusing": cfg.MODEL.LA.FOCUSING,
            "rank_restoration": cfg.MODEL.LA.RANK_RESTORATION,
            "backend": cfg.MODEL.LA.BACKEND,
        },
    }


# Largest MODEL.SWIN.WINDOW_SIZE of models for 224 pixels. As in the paper's code, the default of MODEL.SWIN.SOFTMAX_WINDOW is 7
# up to this size, and 12 above it (384 pixels).
MAX_WINDOW_AT_224 = 56


def _swin_arguments(cfg: "CfgNode") -> dict:
    return {
        "pos_drop_rate": cfg.MODEL.DROP_RATE,
        "patch_size": cfg.MODEL.SWIN.PATCH_SIZE,
        "embed_dim": cfg.MODEL.SWIN.EMBED_DIM,
        "depths": cfg.MODEL.SWIN.DEPTHS,
        "num_heads": cfg.MODEL.SWIN.NUM_HEADS,
        "window_size": cfg.MODEL.SWIN.WINDOW_SIZE or None,
        "softmax_window": cfg.MODEL.SWIN.SOFTMAX_WINDOW or (7 if cfg.MODEL.SWIN.WINDOW_SIZE <= MAX_WINDOW_AT_224 else 12),
        "mlp_ratio": cfg.MODEL.SWIN.MLP_RATIO,
        "qkv_bias": cfg.MODEL.SWIN.QKV_BIAS,
        "patch_norm": cfg.MODEL.SWIN.PATCH_NORM,
    }


def _pvt_arguments(cfg: "CfgNode") -> dict:
    return _pvt_v2_arguments(cfg) | {"pos_drop_rate": cfg.MODEL.DROP_RATE}


def _pvt_v2_arguments(cfg: "CfgNode") -> dict:
    return {"linear_reductions": [int(digit) for digit in cfg.MODEL.LA.PVT_LA_SR_RATIOS]}


def _cswin_arguments(cfg: "CfgNode") -> dict:
    return {"linear_splits": [int(size) or None for size in cfg.MODEL.LA.CSWIN_LA_SPLIT_SIZE.split("-")]}


def _deit_arguments(cfg: "CfgNode") -> dict:
    arguments = {"pos_drop_rate": cfg.MODEL.DROP_RATE}
    if cfg.MODEL.TYPE != "flatten_deit":  # other types determine the model size; MODEL.DEIT does not apply
        return arguments
    return arguments | {
        "patch_size": cfg.MODEL.DEIT.PATCH_SIZE,
        "embed_dim": cfg.MODEL.DEIT.EMBED_DIM,
        "depth": cfg.MODEL.DEIT.DEPTH,
        "num_heads": cfg.MODEL.DEIT.NUM_HEADS,
    }


# Constructor -> function that reads the arguments specific to that constructor from a config.
FAMILY_ARGUMENTS: dict[Callable[..., Backbone], Callable[["CfgNode"], dict]] = {
    swin.SwinTransformer: _swin_arguments,
    pvt.PyramidVisionTransformer: _pvt_arguments,
    pvt_v2.PyramidVisionTransformerV2: _pvt_v2_arguments,
    cswin.CSwinTransformer: _cswin_arguments,
    deit.DeiT: _deit_arguments,
}

# MODEL.TYPE -> registered name. MODEL.SWIN sets the size of flatten_swin, and MODEL.DEIT sets the size of flatten_deit.
REGISTERED_NAMES: dict[str, str] = {
    "flatten_swin": "flatten_swin_t",
    "flatten_pvt_tiny": "flatten_pvt_t",
    "flatten_pvt_small": "flatten_pvt_s",
    "flatten_pvt_medium": "flatten_pvt_m",
    "flatten_pvt_large": "flatten_pvt_b",
    **{name: name for name in pvt_v2.SIZES},
    "FLatten_CSWin_64_24181_tiny_224": "flatten_cswin_t",
    "FLatten_CSWin_64_24322_small_224": "flatten_cswin_s",
    "FLatten_CSWin_96_36292_base_224": "flatten_cswin_b",
    "FLatten_CSWin_96_36292_base_384": "flatten_cswin_b_384",
    "flatten_deit": "flatten_deit_t",
    **{name: name for name in deit.SIZES},
}
