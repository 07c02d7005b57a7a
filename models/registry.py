"""Names to constructors. ``build_model`` is the one place under ``models`` that reads a config."""

from collections.abc import Callable
from difflib import get_close_matches

from torch import nn
from yacs.config import CfgNode

from models import swin

# Model name -> (constructor, its size). create_model takes these names; "_384" is a size at another resolution.
MODELS: dict[str, tuple[Callable[..., nn.Module], dict]] = {
    **{name: (swin.SwinTransformer, {"window_size": None, **size}) for name, size in swin.SIZES.items()},
    "flatten_swin_b_384": (swin.SwinTransformer, {**swin.SIZES["flatten_swin_b"], "img_size": 384}),
}


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
    constructor, size = MODELS[name]
    if img_size is not None:
        kwargs["img_size"] = img_size
    return constructor(**{**size, "num_classes": num_classes, **kwargs})


def build_model(cfg: CfgNode) -> nn.Module:
    """The model that a config describes: MODEL.TYPE and the keys of its family.

    Raises:
        ValueError: an unknown MODEL.TYPE, with the nearest one.
    """
    model_type = cfg.MODEL.TYPE
    if model_type not in BUILDERS:
        raise ValueError(f"MODEL.TYPE={model_type!r} is not a model{_nearest(model_type, BUILDERS)}")
    return BUILDERS[model_type](cfg)


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
        "focusing_factor": cfg.MODEL.LA.FOCUSING_FACTOR,
        "kernel_size": cfg.MODEL.LA.KERNEL_SIZE,
        "linear_kind": cfg.MODEL.LA.KIND,
        "focusing": cfg.MODEL.LA.FOCUSING,
        "rank_restoration": cfg.MODEL.LA.RANK_RESTORATION,
    }


def _build_swin(cfg: CfgNode) -> nn.Module:
    return swin.SwinTransformer(
        **_shared(cfg),
        patch_size=cfg.MODEL.SWIN.PATCH_SIZE,
        in_chans=cfg.MODEL.SWIN.IN_CHANS,
        embed_dim=cfg.MODEL.SWIN.EMBED_DIM,
        depths=cfg.MODEL.SWIN.DEPTHS,
        num_heads=cfg.MODEL.SWIN.NUM_HEADS,
        window_size=cfg.MODEL.SWIN.WINDOW_SIZE,
        mlp_ratio=cfg.MODEL.SWIN.MLP_RATIO,
        qkv_bias=cfg.MODEL.SWIN.QKV_BIAS,
        patch_norm=cfg.MODEL.SWIN.PATCH_NORM,
    )


# MODEL.TYPE -> the family's builder.
BUILDERS: dict[str, Callable[[CfgNode], nn.Module]] = {"flatten_swin": _build_swin}
