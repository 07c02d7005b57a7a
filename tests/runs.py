"""Helpers for toy runs: a classifier, command-line arguments, and a bit-exact comparison of checkpoints."""

from torch import nn

from tests.soak import find_difference


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
