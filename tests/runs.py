"""Toy runs and their comparison."""

from scripts.soak import find_difference


def assert_equal(one, other, where="checkpoint"):
    """Two states are bit-equal, types included."""
    difference = find_difference(one, other, where)
    assert difference is None, difference


def toy_arguments(toy_config, toy_data, output, *opts):
    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", output]
    return [*arguments, "--opts", *map(str, opts)] if opts else arguments
