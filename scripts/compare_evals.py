"""Test whether two models differ in accuracy, from their predictions for the same images.

Pass two prediction files, or the output directories of two evaluations with --opts TEST.PREDICTIONS True. The predictions are
paired, so the test is McNemar's exact test: among the images that exactly one of the models classifies correctly, it tests
whether the fraction that the second model classifies correctly differs from one half.
"""

import csv
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from engine.report import PREDICTION_COLUMNS
from engine.significance import mcnemar_test, paired_interval, wilson_interval
from scripts.command_line import create_parser, reporting_errors


def read(path: Path, weights: str | None) -> tuple[Path, dict[str, tuple[str, str]]]:
    """Read a predictions file. Returns its path, and a dictionary from image name to (prediction, target).

    Args:
        path: predictions file, or output directory of an evaluation.
        weights: raw or ema, to choose the file of a directory; None for the preferred weights of its ``eval.json``.

    Raises:
        ValueError: the file does not exist, is not a predictions file, has no predictions, or is damaged.
    """
    if path.is_dir():
        record = path / "eval.json"
        try:
            evaluation = json.loads(record.read_text()) if record.is_file() else {}
        except RecursionError:
            raise ValueError(f"{record} is nested too deeply; evaluate again") from None
        preferred = evaluation.get("preferred") if isinstance(evaluation, dict) else None
        path = path / f"predictions_{weights or (preferred if preferred in ('raw', 'ema') else 'raw')}.csv"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; evaluate with --opts TEST.PREDICTIONS True")
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames is None or not set(PREDICTION_COLUMNS[:4]) <= set(rows.fieldnames):
            raise ValueError(f"{path}: not a predictions file; expected the header {', '.join(PREDICTION_COLUMNS)}")
        pairs = {}
        for row in rows:
            if None in (row[column] for column in PREDICTION_COLUMNS[:4]) or row["image"] in pairs:
                raise ValueError(f"{path}:{rows.line_num}: truncated row or duplicate image; evaluate again")
            pairs[row["image"]] = row["prediction"], row["target"]
    if not pairs:
        raise ValueError(f"{path} has no predictions; evaluate again with --opts TEST.PREDICTIONS True")
    return path, pairs


def check_same_restriction(first: Path, second: Path) -> None:
    """Check that the predictions of two files, which ``read`` accepts, were restricted to the same classes.

    Raises:
        ValueError: they were not.
    """
    found = []
    for path in (first, second):
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            found.append(next(csv.DictReader(file)).get("restriction") or "all classes of the model")
    if found[0] != found[1]:
        raise ValueError(
            f"{first}: {found[0]}, but {second}: {found[1]}; evaluate both models with the same TEST.CLASS_MAP and "
            "TEST.RESTRICT_CLASSES"
        )


def describe(path: Path) -> str:
    """The path of a file that ``read`` accepts, and TEST.TTA of its evaluation, in which the two files may differ."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        tta = next(csv.DictReader(file)).get("tta")
    return f"{path} (TEST.TTA {tta})" if tta else str(path)


def compare(first: dict[str, tuple[str, str]], second: dict[str, tuple[str, str]]) -> str:
    """Report both accuracies, their difference and McNemar's test.

    Args:
        first, second: dictionaries from image name to (prediction, target).

    Raises:
        ValueError: the images or targets differ.
    """
    first, second = (_by_key(pairs, other) for pairs, other in ((first, second), (second, first)))
    if first.keys() != second.keys():
        unmatched = sorted(first.keys() ^ second.keys())
        raise ValueError(
            f"images in only one of the files: {len(unmatched)} ({unmatched[0]}, ...); evaluate both models on the same data. "
            "Images whose names differ only in the extension cannot be matched with tar shards made by pack_dataset.py"
        )
    if mismatch := next((name for name in first if first[name][1] != second[name][1]), None):
        raise ValueError(
            f"{mismatch} has target {first[mismatch][1]} in the first file and {second[mismatch][1]} in the second; evaluate "
            "both models with the same classes"
        )
    correct = [{name for name, (prediction, target) in pairs.items() if prediction == target} for pairs in (first, second)]
    total, only_first, only_second = len(first), len(correct[0] - correct[1]), len(correct[1] - correct[0])
    lines = [f"{total} images"]
    for label, count in zip(("first", "second"), map(len, correct), strict=True):
        low, high = wilson_interval(count, total)
        lines.append(f"{label:<7} {count:>7} correct  {100 * count / total:6.2f} %  (95 % interval: {low:.2f} to {high:.2f})")
    low, high = paired_interval(only_first, only_second, total)
    lines.append(f"correct only in the first: {only_first}, only in the second: {only_second}")
    difference = 100 * (only_second - only_first) / total
    lines.append(f"second minus first: {difference:+.2f} points (95 % interval: {low:+.2f} to {high:+.2f})")
    p = mcnemar_test(only_first, only_second)
    verdict = "differ" if p < 0.05 else "do not differ"
    lines.append(f"McNemar's exact test: p = {p:.3g}; at the 5 % level, the two models {verdict} significantly")
    return "\n".join(lines)


def _by_key(pairs: dict[str, tuple[str, str]], other: dict) -> dict[str, tuple[str, str]]:
    """Replace image names by their webdataset keys, without shard and extension, if ``other`` has different image names.

    This pairs images in directories with their copies in tar shards. If two names have the same key, no name is replaced.
    """
    if pairs.keys() == other.keys():
        return pairs

    def key(name: str) -> str:
        folder, _, file = re.sub(r"^[^/]*\.tar/", "", name).rpartition("/")
        return f"{folder}/{file.rsplit('.', 1)[0].replace('.', '_')}"  # as pack_dataset.py does: keys must not contain dots

    short = {key(name): pair for name, pair in pairs.items()}
    return short if len(short) == len(pairs) else pairs


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("first", type=Path, help="predictions file, or output directory of an evaluation")
    parser.add_argument("second", type=Path)
    parser.add_argument(
        "--weights",
        choices=("raw", "ema"),
        help="read the predictions of these weights from a directory (default: the preferred weights of its eval.json)",
    )
    args = parser.parse_args()
    with reporting_errors(parser):
        (first, first_pairs), (second, second_pairs) = (read(path, args.weights) for path in (args.first, args.second))
        check_same_restriction(first, second)
        print(f"first: {describe(first)}\nsecond: {describe(second)}\n{compare(first_pairs, second_pairs)}")


if __name__ == "__main__":
    main()
