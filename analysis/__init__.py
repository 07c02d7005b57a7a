"""Attention maps of trained models, and measures of how focused they are."""
