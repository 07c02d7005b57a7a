"""Log lines of a run on the console and in ``log_rank<rank>.txt``, written in the background (see ``utils.background``)."""

import logging
import sys
from collections.abc import Callable
from logging.handlers import MemoryHandler
from pathlib import Path

from termcolor import colored

from utils.background import Sink
from utils.files import check_same, identify
from utils.progress import console
from utils.text import printable

logger = logging.getLogger(__name__)

_COLORS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class _Handler(logging.Handler):
    """Formats records and writes them in the background."""

    def __init__(self, sink: Sink, write: Callable[[str], None]):
        super().__init__()
        self._sink = sink
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._sink(self._write, self.format(record))
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        self._sink.flush()

    def close(self) -> None:
        self.flush()
        super().close()


class _ConsoleHandler(_Handler):
    """Writes to the console. ``flush``, which precedes an error message and the end of the process, erases a progress bar."""

    def flush(self) -> None:
        self._sink(console().close_bar)
        super().flush()


FILE_ONLY = {"file_only": True}  # argument ``extra`` of log calls whose message is too long for the console


class _Formatter(logging.Formatter):
    """Formats a record so that no file name, class name or message of a server can imitate a record (see ``printable``)."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        return self.compose(record, self.formatTime(record, "%Y-%m-%d %H:%M:%S"), printable(text))

    def compose(self, record: logging.LogRecord, stamp: str, text: str) -> str:
        return f"[{stamp} {record.name}] {record.levelname} {text}"


class _ColoredFormatter(_Formatter):
    def compose(self, record: logging.LogRecord, stamp: str, text: str) -> str:
        if record.levelno in _COLORS:
            text = colored(f"{record.levelname} {text}", _COLORS[record.levelno])
        return f"[{colored(stamp, 'green')}] {text}"


def collect_records() -> MemoryHandler:
    """Collect log records from now on, for the log file that ``setup_logging`` opens later."""
    handler = MemoryHandler(capacity=sys.maxsize, flushLevel=sys.maxsize, flushOnClose=False)
    logging.getLogger().addHandler(handler)
    return handler


def setup_logging(rank: int, output: Path | None = None, *, earlier: MemoryHandler | None = None) -> None:
    """Log to the console and, if an output directory is given, to ``log_rank<rank>.txt``.

    Rank 0 logs messages of level INFO and above, other ranks WARNING and above.

    Args:
        earlier: records that were collected before the output directory existed, to write to the file first.
    """
    records = list(earlier.buffer) if earlier is not None else []
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if sys.stdout is not None:
        console().erases_bar = rank > 0  # the bar of rank 0, on the same terminal
        handler = _ConsoleHandler(console().sink, console().write_line)
        handler.setFormatter(_ColoredFormatter())
        handler.addFilter(lambda record: not getattr(record, "file_only", False))
        root.addHandler(handler)
    if output is not None:
        file_handler = _file_handler(output / f"log_rank{rank}.txt")
        for record in records:
            file_handler.handle(record)
        root.addHandler(file_handler)
    logging.captureWarnings(True)


def _file_handler(path: Path) -> _Handler:
    identity = identify(path.parent)

    def write(text: str) -> None:
        check_same(path.parent, identity)  # another run may have started at the path of a moved directory
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")

    handler = _Handler(Sink(str(path)), write)
    handler.setFormatter(_Formatter())
    return handler
