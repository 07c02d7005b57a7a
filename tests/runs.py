"""Helpers for toy runs: a classifier, command-line arguments, and a bit-exact comparison of checkpoints."""

from torch import nn

from scripts.soak import find_difference


class LinearClassifier(nn.Linear):
    """A linear classifier for tests of the trainer, with the methods that ``build_optimizer`` calls."""

    def no_weight_decay(self) -> set[str]:
        return {"bias"}

    def get_classifier(self) -> nn.Module:
        return self


def assert_equal(one, other, where="checkpoint"):
    """Assert that two nested states, such as checkpoints, have equal types and values. ``where`` names them in the error."""
    difference = find_difference(one, other, where)
    assert difference is None, difference


def toy_arguments(toy_config, toy_data, output, *opts):
    """Command-line arguments of ``main.py`` for a toy run. ``opts``: KEY, VALUE, ... for --opts."""
    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", output]
    return [*arguments, "--opts", *map(str, opts)] if opts else arguments
