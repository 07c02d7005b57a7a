"""Measure how focused attention is along the training of each run of an ablation, and compare it with the accuracy.

The script measures the initial weights and the checkpoint after each evaluation; set KEEP_CHECKPOINTS to the number of epochs
before training. It writes a CSV file with the means over heads, queries and images, for every run, epoch and block, and a
picture with the means over blocks. Given such a CSV file instead of the output directory, it draws the picture again.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.ablation_curves import Point, arms_of, draw_means, find_runs, read_csv, read_run
from scripts.command_line import (
    ARGUMENTS,
    check_inputs,
    check_outputs,
    check_positive,
    create_parser,
    reporting_errors,
    save_figure,
)
from utils.config.reading import read_yaml
from utils.errors import ConfigError
from utils.files import write_csv
from utils.run_files import CONFIG, checkpoint_path

CONVOLVED = ", with the convolution"  # suffix of an arm in the picture, for its attention matrix plus its convolution
PANELS = {
    "accuracy": "top-1, %",
    "entropy": "entropy / maximum (1: uniform weights)",
    "effective_rank": "effective rank",
    "row_similarity": "cosine similarity of rows",
}


class Measurement(NamedTuple):
    """Measures of the attention of one block after one epoch of one run; epoch 0 is before training, with accuracy NaN."""

    arm: str
    seed: int
    epoch: int
    step: int
    accuracy: float
    block: str
    form: str
    entropy: float
    effective_rank: float
    row_similarity: float


def saved_evaluations(run: Path, arm: str, seed: int) -> list[Point]:
    """Evaluations of a run after which its checkpoint is still present; empty before the first evaluation.

    Raises:
        ConfigError: the run has none of these checkpoints.
    """
    points = read_run(run, arm, seed)
    saved = [point for point in points if checkpoint_path(run, point.step).is_file()]
    if points and not saved:
        raise ConfigError(f"{run} has no checkpoint of an evaluated epoch; train with KEEP_CHECKPOINTS equal to TRAIN.EPOCHS")
    return saved


def trace(run: Path, points: list[Point], images: list[Path]) -> Iterator[Measurement]:
    """Measure the initial weights of a run and its checkpoints at ``points``."""
    import torch

    from analysis.summary import mean_over_heads, summarise
    from jobs.inspect import InspectedImages
    from jobs.model import open_model
    from models import build_model

    weights = "ema" if read_yaml(run / CONFIG)["EMA"]["ENABLED"] else "raw"  # the weights whose accuracy is in ``points``
    pixels: list[torch.Tensor] = []
    for point in points:
        model, _, cfg, _ = open_model(str(checkpoint_path(run, point.step)), None, [], weights=weights)
        models = [(point, model)]
        if not pixels:
            inspected = InspectedImages(images, cfg)
            pixels = [inspected.read(position)[1] for position in range(len(inspected))]
            torch.manual_seed(cfg.SEED)  # the seed of the initial weights in training
            models.insert(0, (point._replace(epoch=0, step=0, accuracy=math.nan), build_model(cfg).eval()))
        for measured, model in models:
            rows = summarise(model, pixels, forms=())
            for block, form in dict.fromkeys((row.block, row.form) for row in rows):
                names = ("entropy", "effective rank", "row similarity")
                measures = (round(mean_over_heads(rows, block, form, name), 4) for name in names)
                yield Measurement(
                    point.arm, point.seed, measured.epoch, measured.step, measured.accuracy, block, form, *measures
                )


def over_blocks(measurements: list[Measurement]) -> list[Measurement]:
    """Means over blocks, one per run, epoch and form. The convolution becomes part of the name of the arm."""
    groups: dict[tuple, list[Measurement]] = {}
    for row in measurements:
        groups.setdefault((row.arm, row.form, row.seed, row.epoch), []).append(row)
    means = []
    for (arm, form, _, _), rows in groups.items():
        values = {name: statistics.mean(getattr(row, name) for row in rows) for name in PANELS}
        label = arm if form == "own" else f"{arm}{CONVOLVED}"
        means.append(rows[0]._replace(arm=label, block="", **values))
    return means


def draw(measurements: list[Measurement]):
    """Plot the accuracy and the measures, as means over blocks and seeds, against the epoch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(11, 8.5), layout="constrained", dpi=120)
    rows = over_blocks(measurements)
    arms = arms_of(measurements)
    panels = figure.subplots(2, 2)
    for axes, (value, label) in zip(panels.flat, PANELS.items(), strict=True):
        for name in arms_of(rows):
            arm = name.removesuffix(CONVOLVED)
            if value != "accuracy" or name == arm:  # the accuracy of a run is the same for both forms
                style = {"color": f"C{arms.index(arm)}", "ls": "-" if name == arm else "--"}
                draw_means(axes, rows, name, value, marker=".", **style)
        axes.set(xlabel="epoch (0: before training)", ylabel=label, title=value.replace("_", " "))
        axes.grid(alpha=0.3)
    panels[1, 0].set_yscale("log")
    panels[1, 0].yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    panels[1, 0].yaxis.set_major_formatter("{x:g}")
    panels[1, 0].yaxis.set_minor_formatter("{x:g}")
    figure.legend(*panels[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def measure(args: argparse.Namespace) -> list[Measurement]:
    """Measurements of all runs, or those of the CSV file.

    Raises:
        ConfigError: --images or --csv is missing or superfluous, or a run has no checkpoints.
    """
    if not args.ablation.is_dir():
        if args.images or args.csv:
            raise ConfigError(f"{args.ablation} is not a directory of runs; remove --images and --csv to draw a CSV file")
        return read_csv(args.ablation, Measurement)
    if not (args.images and args.csv):
        raise ConfigError(f"{args.ablation} is a directory of runs, which needs --images and --csv")
    from jobs.predict import find_images

    images, measurements = find_images(args.images)[:: args.every], []
    evaluations = {run: saved_evaluations(run, arm, seed) for (arm, seed), run in find_runs(args.ablation).items()}
    for run, points in evaluations.items():
        print(f"{run}: {len(points)} checkpoints", flush=True)
        measurements += trace(run, points, images)
    if not measurements:
        raise ConfigError(f"{args.ablation}: no run has been evaluated yet; wait for the end of the first epoch")
    write_csv(args.csv, Measurement._fields, measurements)
    return measurements


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("ablation", type=Path, help="output directory of scripts/ablate.py, or a CSV file of this script")
    parser.add_argument("--images", **ARGUMENTS["--images"] | {"required": False})
    parser.add_argument("--every", type=int, default=1, metavar="N", help="use every N-th image")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--png", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    with reporting_errors(parser):
        check_positive(args, "every")
        check_inputs(args)
        check_outputs(args, "png", "csv")
        save_figure(draw(measure(args)), args.png)
    print(args.png)


if __name__ == "__main__":
    main()
