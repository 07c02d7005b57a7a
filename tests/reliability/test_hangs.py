"""Processes and loader workers that die or hang (rows S4 and D8 of docs/reliability.md)."""

import os
import re
import signal
import time

import pytest

import utils.trainer
from data.datasets import ImageDataset
from tests.launch import run_main
from tests.reliability.test_signals import call_before
from tests.runs import toy_arguments

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
            call_before(utils.trainer, function, 5 if function == "train_step" else 1, RANK_FAULTS[fault])
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
    seconds = report_time(report) - report_time(outcome.output.splitlines()[0])
    assert seconds <= 3 + 10  # COLLECTIVE_TIMEOUT plus 10 s


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
