"""Toy runs and their comparison."""

from pathlib import Path

import torch

from utils.checkpoint import list_checkpoints
from weights.reader import read_checkpoint


def assert_equal(one, other, where="checkpoint"):
    """Two states are bit-equal, tensors and all."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}.{index}")
    else:
        assert one == other, where


def comparable(folder: Path) -> dict:
    state = read_checkpoint(list_checkpoints(folder)[0])
    return {key: value for key, value in state.items() if key not in ("config", "environment")}


def toy_arguments(toy_config, toy_data, output, *opts):
    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", output]
    return [*arguments, "--opts", *map(str, opts)] if opts else arguments
