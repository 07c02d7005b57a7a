"""Print what runs reached and where it lies: training's last word beside the evaluation of the saved file.

Ends with status 1 where the two count differently.
"""

import argparse
import json
import sys
from pathlib import Path

import yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders that hold metrics.jsonl and eval.json")
    args = parser.parse_args()
    print(f"{'run':<24}{'pixels':>8}{'weights':>9}{'in training':>14}{'--eval':>12}{'top-1':>9}")
    agree = True
    for run in args.runs:
        size = yaml.safe_load((run / "config.yaml").read_text())["DATA"]["IMG_SIZE"]
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        evaluations = [record for record in records if record["kind"].startswith("eval")]
        best_step = max(evaluations, key=lambda record: (record["acc1"], record["step"]))["step"]  # of best.pth
        reported = {r["kind"].removeprefix("eval_"): r for r in evaluations if r["step"] == best_step}
        for weights, result in json.loads((run / "eval.json").read_text())["results"].items():
            before, total = reported[weights]["correct1"], result["num_images"]
            agree &= before == result["correct1"]
            counts = f"{before}/{total}", f"{result['correct1']}/{total}"
            print(f"{run.parent.name:<24}{size:>8}{weights:>9}{counts[0]:>14}{counts[1]:>12}{result['acc1']:>8.2f}%")
    for run in args.runs:
        print(f"\n{run}/")
        print("  best.pth, checkpoint_*.pth, config.yaml, eval.json, log_rank0.txt, metrics.jsonl, events.* (tensorboard)")
    if not agree:
        sys.exit("training and evaluation of the saved file count differently")


if __name__ == "__main__":
    main()
