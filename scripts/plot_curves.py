"""Draw the learning curves of one or more runs, from their metrics.jsonl, as a PNG."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.command_line import check_outputs, create_parser, reporting_errors, save_figure
from utils.errors import ConfigError


def draw(runs: list[Path]):
    """Plot the loss of training, and loss and top-1 accuracy of evaluations, against the number of updates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained", dpi=120)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for number, run in enumerate(runs):
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for kind, label, style in (
            ("train", "training", {"lw": 1}),
            ("eval_raw", "raw weights", {"ls": "--", "marker": "."}),
            ("eval_ema", "ema weights", {"ls": "-", "marker": "."}),
        ):
            points = [record for record in records if record["kind"] == kind]
            steps, style = [point["step"] for point in points], style | {"color": f"C{number}"}
            if points:
                style["label"] = f"{run.parent.name}/{run.name}, {label}"
                loss_axes.plot(steps, [point["loss"] for point in points], **style)
            if points and kind != "train":
                accuracy_axes.plot(steps, [point["acc1"] for point in points], **style)
    loss_axes.set(xlabel="update", ylabel="loss", title="Loss (label smoothing and mixup apply to training only)")
    accuracy_axes.set(xlabel="update", ylabel="top-1, %", title="Accuracy on held-out images")
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of training runs, <output>/<model>/<tag>")
    parser.add_argument("--png", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    with reporting_errors(parser):
        check_outputs(args, "png")
        for run in args.runs:
            if not (run / "metrics.jsonl").is_file():
                raise ConfigError(f"{run} contains no metrics.jsonl; give the output directory of a training run")
        save_figure(draw(args.runs), args.png)
    print(args.png)


if __name__ == "__main__":
    main()
