"""Arbitrary errors at arbitrary calls, in every process and thread of a run (row R18 of docs/reliability.md)."""

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import engine.dry_run
import main
import scripts.evaluate_all
from engine.checkpoint_writer import save_checkpoint
from engine.run_directory import RunLock
from models.checkpoints.reader import read_checkpoint
from tests.injection import ERRORS, Call, Fault, draw_fault, inject, read_calls, record_calls
from tests.launch import run_main
from tests.runs import find_difference, read_state, toy_arguments
from utils.run_files import BEST, list_checkpoints

pytestmark = pytest.mark.reliability
SECONDS_TO_END = 30
OPTIONS = ("TRAIN.EPOCHS", 2, "SAVE_STEPS", 2, "DATA.NUM_WORKERS", 2, "COLLECTIVE_TIMEOUT", 10, "DATA.WORKER_TIMEOUT", 15)
# Functions that only run after an error; a second error in them must not keep the process alive either.
HANDLERS = [
    "jobs/launch.py:leave",
    "utils/errors.py:exit_status",
    "jobs/launch.py:report",
    "jobs/launch.py:describe_known_error",
    "jobs/launch.py:without_traceback",
    "jobs/launch.py:print_traceback",
    "jobs/launch.py:end_process",
    "jobs/launch.py:flush_output",
    "data/workers.py:kill_workers",
    "utils/background.py:BackgroundWrite.close",
    "utils/background.py:Sink.flush",
    "engine/metrics_writer.py:MetricsWriter.close",
    "engine/run_directory.py:RunDirectory.close",
    "utils/errors.py:one_line",
]


@dataclass
class Job:
    """A command, its calls in an undisturbed run, and the function that reads its result.

    Args:
        arguments: function of the output directory.
        prepare: see ``run_main``.
    """

    arguments: Callable[[Path], list]
    read_result: Callable[[Path], object]
    processes: int = 1
    prepare: Callable[[Path], None] = lambda _output: None
    folder: Path | None = None
    calls: dict[Call, int] | None = None
    result: object = None

    def run(self, output: Path, log: Path, install: Callable[[int], None] | None = None):
        def prepare(rank: int) -> None:
            self.prepare(output)
            with open(output / "process_ids", "a") as file:
                file.write(f"{os.getpid()}\n")
            if install is not None:
                install(rank)

        output.mkdir(exist_ok=True)
        return run_main(self.arguments(output), log, processes=self.processes, prepare=prepare, timeout=90)


@pytest.fixture(scope="module")
def jobs(toy_config, toy_data, tmp_path_factory) -> dict[str, Job]:
    """The jobs to disturb, see ``complete``."""
    folder = tmp_path_factory.mktemp("jobs")

    def train(batch_size: int) -> Callable[[Path], list]:
        return lambda output: toy_arguments(toy_config, toy_data, output, *OPTIONS, "DATA.BATCH_SIZE", batch_size)

    def state(output: Path) -> object:
        return read_state(output / "toy/default")

    jobs = {"training": Job(train(16), state), "two processes": Job(train(8), state, processes=2)}
    jobs["check"] = Job(
        lambda output: ["--check", *train(16)(output)],
        lambda _: None,
        prepare=lambda _: setattr(engine.dry_run, "MEASUREMENT_SECONDS", 0.2),
    )
    complete(jobs["training"], folder / "training")
    trained = folder / "training/toy/default"
    replay = folder / "replay_1.pth"
    names = [["class0/000.png"] * 16]
    checkpoint = read_checkpoint(trained / BEST)
    save_checkpoint({**checkpoint, "replay": {"update": 1, "epoch": 0, "images": [names]}}, replay)
    options = ["--data-path", toy_data, "--opts", "DATA.NUM_WORKERS", 2]
    evaluation = ["--eval", "--resume", trained / BEST]
    jobs["evaluation"] = Job(
        lambda output: [*evaluation, "--output", output, *options],
        lambda output: json.loads((output / "toy/default/eval.json").read_text())["results"],
    )
    jobs["replay"] = Job(lambda _: ["--replay", replay, *options], lambda _: None)

    def become_script(output: Path) -> None:
        main.main = scripts.evaluate_all.main
        sys.argv = ["evaluate_all.py", str(trained / BEST), *map(str, options[:2]), "--csv", str(output / "csv"), *options[2:4]]
        sys.argv += ["2"]

    jobs["script"] = Job(lambda _: [], lambda output: (output / "csv").read_text().split(",")[:20], prepare=become_script)
    for name, job in jobs.items():
        job.folder = folder / name
    return jobs


def complete(job: Job, output: Path) -> None:
    """Run a job without faults, and store its calls and its result. Done only once."""
    if job.calls is not None:
        return
    calls = output.with_suffix(".calls")
    outcome = job.run(output, output.with_suffix(".log"), record_calls(calls))
    assert set(outcome.exit_codes) == {0}, outcome.output
    job.calls, job.result = read_calls(calls), job.read_result(output)


def check_fault(jobs: dict[str, Job], seed: int, folder: Path) -> None:
    """Disturb a job by errors drawn from ``seed``, check how it ends, and repeat the command without the errors."""
    rng = random.Random(seed)
    name = rng.choice(["training"] * 3 + list(jobs))
    job = jobs[name]
    complete(job, job.folder)
    fault = draw_fault(job.calls, rng)
    faults = [fault]
    if rng.random() < 0.2:
        faults.append(Fault(Call(fault.call.rank, "main", rng.choice(HANDLERS)), 1, rng.randrange(len(ERRORS))))
    what = f"seed {seed}: {name}, {faults}, {ERRORS[fault.error]()!r:.200}"
    output, log, times = folder / "output", folder / "log", folder / "times"
    times.touch()
    try:
        outcome = job.run(output, log, inject(faults, times))
    except TimeoutError as error:
        pytest.fail(f"{what}: {error}")
    ended = time.time()
    report = f"{what}: exit codes {outcome.exit_codes}\n{outcome.output[-5000:]}"
    if not times.read_text():
        return  # the call was not reached, since the number of calls depends on timing
    fired = [line.split() for line in times.read_text().splitlines()]
    assert ended - float(fired[0][0]) < SECONDS_TO_END * job.processes, report
    assert all_ended(output), report
    tolerated = outcome.exit_codes == [0] * job.processes
    if tolerated:  # the error was handled: the result is that of an undisturbed run
        assert find_difference(job.read_result(output), job.result) is None, report
    else:
        assert 0 not in outcome.exit_codes, report
        assert any(shows_reason(outcome.output, ERRORS[int(error)]()) for _, error in fired), report
    check_directory(output / "toy/default", outcome.output, report)
    repeated = job.run(output, folder / "second log")
    assert set(repeated.exit_codes) == {0}, f"{report}\n--- repeated:\n{repeated.output[-5000:]}"
    assert find_difference(job.read_result(output), job.result) is None, report


def all_ended(output: Path) -> bool:
    """Whether all processes of a run end within 5 s."""
    groups = [int(line) for line in (output / "process_ids").read_text().split()]
    deadline = time.monotonic() + 5
    while any(group_exists(group) for group in groups):
        if time.monotonic() > deadline:
            for group in filter(group_exists, groups):
                os.killpg(group, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def shows_reason(output: str, error: BaseException) -> bool:
    """Whether the console shows the type of an error, or the beginning of its message."""
    if isinstance(error, KeyboardInterrupt) and "stopped" in output:
        return True
    if not isinstance(error, Exception) and "exited unexpectedly" in output:  # it ended a worker outside of its loaders
        return True
    try:
        words = str(error).split()
    except RuntimeError:
        words = []
    return type(error).__name__ in output or bool(words and " ".join(words)[:12] in " ".join(output.split()))


def check_directory(folder: Path, output: str, report: str) -> None:
    """Check that the newest checkpoint is intact, best.pth as new as reported, and nothing locked."""
    RunLock(folder).check()
    checkpoints = list_checkpoints(folder)
    for path in checkpoints[:1]:
        read_checkpoint(path)  # raises an error if the file is damaged
    reported = re.findall(r"saved \S+checkpoint_(\d+)\.pth \(and as best\.pth\)", output)
    if reported and folder.is_dir():  # --check removes its temporary directory
        assert read_checkpoint(folder / BEST)["num_updates"] >= int(reported[-1]), report


@pytest.mark.parametrize("seed", range(15))
def test_r18_an_arbitrary_error_ends_a_job_within_seconds_and_loses_nothing(seed, jobs, tmp_path):
    check_fault(jobs, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(15, 215))
def test_r18_two_hundred_arbitrary_errors(seed, jobs, tmp_path):
    check_fault(jobs, seed, tmp_path)
