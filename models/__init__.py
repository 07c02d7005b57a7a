"""FLatten Transformer models, created from a config (``build_model``) or by name (``create_model``, ``list_models``)."""

from .checkpoints.released import RELEASED, Released, released
from .entrypoints import checkpoint_filter_fn  # importing this module registers every model with timm
from .linear_attention import FocusedLinearAttention
from .registry import build_arguments, build_model, create_model, list_models, nearest_model

__all__ = [
    "RELEASED",
    "FocusedLinearAttention",
    "Released",
    "build_arguments",
    "build_model",
    "checkpoint_filter_fn",
    "create_model",
    "list_models",
    "nearest_model",
    "released",
]
