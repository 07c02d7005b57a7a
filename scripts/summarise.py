"""For each run, print the accuracies measured during training and by main.py --eval, and list the output files.

The exit status is 1 if training and --eval count different numbers of correct predictions for a checkpoint.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.command_line import create_parser, reporting_errors
from utils.errors import ConfigError


def best_evaluations(metrics: Path) -> dict[str, int]:
    """Number of correct predictions per set of weights, in the evaluation after which ``best.pth`` was written.

    Returns:
        Label of the weights (raw, ema) -> number of correct predictions; empty without ``metrics`` (no training in this run).
    """
    if not metrics.is_file():
        return {}
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    evaluations = [record for record in records if record["kind"].startswith("eval")]
    best = max(evaluations, key=lambda record: (record["acc1"], record["step"]))["step"]
    return {r["kind"].removeprefix("eval_"): r["correct1"] for r in evaluations if r["step"] == best}


def print_run(run: Path) -> bool:
    """Print one line per set of weights. Returns whether training and evaluation agree."""
    evaluation, in_training = json.loads((run / "eval.json").read_text()), {}
    if not evaluation.get("restriction") and evaluation.get("tta", "none") == "none":  # as in training
        in_training = best_evaluations(run / "metrics.jsonl")
    for weights, result in evaluation["results"].items():
        correct, total = result["correct1"], result["num_images"]
        trained = f"{in_training[weights]}/{total}" if weights in in_training else "-"
        interval = "{:.2f} to {:.2f}".format(*result["acc1_interval_95"])
        name, pixels = f"{run.parent.name}/{run.name}", str(evaluation["preprocessing"]["img_size"])
        print(f"{name:<24}{pixels:>10}{weights:>9}{trained:>14}{f'{correct}/{total}':>12}{result['acc1']:>8.2f}%{interval:>18}")
    return all(
        in_training.get(name, result["correct1"]) == result["correct1"] for name, result in evaluation["results"].items()
    )


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        help="run directories; each contains eval.json, and metrics.jsonl if the run included training",
    )
    args = parser.parse_args()
    with reporting_errors(parser):
        for run in args.runs:
            if not (run / "eval.json").is_file():
                raise ConfigError(f"{run} contains no eval.json; give the output directory of a run evaluated with --eval")
        print(f"{'run':<24}{'pixels':>10}{'weights':>9}{'in training':>14}{'--eval':>12}{'top-1':>9}{'95 % interval':>18}")
        agree = [print_run(run) for run in args.runs]
    for run in args.runs:
        print(f"{run}/: {', '.join(sorted(path.name for path in run.iterdir() if not path.name.startswith(('events.', '.'))))}")
    if not all(agree):
        sys.exit("training and evaluation of the saved checkpoint disagree on the number of correct predictions")


if __name__ == "__main__":
    main()
