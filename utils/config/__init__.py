"""Configuration of a run: the keys, loading and checking a config, and command-line flags."""

from utils.config.loading import ConfigError, load_config

__all__ = ["ConfigError", "load_config"]
