"""FLatten Transformers: ``build_model`` from a config, ``create_model`` by name, ``list_models``."""

from models.registry import build_model, create_model, list_models

__all__ = ["build_model", "create_model", "list_models"]
