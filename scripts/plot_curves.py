"""Draw the learning curves of one or more runs, from their metrics.jsonl, as a PNG."""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of training runs, <output>/<model>/<tag>")
    parser.add_argument("--png", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    for run in args.runs:
        if not (run / "metrics.jsonl").is_file():
            parser.error(f"{run} contains no metrics.jsonl; give the output directory of a training run")
    figure = Figure(figsize=(11, 4), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for number, run in enumerate(args.runs):
        records, color, name = read(run), f"C{number}", f"{run.parent.name}/{run.name}"
        train = [record for record in records if record["kind"] == "train"]
        loss_axes.plot([r["step"] for r in train], [r["loss"] for r in train], color=color, label=f"{name}, training", lw=1)
        for kind, style in (("eval_raw", "--"), ("eval_ema", "-")):
            points = [record for record in records if record["kind"] == kind]
            if not points:
                continue
            steps, label = [r["step"] for r in points], f"{name}, {kind.removeprefix('eval_')} weights"
            loss_axes.plot(steps, [r["loss"] for r in points], color=color, ls=style, marker=".", label=label)
            accuracy_axes.plot(steps, [r["acc1"] for r in points], color=color, ls=style, marker=".", label=label)
    loss_axes.set(xlabel="update", ylabel="loss", title="Loss (label smoothing and mixup apply to training only)")
    accuracy_axes.set(xlabel="update", ylabel="top-1, %", title="Accuracy on held-out images")
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(args.png, dpi=120)
    print(args.png)


if __name__ == "__main__":
    main()
