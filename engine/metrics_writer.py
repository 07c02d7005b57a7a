"""Metrics of a run as JSON lines, TensorBoard events and points of a tracker, written in the background.

See ``utils.background`` and ``engine.tracker``.
"""

import json
import logging
import math
import mmap
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.tracker import Tracker
from utils.background import SECONDS_AT_EXIT, Sink
from utils.files import check_same, identify, write_text
from utils.run_files import METRICS

logger = logging.getLogger(__name__)

EVENT_FILES = "events.out.tfevents."  # start of the names of TensorBoard's event files
# Kind and name of a value -> its tag in TensorBoard, which shows groups in the order of their names, capitals first.
OVERVIEW = {
    ("train", "loss"): "Overview/training_loss",
    ("train", "lr"): "Overview/learning_rate",
    ("eval_raw", "acc1"): "Overview/accuracy_raw",
    ("eval_ema", "acc1"): "Overview/accuracy_ema",
}


class MetricsWriter:
    """Writes ``metrics.jsonl`` and TensorBoard events of a run, and passes the same values to its tracker.

    On resume, entries after the checkpoint are discarded, so that no step is logged twice.

    Args:
        output: the run's directory.
        step: number of updates at the start; entries of later updates are discarded.
        evaluated: whether the evaluation at ``step`` is complete; if not, its entries are discarded too.
        evaluations: records of all evaluations until ``step``. Those that ``metrics.jsonl`` lacks are restored.
        tracker: closed with this writer.
    """

    def __init__(
        self,
        output: Path,
        step: int,
        *,
        evaluated: bool = True,
        evaluations: Sequence[dict] = (),
        tracker: Tracker | None = None,
    ):
        self._tracker = tracker
        self._path = output / METRICS
        self._folder = output
        self._identity = identify(output)
        self._write_line = Sink(str(self._path))
        self._write_event = Sink(f"{output}: TensorBoard events")
        self._board: Any = None  # TensorBoard's writer, once the background thread has opened it
        self._flushed: list[threading.Event] = []  # set when all entries before the last call of ``flush`` are written
        self._write_line(_restore_records, self._path, step, evaluated, evaluations)
        self._write_event(self._open_board, step, evaluated)

    def _open_board(self, step: int, evaluated: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        has_overview = step == 0 or _has_overview(self._folder)
        _rename_later_event_files(self._folder)
        # TensorBoard discards earlier events of this step and of later steps.
        board = SummaryWriter(str(self._folder), purge_step=step + 1 if evaluated else step)
        for record in [] if evaluated and has_overview else read_records(self._path):
            # TensorBoard discards the training point with an incomplete evaluation of the same step. Events of earlier versions
            # have no overview.
            is_discarded = not evaluated and (record["step"], record["kind"]) == (step, "train")
            is_missing = not has_overview and (record["step"] < step or (record["step"] == step and evaluated))
            for tag, value in _points(record["kind"], record).items() if is_discarded or is_missing else ():
                if value is not None and (is_discarded or tag in OVERVIEW.values()):
                    board.add_scalar(tag, value, record["step"])
        self._board = board

    def _append(self, line: str) -> None:
        check_same(self._folder, self._identity)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _event(self, method: str, *arguments: object) -> None:
        if self._board is not None:
            check_same(self._folder, self._identity)  # TensorBoard's thread would fail with a traceback
            getattr(self._board, method)(*arguments)

    def scalars(self, step: int, kind: str, values: dict[str, float], *, file_only: Collection[str] = ()) -> None:
        """Write a JSON line with ``step`` and ``kind``, and every value as a point of TensorBoard and of the tracker.

        See ``_points`` for their names.

        Args:
            file_only: names of values that TensorBoard and the tracker do not show.
        """
        self._write_line(self._append, json.dumps(_as_json({"step": step, "kind": kind, **values})))
        shown = {name: value for name, value in values.items() if name not in file_only}
        for tag, value in _points(kind, shown).items():
            self._write_event(self._event, "add_scalar", tag, value, step)
        if self._tracker is not None:
            points = _as_json(_points(kind, shown, in_overview=False))
            self._tracker.scalars(step, {name: value for name, value in points.items() if value is not None})

    def text(self, name: str, text: str, step: int) -> None:
        self._write_event(self._event, "add_text", name, text, step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Write an image, (3, H, W) in [0, 1], to TensorBoard."""
        self._write_event(self._event, "add_image", name, image, step)

    def image_grid(self, name: str, images: Tensor, step: int) -> None:
        """Write a grid of images, (B, 3, H, W), each scaled to [0, 1] by its own minimum and maximum."""
        from torchvision.utils import make_grid

        self.image(name, make_grid(images.float().cpu(), nrow=4, normalize=True, scale_each=True), step)

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

    def close(self, *, finished: bool = False) -> None:
        """Wait until all entries are written, for a limited time, and end the tracker's run.

        Args:
            finished: see ``Tracker.close``.
        """
        self._write_event(self._event, "close")
        self._flushed = []  # wait once more, even if a previous flush has timed out
        self.flush()
        if self._tracker is not None:
            self._tracker.close(finished=finished)


def _as_json(record: dict) -> dict:
    """Replace infinity and NaN, which are possible gradient norms in fp16, by None: JSON cannot represent them."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()}


def _points(kind: str, values: Mapping[str, Any], *, in_overview: bool = True) -> dict[str, Any]:
    """Tag -> value, for the values of a record: ``kind/name``, or the tag in ``OVERVIEW``. Epochs are counted from 1."""
    overview = OVERVIEW if in_overview else {}
    return {
        overview.get((kind, name), f"{kind}/{name}"): value + 1 if name == "epoch" else value
        for name, value in values.items()
        if name not in ("step", "kind")
    }


def _has_overview(folder: Path) -> bool:
    """Whether TensorBoard's event files have points of ``OVERVIEW``."""
    for path in folder.glob(f"{EVENT_FILES}*"):
        if path.stat().st_size:  # an empty file cannot be mapped
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if any(content.find(tag.encode()) >= 0 for tag in OVERVIEW.values()):
                    return True
    return False


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
        write_text(path, "".join(f"{json.dumps(record)}\n" for record in records))


def _rename_later_event_files(folder: Path) -> None:
    """Rename TensorBoard's event files of previous processes if one of them would be read after a file created now.

    TensorBoard reads the files in the order of their names, which contain the time of their creation. After the clock was
    set back, it would read an old file last and show events that the resumed run has discarded.
    """
    prefix, now = EVENT_FILES, int(time.time())
    paths = sorted(folder.glob(f"{prefix}[0-9]*"))
    if not paths or paths[-1].name < f"{prefix}{now:010d}":
        return
    for position, path in enumerate(paths, start=now - len(paths)):
        _, _, rest = path.name.removeprefix(prefix).partition(".")
        renamed = path.with_name(f"{prefix}{position:010d}.{rest}")
        if not renamed.exists():
            path.rename(renamed)
