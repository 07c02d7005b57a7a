"""Output files of an evaluation: ``eval.json``, accuracy per class, confusion matrix, and predictions for every image."""

import logging
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from engine.evaluation import EvalResult, Predictions
from engine.metrics import f1_scores, precisions, recalls
from engine.significance import wilson_interval
from utils.files import replacing, write_csv, write_json
from utils.text import escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

MISTAKES = "mistakes.png"
MAX_PICTURE_SIDE = 256  # maximum pixels per side of an image in ``draw_predictions``
CAPTION_WIDTH = 28  # characters per line of a caption in ``draw_predictions``
MAX_CLASS_LENGTH = 2 * CAPTION_WIDTH  # characters of a class in a caption: longer ones would cover the image above
MAX_CLASSES_DRAWN = 50  # with more classes, no confusion matrix is drawn
MAX_CLASSES_WITH_COUNTS = 20  # with more classes, the confusion matrix has no numbers in its cells


def write_evaluation(
    output: Path,
    results: dict[str, EvalResult],
    *,
    preferred: str,
    about: dict,
    classes: Sequence[str],
    names: Sequence[str],
    real_labels: Sequence[Sequence[int]] | None,
    predictions: bool,
    restriction: str = "",
    tta: str = "none",
) -> None:
    """Write the results of an evaluation to a directory; each file is replaced atomically.

    Args:
        results: label of the weights (raw or ema) -> result, with predictions.
        preferred: label of the weights whose accuracy is reported and whose confusion matrix is drawn.
        about: further entries of ``eval.json``, such as the checkpoint and the preprocessing.
        classes: names of the classes that can be predicted, by class id.
        names: image names, in the dataset's order.
        real_labels: all correct class ids of each image (ReaL labels), in the dataset's order; images without a
            label are not counted. None: do not compute the accuracy on ReaL labels.
        predictions: whether to write ``predictions_<weights>.csv`` too.
        restriction: if the dataset has a part of the model's classes, says whether predictions are restricted to them; else "".
        tta: TEST.TTA.
    """
    record = about | {
        "restriction": restriction or None,
        "tta": tta,
        "preferred": preferred,
        "results": {weights: _record(result, real_labels) for weights, result in results.items()},
    }
    for stale in (output / "confusion.png", output / MISTAKES, *output.glob("predictions_*.csv")):  # from an earlier evaluation
        stale.unlink(missing_ok=True)
    write_json(output / "eval.json", record)
    for weights, values in record["results"].items():
        if "real" in values:
            logger.info(
                "%s weights, ReaL labels: Acc@1 %.3f, %d images", weights, values["real"]["acc1"], values["real"]["num_images"]
            )
    written = ["eval.json", "eval_classes.csv"]
    write_csv(
        output / "eval_classes.csv",
        ["class", "num_images", *(f"{column}_{weights}" for weights in results for column in CLASS_COLUMNS)],
        _class_rows(classes, results),
    )
    if len(classes) <= MAX_CLASSES_DRAWN:
        title = f"{results[preferred].acc1:.2f} % correct, {preferred} weights"
        draw_confusion(confusion_matrix(results[preferred], len(classes)), classes, title, output / "confusion.png")
        written.append("confusion.png")
    if predictions:
        for weights, result in results.items():
            conditions = {"restriction": restriction} if restriction else {}
            conditions |= {"tta": tta} if tta != "none" else {}
            rows = ([*row, *conditions.values()] for row in _prediction_rows(result, classes, names))
            write_csv(output / f"predictions_{weights}.csv", [*PREDICTION_COLUMNS, *conditions], rows)
            written.append(f"predictions_{weights}.csv")
    logger.info("written to %s: %s", output, ", ".join(written))


CLASS_COLUMNS = ["correct1", "acc1", "precision", "f1"]
PREDICTION_COLUMNS = ["image", "target", "confidence", "prediction", "second", "third", "fourth", "fifth"]


def _predictions(result: EvalResult) -> Predictions:
    assert result.predictions is not None, "reports are written on rank 0, after an evaluation with keep_predictions"
    return result.predictions


def confusion_matrix(result: EvalResult, num_classes: int) -> np.ndarray:
    """(num_classes, num_classes) counts: rows are true classes, columns are predictions. Only for few classes."""
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(matrix, (_predictions(result).targets, _predictions(result).ranked[:, 0]), 1)
    return matrix


def draw_confusion(matrix: np.ndarray, classes: Sequence[str], title: str, path: Path) -> None:
    """Draw a confusion matrix. Colours show counts in percent of the true class; with few classes, cells show counts.

    scikit-learn's ``ConfusionMatrixDisplay`` takes colours and numbers from one matrix, so that every cell would have to be
    changed afterwards; it saves three lines and takes another second to import.
    """
    from matplotlib.figure import Figure

    num_classes = len(classes)
    side = max(4.0, 1.5 + 0.32 * num_classes)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    percentages = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(percentages, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, ax=axes, label="% of the class", shrink=0.8)
    labels = [_plain(name) for name in classes]
    axes.set_xticks(range(num_classes), labels, rotation=90)
    axes.set_yticks(range(num_classes), labels)
    axes.set(xlabel="prediction", ylabel="class", title=title)
    if num_classes <= MAX_CLASSES_WITH_COUNTS:
        for row, column in np.argwhere(matrix):
            color = "white" if percentages[row, column] > 50 else "black"
            axes.text(column, row, matrix[row, column], ha="center", va="center", color=color, fontsize=8)
    _save(figure, path, dpi=120)


class Caption(NamedTuple):
    """Text above an image of ``draw_predictions``.

    Attributes:
        name: name of the image's file.
        prediction: the predicted class, with its confidence.
        truth: the name of the true class; None if it is unknown.
        is_correct: whether the prediction is the true class.
        origin: label of the true class, such as what it is known from.
    """

    name: str
    prediction: str
    truth: str | None = None
    is_correct: bool = False
    origin: str = "directory"

    @property
    def color(self) -> str:
        """Black if the true class is unknown, else green or red."""
        return "black" if self.truth is None else "green" if self.is_correct else "red"

    def lines(self) -> list[str]:
        """Lines to draw. Long names lose their middle, and the true class follows a wrong prediction."""
        mark = "" if self.truth is None else "\N{CHECK MARK} " if self.is_correct else "\N{BALLOT X} "
        lines = [_shorten(self.name, CAPTION_WIDTH)]
        lines += textwrap.wrap(f"{mark}{_shorten(self.prediction, MAX_CLASS_LENGTH)}", CAPTION_WIDTH)
        if self.truth is not None and not self.is_correct:
            lines += textwrap.wrap(f"{self.origin}: {_shorten(self.truth, MAX_CLASS_LENGTH)}", CAPTION_WIDTH)
        return [_plain(line) for line in lines]


def _shorten(text: str, length: int) -> str:
    """Replace the middle of a longer text by an ellipsis, so that ``length`` characters remain."""
    if len(text) <= length:
        return text
    return f"{text[: (length - 1) // 2]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - length // 2 :]}"


def draw_predictions(images: Sequence[Image.Image], captions: Sequence[Caption], path: Path) -> None:
    """Draw a grid of images with captions, coloured by ``Caption.color``."""
    from matplotlib.figure import Figure

    columns = min(6, max(1, math.ceil(math.sqrt(len(images)))))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(2.2 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions, strict=False):
        picture = image.copy()
        picture.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
        axis.imshow(picture)
        axis.set_title("\n".join(caption.lines()), fontsize=8, color=caption.color)
    _save(figure, path, dpi=110)


def draw_mistakes(
    result: EvalResult,
    count: int,
    *,
    classes: Sequence[str],
    names: Sequence[str],
    load: Callable[[int], Image.Image],
    path: Path,
) -> None:
    """Draw the wrong predictions with the highest confidence, most confident first. Without mistakes, draw nothing.

    Args:
        count: maximum number of images.
        classes, names: see ``write_evaluation``.
        load: returns an image of the dataset, given its position.
    """
    predictions = _predictions(result)
    wrong = np.flatnonzero(predictions.targets != predictions.ranked[:, 0])
    shown = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:count]
    pictures, captions = [], []
    for position in shown.tolist():
        picture = load(position)
        picture.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))  # now: photographs of full size would need much memory
        pictures.append(picture)
        text = f"{classes[predictions.ranked[position, 0]]}: {100 * predictions.confidence[position]:.1f}%"
        truth = classes[predictions.targets[position]]
        captions.append(Caption(names[position].rpartition("/")[2], text, truth, origin="class"))
    if pictures:
        draw_predictions(pictures, captions, path)
        logger.info("%s: %d of %d wrong predictions, those with the highest confidence", path, len(pictures), len(wrong))


def _plain(text: str) -> str:
    """Convert text so that matplotlib draws it literally: replace invalid Unicode and control characters, and escape $."""
    return escape(text.encode(errors="replace").decode()).replace("$", r"\$")  # $ starts a formula


def _save(figure: "Figure", path: Path, *, dpi: int) -> None:
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # drawn as a box: a name may have any character
        figure.savefig(temporary, dpi=dpi)


def _record(result: EvalResult, real_labels: Sequence[Sequence[int]] | None) -> dict:
    record: dict[str, Any] = result.to_dict() | {
        "acc1_interval_95": wilson_interval(result.correct1, result.num_images),
        "acc5_interval_95": wilson_interval(result.correct5, result.num_images),
        "loss": result.loss if math.isfinite(result.loss) else None,  # JSON has no infinity
    }
    if real_labels is not None:
        labelled = [
            (prediction, labels)
            for prediction, labels in zip(_predictions(result).model_classes, real_labels, strict=True)
            if labels
        ]
        correct = sum(int(prediction) in labels for prediction, labels in labelled)
        acc1 = 100 * correct / max(len(labelled), 1)
        record["real"] = {"correct1": correct, "num_images": len(labelled), "acc1": acc1}
    return record


def _class_rows(classes: Sequence[str], results: dict[str, EvalResult]) -> Iterable[list]:
    tables = [result.class_counts for result in results.values()]
    percentages = [(recalls(counts), precisions(counts), f1_scores(counts)) for counts in tables]
    for class_id, name in enumerate(classes):
        total = int(tables[0][0, class_id])
        row = [name, total]
        for counts, columns in zip(tables, percentages, strict=True):
            row += [int(counts[2, class_id]), *(f"{values[class_id]:.3f}" for values in columns)]
        if total:  # every class of the dataset has images, but other classes of the model may be predicted too
            yield row


def _prediction_rows(result: EvalResult, classes: Sequence[str], names: Sequence[str]) -> Iterable[list]:
    predictions = _predictions(result)
    for position in sorted(range(len(names)), key=names.__getitem__):
        ranked = [classes[class_id] for class_id in predictions.ranked[position]]
        row = [names[position], classes[predictions.targets[position]], f"{predictions.confidence[position]:.4f}", *ranked]
        yield row + [""] * (len(PREDICTION_COLUMNS) - len(row))  # fewer than five classes
