"""Signals that stop training (rows S1 to S3 and S7 of docs/reliability.md), and checkpoints at time intervals."""

import json
import os
import re
import signal
import time

import pytest

import engine.evaluation
import engine.saver
import engine.trainer
import jobs.train
from models.checkpoints.reader import read_checkpoint
from tests.launch import run_main, torchrun, wait_for
from tests.runs import assert_equal, newest_update, read_state, toy_arguments
from utils.run_files import list_checkpoints
from utils.stop import SECONDS_OF_ONE_REQUEST, SIGNALS

pytestmark = pytest.mark.reliability
STOPPED = 75  # exit status of a run that a signal stopped, see docs/outputs.md


def call_before(module, name: str, number: int, action) -> None:
    """Patch the function ``name`` of a module: run ``action`` immediately before its ``number``-th call, counted from 1."""
    original, calls = getattr(module, name), []

    def replacement(*arguments, **options):
        calls.append(None)
        if len(calls) == number:
            action()
        return original(*arguments, **options)

    setattr(module, name, replacement)


class FunctionalStub:
    """Replacement for ``torch.nn.functional`` in ``engine.evaluation``: patching it does not affect the loss in training."""

    cross_entropy = staticmethod(engine.evaluation.F.cross_entropy)


def signal_in(phase: str, signal_number: int):
    """Return a ``prepare`` function that makes one rank send ``signal_number`` to itself in ``phase``."""

    def send() -> None:
        os.kill(os.getpid(), signal_number)

    def prepare(rank: int) -> None:
        if phase == "save" and rank == 0:
            call_before(engine.saver, "save_checkpoint", 2, send)
        if phase != "save" and rank == 1:
            if phase == "start-up":
                call_before(jobs.train, "build_trainer", 1, send)
            elif phase == "step":
                call_before(engine.trainer, "train_step", 5, send)
            else:
                engine.evaluation.F = FunctionalStub
                # For each batch, the loss of the raw weights is computed first, then the loss of the EMA weights.
                call_before(FunctionalStub, "cross_entropy", 1 if phase == "evaluation" else 2, send)

    return prepare


@pytest.mark.parametrize(
    ("phase", "signal_number"),
    [
        ("start-up", signal.SIGTERM),
        ("step", signal.SIGUSR1),
        ("save", signal.SIGTERM),
        ("evaluation", signal.SIGINT),
        ("EMA evaluation", signal.SIGTERM),
    ],
)
def test_s1_signal_to_one_rank_stops_all_ranks_and_saves_their_state(
    phase, signal_number, uninterrupted, toy_config, toy_data, tmp_path
):
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "SAVE_STEPS", 2, "DATA.BATCH_SIZE", 4)
    folder = tmp_path / "toy/default"
    stopped = run_main(arguments, tmp_path / "log", processes=2, prepare=signal_in(phase, signal_number))
    assert stopped.exit_codes == [STOPPED, STOPPED], stopped.output
    if phase == "start-up":
        assert "stopped before the first update" in stopped.output
        assert not list_checkpoints(folder)
    else:
        assert "the same command resumes the run" in stopped.output
        newest = list_checkpoints(folder)[0]
        assert f"the checkpoint after update {read_checkpoint(newest)['num_updates']} is saved" in stopped.output
    resumed = run_main(arguments, tmp_path / "log", processes=2)
    assert resumed.exit_codes == [0, 0], resumed.output
    assert_equal(read_state(folder), read_state(uninterrupted(2)))
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = [(point["kind"], point["step"]) for point in points]
    assert len(keys) == len(set(keys))
    assert {key for key in keys if key[0].startswith("eval")} == {
        (f"eval_{weights}", step) for weights in ("raw", "ema") for step in (12, 24, 36)
    }


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGKILL])
def test_s2_second_signal_ends_the_process_immediately_and_leaves_intact_checkpoints(second, toy_config, toy_data, tmp_path):
    def prepare(rank: int) -> None:
        def send_two_signals_and_hang() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            # This thread writes the checkpoint. Meanwhile, the main thread handles the signal.
            time.sleep(SECONDS_OF_ONE_REQUEST + 0.5)
            os.kill(os.getpid(), second)
            time.sleep(60)

        call_before(engine.saver, "save_checkpoint", 3, send_two_signals_and_hang)

    arguments = toy_arguments(toy_config, toy_data, tmp_path, "SAVE_STEPS", 2)
    outcome = run_main(arguments, tmp_path / "log", prepare=prepare, timeout=30)
    assert outcome.exit_codes == [128 + second if second == signal.SIGTERM else -second]
    checkpoints = list_checkpoints(tmp_path / "toy/default")
    assert [read_checkpoint(path)["num_updates"] for path in checkpoints] == [4, 2]


def reset_sighup(rank: int) -> None:
    """Let SIGHUP end this process by default, even if the tests themselves run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(
    "signal_number",
    [
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_s3_loader_workers_ignore_a_signal_to_their_process_group(signal_number, uninterrupted, toy_config, toy_data, tmp_path):
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "SAVE_STEPS", 2, "DATA.BATCH_SIZE", 8, "DATA.NUM_WORKERS", 2)
    folder = tmp_path / "toy/default"
    stopped = run_main(
        arguments,
        tmp_path / "log",
        kill_when=lambda: len(list_checkpoints(folder)) == 2,
        kill_signal=signal_number,
        prepare=reset_sighup,
    )
    assert stopped.exit_codes == [STOPPED], stopped.output
    assert "Traceback" not in stopped.output
    assert stopped.output.count("is saved, and the same command resumes the run") == 1
    resumed = run_main(arguments, tmp_path / "log")
    assert resumed.exit_codes == [0], resumed.output
    assert_equal(read_state(folder), read_state(uninterrupted(1)))


def test_s7_sighup_has_no_effect_on_a_run_under_nohup(toy_config, toy_data, tmp_path):
    """nohup starts its command with SIGHUP ignored."""

    def prepare(rank: int) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    arguments = toy_arguments(toy_config, toy_data, tmp_path, "TRAIN.EPOCHS", 1, "SAVE_STEPS", 2, "DATA.NUM_WORKERS", 2)
    folder = tmp_path / "toy/default"
    options = {"kill_when": lambda: bool(list_checkpoints(folder)), "kill_signal": signal.SIGHUP, "prepare": prepare}
    outcome = run_main(arguments, tmp_path / "log", **options)
    assert outcome.exit_codes == [0], outcome.output


@pytest.mark.parametrize("second", [signal.SIGHUP, signal.SIGTERM])
def test_s7_a_request_that_arrives_twice_within_two_seconds_still_saves(second, toy_config, toy_data, tmp_path):
    """When a terminal is closed, its processes get SIGHUP from the kernel, and again from torchrun."""

    def prepare(rank: int) -> None:
        def send_twice() -> None:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.7)
            os.kill(os.getpid(), second)

        reset_sighup(rank)
        call_before(engine.trainer, "train_step", 3, send_twice)

    outcome = run_main(toy_arguments(toy_config, toy_data, tmp_path), tmp_path / "log", prepare=prepare)
    assert outcome.exit_codes == [STOPPED], outcome.output
    assert read_checkpoint(list_checkpoints(tmp_path / "toy/default")[0])["num_updates"] == 3


@pytest.mark.parametrize(("arrival", "saved"), [("before the request", [5]), ("after the request", [6, 5])])
def test_s7_all_ranks_stop_at_most_one_update_after_the_update_in_flight(arrival, saved, toy_config, toy_data, tmp_path):
    """All ranks get SIGTERM during a slow fifth update, before or after it has sent the requests of its process.

    In the second case, all ranks need another update to agree. Rank 0 saves the state before that update, since its duration
    may exceed the time after which a launcher kills the processes.
    """
    in_fifth_update = tmp_path / "in fifth update"

    def prepare(rank: int) -> None:
        def wait_for_signal() -> None:
            in_fifth_update.touch()
            time.sleep(2)

        engine.trainer.SLOW_UPDATE = 1.5
        if arrival == "before the request":
            call_before(engine.trainer, "train_step", 5, wait_for_signal)
        else:
            call_before(engine.trainer.Trainer, "begin_change", 5, wait_for_signal)

    arguments = toy_arguments(toy_config, toy_data, tmp_path, "DATA.BATCH_SIZE", 4, "PRINT_FREQ", 99, "KEEP_CHECKPOINTS", 9)
    arguments += ["DATA.NUM_WORKERS", 2]
    options = {"processes": 2, "kill_when": in_fifth_update.exists, "kill_signal": signal.SIGTERM, "prepare": prepare}
    outcome = run_main(arguments, tmp_path / "log", **options)
    assert outcome.exit_codes == [STOPPED, STOPPED], outcome.output
    assert [read_checkpoint(path)["num_updates"] for path in list_checkpoints(tmp_path / "toy/default")] == saved


@pytest.mark.parametrize(
    ("launcher", "signal_number"),
    [
        pytest.param(launcher, number, marks=[] if (launcher, number) == ("nohup", signal.SIGHUP) else [pytest.mark.slow])
        for launcher in ("", "nohup")
        for number in SIGNALS
    ],
)
def test_s7_signals_that_torchrun_forwards_stop_the_run_and_save_its_state(
    launcher, signal_number, toy_config, toy_data, tmp_path
):
    """torchrun handles SIGHUP even under nohup. It forwards SIGUSR1 only if an option lists it."""
    folder, log = tmp_path / "toy/default", tmp_path / "log"
    options = ["--standalone", "--nproc_per_node=1", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "SAVE_STEPS", 2, "TRAIN.EPOCHS", 99)
    job = torchrun([*arguments, "DATA.NUM_WORKERS", 2], log, *options, prefix=[launcher] if launcher else [])
    try:
        wait_for(lambda: newest_update(folder) > 2, job, log)
        job.send_signal(signal_number)
        assert job.wait(60) == 1
    finally:
        for process in [job.pid] if job.poll() is None else []:
            os.killpg(process, signal.SIGKILL)
    saved = re.search(r"the checkpoint after update (\d+) is saved, and the same command resumes", log.read_text())
    assert saved is not None, log.read_text()
    assert read_checkpoint(list_checkpoints(folder)[0])["num_updates"] == int(saved[1])


def test_checkpoints_are_saved_at_time_intervals_within_an_epoch(toy_config, toy_data, tmp_path):
    """SAVE_MINUTES is measured on rank 0; all processes save at the same update."""
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "SAVE_MINUTES", 1e-9, "KEEP_CHECKPOINTS", 99, "TRAIN.EPOCHS", 1)
    outcome = run_main([*arguments, "DATA.BATCH_SIZE", 4], tmp_path / "log", processes=2)
    assert outcome.exit_codes == [0, 0], outcome.output
    saved = {read_checkpoint(path)["num_updates"] for path in list_checkpoints(tmp_path / "toy/default")}
    assert len(saved) > 3
    assert 12 in saved
    default_output = tmp_path / "default interval"
    outcome = run_main(
        toy_arguments(toy_config, toy_data, default_output, "TRAIN.EPOCHS", 1, "DATA.BATCH_SIZE", 8), tmp_path / "log"
    )
    assert outcome.exit_codes == [0], outcome.output
    assert [path.name for path in list_checkpoints(default_output / "toy/default")] == ["checkpoint_000000012.pth"]


def test_a_run_resumed_with_fewer_epochs_than_already_trained_is_evaluated(toy_config, toy_data, tmp_path):
    """A run is killed in its second epoch, and resumes with TRAIN.EPOCHS 1."""
    folder = tmp_path / "toy/default"
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "SAVE_STEPS", 2, "DATA.BATCH_SIZE", 8)

    def in_second_epoch() -> bool:
        return any(int(path.stem.split("_")[1]) > 12 for path in list_checkpoints(folder))

    assert run_main(arguments, tmp_path / "log", kill_when=in_second_epoch).exit_codes == [-9]
    outcome = run_main([*arguments, "TRAIN.EPOCHS", 1], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    state = read_checkpoint(list_checkpoints(folder)[0])
    assert state["last_evaluation"] == state["num_updates"] > 12
    assert "this run is finished" in run_main([*arguments, "TRAIN.EPOCHS", 1], tmp_path / "log").output
