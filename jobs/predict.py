"""Classify images without labels."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from data.datasets import FileDataset, read_file
from data.decoding import decode_image
from data.files import DataError, image_extensions, read_head
from data.index import SAMPLED_BYTES, log_notes
from data.orientation import warn_if_turned
from data.sources.folder import list_images
from data.transforms import Normalize, create_eval_transform
from data.workers import create_loader
from jobs.locate_checkpoint import Checkpoint
from models.preprocessing import Preprocessing
from utils.errors import TrainingError
from utils.progress import progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """Top-k class ids and confidences (softmax) of an image, most confident first; both are empty if ``error`` is not None."""

    image: Path
    class_ids: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()
    error: str | None = None


def find_images(paths: Sequence[Path]) -> list[Path]:
    """List every file in ``paths``, and all image files below every directory in ``paths``, sorted per directory.

    Which files of a directory are images is decided as for training; what is left out is logged.

    Raises:
        DataError: a path does not exist, a directory has no images or cannot be listed, or an image would be listed twice.
    """
    images: list[Path] = []
    for path in paths:
        if path.is_dir():
            listing = list_images(path)
            log_notes(listing.notes())
            if not listing.names:
                raise DataError(f"{path} has no images; the known extensions are {', '.join(image_extensions())}")
            images += [path / name for name in listing.names]
        elif path.is_file():
            images.append(path)  # an explicit path may have any extension
        else:
            raise DataError(f"{path}: no such file or directory")
    return images


def class_names(checkpoint: Checkpoint, num_classes: int) -> list[str]:
    """Class names by class id: from the checkpoint, else from the ImageNet variant with this number of classes, else the ids.

    WordNet ids of ImageNet-1K are replaced by their descriptions.
    """
    if len(checkpoint.class_names) == num_classes:
        imagenet = ImageNetInfo()
        known = set(imagenet.label_names())
        return [imagenet.label_name_to_description(name) if name in known else name for name in checkpoint.class_names]
    subset = infer_imagenet_subset({"num_classes": num_classes})
    logger.warning(
        "%s has no names for its %d classes; %s",
        checkpoint.path,
        num_classes,
        f"those of {subset} are assumed" if subset else "they are numbered from 0",
    )
    if subset is not None:
        imagenet = ImageNetInfo(subset)
        return [imagenet.index_to_description(index) for index in range(num_classes)]
    return [str(index) for index in range(num_classes)]


def true_class(image: Path, classes: Sequence[str]) -> int | None:
    """The class id of an image whose directory has the name of a class, as in a dataset; None for any other image.

    Args:
        classes: class names of the checkpoint, by class id.
    """
    name = image.absolute().parent.name
    return classes.index(name) if name in classes else None


def predict(
    model: nn.Module,
    images: Sequence[Path],
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    top_k: int,
) -> list[Prediction]:
    """Top-k predictions for every image, in the order of ``images``. For an unreadable image, only ``error`` is set.

    Args:
        model: in evaluation mode, on ``device``.

    Raises:
        TrainingError: the model's outputs for an image are not finite.
    """
    dataset = FileDataset(images, create_eval_transform(preprocessing), exif=preprocessing.exif)
    if not preprocessing.exif:
        warn_if_turned(
            "the images",
            len(images),
            read_beginning=lambda position: read_head(images[position], SAMPLED_BYTES),
            read=lambda position: read_file(images[position]),
        )
    loader = create_loader(dataset, num_workers=num_workers, batch_size=batch_size, collate_fn=list)
    normalize = Normalize(preprocessing.mean, preprocessing.std, device)
    predictions: list[Prediction] = []
    with closing(progress(loader, len(loader), "predict")) as batches:
        for samples in batches:
            readable = [image for _, image, _ in samples if image is not None]
            rows = iter(_predict_batch(model, normalize, readable, top_k, device))
            for position, image, error in samples:
                if image is None:
                    logger.warning("%s: not a readable image (%s)", images[position], error)
                    predictions.append(Prediction(images[position], error=error))
                    continue
                class_ids, confidences = next(rows)
                if not math.isfinite(confidences[0]):
                    raise TrainingError(
                        f"{images[position]}: the outputs of the model are not finite; use another checkpoint, and look for "
                        "extreme weights or values of DATA.MEAN and DATA.STD"
                    )
                predictions.append(Prediction(images[position], class_ids, confidences))
    return predictions


def read_thumbnail(path: Path, *, exif: bool) -> Image.Image:
    """Read an image, reduced to at most 512 pixels per side: many of them fit into memory. exif: see ``decode_image``."""
    picture = decode_image(read_file(path), exif=exif)
    picture.thumbnail((512, 512))
    return picture


@torch.inference_mode()
def _predict_batch(
    model: nn.Module, normalize: Normalize, images: list[Tensor], top_k: int, device: torch.device
) -> Iterator[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Yield class ids and confidences of each image, most confident first; NaN for an image with logits that are not finite."""
    if not images:
        return
    logits = model(normalize(torch.stack(images).to(device))).float()
    probabilities = logits.softmax(dim=1).masked_fill(~logits.isfinite().all(dim=1, keepdim=True), torch.nan)
    confidences, class_ids = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1)
    for ids, values in zip(class_ids.tolist(), confidences.tolist(), strict=True):
        yield tuple(ids), tuple(values)
