"""Outputs of a run: log lines, a progress bar, metrics as JSON lines, and TensorBoard events.

All are written in the background, see ``utils.background``.
"""

import functools
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TextIO

from termcolor import colored
from torch import Tensor
from tqdm import tqdm

from utils.background import SECONDS_AT_EXIT, Sink
from utils.files import check_same, identify, replacing
from utils.text import printable

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
_COLORS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


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
        console = _Handler(_console().sink, _console().write_line)
        console.setFormatter(_ColoredFormatter())
        console.addFilter(lambda record: not getattr(record, "file_only", False))
        root.addHandler(console)
    if output is not None:
        file_handler = _file_handler(output / f"log_rank{rank}.txt")
        for record in records:
            file_handler.handle(record)
        root.addHandler(file_handler)
    logging.captureWarnings(True)


class _Console:
    """Lines on standard output and a progress bar on standard error, written by one thread so that they do not interleave."""

    def __init__(self) -> None:
        self.sink = Sink("console")
        self._bar: tqdm | None = None

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
def _console() -> _Console:
    return _Console()


def _file_handler(path: Path) -> _Handler:
    identity = identify(path.parent)

    def write(text: str) -> None:
        check_same(path.parent, identity)  # another run may have started at the path of a moved directory
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")

    handler = _Handler(Sink(str(path)), write)
    handler.setFormatter(_Formatter())
    return handler


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
    console = _console()
    console.sink(console.open_bar, total, title)
    try:
        for done, item in enumerate(items):
            console.sink(console.advance_bar, done)
            yield item
    finally:
        console.sink(console.close_bar)


class MetricsWriter:
    """Writes ``metrics.jsonl`` and TensorBoard events of a run.

    On resume, entries after the checkpoint are discarded, so that no step is logged twice.

    Args:
        output: the run's directory.
        step: number of updates at the start; entries of later updates are discarded.
        evaluated: whether the evaluation at ``step`` is complete; if not, its entries are discarded too.
        evaluations: records of all evaluations until ``step``. Those that ``metrics.jsonl`` lacks are restored.
    """

    def __init__(self, output: Path, step: int, *, evaluated: bool = True, evaluations: Sequence[dict] = ()):
        self._path = output / METRICS
        self._folder = output
        self._identity = identify(output)
        self._write_line = Sink(str(self._path))
        self._write_event = Sink(f"{output}: TensorBoard events")
        self._board = None
        self._flushed: list[threading.Event] = []  # set when all entries before the last call of ``flush`` are written
        self._write_line(_restore_records, self._path, step, evaluated, evaluations)
        self._write_event(self._open_board, step, evaluated)

    def _open_board(self, step: int, evaluated: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        _rename_later_event_files(self._folder)
        # TensorBoard discards earlier events of this step and of later steps.
        board = SummaryWriter(str(self._folder), purge_step=step + 1 if evaluated else step)
        for record in [] if evaluated else read_records(self._path):
            if (record["step"], record["kind"]) == (step, "train"):  # discarded with the evaluation of the same step
                for name, value in record.items():
                    if name not in ("step", "kind") and value is not None:
                        board.add_scalar(f"train/{name}", value, step)
        self._board = board

    def _append(self, line: str) -> None:
        check_same(self._folder, self._identity)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _event(self, method: str, *arguments: object) -> None:
        if self._board is not None:
            getattr(self._board, method)(*arguments)

    def scalars(self, step: int, kind: str, values: dict[str, float | int]) -> None:
        """Write a JSON line with ``step`` and ``kind``, and a TensorBoard point ``kind/name`` for every value."""
        self._write_line(self._append, json.dumps(_as_json({"step": step, "kind": kind, **values})))
        for name, value in values.items():
            self._write_event(self._event, "add_scalar", f"{kind}/{name}", value, step)

    def text(self, name: str, text: str, step: int) -> None:
        self._write_event(self._event, "add_text", name, text, step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Write an image, (3, H, W) in [0, 1], to TensorBoard."""
        self._write_event(self._event, "add_image", name, image, step)

    def figure(self, name: str, figure: object, step: int) -> None:
        """Write a matplotlib figure to TensorBoard. It is rendered in the background: do not use the figure after the call."""
        self._write_event(self._event, "add_figure", name, figure, step)

    def flush(self) -> None:
        """Wait until all entries so far are written, for at most ``SECONDS_AT_EXIT``.

        If a previous call has timed out, do not wait again before its entries are written.
        """
        if not all(written.is_set() for written in self._flushed):
            return
        self._write_event(self._event, "flush")
        self._flushed = [threading.Event(), threading.Event()]
        deadline = time.monotonic() + SECONDS_AT_EXIT
        for sink, written in zip((self._write_line, self._write_event), self._flushed, strict=True):
            sink(written.set)
        for written in self._flushed:
            written.wait(max(deadline - time.monotonic(), 0))

    def close(self) -> None:
        self._write_event(self._event, "close")
        self._flushed = []  # wait once more, even if a previous flush has timed out
        self.flush()


def _as_json(record: dict) -> dict:
    """Replace infinity and NaN, which are possible gradient norms in fp16, by None: JSON cannot represent them."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()}


def read_records(path: Path) -> list[dict]:
    """Records of a metrics file, without lines that were truncated when a process was killed."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            if isinstance(record["step"], int) and isinstance(record["kind"], str):
                records.append(record)
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return records


def lacks_evaluations(output: Path, evaluations: Sequence[dict]) -> bool:
    """Whether ``metrics.jsonl`` lacks a record of ``evaluations``: its disk was full or slow when the run ended."""
    try:
        known = {(record["step"], record["kind"]) for record in read_records(output / METRICS)}
    except OSError:
        return bool(evaluations)
    return not all((record["step"], record["kind"]) in known for record in evaluations)


def restore_evaluations(output: Path, step: int, evaluations: Sequence[dict]) -> None:
    """Add the records of ``evaluations`` that ``metrics.jsonl`` lacks. A failure causes only a warning.

    Args:
        output: the directory of a finished run.
        step: number of updates of the run.
        evaluations: records of all evaluations of the run.
    """
    try:
        _restore_records(output / METRICS, step, True, evaluations)
    except OSError as error:
        logger.warning("%s: missing evaluations cannot be restored (%s)", output / METRICS, error)
    else:
        logger.warning("%s: missing evaluations restored from the checkpoint", output / METRICS)


def _restore_records(path: Path, step: int, evaluated: bool, evaluations: Sequence[dict]) -> None:
    """Remove records of later steps or of an incomplete evaluation, and add missing records of complete evaluations.

    Args:
        evaluated, evaluations: see ``MetricsWriter``.
    """
    records = [
        record
        for record in read_records(path)
        if record["step"] < step or (record["step"] == step and (evaluated or not record["kind"].startswith("eval")))
    ]
    known = {(record["step"], record["kind"]) for record in records}
    records += [_as_json(record) for record in evaluations if (record["step"], record["kind"]) not in known]
    records.sort(key=lambda record: record["step"])  # stable: within a step, training comes before the evaluation
    if records or path.exists():
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def _rename_later_event_files(folder: Path) -> None:
    """Rename TensorBoard's event files of previous processes if one of them would be read after a file created now.

    TensorBoard reads the files in the order of their names, which contain the time of their creation. After the clock was
    set back, it would read an old file last and show events that the resumed run has discarded.
    """
    prefix, now = "events.out.tfevents.", int(time.time())
    paths = sorted(folder.glob(f"{prefix}[0-9]*"))
    if not paths or paths[-1].name < f"{prefix}{now:010d}":
        return
    for position, path in enumerate(paths, start=now - len(paths)):
        _, _, rest = path.name.removeprefix(prefix).partition(".")
        renamed = path.with_name(f"{prefix}{position:010d}.{rest}")
        if not renamed.exists():
            path.rename(renamed)
