"""Helpers for toy runs: a classifier, command-line arguments, and the state of a run with its bit-exact comparison."""

from pathlib import Path

import torch
from torch import nn

from models.checkpoints.loading import LoadReport, fill_model
from models.checkpoints.reader import read_checkpoint
from utils.run_files import list_checkpoints, num_updates_of


class LinearClassifier(nn.Linear):
    """A linear classifier for tests of the trainer, with the methods that ``build_optimizer`` calls."""

    def no_weight_decay(self) -> set[str]:
        return {"bias"}

    def get_classifier(self) -> nn.Module:
        return self


def load_weights(model: nn.Module, path: Path, *, weights: str = "auto") -> LoadReport:
    """Load the weights of a file into a model."""
    return fill_model(model, read_checkpoint(path), weights=weights, path=path)


def find_difference(one: object, other: object, where: str = "checkpoint") -> str | None:
    """First difference in type or value between two nested states; None if they are equal."""
    if type(one) is not type(other):
        return f"{where}: {type(one).__name__} and {type(other).__name__}"
    if isinstance(one, torch.Tensor):
        return None if torch.equal(one, other) else where
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return f"{where}: keys {sorted(map(str, one.keys() ^ other.keys()))}"
        entries = [(str(key), one[key], other[key]) for key in one]
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return f"{where}: lengths {len(one)} and {len(other)}"
        entries = [(str(index), *pair) for index, pair in enumerate(zip(one, other, strict=True))]
    else:
        return None if one == other else f"{where}: {one!r} and {other!r}"
    return next((difference for key, *pair in entries if (difference := find_difference(*pair, f"{where}.{key}"))), None)


def read_state(folder: Path) -> dict:
    """Read the newest checkpoint of a run, without the entries that depend on the command, the machine and the run's id."""
    state = read_checkpoint(list_checkpoints(folder)[0])
    return {key: value for key, value in state.items() if key not in ("config", "environment", "run_id")}


def newest_update(folder: Path) -> int:
    """Number of updates of the newest checkpoint, from its file name; 0 if there is none."""
    return max(map(num_updates_of, list_checkpoints(folder)), default=0)


def assert_equal(one, other, where="checkpoint"):
    """Assert that two nested states, such as checkpoints, have equal types and values. ``where`` names them in the error."""
    difference = find_difference(one, other, where)
    assert difference is None, difference


def toy_arguments(toy_config, toy_data, output, *opts):
    """Command-line arguments of ``main.py`` for a toy run. ``opts``: KEY, VALUE, ... for --opts."""
    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", output]
    return [*arguments, "--opts", *map(str, opts)] if opts else arguments


def run_state(*, num_updates: int, run_id: str = "", best: int = -1) -> dict:
    """A small checkpoint with every entry that is needed to resume, for tests that only choose between checkpoints.

    Args:
        best: update of the best evaluation; -1: no evaluation yet.
    """
    state = {
        **{"model": {}, "optimizer": {}, "scaler": {}, "config": {}, "updates_per_epoch": 5, "global_batch_size": 8},
        "num_updates": num_updates,
        "best": {"acc1": 50.0 if best >= 0 else -1.0, "weights": "raw", "epoch": 0, "num_updates": best},
    }
    return state | ({"run_id": run_id} if run_id else {})
