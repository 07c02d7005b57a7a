"""One run: updates, evaluation, checkpoints and the output directory."""
