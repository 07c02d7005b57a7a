"""Image transforms in the data loader (decoded image to uint8 tensor), and normalisation on the device."""

import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from torch import Tensor
from torchvision import transforms

from models.preprocessing import MAX_SMALL_SIZE, Preprocessing, deterministic

Transform = Callable[[Image.Image | Tensor], Tensor]

MAX_RESIZED_PIXELS = 2**24  # maximum size of a resized image before the crop; beyond it, only the crop is computed


def create_train_transform(
    img_size: tuple[int, int],
    *,
    interpolation: str,
    mean: Sequence[float],
    scale: Sequence[float],
    ratio: Sequence[float],
    hflip: float,
    color_jitter: float,
    auto_augment: str,
) -> Transform:
    """Create the training augmentation, which returns uint8; normalisation and erasing follow on the device.

    Above ``MAX_SMALL_SIZE`` pixels, the transform also accepts tensors as returned by ``decode_pixels``.

    Args:
        img_size: (height, width) in pixels.
    """
    augment: Any = create_transform(
        img_size,
        is_training=True,
        interpolation=interpolation,
        mean=tuple(mean),
        scale=(scale[0], scale[1]),
        ratio=(ratio[0], ratio[1]),
        hflip=hflip,
        color_jitter=color_jitter or None,  # type: ignore[arg-type]  # timm accepts None
        auto_augment=None if auto_augment in ("", "none", "None") else auto_augment,
        use_prefetcher=True,
    )
    if max(img_size) > MAX_SMALL_SIZE:
        crop = RandomResizedCrop(img_size, scale=tuple(scale), ratio=tuple(ratio), interpolation=interpolation)
        return transforms.Compose([crop, *augment.transforms[1:]])
    resize_and_crop = [
        transforms.Resize(img_size, str_to_interp_mode(deterministic(interpolation))),
        transforms.RandomCrop(img_size, padding=4),
    ]
    return transforms.Compose([*resize_and_crop, *augment.transforms[1:]])


class TransformSchedule:
    """Transforms of successive epochs, in training with several input sizes.

    Args:
        transforms: pairs of the first epoch of a transform and the transform, in the order of the epochs, from epoch 0 on.
            Epochs are those of the keys of ``data.datasets.ImageDataset``.
    """

    def __init__(self, transforms: Sequence[tuple[int, Transform]]):
        self.first_epochs, self.transforms = zip(*transforms, strict=True)

    def at(self, epoch: int) -> Transform:
        return self.transforms[bisect_right(self.first_epochs, epoch) - 1]


class RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random resized crop, with the same random draws, but resized by torch's uint8 kernels instead of Pillow.

    The kernels take a third of Pillow's time. Their results differ from Pillow's by at most 2 of 255 levels.
    """

    def __call__(self, image: Image.Image | Tensor) -> Image.Image:
        """Crop and resize an RGB Pillow image or a (3, H, W) uint8 tensor."""
        if not isinstance(image, Tensor):
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        mode = random.choice(self.interpolation) if isinstance(self.interpolation, tuple) else self.interpolation
        top, left = min(top, image.shape[1] - 1), min(left, image.shape[2] - 1)
        height, width = max(height, 1), max(width, 1)  # for an image of one or two pixels, the crop size may round to 0
        crop = image[None, :, top : top + height, left : left + width]
        resized = F.interpolate(crop, size=self.size, mode=mode.value, antialias=True, align_corners=False)
        return Image.fromarray(resized[0].permute(1, 2, 0).numpy())


_POLICY = re.compile(
    r"rand(-(m|n|p|mstd|mmax|inc)\d[\d.]*|-t(weights|3aw?))*|augmix(-(m|mstd|w|d|a|b)\d[\d.]*)*|(original|originalr|v0|v0r|3a)(-mstd\d[\d.]*)*"
)


def check_policy(policy: str) -> None:
    """Check the syntax of a timm augmentation policy; timm checks it with ``assert``, which ``python -O`` removes.

    Raises:
        ValueError: the policy has an unknown section (policies consist of sections separated by hyphens).
    """
    if policy not in ("", "none", "None") and not _POLICY.fullmatch(policy):
        raise ValueError("unknown section")


def create_eval_transform(preprocessing: Preprocessing) -> Transform:
    """Create the evaluation transform, from a PIL image to (3, H, W) uint8."""
    options = preprocessing.timm_options()
    transform: Any = create_transform(preprocessing.img_size, is_training=False, normalize=False, **options)
    if preprocessing.crop_mode != "short":
        return transform
    return CropOfElongatedImage(preprocessing, transform)  # type: ignore[return-value]  # for evaluation: takes no tensors


class CropOfElongatedImage:
    """Evaluation transform for ``short`` that needs little memory for images of any aspect ratio.

    A resized image above ``MAX_RESIZED_PIXELS`` is not computed, only its centre crop. An image of 1 x 30,000 pixels would
    otherwise be resized to 256 x 7,680,000. The pixels differ by at most 2 of 255 levels, since coordinates are rounded.
    """

    def __init__(self, preprocessing: Preprocessing, transform: Transform):
        self.crop_size = preprocessing.img_size
        self.minimum_size = preprocessing.resized_to
        bicubic = deterministic(preprocessing.interpolation) == "bicubic"
        self.resampling = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
        self.transform = transform

    def __call__(self, image: Image.Image) -> Tensor:
        height, width = self.resized_size(image)
        if height * width <= MAX_RESIZED_PIXELS:
            return self.transform(image)
        return torch.from_numpy(np.array(self.resize_and_crop(image))).permute(2, 0, 1)

    def resized_size(self, image: Image.Image) -> tuple[int, int]:
        """(height, width) to which timm resizes an image before the crop."""
        (min_height, min_width), (height, width) = self.minimum_size, (image.height, image.width)
        if min_height != min_width:
            ratio = min(height / min_height, width / min_width)
            return round(height / ratio), round(width / ratio)
        if width <= height:
            return int(min_width * height / width), min_width
        return min_height, int(min_height * width / height)

    def resize_and_crop(self, image: Image.Image) -> Image.Image:
        """Compute only the centre crop of the resized image."""
        # Pillow stores boxes in float32: crop to whole pixels first, so that the coordinates of the box are small.
        spans = [
            _crop_span(length, resized, crop)
            for length, resized, crop in zip(image.size, self.resized_size(image)[::-1], self.crop_size[::-1], strict=True)
        ]
        (left, right), (top, bottom) = (pixels for pixels, _ in spans)
        (x0, x1), (y0, y1) = (span for _, span in spans)
        return image.crop((left, top, right, bottom)).resize(self.crop_size[::-1], self.resampling, box=(x0, y0, x1, y1))


def _crop_span(length: int, resized: int, crop: int) -> tuple[tuple[int, int], tuple[float, float]]:
    """Pixels of an image's side that a centre crop of the resized side depends on, and the exact span of the crop among them.

    Args:
        length, resized, crop: length of the side in pixels: of the image, of the resized image, of the crop.
    """
    scale = length / resized
    start = round((resized - crop) / 2) * scale  # rounded like torchvision's CenterCrop
    end = start + crop * scale
    margin = 2 * max(scale, 1) + 1  # radius of the bicubic filter, and one pixel for rounding
    first, last = max(math.floor(start - margin), 0), min(math.ceil(end + margin), length)
    return (first, last), (start - first, min(end - first, last - first))


class Normalize:
    """Convert uint8 images to normalised floats on their device. (B, 3, H, W) -> (B, 3, H, W)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device):
        self.mean = 255 * torch.tensor(mean, device=device).view(3, 1, 1)
        self.scale = 1 / (255 * torch.tensor(std, device=device).view(3, 1, 1))

    def __call__(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) * self.scale
