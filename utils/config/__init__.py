"""Configuration of a run: the keys, loading and checking a config, and command-line flags."""

from utils.config.loading import load_config

__all__ = ["load_config"]  # model cards of exported models import it from here
