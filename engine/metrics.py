"""Metrics of a classifier, from integer counts that can be summed over processes, and the best evaluation of a run.

C: number of classes; K: ``NUM_BINS``. All metrics are in percent. Classes without images do not count in averages over classes.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

NUM_BINS = 15  # of the calibration error, as in https://arxiv.org/abs/1706.04599
UNITS_OF_CONFIDENCE = 2**32  # confidences are summed in this fraction: sums of integers do not depend on their order


def add_to_class_counts(counts: Tensor, targets: Tensor, predicted: Tensor) -> None:
    """Add a batch to ``counts``, (3, C): numbers of images, predictions and correct predictions of each class.

    Args:
        targets, predicted: (B,) class ids.
    """
    ones = torch.ones_like(targets)
    counts[0].index_add_(0, targets, ones)
    counts[1].index_add_(0, predicted, ones)
    counts[2].index_add_(0, targets, (targets == predicted).to(targets.dtype))


def add_to_bins(bins: Tensor, confidences: Tensor, is_correct: Tensor) -> None:
    """Add a batch to ``bins``, (3, K): numbers of images and of correct predictions, and sums of confidences.

    Bins of equal width include their upper limit.

    Args:
        confidences: (B,) probabilities of the predictions.
        is_correct: (B,) bool.
    """
    limits = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64, device=bins.device)[1:-1]
    units = (confidences.double() * UNITS_OF_CONFIDENCE).round().long()
    values = torch.stack([torch.ones_like(units), is_correct.long(), units])
    bins.index_add_(1, torch.bucketize(confidences.double(), limits), values)


def recalls(counts: np.ndarray) -> np.ndarray:
    """Recall of each class in percent, (C,); 0 for classes without images. counts: see ``add_to_class_counts``."""
    return 100 * counts[2] / np.maximum(counts[0], 1)


def precisions(counts: np.ndarray) -> np.ndarray:
    """Precision of each class in percent, (C,); 0 for classes that are never predicted."""
    return 100 * counts[2] / np.maximum(counts[1], 1)


def f1_scores(counts: np.ndarray) -> np.ndarray:
    """F1 score of each class in percent, (C,): the harmonic mean of precision and recall."""
    return 100 * 2 * counts[2] / np.maximum(counts[0] + counts[1], 1)


def balanced_accuracy(counts: np.ndarray) -> float:
    """Mean recall over the classes with images."""
    return float(recalls(counts)[counts[0] > 0].mean())


def macro_f1(counts: np.ndarray) -> float:
    """Mean F1 score over the classes with images."""
    return float(f1_scores(counts)[counts[0] > 0].mean())


def calibration_error(bins: np.ndarray) -> float:
    """Expected calibration error: mean over images of the difference between accuracy and mean confidence of their bin."""
    num_images, correct, units = bins
    return float(100 * np.abs(correct - units / UNITS_OF_CONFIDENCE).sum() / num_images.sum())


def score(value: float, metric: str) -> float:
    """The value of a metric, negated if smaller values are better. metric: one of the values of BEST_METRIC."""
    return -value if metric == "loss" else value


def scores(evaluations: Sequence[dict], metric: str, *, since: int) -> dict[int, float]:
    """Number of updates -> ``score`` of the best weights, in the order of the updates.

    Args:
        evaluations, since: see ``TrainState``. Earlier versions have not recorded every metric; such evaluations are left out.
    """
    found: dict[int, float] = {}
    for record in evaluations:
        value, step = record.get(metric), record["step"]
        if step > since and isinstance(value, (int, float)):
            found[step] = max(found.get(step, -np.inf), score(value, metric))
    return found


def own_evaluations(records: Iterable[Mapping]) -> dict[int, Mapping]:
    """Number of updates -> record of the evaluation, in the order of the updates.

    The result of an evaluation is that of the EMA weights, if both the raw and the EMA weights were evaluated.

    Args:
        records: lines of ``metrics.jsonl``, of training and of evaluations.
    """
    found: dict[int, Mapping] = {}
    for record in sorted(records, key=lambda record: record["step"]):
        if record["kind"] == "eval_ema" or (record["kind"] == "eval_raw" and record["step"] not in found):
            found[record["step"]] = record
    return found


def count_stale(evaluations: Sequence[dict], metric: str, *, since: int) -> int:
    """Number of newest evaluations that are not better than the best one before them. Arguments: see ``scores``."""
    values = list(scores(evaluations, metric, since=since).values())
    return len(values) - 1 - values.index(max(values)) if values else 0


def list_top(state: Mapping, metric: str, count: int) -> list[int] | None:
    """Numbers of updates of the ``count`` best evaluations, best first; on ties, later ones first. None if ``count`` is 1.

    Args:
        state: entries of a checkpoint, or the attributes of a ``TrainState``.
    """
    if count == 1:
        return None
    found = scores(state.get("evaluations", []), metric, since=state.get("best_since", 0))
    return sorted(found, key=lambda update: (found[update], update), reverse=True)[:count]
