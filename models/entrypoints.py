"""Registration with timm: importing this module makes every model available to ``timm.create_model`` and timm's scripts."""

from collections.abc import Callable, Mapping
from typing import cast

from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from .backbone import Backbone
from .checkpoints.download import fetch
from .checkpoints.loading import stored_img_size
from .checkpoints.reader import choose_weights, read_checkpoint
from .checkpoints.released import RELEASED
from .deit import DeiT
from .registry import MODELS


def _cfg(name: str) -> dict:
    """timm's ``pretrained_cfg`` of a model: URL of released weights, input size and evaluation transform.

    ``crop_mode`` is "squash" because the released accuracies were measured on images resized to a square, with the aspect ratio
    changed.
    """
    family, img_size = cast(type[Backbone], MODELS[name].func), MODELS[name].keywords.get("img_size", 224)
    return {
        "url": RELEASED[name].url if name in RELEASED else "",
        "num_classes": 1000,
        "input_size": (3, img_size, img_size),
        "fixed_input_size": False,
        "pool_size": None if family is DeiT else (img_size // 32, img_size // 32),
        "crop_pct": 1.0 if name == "flatten_swin_b_384" else 0.875,  # as in the paper's configs
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": family.first_conv,
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2308.00442",
        "paper_name": "FLatten Transformer: Vision Transformer using Focused Linear Attention",
        "origin_url": "https://github.com/LeapLabTHU/FLatten-Transformer",
    }


default_cfgs = generate_default_cfgs({f"{name}.in1k": _cfg(name) for name in MODELS})


def checkpoint_filter_fn(state_dict: Mapping, model: Backbone) -> dict[str, Tensor]:
    """Checkpoint filter for timm: extract the state dict, drop unused entries and resize position tables.

    The image size of the checkpoint is read from its config (DATA.IMG_SIZE). Without a config, timm stores it in
    ``model.pretrained_model_args`` or ``model.pretrained_cfg``; if the position tables do not match that size, they are resized
    as in ``Backbone.resize_position_tables`` without an ``img_size``.

    Args:
        state_dict: a state dict, or a checkpoint of the paper's code, of this project or of timm;
            ``models.checkpoints.reader.preferred_weights`` selects between its raw and EMA weights.

    Raises:
        ValueError: ``state_dict`` contains no weights, or a position table whose shape is ambiguous.
    """
    img_size = stored_img_size(state_dict)
    _, state_dict = choose_weights(state_dict, "auto", "state dict")
    if img_size is not None:
        return model.adapt_state_dict(state_dict, img_size=img_size)
    arguments, config = getattr(model, "pretrained_model_args", {}), getattr(model, "pretrained_cfg", {})
    checkpoint_img_size = arguments.get("img_size") or config.get("input_size", ())[1:] or None
    try:
        return model.adapt_state_dict(state_dict, img_size=checkpoint_img_size)
    except ValueError:
        return model.adapt_state_dict(state_dict)


def _create(name: str, pretrained: bool, **kwargs) -> nn.Module:
    """Create a model with timm's ``build_model_with_cfg``, and load pretrained weights if ``pretrained``.

    Files are read here: timm's loader rejects the config object in released files, and drops the config in other checkpoints,
    which determines the layout of the position tables.
    """
    overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
    if pretrained and (state := _read_pretrained(name, kwargs.get("pretrained_cfg"), overlay)):
        overlay = {**overlay, "state_dict": state}
    model = build_model_with_cfg(
        MODELS[name],
        name,
        pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(_num_maps(name, kwargs))), "feature_cls": "getter"},
        **kwargs,
    )
    for module in model.modules():  # a feature extractor and its model would both keep the loaded state dict in memory
        getattr(module, "pretrained_cfg", {}).pop("state_dict", None)
    return model


def _read_pretrained(name: str, pretrained_cfg: str | dict | None, overlay: Mapping) -> dict | None:
    """The checkpoint that timm would load from a local file or from the released URL; None for other sources.

    Raises:
        CheckpointError: the file cannot be read.
    """
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, overlay)
    if cfg.state_dict or cfg.source in ("hf-hub", "local-dir"):
        return None
    if cfg.file:
        return read_checkpoint(cfg.file)
    if name not in RELEASED or cfg.url != RELEASED[name].url or cfg.hf_hub_id:
        return None
    return read_checkpoint(fetch(RELEASED[name].url, name))


def _num_maps(name: str, kwargs: Mapping) -> int:
    """Number of feature maps: one per block in DeiT, one per stage in other families."""
    arguments = {**MODELS[name].keywords, **kwargs}
    return arguments["depth"] if "depth" in arguments else len(arguments["depths"])


__all__ = ["checkpoint_filter_fn", "default_cfgs"]


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """The function that creates a model by the conventions of timm and torch.hub."""

    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        return _create(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"Create {name}; see ``{MODELS[name].func.__name__}`` for its arguments."
    return create


# Each function is an attribute of this module, as timm and pickle require. If the package is imported under two names, such as
# ``models`` and ``flatten_transformer``, timm keeps the functions of the first import.
for _name in MODELS:
    globals()[_name] = _entrypoint(_name)
    if not is_model(_name):
        register_model(globals()[_name])
