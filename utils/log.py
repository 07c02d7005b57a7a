"""What people see: log lines, a progress bar, metrics as JSON lines, TensorBoard."""

import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from termcolor import colored
from torch import Tensor
from tqdm import tqdm

from utils.files import replacing

logger = logging.getLogger(__name__)

_COLORS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class _Console(logging.Handler):
    """Lines on standard output that leave a progress bar whole."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _ColoredFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = colored(self.formatTime(record, "%Y-%m-%d %H:%M:%S"), "green")
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        if record.levelno in _COLORS:
            text = colored(f"{record.levelname} {text}", _COLORS[record.levelno])
        return f"[{stamp}] {text}"


def setup_logging(rank: int, output: Path | None = None) -> None:
    """Every module's log of rank 0 to the console, and to ``log_rank0.txt`` where an output folder is given.

    Other ranks log warnings and worse, to their own file and the console.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    console = _Console()
    console.setFormatter(_ColoredFormatter())
    root.addHandler(console)
    if output is not None:
        file = logging.FileHandler(output / f"log_rank{rank}.txt", delay=rank != 0)
        file.setFormatter(logging.Formatter("[%(asctime)s %(name)s] %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        root.addHandler(file)
    logging.captureWarnings(True)


def progress(items: Iterable, total: int, title: str, *, seconds_between_lines: float = 30.0) -> Iterator:
    """The items, with a bar on a terminal and a plain line now and then in a log; rank 0 only."""
    if not logger.isEnabledFor(logging.INFO):
        yield from items
        return
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=title, leave=False, dynamic_ncols=True)
        return
    last = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last > seconds_between_lines:
            last = time.monotonic()
            logger.info("%s: %d of %d", title, done, total)
        yield item


class MetricsWriter:
    """``metrics.jsonl`` and TensorBoard events of a run; what a resumed run does again is written once.

    Args:
        output: the run's folder.
        step: updates done so far; whatever was written of later ones is removed.
        evaluated: whether the evaluation after ``step`` is done; otherwise its records are removed too.
    """

    def __init__(self, output: Path, step: int, *, evaluated: bool = True):
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        path = output / "metrics.jsonl"
        if path.exists():
            _cut_after(path, step, evaluated=evaluated)
        self._lines = path.open("a", buffering=1)
        self._board = SummaryWriter(str(output), purge_step=step + 1)

    def scalars(self, step: int, kind: str, values: dict[str, float | int]) -> None:
        """One point: a JSON line with ``step`` and ``kind``, and a curve ``kind/name`` for every number."""
        # JSON has no infinity and no NaN, which a norm may be in fp16.
        record = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, "kind": kind, **record}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def text(self, name: str, text: str, step: int) -> None:
        self._board.add_text(name, text, step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """image: (3, H, W) in [0, 1]."""
        self._board.add_image(name, image, step)

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def _cut_after(path: Path, step: int, *, evaluated: bool) -> None:
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the line that a kill cut short
            continue
        pending = record["step"] == step and not evaluated and record["kind"].startswith("eval")
        if record["step"] <= step and not pending:
            kept.append(line)
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept))
