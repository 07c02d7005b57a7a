"""Whole runs with TRAIN.PATIENCE, BEST_METRIC, KEEP_BEST and EMA.WARMUP."""

import os
import signal

import pytest
import torch

import engine.saver
from jobs.averaging import average
from jobs.locate_checkpoint import locate
from models.checkpoints.reader import read_checkpoint
from tests.launch import run_main
from tests.reliability.test_signals import call_before
from tests.runs import assert_equal, read_state, toy_arguments
from utils.run_files import BEST

# The learning rate is so low that no evaluation is better than the first one: the run ends after three epochs of 12 updates.
OPTIONS = {
    **{"TRAIN.PATIENCE": 2, "BEST_METRIC": "macro_f1", "KEEP_BEST": 2, "KEEP_CHECKPOINTS": 1, "EMA.WARMUP": True},
    **{"TRAIN.EPOCHS": 4, "TRAIN.BASE_LR": 1e-9, "TRAIN.WARMUP_LR": 0, "TRAIN.MIN_LR": 0, "DATA.NUM_WORKERS": 2},
}


def list_files(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_run_that_ends_early_and_keeps_its_best_checkpoints_is_resumed_exactly(toy_config, toy_data, tmp_path):
    """The second run is killed after the checkpoint of its first evaluation, before that checkpoint is linked."""

    def arguments(name: str, **changes):
        options = OPTIONS | {key.replace("__", "."): value for key, value in changes.items()}
        return toy_arguments(toy_config, toy_data, tmp_path / name, *(entry for item in options.items() for entry in item))

    def prepare(rank: int) -> None:
        call_before(engine.saver, "link_top", 2, lambda: os.kill(os.getpid(), signal.SIGKILL))

    first, second = (tmp_path / name / "toy/default" for name in ("first", "second"))
    outcome = run_main(arguments("first"), tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert "done after epoch 3 of 4" in outcome.output
    assert "ETA at most" in outcome.output
    assert run_main(arguments("second"), tmp_path / "log", prepare=prepare).exit_codes == [-9]
    assert not list(second.glob("top_*"))
    outcome = run_main(arguments("second"), tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert_equal(read_state(second), read_state(first))
    top = ["top_000000024.pth", "top_000000036.pth"]  # on ties, later ones
    for folder in (first, second):
        assert sorted(path.name for path in folder.glob("top_*")) == top
        assert read_checkpoint(folder / BEST)["best"]["metric"] == "macro_f1"

    soup = average([locate(str(first / name)) for name in top], "raw")["model"]
    weights = [read_checkpoint(first / name)["model"] for name in top]
    for name, value in soup.items():
        torch.testing.assert_close(value, (weights[0][name] + weights[1][name]) / 2)

    before = list_files(second)
    outcome = run_main(arguments("second"), tmp_path / "log")
    assert outcome.exit_codes == [0]
    assert "this run is finished after epoch 3 of 4" in outcome.output
    assert "raise TRAIN.PATIENCE or set it to 0 to continue" in outcome.output
    assert list_files(second) == before

    outcome = run_main(arguments("second", TRAIN__PATIENCE=0, BEST_METRIC="loss"), tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert "BEST_METRIC (from macro_f1 to loss) changed after the best accuracy was measured; the best accuracy is reset" in (
        " ".join(outcome.output.split())
    )
    assert {"best_000000024.pth", "best_000000036.pth"} < {path.name for path in second.iterdir()}
    assert [path.name for path in second.glob("top_*")] == ["top_000000048.pth"]
    best = read_checkpoint(second / BEST)["best"]
    assert (best["metric"], best["num_updates"]) == ("loss", 48)
    assert best["value"] == pytest.approx(min(record["loss"] for record in read_state(second)["evaluations"][-2:]))
