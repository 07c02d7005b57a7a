"""The console of a training run on a terminal: the progress bar, and a clean terminal whenever the run ends."""

import argparse
import fcntl
import os
import pty
import re
import signal
import struct
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import engine.trainer
import utils.progress
from scripts.command_line import reporting_errors
from tests.launch import run_main, run_script
from tests.reliability.test_signals import call_before
from tests.runs import toy_arguments
from utils.errors import ConfigError
from utils.log import setup_logging

WIDTH = 110
STYLE = re.compile(r"\x1b\[\d+m")


class Terminal:
    """A pseudo-terminal that records what is written to it."""

    def __init__(self) -> None:
        self._master, self._slave = pty.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
        self._data = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while chunk := os.read(self._master, 1 << 16):
                self._data += chunk
        except OSError:  # no process has the terminal open
            pass

    def connect(self, _rank: int) -> None:
        """Connect standard output and standard error of this process to the terminal."""
        for descriptor in (1, 2):
            os.dup2(self._slave, descriptor)
        utils.progress.console.cache_clear()

    def close(self) -> str:
        """What was written, without colours."""
        os.close(self._slave)
        self._reader.join(10)
        os.close(self._master)
        return STYLE.sub("", self._data.decode())


def shown_lines(written: str) -> list[str]:
    """Lines that the terminal shows at the end: text after a carriage return overwrites the line."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            part = part.rpartition("\x1b[K")[2]
            shown = part if "\x1b[K" in line else part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def run_on_terminal(arguments, tmp_path: Path, *, processes: int = 1, fail_at: int = 0, error: BaseException | None = None):
    """Run ``main.py`` on a terminal; rank 0 raises ``error``, or receives Ctrl-C, before update ``fail_at``."""
    terminal = Terminal()

    def fail() -> None:
        if error is not None:
            raise error
        os.kill(os.getpid(), signal.SIGINT)

    def prepare(rank: int) -> None:
        terminal.connect(rank)
        if fail_at and rank == 0:
            call_before(engine.trainer, "train_step", fail_at, fail)

    outcome = run_main(arguments, tmp_path / "log", processes=processes, prepare=prepare)
    return outcome.exit_codes, terminal.close()


def assert_clean(lines: list[str]) -> None:
    """Every line is a log line or its continuation, without a remainder of a progress bar."""
    assert lines[-1] == ""
    assert not [line for line in lines if "█" in line or "|  " in line]
    for line in lines:
        assert line == "" or line.startswith(("[20", "  ", "Traceback", "KeyError"))


def test_a_terminal_shows_the_progress_of_each_epoch_and_is_clean_at_the_end(toy_config, toy_data, tmp_path):
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "TRAIN.EPOCHS", 2, "DATA.BATCH_SIZE", 4)
    exit_codes, written = run_on_terminal(arguments, tmp_path, processes=2)
    assert exit_codes == [0, 0], written
    for epoch in (1, 2):
        bars = re.findall(
            rf"\repoch {epoch}/2 \|.*?\| +\d+/12, loss [\d.]+, lr [\d.e+-]+, \d+ images/s, ETA 0:00:\d\d", written
        )
        assert bars, written.replace("\r", "\n")
    lines = shown_lines(written)
    assert_clean(lines)
    assert "done; training in this process took" in lines[-2]
    assert sum(f"epoch {epoch}/2 [12/12] loss" in line for line in lines for epoch in (1, 2)) == 2


def test_the_error_of_a_script_replaces_its_progress_bar(tmp_path):
    terminal = Terminal()

    def fail_with_a_bar() -> None:
        terminal.connect(0)
        setup_logging(0)
        with reporting_errors(argparse.ArgumentParser()):
            for _ in utils.progress.progress(range(9), 9, "images"):
                time.sleep(2 * utils.progress.SECONDS_BETWEEN_DRAWS)
                raise ConfigError("--every 0: must be at least 1")

    outcome = run_script(SimpleNamespace(main=fail_with_a_bar, __file__="script.py"), [], tmp_path / "log")
    written = terminal.close()
    assert outcome.exit_codes == [2]
    assert "\rimages:   0%|" in written
    assert shown_lines(written) == ["script.py: error: --every 0: must be at least 1", ""]


@pytest.mark.parametrize(("error", "status"), [(None, 75), (KeyError("injected"), 1)], ids=["Ctrl-C", "crash"])
def test_a_run_that_ends_within_an_epoch_leaves_a_clean_terminal(error, status, toy_config, toy_data, tmp_path):
    arguments = toy_arguments(toy_config, toy_data, tmp_path)
    exit_codes, written = run_on_terminal(arguments, tmp_path, fail_at=8, error=error)
    assert exit_codes == [status], written
    assert "\repoch 1/3 |" in written
    lines = shown_lines(written)
    assert_clean(lines)
    assert ("the same command resumes" if error is None else "injected") in "\n".join(lines[-4:])
