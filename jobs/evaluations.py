"""Evaluations of all runs of an ablation, from the runs or from a CSV file, for curves."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from yacs.config import CfgNode

from engine.metrics import own_evaluations
from engine.metrics_writer import read_records
from engine.schedule import global_batch_size
from utils.config.reading import read_yaml
from utils.errors import ConfigError
from utils.files import read_csv
from utils.run_files import CONFIG, METRICS


class Evaluation(NamedTuple):
    """One evaluation of one run.

    Attributes:
        epoch: number of completed epochs.
        step: number of updates.
        num_images: number of images in these updates; repeated images count each time.
        weights: raw or ema; ema if both were evaluated.
        accuracy: top-1 in percent.
        loss: NaN if it was not finite.
    """

    arm: str
    seed: int
    epoch: int
    step: int
    num_images: int
    weights: str
    accuracy: float
    loss: float


def find_runs(ablation: Path) -> dict[tuple[str, int], Path]:
    """Arm and seed -> directory of the run, for all runs in the output directory of scripts/ablate.py.

    Raises:
        ConfigError: there is no run, or there are two runs of the same arm and seed.
    """
    runs: dict[tuple[str, int], Path] = {}
    for metrics in sorted(ablation.glob(f"*/*/{METRICS}")):
        if match := re.fullmatch(r"(.+)_(\d+)", metrics.parent.name):
            name = match[1].replace("_", " "), int(match[2])
            if name in runs:
                raise ConfigError(f"{runs[name]} and {metrics.parent} have the same arm and seed; move one of them")
            runs[name] = metrics.parent
    if not runs:
        raise ConfigError(
            f"{ablation} contains no runs <model>/<arm>_<seed>/{METRICS}; give the output directory of scripts/ablate.py, two "
            "levels above a run"
        )
    return runs


def read_run(run: Path, arm: str, seed: int) -> list[Evaluation]:
    """Evaluations of a run with one process, in the order of its updates.

    Raises:
        ConfigError: a file of the run lacks an entry.
    """
    try:
        images_per_update = global_batch_size(CfgNode(read_yaml(run / CONFIG)), 1)
        return list(_read_evaluations(run / METRICS, images_per_update, arm, seed))
    except (KeyError, AttributeError, TypeError) as error:
        problem = f"is damaged or was written by another program ({error!r})"
        raise ConfigError(f"{run}: {CONFIG} or {METRICS} {problem}; move the run out of the directory") from None


def _read_evaluations(metrics: Path, images_per_update: int, arm: str, seed: int) -> Iterator[Evaluation]:
    for step, record in own_evaluations(read_records(metrics)).items():
        weights = record["kind"].removeprefix("eval_")
        loss = float("nan") if record["loss"] is None else float(record["loss"])  # JSON has no NaN or infinity
        num_images = step * images_per_update
        yield Evaluation(arm, seed, record["epoch"] + 1, step, num_images, weights, float(record["acc1"]), loss)


def read_evaluations(source: Path) -> list[Evaluation]:
    """Evaluations of all runs of an ablation, from its output directory or from a CSV file with the columns of ``Evaluation``.

    Raises:
        ConfigError: there are no runs, or the file has other columns.
    """
    if source.is_dir():
        runs = find_runs(source).items()
        return [evaluation for (arm, seed), run in runs for evaluation in read_run(run, arm, seed)]
    return read_csv(source, Evaluation, ("arm", "seed", "step"))
