"""Learning curves of the runs of an ablation, read from its output directory or from a CSV file, and their means over seeds."""

import csv
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.config.reading import read_yaml
from utils.errors import ConfigError
from utils.run_files import CONFIG, METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Point(NamedTuple):
    """One evaluation of one run.

    Attributes:
        epoch: number of completed epochs.
        step: number of updates.
        accuracy: top-1 in percent, of the EMA weights if they were evaluated.
        loss: of the evaluation, with the same weights.
        seconds: time of training until the evaluation at the median speed between two evaluations, which excludes evaluations,
            checkpoints and interruptions.
    """

    arm: str
    seed: int
    epoch: int
    step: int
    accuracy: float
    loss: float
    seconds: float


def find_runs(ablation: Path) -> dict[tuple[str, int], Path]:
    """Arm and seed -> directory of the run, for all runs in the output directory of scripts/ablate.py.

    Raises:
        ConfigError: there is no run.
    """
    runs = {}
    for metrics in sorted(ablation.glob(f"*/*/{METRICS}")):
        if match := re.fullmatch(r"(.+)_(\d+)", metrics.parent.name):
            runs[match[1].replace("_", " "), int(match[2])] = metrics.parent
    if not runs:
        raise ConfigError(
            f"{ablation} contains no {METRICS} and no runs; give a run directory or the output of scripts/ablate.py"
        )
    return runs


def read_run(run: Path, arm: str, seed: int) -> list[Point]:
    """Evaluations of a run with one process, in the order of its updates.

    Raises:
        ConfigError: a file of the run lacks an entry.
    """
    from engine.metrics_writer import read_records

    cfg = read_yaml(run / CONFIG)
    try:
        images_per_update = cfg["DATA"]["GLOBAL_BATCH_SIZE"] or cfg["DATA"]["BATCH_SIZE"] * max(
            1, cfg["TRAIN"]["ACCUMULATION_STEPS"]
        )
        return _read_evaluations(read_records(run / METRICS), images_per_update, arm, seed)
    except (KeyError, TypeError, statistics.StatisticsError) as error:
        raise ConfigError(f"{run}: {CONFIG} or {METRICS} is damaged or of another program ({error!r}); leave it out") from None


def _read_evaluations(records: Sequence[dict], images_per_update: int, arm: str, seed: int) -> list[Point]:
    points: dict[int, Point] = {}  # by step: an evaluation of the EMA weights replaces that of the raw weights
    speeds, seconds, last_step = [], 0.0, 0
    for record in records:
        step = record["step"]
        if record["kind"] == "train":
            speeds.append(record["images_per_second"])
        elif record["kind"].startswith("eval_"):
            if step > last_step:
                seconds += (step - last_step) * images_per_update / statistics.median(speeds)
                speeds, last_step = [], step
            loss = math.nan if record["loss"] is None else record["loss"]  # JSON has no NaN or infinity
            points[step] = Point(arm, seed, record["epoch"] + 1, step, record["acc1"], loss, round(seconds, 1))
    return list(points.values())


def read_points(source: Path) -> list[Point]:
    """Evaluations of all runs of an ablation, from its output directory or from a CSV file with the columns of ``Point``.

    Raises:
        ConfigError: there are no runs, or the file has other columns.
    """
    if source.is_dir():
        return [point for (arm, seed), run in find_runs(source).items() for point in read_run(run, arm, seed)]
    return read_csv(source, Point)


def read_csv(path: Path, kind: Callable[..., Any]) -> list:
    """Rows of a CSV file as named tuples.

    Args:
        kind: a named tuple with fields of type str, int and float.

    Raises:
        ConfigError: the file has other columns, or a row that does not fit them.
    """
    types = kind.__annotations__
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        try:
            if reader.fieldnames != list(types):
                raise ConfigError(f"{path}: expected a CSV file with the columns {', '.join(types)}")
            return [kind(**{name: types[name](value) for name, value in row.items()}) for row in reader]
        except (KeyError, TypeError, csv.Error):
            problem = "the row has more or fewer values than columns"
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            problem = str(error)
        raise ConfigError(f"{path}:{reader.line_num}: {problem}; correct the row, or write the file again with --csv")


def draw_means(axes: "Axes", rows: Iterable, arm: str, value: str, *, scale: float = 1, x: str = "epoch", **style: Any) -> None:
    """Plot the mean of a value over the seeds of an arm, and a band of one standard deviation on either side.

    The line ends where the first run of the arm ends, so that all its points are means over the same seeds. There is no band
    with a single seed.

    Args:
        rows: named tuples with the fields ``arm``, ``seed``, ``epoch``, ``x`` and ``value``, one per run and epoch; rows whose
            value is NaN are omitted.
        scale: multiplier of ``x``.
    """
    by_epoch: dict[int, list] = {}
    for row in rows:
        if row.arm == arm and not math.isnan(getattr(row, value)):
            by_epoch.setdefault(row.epoch, []).append(row)
    if not by_epoch:
        axes.plot([], [], label=f"{arm} (no values)", **style)
        return
    most = max(map(len, by_epoch.values()))
    groups = [group for _, group in sorted(by_epoch.items()) if len(group) == most]
    xs = [scale * statistics.mean(getattr(row, x) for row in group) for group in groups]
    means = [statistics.mean(getattr(row, value) for row in group) for group in groups]
    (line,) = axes.plot(xs, means, label=f"{arm} ({most} seed{'s' * (most > 1)})", **style)
    if most > 1:
        deviations = [statistics.stdev(getattr(row, value) for row in group) for group in groups]
        low, high = ([mean + sign * d for mean, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def arms_of(rows: Sequence) -> list[str]:
    """Names of the arms, in the order in which they first appear."""
    return list(dict.fromkeys(row.arm for row in rows))
