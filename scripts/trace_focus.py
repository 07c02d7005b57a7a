"""Measure how focused attention is along the training of each run of an ablation, and compare it with the accuracy.

The script measures the initial weights, except those of runs with MODEL.PRETRAINED, and the checkpoint after each evaluation.
For this, set KEEP_CHECKPOINTS before training to more than the number of epochs; interrupted runs save further checkpoints.

The CSV file has the means over heads, queries and images, for every run, epoch and block; it is rewritten after each run. The
picture has the means over blocks. Given such a CSV file instead of the output directory, the script draws the picture again.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.command_line import (
    ARGUMENTS,
    check_inputs,
    check_outputs,
    check_positive,
    create_parser,
    reporting_errors,
    save_figure,
)
from utils.config.keys import KEYS
from utils.config.loading import flatten
from utils.config.reading import read_yaml
from utils.errors import ConfigError
from utils.files import read_csv, write_csv
from utils.run_files import CONFIG, checkpoint_path

if TYPE_CHECKING:
    from jobs.evaluations import Evaluation

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


def saved_evaluations(run: Path, arm: str, seed: int) -> "list[Evaluation]":
    """Evaluations of a run with a checkpoint; empty before the first evaluation.

    Raises:
        ConfigError: checkpoints are missing. Only the last may be missing: a run in progress writes it in the background.
    """
    from jobs.evaluations import read_run

    evaluations = read_run(run, arm, seed)
    saved = [evaluation for evaluation in evaluations if checkpoint_path(run, evaluation.step).is_file()]
    for evaluation in evaluations[:-1]:
        if evaluation not in saved:
            advice = "move the run out of the directory, and train it again with a larger KEEP_CHECKPOINTS"
            raise ConfigError(f"{run} has no checkpoint of epoch {evaluation.epoch}; {advice}")
    return saved


def trace(run: Path, evaluations: "list[Evaluation]", images: list[Path]) -> Iterator[Measurement]:
    """Measure the initial weights of a run and its checkpoints at ``evaluations``."""
    import torch

    from jobs.inspect import InspectedImages
    from jobs.model import open_model
    from models import build_model

    stored = flatten(read_yaml(run / CONFIG))
    pixels: list[torch.Tensor] = []
    for evaluation in evaluations:
        path = str(checkpoint_path(run, evaluation.step))
        model, _, cfg, _ = open_model(path, None, [], weights=evaluation.weights)
        if not pixels:
            inspected = InspectedImages(images, cfg)
            pixels = [inspected.read(position)[1] for position in range(len(inspected))]
            if not stored.get("MODEL.PRETRAINED"):
                torch.manual_seed(stored.get("SEED", KEYS["SEED"].default))  # before the model is built, as in training
                before_training = evaluation._replace(epoch=0, step=0, accuracy=math.nan)
                yield from measure_blocks(build_model(cfg).eval(), before_training, pixels)
        yield from measure_blocks(model, evaluation, pixels)


def measure_blocks(model, evaluation: "Evaluation", pixels: list) -> Iterator[Measurement]:
    """Measure the attention of every block.

    Args:
        evaluation: the evaluation of the weights of ``model``.
        pixels: preprocessed images, (3, H, W) each.
    """
    from analysis.summary import mean_over_heads, summarise

    rows = summarise(model, pixels, forms=())
    for block, form in dict.fromkeys((row.block, row.form) for row in rows):
        names = ("entropy", "effective rank", "row similarity")
        measures = [round(mean_over_heads(rows, block, form, name), 4) for name in names]
        of_weights = (evaluation.arm, evaluation.seed, evaluation.epoch, evaluation.step, evaluation.accuracy)
        yield Measurement(*of_weights, block, form, *measures)


def over_blocks(measurements: list[Measurement]) -> list[Measurement]:
    """Means over blocks, one per run, epoch and form."""
    groups: dict[tuple, list[Measurement]] = {}
    for row in measurements:
        groups.setdefault((row.arm, row.form, row.seed, row.epoch), []).append(row)
    means = []
    for rows in groups.values():
        values = {name: statistics.mean(getattr(row, name) for row in rows) for name in PANELS}
        means.append(rows[0]._replace(block="", **values))
    return means


def draw(measurements: list[Measurement]):
    """Plot the accuracy and the measures, as means over blocks and seeds, against the epoch."""
    from matplotlib.figure import Figure

    from analysis.curves import add_legend_below, by_arm, draw_means, label_epochs, label_log_axis
    from analysis.summary import OWN

    figure = Figure(figsize=(11, 8.5), layout="constrained", dpi=120)
    panels = figure.subplots(2, 2, sharex=True)
    arms = by_arm(over_blocks(measurements))
    for axes, (value, label) in zip(panels.flat, PANELS.items(), strict=True):
        for number, (arm, rows) in enumerate(arms.items()):
            own = [row for row in rows if row.form == OWN]
            convolved = [row for row in rows if row.form != OWN]
            style = {"color": f"C{number}", "marker": "."}
            draw_means(axes, own, value, arm, **style)
            if convolved and value != "accuracy":  # both forms have the accuracy of the model
                draw_means(axes, convolved, value, f"{arm}, with the convolution", ls="--", **style)
        axes.set(ylabel=label, title=value.replace("_", " "))
        axes.grid(alpha=0.3)
    for axes in panels[1]:
        label_epochs(axes, "epoch (0: before training)")
    panels[1, 0].set_yscale("log")
    label_log_axis(panels[1, 0].yaxis)
    add_legend_below(figure, panels[0, 1])
    return figure


def read_or_measure(args: argparse.Namespace) -> list[Measurement]:
    """Read the CSV file, or measure all runs and write it.

    Raises:
        ConfigError: --images or --csv is missing or superfluous, or a run has no checkpoints.
    """
    if not args.ablation.exists():
        raise ConfigError(f"{args.ablation}: no such file or directory; correct the path")
    if not args.ablation.is_dir():
        if args.images or args.csv:
            raise ConfigError(f"{args.ablation} is not a directory of runs; remove --images and --csv to draw a CSV file")
        return read_csv(args.ablation, Measurement, ("arm", "seed", "epoch", "block", "form"))
    if not (args.images and args.csv):
        raise ConfigError(f"{args.ablation} is a directory of runs, which needs --images and --csv")
    from jobs.evaluations import find_runs
    from jobs.predict import find_images

    images, measurements = find_images(args.images)[:: args.every], []
    evaluations = {run: saved_evaluations(run, arm, seed) for (arm, seed), run in find_runs(args.ablation).items()}
    if not any(evaluations.values()):
        raise ConfigError(
            f"{args.ablation}: no run has saved a checkpoint after an evaluation yet; wait for the end of the first epoch"
        )
    for run, saved in evaluations.items():
        print(f"{run}: {len(saved)} checkpoints", flush=True)
        measurements += trace(run, saved, images)
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
        save_figure(draw(read_or_measure(args)), args.png)
    print(args.png)


if __name__ == "__main__":
    main()
