"""The console: its lines, and the progress of long work as a bar on a terminal or as log lines elsewhere."""

import functools
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

from utils.background import Sink

logger = logging.getLogger(__name__)


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
    """Lines on standard output and a progress bar on standard error, written by one thread so that they do not interleave."""

    def __init__(self) -> None:
        self.sink = Sink("console")
        self._bar: Any = None  # tqdm's bar, while one is shown

    def write_line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        _Stream(sys.stdout).write(text + "\n")
        if self._bar is not None:
            self._bar.refresh()

    def open_bar(self, total: int, title: str) -> None:
        self._bar = tqdm(total=total, desc=title, leave=False, dynamic_ncols=True, file=_Stream(sys.stderr))

    def advance_bar(self, done: int) -> None:
        self._bar.update(done - self._bar.n)

    def close_bar(self) -> None:
        self._bar.close()
        self._bar = None


@functools.cache
def console() -> Console:
    return Console()


def progress(items: Iterable, total: int, title: str, *, seconds_between_lines: float = 30.0) -> Iterator:
    """Iterate over ``items``. Rank 0 shows a progress bar on a terminal, or periodic log lines elsewhere."""
    if not logger.isEnabledFor(logging.INFO):
        yield from items
        return
    if sys.stderr is not None and sys.stderr.isatty():
        yield from _with_bar(items, total, title)
        return
    last = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last > seconds_between_lines:
            last = time.monotonic()
            logger.info("%s: %d of %d", title, done, total)
        yield item


def _with_bar(items: Iterable, total: int, title: str) -> Iterator:
    console().sink(console().open_bar, total, title)
    try:
        for done, item in enumerate(items):
            console().sink(console().advance_bar, done)
            yield item
    finally:
        console().sink(console().close_bar)
