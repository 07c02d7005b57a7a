"""Processes and loader workers that die or hang (rows S4 and D8 of docs/reliability.md)."""

import os
import re
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch

import data.build
import data.loader
import engine.trainer
import jobs.launch
import utils.background
import utils.distributed
from data.datasets import ImageDataset
from data.workers import StallCheck, StalledWorkerError, WatchedDataset
from models.checkpoints.reader import read_checkpoint
from tests.launch import run_main
from tests.reliability.test_signals import call_before
from tests.runs import toy_arguments
from tests.utils.test_distributed import FakeEvent
from utils.collective_watch import CollectiveWatch
from utils.run_files import list_checkpoints

pytestmark = pytest.mark.reliability


def fail() -> None:
    raise ValueError("injected")


RANK_FAULTS = {
    "raises": fail,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(60),
}


@pytest.mark.parametrize("fault", RANK_FAULTS)
@pytest.mark.parametrize("function", ["train_step", "evaluate"])
def test_s4_lost_rank_ends_the_other_ranks_and_the_error_names_it(fault, function, toy_config, toy_data, tmp_path):
    def prepare(rank: int) -> None:
        if rank == 1:
            call_before(engine.trainer, function, 5 if function == "train_step" else 1, RANK_FAULTS[fault])
            if fault == "hangs":  # SIGALRM ends the hanging process 14 s after its start
                signal.alarm(14)

    arguments = toy_arguments(toy_config, toy_data, tmp_path, "DATA.BATCH_SIZE", 4, "COLLECTIVE_TIMEOUT", 3)
    started = time.monotonic()
    outcome = run_main(arguments, tmp_path / "log", processes=2, prepare=prepare, timeout=60)
    assert outcome.exit_codes[0] == 1, outcome.output
    assert time.monotonic() - started < 45
    phase = "training after update 4" if function == "train_step" else "evaluation after update 12"
    report = next(line for line in outcome.output.splitlines() if "rank(s) 1 lost" in line)
    assert re.search(rf"did not take part in {phase}", report)
    # Rank 0 has saved the updates before the one in which it lost rank 1, or the state before the evaluation.
    newest = list_checkpoints(tmp_path / "toy/default")[0]
    assert read_checkpoint(newest)["num_updates"] == (4 if function == "train_step" else 12)
    last_progress = [line for line in outcome.output.splitlines() if " epoch 1/" in line][-1]
    seconds = report_time(report) - report_time(last_progress)
    assert seconds <= 3 + 10  # COLLECTIVE_TIMEOUT plus 10 s


def test_s4_the_other_ranks_report_that_rank_0_was_killed_while_they_wait_for_it(toy_config, toy_data, tmp_path):
    def prepare(rank: int) -> None:
        call_before(engine.saver.Saver, "start", 1, RANK_FAULTS["killed"])  # only rank 0 calls this function

    arguments = toy_arguments(toy_config, toy_data, tmp_path, "DATA.BATCH_SIZE", 4)
    outcome = run_main(arguments, tmp_path / "log", processes=2, prepare=prepare, timeout=100)
    assert outcome.exit_codes == [-signal.SIGKILL, 1], outcome.output
    assert re.search("rank\\(s\\) 0 lost: .* in saving after update 12", outcome.output), outcome.output


def test_s4_a_collective_that_does_not_finish_on_a_gpu_ends_the_process_and_the_error_names_the_rank(
    toy_config, toy_data, tmp_path
):
    """The GPU is faked: the host waits in the collective until the thread that watches it ends the process."""

    def hang_until_reported() -> None:
        while "lost" not in (tmp_path / "log").read_text():
            time.sleep(0.1)
        os._exit(1)

    def prepare(rank: int) -> None:
        setup = jobs.launch.setup

        def setup_with_watch(timeout_seconds, on_stall):
            world = setup(timeout_seconds, on_stall)
            utils.distributed._watch = CollectiveWatch(2, lambda error: on_stall(error, world))
            return world

        jobs.launch.setup, torch.cuda.Event = setup_with_watch, FakeEvent
        FakeEvent.finished = True  # the events that the GPU reaches; the hanging collective has none
        utils.distributed.SECONDS_TO_REGISTER = 1
        if rank == 1:
            call_before(engine.trainer, "train_step", 5, hang_until_reported)

    arguments = toy_arguments(toy_config, toy_data, tmp_path, "DATA.BATCH_SIZE", 4)
    outcome = run_main(arguments, tmp_path / "log", processes=2, prepare=prepare, timeout=100)
    assert outcome.exit_codes[0] == 1, outcome.output
    assert "rank(s) 1 lost: a process ended, or did not take part in training after update 4 within" in outcome.output
    assert "(a collective operation has not finished for 2 s)" in outcome.output
    assert "Traceback" not in outcome.output


def report_time(line: str) -> float:
    """Time of a log line in seconds since 1970."""
    return time.mktime(time.strptime(re.search(r"\[(.{19})\]", line).group(1), "%Y-%m-%d %H:%M:%S"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("killed", r"DataLoader worker \(pid.*\d+\)"),
        ("stalled", r"the loader workers have finished no image for 2 s \(worker 1 is reading .*/train/class\d/\d+.png\)"),
    ],
)
def test_d8_the_error_identifies_the_lost_loader_worker(fault, message, toy_config, toy_data, tmp_path):
    test_process = os.getpid()

    def prepare(rank: int) -> None:
        original, parent = ImageDataset.__getitem__, os.getpid()

        def read(self, key):
            from torch.utils.data import get_worker_info

            if get_worker_info() and get_worker_info().id == 1:
                assert os.getpid() not in (parent, test_process)  # kill or stall only a loader worker
                os.kill(os.getpid(), signal.SIGKILL) if fault == "killed" else time.sleep(60)
            return original(self, key)

        ImageDataset.__getitem__ = read

    arguments = toy_arguments(toy_config, toy_data, tmp_path, "DATA.NUM_WORKERS", 2, "DATA.WORKER_TIMEOUT", 2)
    started = time.monotonic()
    outcome = run_main(arguments, tmp_path / "log", prepare=prepare)
    assert outcome.exit_codes == [1], outcome.output
    assert re.search(message, outcome.output.splitlines()[-1])
    assert "the same command resumes" in outcome.output.lower()
    assert "Traceback" not in outcome.output
    assert time.monotonic() - started < 30


def replace_collate(function) -> None:
    """Let the loader workers call ``function`` instead of the project's collate function."""
    data.build.collate = function


def fail_to_collate(message: str, error_type: type[BaseException] = RuntimeError):
    def collate(_samples):
        raise error_type(message)

    return lambda: replace_collate(collate)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (fail_to_collate("first line\nthe true reason"), "RuntimeError: first line\n  the true reason"),
        (
            fail_to_collate("unable to resize file </torch_7> to the right size: No space left on device (28)"),
            "No space left on device (28). The shared memory (/dev/shm) through which the loader workers send batches is full",
        ),
        (fail_to_collate("left by a library", SystemExit), "RuntimeError: SystemExit: left by a library"),
        (fail_to_collate("end of an iterator", StopIteration), "StopIteration: end of an iterator"),
        (lambda: replace_collate(lambda _samples: os._exit(0)), "exited unexpectedly"),
        (lambda: replace_collate(lambda _samples: lambda: None), "cannot send a batch: "),
    ],
    ids=["error", "full shared memory", "SystemExit", "StopIteration", "exit with status 0", "batch that cannot be sent"],
)
def test_d8_the_reason_of_a_workers_failure_is_on_the_console(fault, expected, trained, toy_data, tmp_path):
    arguments = ["--eval", "--resume", trained, "--output", tmp_path, "--data-path", toy_data, "--opts", "DATA.NUM_WORKERS", 2]
    started = time.monotonic()
    outcome = run_main(arguments, tmp_path / "log", prepare=lambda _rank: fault())
    assert outcome.exit_codes == [1], outcome.output
    assert expected in outcome.output
    assert time.monotonic() - started < 30


def test_d8_workers_that_are_slow_but_make_progress_do_not_end_the_run(trained, toy_data, tmp_path):
    """A batch takes longer than DATA.WORKER_TIMEOUT, but no image does."""

    def prepare(_rank: int) -> None:
        original = ImageDataset.__getitem__
        ImageDataset.__getitem__ = lambda self, key: time.sleep(0.2) or original(self, key)

    options = ["DATA.NUM_WORKERS", 2, "DATA.WORKER_TIMEOUT", 1, "DATA.BATCH_SIZE", 16]
    arguments = ["--eval", "--resume", trained, "--output", tmp_path, "--data-path", toy_data, "--opts", *options]
    outcome = run_main(arguments, tmp_path / "log", prepare=prepare)
    assert outcome.exit_codes == [0], outcome.output


def test_d8_time_in_which_the_process_is_suspended_is_no_stall(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    check = StallCheck(WatchedDataset([], 0), timeout=10)
    for seconds in (5000, *[1] * 7):  # suspended, then 7 checks without progress
        now[0] += seconds
        check.check()
    now[0] += 1
    with pytest.raises(StalledWorkerError, match="no image for 10 s"):
        check.check()


def test_d8_a_temporary_directory_whose_path_is_too_long_is_rejected_if_workers_are_used(trained, toy_data, tmp_path):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()

    def prepare(_rank: int) -> None:
        os.environ["TMPDIR"], tempfile.tempdir = str(folder), None

    for num_workers, status in ((2, 2), (0, 0)):
        options = ["--data-path", toy_data, "--opts", "DATA.NUM_WORKERS", num_workers]
        outcome = run_main(
            ["--eval", "--resume", trained, "--output", tmp_path, *options], tmp_path / "log", prepare=prepare, timeout=60
        )
        assert outcome.exit_codes == [status], outcome.output
        assert ("export TMPDIR=/tmp" in outcome.output) == (num_workers > 0)


@pytest.mark.parametrize("end", ["error while a worker is stopped", "killed while a worker reads"])
def test_workers_that_do_not_respond_end_with_the_training_process(end, toy_config, toy_data, tmp_path):
    process_ids = tmp_path / "process ids"

    def prepare(_rank: int) -> None:
        def read(self, key):
            with open(process_ids, "a") as file:
                file.write(f"{os.getpid()}\n")
            if end.startswith("error"):
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)

        ImageDataset.__getitem__ = read

        def end_process() -> None:
            while not process_ids.exists():
                time.sleep(0.01)
            time.sleep(0.5)
            if end.startswith("error"):
                raise KeyError("injected")
            os.kill(os.getpid(), signal.SIGKILL)

        # ``_timed_out`` is called while the process waits for its first batch.
        call_before(data.loader, "_timed_out", 1, end_process)

    options = ["DATA.NUM_WORKERS", 2, "DATA.WORKER_TIMEOUT", 20]
    outcome = run_main(toy_arguments(toy_config, toy_data, tmp_path, *options), tmp_path / "log", prepare=prepare, timeout=60)
    assert outcome.exit_codes == [1 if end.startswith("error") else -signal.SIGKILL], outcome.output
    deadline = time.monotonic() + 15
    for process_id in process_ids.read_text().split():
        while has_not_ended(int(process_id)):
            assert time.monotonic() < deadline, outcome.output
            time.sleep(0.1)


def has_not_ended(process_id: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_checkpoint_write_that_hangs_does_not_keep_the_process_alive(monkeypatch, caplog):
    monkeypatch.setattr(utils.background, "SECONDS_OF_LAST_WRITE", 0.1)
    write = utils.background.BackgroundWrite()
    write.start(lambda: time.sleep(60))
    assert write._thread.daemon
    write.close()
    assert "the write is interrupted" in caplog.text
