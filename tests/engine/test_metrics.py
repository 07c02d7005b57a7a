"""Metrics of a classifier against scikit-learn, and the order of evaluations."""

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import balanced_accuracy_score, precision_recall_fscore_support
from torch import nn

from engine.evaluation import evaluate
from engine.metrics import count_stale, f1_scores, list_top, precisions, recalls
from utils.distributed import World

WORLD = World(0, 0, 1, torch.device("cpu"))


class Batch:
    def __init__(self, images, targets):
        self.images = images
        self.targets = targets


@pytest.mark.parametrize("class_ids", [None, [4, 0, 2, 3]], ids=["all classes", "restricted classes"])
def test_metrics_equal_those_of_scikit_learn_for_unbalanced_classes_and_any_batches(class_ids):
    """Class 1 has no images, but is predicted."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(300, 6, generator=generator)
    targets = torch.multinomial(torch.tensor([0.6, 0.0, 0.3, 0.1]), 300, replacement=True, generator=generator)
    model = nn.Linear(6, 6 if class_ids else 4)
    with torch.no_grad():
        model.bias.zero_()
        model.weight.copy_(torch.randn(model.weight.shape, generator=generator))
    parts = zip(images.split([1, 120, 179]), targets.split([1, 120, 179]), strict=True)
    batches = [Batch(*part) for part in parts]
    result = evaluate({"raw": model}, batches, amp_dtype=torch.float32, world=WORLD, class_ids=class_ids)["raw"]

    logits = model(images).detach()
    probabilities = (logits if class_ids is None else logits[:, class_ids]).softmax(dim=1).numpy()
    truth, predicted, confidence = targets.numpy(), probabilities.argmax(axis=1), probabilities.max(axis=1)
    present = np.unique(truth)
    precision, recall, f1, support = precision_recall_fscore_support(truth, predicted, labels=present, zero_division=0)
    assert 1 in predicted
    assert result.balanced_accuracy == pytest.approx(100 * recall.mean())
    assert result.macro_f1 == pytest.approx(100 * f1.mean())
    np.testing.assert_array_equal(result.class_counts[0][present], support)
    for found, expected in ((precisions, precision), (recalls, recall), (f1_scores, f1)):
        np.testing.assert_allclose(found(result.class_counts)[present], 100 * expected)
    accuracies, confidences = calibration_curve(truth == predicted, confidence, n_bins=15)
    sizes = np.histogram(confidence, bins=15, range=(0, 1))[0]
    expected = 100 * (sizes[sizes > 0] * np.abs(accuracies - confidences)).sum() / 300
    assert result.calibration_error == pytest.approx(expected, abs=1e-6)


def test_balanced_accuracy_equals_that_of_scikit_learn_if_every_class_has_images():
    model = nn.Linear(3, 3, bias=False)
    images, targets = torch.eye(3)[[0, 0, 0, 1, 2, 1]], torch.tensor([0, 0, 0, 1, 2, 2])
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
    result = evaluate({"raw": model}, [Batch(images, targets)], amp_dtype=torch.float32, world=WORLD)["raw"]
    assert result.balanced_accuracy == pytest.approx(100 * balanced_accuracy_score(targets, images.argmax(dim=1)))


def test_evaluations_are_ordered_by_the_better_weights_and_ties_are_not_better():
    values = {2: (50.0, 60.0), 4: (70.0, 10.0), 6: (70.0, 20.0), 8: (65.0, 69.0)}
    evaluations = [
        {"step": step, "kind": kind, "acc1": value, "loss": 100 - value}
        for step, pair in values.items()
        for kind, value in zip(("eval_raw", "eval_ema"), pair, strict=True)
    ]
    for metric in ("acc1", "loss"):
        assert count_stale(evaluations, metric, since=0) == 2
        assert count_stale(evaluations[:4], metric, since=0) == 0
        assert count_stale(evaluations, metric, since=6) == 0
        assert list_top({"evaluations": evaluations}, metric, 3) == [6, 4, 8]
        assert list_top({"evaluations": evaluations, "best_since": 4}, metric, 3) == [6, 8]
    assert count_stale(evaluations, "macro_f1", since=0) == 0  # not recorded by earlier versions
