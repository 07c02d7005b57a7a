"""For each run, print the accuracies measured during training and by main.py --eval, and list the output files.

The exit status is 1 if training and --eval count different numbers of correct predictions for a checkpoint.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.command_line import create_parser, reporting_errors
from utils.config.reading import read_yaml
from utils.errors import ConfigError
from utils.run_files import BEST, CONFIG, METRICS, is_numbered, is_top, num_updates_of


def evaluations_in_training(run: Path, evaluation: dict) -> dict[str, int]:
    """Number of correct predictions per set of weights, in training, of the checkpoint that ``eval.json`` is about.

    Returns:
        Label of the weights (raw, ema) -> number of correct predictions; empty if training has not evaluated the checkpoint, or
        has evaluated it on another number of images.
    """
    from engine.metrics import scores
    from engine.metrics_writer import read_records

    records = [record for record in read_records(run / METRICS) if record["kind"].startswith("eval_")]
    checkpoint = Path(evaluation["checkpoint"])
    if is_numbered(checkpoint) or is_top(checkpoint):
        step = num_updates_of(checkpoint)
    else:
        cfg = read_yaml(run / CONFIG) if records and checkpoint.name == BEST else {}
        by_step = scores(records, cfg.get("BEST_METRIC", "acc1"), since=0) if cfg else {}
        step = max(by_step, key=lambda step: (by_step[step], step), default=-1)
    found = {record["kind"].removeprefix("eval_"): record for record in records if record["step"] == step}
    results = evaluation["results"]
    return {
        label: record["correct1"]
        for label, record in found.items()
        if label in results and record["num_images"] == results[label]["num_images"]
    }


def print_run(run: Path) -> bool:
    """Print one line per set of weights. Returns whether training and evaluation agree.

    Raises:
        ConfigError: ``eval.json`` was not written by main.py --eval.
    """
    try:
        evaluation, in_training = json.loads((run / "eval.json").read_text(encoding="utf-8")), {}
        if not evaluation.get("restriction") and evaluation.get("tta", "none") == "none":  # as in training
            in_training = evaluations_in_training(run, evaluation)
        lines = [
            format_line(run, evaluation, weights, result, in_training.get(weights))
            for weights, result in evaluation["results"].items()
        ]
    except ConfigError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError):
        raise ConfigError(f"{run / 'eval.json'}: not a result of main.py --eval; evaluate the run again") from None
    print("\n".join(lines))
    return all(
        in_training.get(name, result["correct1"]) == result["correct1"] for name, result in evaluation["results"].items()
    )


def format_line(run: Path, evaluation: dict, weights: str, result: dict, in_training: int | None) -> str:
    """One line of the table. in_training: number of correct predictions in training; None if it is unknown."""
    correct, total = result["correct1"], result["num_images"]
    trained = "-" if in_training is None else f"{in_training}/{total}"
    interval = "{:.2f} to {:.2f}".format(*result["acc1_interval_95"])
    name, pixels = f"{run.parent.name}/{run.name}", str(evaluation["preprocessing"]["img_size"])
    return f"{name:<24}{pixels:>10}{weights:>9}{trained:>14}{f'{correct}/{total}':>12}{result['acc1']:>8.2f}%{interval:>18}"


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
