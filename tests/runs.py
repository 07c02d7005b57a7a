"""Helpers for toy runs: a classifier, command-line arguments, and the comparison of states."""

from torch import nn

from scripts.soak import find_difference


class LinearClassifier(nn.Linear):
    """A linear classifier for tests of the trainer, with the methods that ``build_optimizer`` calls."""

    def no_weight_decay(self) -> set[str]:
        return {"bias"}

    def get_classifier(self) -> nn.Module:
        return self


def assert_equal(one, other, where="checkpoint"):
    """Assert that two states are bit-equal and have the same types. ``where`` names the states in the error."""
    difference = find_difference(one, other, where)
    assert difference is None, difference


def toy_arguments(toy_config, toy_data, output, *opts):
    """Command-line arguments of ``main.py`` for a toy run. ``opts``: KEY, VALUE, ... for --opts."""
    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", output]
    return [*arguments, "--opts", *map(str, opts)] if opts else arguments
