"""Draw learning curves as a PNG: of single runs, or of the arms of an ablation as means over seeds.

Run directories are drawn one by one. The output directory of scripts/ablate.py, or a CSV file that --csv has written from it,
is drawn with one line per arm and a band of one standard deviation over seeds. With --steps, arms with different numbers of
tokens are compared by epochs and by the time of their forward and backward passes.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.command_line import check_outputs, create_parser, reporting_errors, save_figure
from utils.errors import ConfigError
from utils.files import write_csv
from utils.run_files import METRICS

if TYPE_CHECKING:
    from jobs.evaluations import Evaluation

STEP_NUMBERS = ("tokens", "ms_per_image", "peak_memory_mib_per_image")  # in every record of benchmark.py arms


def draw(runs: list[Path]):
    """Plot the loss of training, and loss and top-1 accuracy of evaluations, against the number of updates.

    Raises:
        ConfigError: a run has no records.
    """
    from matplotlib.figure import Figure

    from analysis.curves import add_legend_below
    from engine.metrics_writer import read_records

    figure = Figure(figsize=(11, 4.5), layout="constrained", dpi=120)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for number, run in enumerate(runs):
        records = read_records(run / METRICS)
        if not records:
            raise ConfigError(f"{run / METRICS} has no records yet; wait for the first update of the run, or leave it out")
        for kind, label, style in (
            ("train", "training", {"lw": 1}),
            ("eval_raw", "raw weights", {"ls": "--", "marker": "."}),
            ("eval_ema", "ema weights", {"ls": "-", "marker": "."}),
        ):
            points = [record for record in records if record["kind"] == kind]
            steps, style = [point["step"] for point in points], style | {"color": f"C{number}"}
            if points:
                style["label"] = f"{run.parent.name}/{run.name}, {label}"
                loss_axes.plot(steps, [point.get("loss") for point in points], **style)
            if points and kind != "train":
                accuracy_axes.plot(steps, [point.get("acc1") for point in points], **style)
    loss_axes.set(xlabel="update", ylabel="loss", title="Loss (label smoothing and mixup apply to training only)")
    accuracy_axes.set(xlabel="update", ylabel="top-1, %", title="Accuracy on held-out images")
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
    add_legend_below(figure, loss_axes)
    return figure


def draw_arms(evaluations: "list[Evaluation]"):
    """Plot loss and top-1 accuracy of evaluations against the epoch, as means over seeds with a band of one deviation."""
    from matplotlib.figure import Figure

    from analysis.curves import add_legend_below, by_arm, draw_means, label_epochs

    figure = Figure(figsize=(11, 4.5), layout="constrained", dpi=120)
    panels = figure.subplots(1, 2)
    for axes, value, label in zip(panels, ("loss", "accuracy"), ("loss", "top-1, %"), strict=True):
        for number, (arm, rows) in enumerate(by_arm(evaluations).items()):
            style = ("-", "--", ":", "-.")[number // 10 % 4]  # matplotlib repeats its colours after ten lines
            draw_means(axes, rows, value, arm, marker=".", ls=style)
        axes.set(ylabel=label, title=f"{value} on held-out images")
        axes.grid(alpha=0.3)
        label_epochs(axes)
    add_legend_below(figure, panels[0])
    return figure


def draw_tokens(evaluations: "list[Evaluation]", steps: list[dict]):
    """Plot accuracy against epoch and time, and time and memory of forward and backward passes against the number of tokens.

    These passes do not include loading and the optimizer.

    Args:
        steps: records of ``benchmark.py arms``, also of other arms. A colour stands for a kind of attention, the name of an arm
            without its number of tokens; a line style stands for a number of tokens.
    """
    from matplotlib.figure import Figure

    from analysis.curves import add_legend_below, by_arm, draw_means, label_epochs, label_log_axis

    figure = Figure(figsize=(11, 8.5), layout="constrained", dpi=120)
    panels = figure.subplots(2, 2)
    (by_epoch, by_time), (time_axes, memory_axes) = panels
    kinds = list(dict.fromkeys(kind_of(record) for record in steps))
    tokens = sorted({record["tokens"] for record in steps})
    evaluated = by_arm(evaluations)
    for record in steps:
        arm = record["arm"]
        if arm in evaluated:
            line_style = (":", "--", "-", "-.")[tokens.index(record["tokens"]) % 4]
            style = {"color": f"C{kinds.index(kind_of(record))}", "ls": line_style, "marker": "."}
            draw_means(by_epoch, evaluated[arm], "accuracy", arm, **style)
            time = {"x": "num_images", "scale": record["ms_per_image"] / 60_000}
            draw_means(by_time, evaluated[arm], "accuracy", arm, **time, **style)
    for number, kind in enumerate(kinds):
        rows = sorted((record for record in steps if kind_of(record) == kind), key=lambda record: record["tokens"])
        for axes, value in ((time_axes, "ms_per_image"), (memory_axes, "peak_memory_mib_per_image")):
            axes.loglog([row["tokens"] for row in rows], [row[value] for row in rows], "o-", color=f"C{number}", label=kind)
    by_epoch.set(ylabel="top-1, %", title="Accuracy after equal epochs")
    label_epochs(by_epoch)
    passes = "forward and backward passes"
    by_time.set(xlabel=f"minutes of {passes}", ylabel="top-1, %", title="Accuracy after equal time", xscale="log")
    time_axes.set(xlabel="tokens", ylabel="ms per image", title=f"Time of {passes}")
    memory_axes.set(xlabel="tokens", ylabel="MiB per image", title=f"Peak memory of {passes}")
    for axes in (time_axes, memory_axes):
        axes.set_xticks(tokens, map(str, tokens))
        axes.minorticks_off()
    for axis in (by_time.xaxis, time_axes.yaxis, memory_axes.yaxis):
        label_log_axis(axis)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    memory_axes.legend(fontsize=8)
    add_legend_below(figure, by_epoch, num_columns=3)
    return figure


def read_steps(path: Path, arms: set[str]) -> list[dict]:
    """Records of ``benchmark.py arms --json``.

    Raises:
        ConfigError: the file is not of this kind, has an arm twice, or lacks one.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["records"]
        measured = Counter(record["arm"] for record in records)
        numbers = [record[name] for record in records for name in STEP_NUMBERS]
        if not all(0 < number < math.inf for number in numbers) or max(measured.values(), default=1) > 1:
            raise ValueError("a measurement is not positive, or an arm was measured twice")
    except OSError as error:
        raise ConfigError(f"--steps {path} cannot be read ({error.strerror}); correct the path") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"--steps {path}: not a file of benchmark.py arms --json") from None
    if missing := sorted(arms - measured.keys()):
        advice = "repeat benchmark.py arms with the file of this ablation, or move the runs of this arm away"
        raise ConfigError(f"--steps {path} lacks the arm {missing[0]}; {advice}")
    return records


def kind_of(record: dict) -> str:
    """Kind of attention of an arm: "softmax" for "softmax 64" and 64 tokens."""
    return re.sub(rf" {record['tokens']}\b", "", record["arm"])


def main() -> None:
    parser = create_parser(__doc__)
    sources = "directories of training runs, <output>/<model>/<tag>; or the output directory of an ablation, or its CSV file"
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help=sources)
    parser.add_argument("--png", type=Path, required=True, help="file to write")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the evaluations of all runs of the ablation")
    steps = "measurements of the arms, from benchmark.py arms --json FILE"
    parser.add_argument("--steps", type=Path, metavar="FILE", help=steps)
    args = parser.parse_args()
    with reporting_errors(parser):
        check_outputs(args, "png", "csv")
        save_figure(choose_figure(args), args.png)
    print(args.png)


def choose_figure(args: argparse.Namespace):
    """Draw the figure that the arguments select, and write the CSV file.

    Raises:
        ConfigError: the sources are neither run directories nor a single ablation.
    """
    first = args.sources[0]
    if any((source / METRICS).is_file() for source in args.sources) or len(args.sources) > 1:
        if unusable := [source for source in args.sources if not (source / METRICS).is_file()]:
            raise ConfigError(f"{unusable[0]} contains no {METRICS}; give the output directory of a training run")
        if args.csv or args.steps:
            raise ConfigError(f"{first} is a training run; --csv and --steps need the output directory of scripts/ablate.py")
        return draw(args.sources)
    if not first.exists():
        raise ConfigError(f"{first}: no such file or directory; correct the path")
    from jobs.evaluations import Evaluation, read_evaluations

    evaluations = read_evaluations(first)
    if not evaluations:
        raise ConfigError(f"{first} has no evaluations; wait for the end of the first epoch of a run")
    steps = read_steps(args.steps, {evaluation.arm for evaluation in evaluations}) if args.steps else []
    if args.csv:
        write_csv(args.csv, Evaluation._fields, evaluations)
    return draw_tokens(evaluations, steps) if steps else draw_arms(evaluations)


if __name__ == "__main__":
    main()
