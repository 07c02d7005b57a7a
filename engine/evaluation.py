"""Evaluation: counts of correct predictions over a dataset whose images are divided among the processes."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.metrics import NUM_BINS, add_to_bins, add_to_class_counts, balanced_accuracy, calibration_error, macro_f1
from utils.distributed import World, gather_on_main, sum_over_processes
from utils.errors import Stopped, TrainingError
from utils.progress import progress

logger = logging.getLogger(__name__)

MAX_CLASSES_WITHOUT_TOP5 = 10  # maximum number of classes for which the top-5 accuracy is only in files


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions for every image of a dataset, in the dataset's order.

    Class ids refer to the dataset's classes unless stated otherwise; with TEST.CLASS_MAP, the model's class ids may differ.

    Args:
        targets: (N,) true class ids.
        ranked: (N, k) class ids of the k <= 5 most likely classes, most likely first.
        confidence: (N,) softmax probability of the most likely class.
        model_classes: (N,) the most likely class, as a class id of the model.
    """

    targets: np.ndarray
    ranked: np.ndarray
    confidence: np.ndarray
    model_classes: np.ndarray


@dataclass(frozen=True)
class EvalResult:
    """Counts and mean loss over a whole dataset.

    Args:
        weights: label of the weights, raw or ema.
        correct1, correct5: numbers of images with a correct top-1 and top-5 prediction.
        num_classes: number of classes that can be predicted.
        class_counts: (3, num_classes), see ``add_to_class_counts``.
        bins: (3, NUM_BINS), see ``add_to_bins``.
        predictions: predictions for every image, on rank 0 only; None without ``keep_predictions``.
    """

    weights: str
    correct1: int
    correct5: int
    num_images: int
    loss: float
    num_classes: int
    class_counts: np.ndarray = field(repr=False, compare=False)
    bins: np.ndarray = field(repr=False, compare=False)
    predictions: Predictions | None = field(default=None, repr=False, compare=False)

    @property
    def acc1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.correct1 / self.num_images

    @property
    def shows_top5(self) -> bool:
        """Whether logs give the top-5 accuracy. With at most ten classes, random predictions reach 50 %."""
        return self.num_classes > MAX_CLASSES_WITHOUT_TOP5

    @property
    def acc5(self) -> float:
        """Top-5 accuracy in percent."""
        return 100 * self.correct5 / self.num_images

    @property
    def balanced_accuracy(self) -> float:
        return balanced_accuracy(self.class_counts)

    @property
    def macro_f1(self) -> float:
        return macro_f1(self.class_counts)

    @property
    def calibration_error(self) -> float:
        return calibration_error(self.bins)

    @property
    def file_only(self) -> tuple[str, ...]:
        """Entries of ``to_dict`` that TensorBoard does not show."""
        return ("num_images",) if self.shows_top5 else ("num_images", "acc5", "correct5")

    def to_dict(self) -> dict[str, float | int]:
        """Metrics and counts, for logs and files."""
        counted = ("acc1", "acc5", "correct1", "correct5", "num_images", "loss")
        names = (*counted, "balanced_accuracy", "macro_f1", "calibration_error")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        top5 = f" Acc@5 {self.acc5:.3f}" if self.shows_top5 else ""
        return f" * Acc@1 {self.acc1:.3f}{top5}"


class FlipAverage(nn.Module):
    """A classifier whose logits are the mean of those of ``model`` for an image and for its horizontal mirror image.

    Logits are averaged, not probabilities, as timm does for its test-time augmentation: the mean can be restricted to some
    classes afterwards.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training  # ``evaluate`` sets this mode again, also in ``model``

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes), in fp32, of images (B, 3, H, W)."""
        return (self.model(images).float() + self.model(images.flip(-1)).float()) / 2


def augmented(model: nn.Module, tta: str) -> nn.Module:
    """The model with the test-time augmentation of TEST.TTA; the model itself without one."""
    return FlipAverage(model) if tta == "flip" else model


def describe_conditions(restriction: str, tta: str) -> str:
    """How an accuracy was measured, if not from one prediction among all classes per image; else "".

    Args:
        restriction: see ``data.build.Datasets``.
        tta: TEST.TTA.
    """
    return ", ".join(filter(None, [restriction, "mean of image and mirror image" if tta == "flip" else ""]))


@torch.no_grad()
def evaluate(
    models: dict[str, nn.Module],
    loader,
    *,
    amp_dtype: torch.dtype,
    world: World,
    class_ids: Sequence[int] | None = None,
    keep_predictions: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, EvalResult]:
    """Count correct predictions over a dataset whose images are divided among the processes. Every image is counted once.

    Args:
        models: label of the weights (raw or ema) -> model, not wrapped in DDP, because processes may have different numbers
            of batches.
        loader: this process's batches.
        class_ids: the model's class id for each class of the dataset; only these classes are predicted. None if model and
            dataset have the same classes.
        keep_predictions: collect the prediction for every image on rank 0.
        stop: returns whether this process was asked to stop.

    Returns:
        A result for each model, the same in every process except for the predictions.

    Raises:
        Stopped: in every process, if any of them was asked to stop.
        TrainingError: in every process, if a model's outputs are not finite.
    """
    were_training = {label: model.training for label, model in models.items()}
    counters = {label: _Counter(world.device, class_ids, keep_predictions) for label in models}
    indices: list[int] = []
    stopping = False
    for model in models.values():
        model.eval()
    with closing(progress(loader, len(loader), "evaluate")) as batches:
        for batch in batches:
            if stopping := stop():
                break
            if keep_predictions:
                indices += batch.indices
            for label, model in models.items():
                with torch.autocast(world.device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32):
                    logits = model(batch.images)
                counters[label].add(logits.float(), batch.targets)
    for label, model in models.items():
        model.train(were_training[label])
    if sum_over_processes(torch.tensor(int(stopping), device=world.device)):
        raise Stopped("stopped during evaluation")
    return {label: counter.result(label, indices, world) for label, counter in counters.items()}


class _Counter:
    """Evaluation sums of one model over the images of this process, kept on the device."""

    def __init__(self, device: torch.device, class_ids: Sequence[int] | None, keep_predictions: bool):
        self.class_ids = class_ids
        self.selected = None if class_ids is None else torch.tensor(class_ids, device=device)
        # Correct top-1, correct top-5, sum of losses, images with non-finite outputs. Counts are exact in float64.
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.num_images = 0
        self.num_classes = 0
        self.class_counts: Tensor | None = None  # from the first batch on, which shows the number of classes
        self.bins = torch.zeros(3, NUM_BINS, dtype=torch.int64, device=device)
        self.predictions: list[Tensor] | None = [] if keep_predictions else None
        self.targets: list[Tensor] = []

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch. logits: (B, num_classes); targets: (B,) class ids."""
        if self.selected is not None:
            logits = logits.index_select(1, self.selected)
        self.num_images += len(targets)
        self.num_classes = logits.shape[1]
        ranked = logits.topk(min(5, self.num_classes), dim=1).indices
        correct = ranked == targets.unsqueeze(1)  # (B, k), k <= 5
        loss = F.cross_entropy(logits, targets, reduction="sum")
        not_finite = (~logits.isfinite()).any(dim=1).sum()
        self.sums += torch.stack([correct[:, 0].sum(), correct.sum(), loss, not_finite]).double()
        if self.class_counts is None:
            self.class_counts = targets.new_zeros(3, self.num_classes)
        add_to_class_counts(self.class_counts, targets, ranked[:, 0])
        confidences = logits.softmax(dim=1).amax(dim=1)
        add_to_bins(self.bins, confidences, correct[:, 0])
        if self.predictions is not None:
            self.predictions.append(torch.cat([ranked.double(), confidences.unsqueeze(1)], dim=1))
            self.targets.append(targets)

    def result(self, weights: str, indices: list[int], world: World) -> EvalResult:
        """Combine the sums of all processes into the result.

        Args:
            indices: positions of this process's images in the dataset; used only if predictions are kept.
        """
        # A process without batches does not know the number of classes, so this number is averaged over the other processes.
        counts = self.sums.new_tensor([self.num_images, self.num_classes, self.num_classes > 0])
        *sums, total, class_sum, num_with_batches = sum_over_processes(torch.cat([self.sums, counts])).tolist()
        correct1, correct5, loss, not_finite = sums
        total = int(total)
        if not_finite:
            raise TrainingError(
                f"the {weights} weights give outputs that are not finite for {int(not_finite)} of {total} images, so the "
                "accuracy is undefined; evaluate another checkpoint, or use fp32 (TEST.PRECISION fp32)"
            )
        num_classes = int(class_sum // num_with_batches)
        if self.class_counts is None:
            self.class_counts = self.bins.new_zeros(3, num_classes)
        integers = sum_over_processes(torch.cat([self.class_counts, self.bins], dim=1)).cpu().numpy()
        class_counts, bins = integers[:, :num_classes], integers[:, num_classes:]
        predictions = None if self.predictions is None else self._gather(indices, world)
        return EvalResult(
            weights, int(correct1), int(correct5), total, loss / total, num_classes, class_counts, bins, predictions
        )

    def _gather(self, indices: list[int], world: World) -> Predictions | None:
        """The predictions of all processes, in the dataset's order; None except on rank 0."""
        local = np.empty((0, 0)), np.empty(0), np.empty(0)  # ranked classes and confidence, targets, positions
        if indices and self.predictions is not None:
            local = torch.cat(self.predictions).cpu().numpy(), torch.cat(self.targets).cpu().numpy(), np.array(indices)
        gathered = gather_on_main(world, local)
        if gathered is None:
            return None
        not_empty = (part for part in gathered if len(part[2]))
        values, targets, positions = (np.concatenate(parts) for parts in zip(*not_empty, strict=True))
        order = positions.argsort()
        values = values[order]
        ranked = values[:, :-1].astype(np.int64)
        model_classes = ranked[:, 0] if self.class_ids is None else np.array(self.class_ids)[ranked[:, 0]]
        return Predictions(targets[order].astype(np.int64), ranked, values[:, -1], model_classes)


def log_results(results: Mapping[str, EvalResult]) -> None:
    """Log counts, loss and accuracies for each set of weights (raw and EMA)."""
    for label, result in results.items():
        logger.info(
            "%s weights: %d of %d correct, loss %.4f, balanced accuracy %.3f, macro F1 %.3f, calibration error %.3f,%s",
            label,
            result.correct1,
            result.num_images,
            result.loss,
            result.balanced_accuracy,
            result.macro_f1,
            result.calibration_error,
            result,
        )


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model itself, or a copy on ``device`` if the model is on another type of device."""
    return model if next(model.parameters()).device.type == device.type else copy.deepcopy(model).to(device)
