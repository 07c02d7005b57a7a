"""The console: its lines, and the progress of long work as a bar on a terminal or as log lines elsewhere."""

import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, TextIO

from tqdm import tqdm

from utils.background import Sink

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_DRAWS = 0.2  # minimum interval between two updates of a progress bar


class _Stream:
    """A console stream without Python's buffer. A blocked write would hold the buffer's lock and thus block the process's exit.

    Characters that the console cannot encode are escaped.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> None:
        data = text.encode(self.encoding, errors="backslashreplace")
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):  # an in-memory stream has no descriptor
            self._stream.write(data.decode(self.encoding))
            return
        while data:
            data = data[os.write(descriptor, data) :]

    def flush(self) -> None:
        pass

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()


class Console:
    """Lines on standard output and a progress bar on standard error, written by one thread so that they do not interleave.

    Attributes:
        erases_bar: whether each line first erases the line of the terminal, where another process may show a progress bar.
    """

    def __init__(self) -> None:
        self.sink = Sink("console")
        self.erases_bar = False
        self._bar: Any = None  # tqdm's bar, while one is shown

    def write_line(self, text: str) -> None:
        stdout = _Stream(sys.stdout)
        if self._bar is not None:
            self._bar.clear()
        elif self.erases_bar and stdout.isatty():
            text = f"\r\x1b[K{text}"
        stdout.write(text + "\n")
        if self._bar is not None:
            self._bar.refresh()

    def open_bar(self, title: str, done: int, total: int, form: str | None) -> None:
        options = {"leave": False, "dynamic_ncols": True, "mininterval": 0, "miniters": 1, "bar_format": form}
        self._bar = tqdm(desc=title, initial=done, total=total, file=_Stream(sys.stderr), **options)

    def advance_bar(self, done: int, status: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(status, refresh=False)
            self._bar.update(done - self._bar.n)

    def close_bar(self) -> None:
        """Erase the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@functools.cache
def console() -> Console:
    return Console()


def progress(
    items: Iterable,
    total: int,
    title: str,
    *,
    done: int = 0,
    status: Callable[[], str] | None = None,
    seconds_between_lines: float = 30.0,
) -> Generator:
    """Iterate over ``items``. Rank 0 shows a progress bar on a terminal, or periodic log lines elsewhere.

    If the loop over the items may raise an error, wrap the iterator in ``contextlib.closing``, which then erases the bar.

    Args:
        total: number of items, including those that are already done.
        done: number of items that are done before the first one of ``items``.
        status: returns the text at the end of the bar, instead of the times that have passed and remain.
    """
    if not logger.isEnabledFor(logging.INFO):
        yield from items
        return
    if sys.stderr is not None and sys.stderr.isatty():
        yield from _with_bar(items, total, title, done, status)
        return
    last = time.monotonic()
    for number, item in enumerate(items, done):
        if time.monotonic() - last > seconds_between_lines:
            last = time.monotonic()
            logger.info("%s: %d of %d", title, number, total)
        yield item


def _with_bar(items: Iterable, total: int, title: str, done: int, status: Callable[[], str] | None) -> Generator:
    form = None if status is None else "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}"
    console().sink(console().open_bar, title, done, total, form)
    drawn = time.monotonic()
    try:
        for number, item in enumerate(items, done):
            if time.monotonic() - drawn > SECONDS_BETWEEN_DRAWS:
                drawn = time.monotonic()
                console().sink(console().advance_bar, number, "" if status is None else status())
            yield item
    finally:
        console().sink(console().close_bar)
