"""Names to constructors. ``build_model`` is the one place under ``models`` that reads a config."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from yacs.config import CfgNode

from models import cswin, deit, pvt, pvt_v2, swin

Constructor = Callable[..., nn.Module]

# Model name -> constructor with its size.
MODELS: dict[str, Constructor] = {
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
MODELS["flatten_swin_b_384"] = partial(MODELS["flatten_swin_b"], img_size=384)
MODELS["flatten_cswin_b_384"] = partial(MODELS["flatten_cswin_b"], img_size=384, softmax_splits=(1, 2, 12, 12))


def list_models() -> list[str]:
    """Names that ``create_model`` takes, sorted."""
    return sorted(MODELS)


def create_model(name: str, *, num_classes: int = 1000, img_size: int | tuple[int, int] | None = None, **kwargs) -> nn.Module:
    """A model of the zoo by name, with fresh weights.

    Args:
        name: one of ``list_models()``.
        num_classes: outputs of the head; 0 for pooled features.
        img_size: native input size, a number or (height, width); the name's own when not given (224, mostly).
        kwargs: further arguments of the family's constructor.

    Raises:
        ValueError: an unknown name, with the nearest one.
        TypeError: an argument that the family does not take.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}{_nearest(name, MODELS)}; models.list_models() names all")
    if img_size is not None:
        kwargs["img_size"] = img_size
    return MODELS[name](num_classes=num_classes, **kwargs)


def build_model(cfg: CfgNode) -> nn.Module:
    """The model that a config describes: MODEL.TYPE and the keys of its family.

    Raises:
        ValueError: an unknown MODEL.TYPE, with the nearest one.
    """
    model_type = cfg.MODEL.TYPE
    if model_type not in BUILDERS:
        raise ValueError(f"MODEL.TYPE={model_type!r} is not a model{_nearest(model_type, BUILDERS)}")
    return BUILDERS[model_type](cfg)


def nearest_model(state_dict: Mapping[str, Tensor]) -> str:
    """Which model of the zoo a state dict fits best, by names and shapes, as the end of a message; "" for none."""
    stored = {(name, value.shape) for name, value in state_dict.items()}
    best, share = "", 0.5  # of all entries of either
    for name in list_models():
        with torch.device("meta"):
            own = {(entry, value.shape) for entry, value in create_model(name).state_dict().items()}
        if len(stored & own) / len(stored | own) > share:
            best, share = name, len(stored & own) / len(stored | own)
    return f": its entries are most like those of {best}" if best else ": it is like no model of the zoo"


def _nearest(name: str, names) -> str:
    matches = get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f": did you mean {matches[0]!r}?" if matches else ""


def _shared(cfg: CfgNode) -> dict:
    return {
        "img_size": cfg.DATA.IMG_SIZE,
        "num_classes": cfg.MODEL.NUM_CLASSES,
        "drop_rate": cfg.MODEL.DROP_RATE,
        "drop_path_rate": cfg.MODEL.DROP_PATH_RATE,
        "attn_type": cfg.MODEL.LA.ATTN_TYPE,
        "linear": {
            "focusing_factor": cfg.MODEL.LA.FOCUSING_FACTOR,
            "kernel_size": cfg.MODEL.LA.KERNEL_SIZE,
            "kind": cfg.MODEL.LA.KIND,
            "focusing": cfg.MODEL.LA.FOCUSING,
            "rank_restoration": cfg.MODEL.LA.RANK_RESTORATION,
        },
    }


def _build_swin(cfg: CfgNode) -> nn.Module:
    return swin.SwinTransformer(
        **_shared(cfg),
        patch_size=cfg.MODEL.SWIN.PATCH_SIZE,
        embed_dim=cfg.MODEL.SWIN.EMBED_DIM,
        depths=cfg.MODEL.SWIN.DEPTHS,
        num_heads=cfg.MODEL.SWIN.NUM_HEADS,
        window_size=cfg.MODEL.SWIN.WINDOW_SIZE,
        mlp_ratio=cfg.MODEL.SWIN.MLP_RATIO,
        qkv_bias=cfg.MODEL.SWIN.QKV_BIAS,
        patch_norm=cfg.MODEL.SWIN.PATCH_NORM,
    )


def _build_pvt(constructor: Constructor, cfg: CfgNode) -> nn.Module:
    return constructor(**_shared(cfg), linear_reductions=[int(digit) for digit in cfg.MODEL.LA.PVT_LA_SR_RATIOS])


def _build_cswin(constructor: Constructor, cfg: CfgNode) -> nn.Module:
    return constructor(**_shared(cfg), linear_splits=[int(size) for size in cfg.MODEL.LA.CSWIN_LA_SPLIT_SIZE.split("-")])


def _build_deit(constructor: Constructor, cfg: CfgNode) -> nn.Module:
    return constructor(**_shared(cfg))


# MODEL.TYPE -> its builder.
BUILDERS: dict[str, Callable[[CfgNode], nn.Module]] = {
    "flatten_swin": _build_swin,
    "flatten_pvt_tiny": partial(_build_pvt, MODELS["flatten_pvt_t"]),
    "flatten_pvt_small": partial(_build_pvt, MODELS["flatten_pvt_s"]),
    "flatten_pvt_medium": partial(_build_pvt, MODELS["flatten_pvt_m"]),
    "flatten_pvt_large": partial(_build_pvt, MODELS["flatten_pvt_b"]),
    **{name: partial(_build_pvt, MODELS[name]) for name in pvt_v2.SIZES},
    "FLatten_CSWin_64_24181_tiny_224": partial(_build_cswin, MODELS["flatten_cswin_t"]),
    "FLatten_CSWin_64_24322_small_224": partial(_build_cswin, MODELS["flatten_cswin_s"]),
    "FLatten_CSWin_96_36292_base_224": partial(_build_cswin, MODELS["flatten_cswin_b"]),
    "FLatten_CSWin_96_36292_base_384": partial(_build_cswin, MODELS["flatten_cswin_b_384"]),
    **{name: partial(_build_deit, MODELS[name]) for name in deit.SIZES},
}


# timm: importing ``models`` makes every name known to timm.create_model, features_only and timm's own scripts.


def _timm_config(name: str) -> dict:
    side = 384 if name.endswith("_384") else 224
    first_conv = {
        swin.SwinTransformer: "patch_embed.proj",
        pvt.PyramidVisionTransformer: "patch_embed1.proj",
        pvt_v2.PyramidVisionTransformerV2: "patch_embed1.proj",
        cswin.CSwinTransformer: "stage1_conv_embed.0",
        deit.DeiT: "patch_embed.proj",
    }
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, side, side),
        "fixed_input_size": False,
        "pool_size": None,
        "crop_pct": 0.875 if side == 224 else 1.0,
        "crop_mode": "squash",  # the square that published numbers were measured on
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": first_conv[_constructor(name)],
        "classifier": "head",
        "license": "mit",
    }


def _constructor(name: str) -> type[nn.Module]:
    return MODELS[name].func


default_cfgs = generate_default_cfgs({name: _timm_config(name) for name in MODELS})


def _register(name: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        maps = 4 if _constructor(name) is not deit.DeiT else 12
        features = {"out_indices": tuple(range(maps)), "feature_cls": "getter"}
        return build_model_with_cfg(MODELS[name], name, pretrained, feature_cfg=features, **kwargs)

    entrypoint.__name__, entrypoint.__module__ = name, __name__
    register_model(entrypoint)


__all__ = ["build_model", "create_model", "list_models"]
for _name in MODELS:
    _register(_name)
