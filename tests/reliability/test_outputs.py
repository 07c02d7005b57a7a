"""Consoles, log files and metrics files that fail or block (row R16 of docs/reliability.md)."""

import errno
import json
import os
import signal
import sys
import threading
import time

import pytest

import engine.metrics_writer
import engine.trainer
import utils.log
import utils.progress
from tests.launch import run_main
from tests.reliability.test_signals import call_before
from tests.runs import assert_equal, read_state, toy_arguments
from utils.run_files import BEST, list_checkpoints

pytestmark = pytest.mark.reliability


def create_arguments(toy_config, toy_data, output) -> list:
    return toy_arguments(toy_config, toy_data, output, "SAVE_STEPS", 2, "DATA.BATCH_SIZE", 8, "PRINT_FREQ", 1)


def broken_pipe() -> int:
    """Write end of a pipe whose read end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_pipe() -> int:
    """Write end of a full pipe. The read end stays open and is never read, so that writing blocks."""
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    os.write(writer, bytes(1 << 20))  # writes until the pipe's buffer is full
    os.set_blocking(writer, True)
    return writer


def redirect_stdout(descriptor: int) -> None:
    os.dup2(descriptor, 1)


def close_console() -> None:
    os.close(1)
    sys.stdout = None


CONSOLES = {
    "broken pipe": lambda: redirect_stdout(broken_pipe()),
    "blocked pipe": lambda: redirect_stdout(full_pipe()),
    "full disk": lambda: redirect_stdout(os.open("/dev/full", os.O_WRONLY)),
    "closed": close_console,
    "not UTF-8": lambda: sys.stdout.reconfigure(encoding="ascii"),
}


@pytest.mark.parametrize("console", CONSOLES)
def test_r16_a_console_that_fails_or_blocks_does_not_end_a_run(console, uninterrupted, toy_config, toy_data, tmp_path):
    def prepare(rank: int) -> None:
        utils.progress.console.cache_clear()
        CONSOLES[console]()

    # The path is not ASCII, so a console with ASCII encoding must escape it.
    output = tmp_path / "Ausgabe \N{LATIN SMALL LETTER U WITH DIAERESIS}"
    outcome = run_main(create_arguments(toy_config, toy_data, output), tmp_path / "log", prepare=prepare)
    assert outcome.exit_codes == [0], outcome.output
    folder = output / "toy/default"
    assert_equal(read_state(folder), read_state(uninterrupted(1)))
    log = (folder / "log_rank0.txt").read_text()
    assert "best Acc@1" in log
    if console in ("broken pipe", "full disk"):
        assert log.count("console: not written") == 1
    if console == "not UTF-8":
        assert "Ausgabe \\xfc" in outcome.output


def test_r16_processes_without_a_console_save_their_state_when_stopped(toy_config, toy_data, tmp_path):
    """The exit status must be 75, because a job is requeued only with this status."""

    def prepare(rank: int) -> None:
        utils.progress.console.cache_clear()
        close_console()
        os.close(2)
        sys.stderr = None
        if rank == 1:
            call_before(engine.trainer, "train_step", 5, lambda: os.kill(os.getpid(), signal.SIGTERM))

    arguments = toy_arguments(toy_config, toy_data, tmp_path, "DATA.BATCH_SIZE", 4)
    assert run_main(arguments, tmp_path / "log", processes=2, prepare=prepare).exit_codes == [75, 75]
    assert list_checkpoints(tmp_path / "toy/default")


def test_r16_a_metrics_file_that_cannot_be_rewritten_on_resume_does_not_end_the_run(toy_config, toy_data, tmp_path):
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "TRAIN.EPOCHS", 2, "SAVE_STEPS", 2)
    folder = tmp_path / "toy/default"
    run_main(arguments, tmp_path / "log", kill_when=lambda: len(list_checkpoints(folder)) == 2)

    def prepare(rank: int) -> None:
        def raise_no_space(path, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        engine.metrics_writer.write_text = raise_no_space

    outcome = run_main(arguments, tmp_path / "log", prepare=prepare)
    assert outcome.exit_codes == [0], outcome.output
    assert "metrics.jsonl: not written (OSError: [Errno 28] No space left on device)" in outcome.output


@pytest.mark.parametrize("output", ["log_rank0.txt", "metrics.jsonl", "events"])
def test_r16_failed_writes_of_logs_or_metrics_do_not_end_the_run(output, uninterrupted, toy_config, toy_data, tmp_path):
    def prepare(rank: int) -> None:
        """From the second epoch on, make every write to ``output`` fail with ENOSPC."""
        original_open, original_event = open, engine.metrics_writer.MetricsWriter._event

        def fail_after_first_epoch() -> None:
            if (tmp_path / "toy/default/checkpoint_000000012.pth").exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def open_or_fail(file, *rest, **options):
            if str(file).endswith(output):
                fail_after_first_epoch()
            return original_open(file, *rest, **options)

        def event_or_fail(self, *rest):
            if output == "events":
                fail_after_first_epoch()
            return original_event(self, *rest)

        utils.log.open = engine.metrics_writer.open = open_or_fail
        engine.metrics_writer.MetricsWriter._event = event_or_fail

    arguments = [*create_arguments(toy_config, toy_data, tmp_path), "KEEP_CHECKPOINTS", 99]
    outcome = run_main(arguments, tmp_path / "log", prepare=prepare)
    assert outcome.exit_codes == [0], outcome.output
    assert outcome.output.count("No space left on device); the run continues") == 1
    assert_equal(read_state(tmp_path / "toy/default"), read_state(uninterrupted(1)))


def test_u3_a_checkpoint_is_written_only_after_its_metrics(toy_config, toy_data, tmp_path):
    """The disk of the metrics file is slow, and the run is killed as soon as the first evaluation is saved."""

    def prepare(rank: int) -> None:
        append = engine.metrics_writer.MetricsWriter._append

        def append_slowly(self, line: str) -> None:
            time.sleep(0.3)
            append(self, line)

        engine.metrics_writer.MetricsWriter._append = append_slowly

    folder = tmp_path / "toy/default"
    options = {"prepare": prepare, "kill_when": (folder / BEST).exists}
    outcome = run_main(toy_arguments(toy_config, toy_data, tmp_path, "TRAIN.EPOCHS", 2), tmp_path / "log", **options)
    assert outcome.exit_codes == [-9], outcome.output
    records = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records if record["step"] == 12] == ["train", "eval_raw", "eval_ema"]


@pytest.mark.parametrize("line", ["[1, 2]", '"text"', "7", '{"step": "x"}', "{}", '{"step": 3, "ki', "\x00\xff"])
def test_a_metrics_file_with_unexpected_content_does_not_stop_the_metrics(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "kind": "train", "loss": 3.0}\n' + f"{line}\n", encoding="latin-1")
    writer = engine.metrics_writer.MetricsWriter(tmp_path, 2)
    writer.scalars(4, "train", {"loss": 1.0})
    writer.close()
    records = [json.loads(text) for text in path.read_text().splitlines()]
    assert records == [{"step": 2, "kind": "train", "loss": 3.0}, {"step": 4, "kind": "train", "loss": 1.0}]


def test_blocked_output_does_not_block_the_caller():
    sink, release, results = engine.metrics_writer.Sink("blocked"), threading.Event(), []
    sink(lambda: results.append(release.wait(60)))
    for _ in range(20_000):
        sink(int)  # more calls than the queue accepts; int() has no effect
    assert not results
    release.set()
    sink.flush()
    assert results == [True]
