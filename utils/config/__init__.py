"""Configuration of a run: the keys, loading and checking a config, and command-line flags."""
