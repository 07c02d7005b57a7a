"""RandAugment (https://arxiv.org/abs/1909.13719) of whole batches of uint8 images on their device.

The distribution of operations and magnitudes is that of timm's RandAugment, which augments one Pillow image at a time in the
loader workers. Pixels differ slightly: docs/training.md gives the differences. The random numbers of a batch are drawn at once
on the CPU; no value is read from the device.

In each layer of the policy, images are sorted by the kind of their operation, so that each kind is a slice of the batch. Except
for geometric operations, all values are integers, or multiples of 1/1024 that float32 represents exactly. Therefore, the pixels
of an image do not depend on the other images of the batch.

Shapes: B images of H x W pixels, L layers, K images in one slice, P numbers per image and layer (``Columns``).
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from data.files import DataError
from utils.random import Stream, draw_uniform, hash_keys

LEVELS = np.arange(256)
FACTOR_STEP = 1 / 1024  # factors are rounded to multiples of this
LUMA = [19595 / 65536, 38470 / 65536, 7471 / 65536]  # weights of red, green and blue in Pillow's grey values
TRUNCATION_MARGIN = 0.01  # grey levels: rounding errors must not turn 100 into 99.9999, which would be truncated to 99
NUM_DRAWS = 5  # per image and layer


class Kind(IntEnum):
    """Kinds of operations, in the order of their slices in the sorted batch."""

    NONE = 0
    TABLE = 1  # look-up table
    STRETCH = 2  # look-up table computed from the histogram: AutoContrast
    EQUALIZE = 3  # look-up table computed from the histogram: Equalize
    COLOR = 4  # blend with the grey image
    CONTRAST = 5  # blend with the mean grey value
    SHARPNESS = 6  # blend with the smoothed image
    AFFINE = 7


class Columns:
    """Numbers per image and layer: look-up table, affine coefficients or blend factor, and position in the previous order."""

    TABLE = slice(0, 256)
    COEFFICIENTS = slice(256, 262)
    FACTOR = slice(256, 257)
    POSITION = 262
    COUNT = 263


# Name of an operation in timm, without the suffix "Increasing" -> kind.
KINDS = {
    "AutoContrast": Kind.STRETCH,
    "Equalize": Kind.EQUALIZE,
    "Invert": Kind.TABLE,
    "Posterize": Kind.TABLE,
    "Solarize": Kind.TABLE,
    "SolarizeAdd": Kind.TABLE,
    "Brightness": Kind.TABLE,
    "Color": Kind.COLOR,
    "Contrast": Kind.CONTRAST,
    "Sharpness": Kind.SHARPNESS,
    "Rotate": Kind.AFFINE,
    "ShearX": Kind.AFFINE,
    "ShearY": Kind.AFFINE,
    "TranslateXRel": Kind.AFFINE,
    "TranslateYRel": Kind.AFFINE,
}


def build_table(name: str, increasing: bool, level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """Look-up tables of a pointwise operation. level: (K, 1), 1 for magnitude 10. Returns (K, 256)."""
    if name == "Invert":
        return np.broadcast_to(255 - LEVELS, (len(level), 256))
    if name == "Posterize":
        bits = np.floor(4 * level).astype(int)
        step = 2 ** (8 - np.clip(4 - bits if increasing else bits, 0, 8))
        return LEVELS // step * step
    if name == "Solarize":
        threshold = np.minimum(np.floor(256 * level), 256)
        return np.where((256 - threshold if increasing else threshold) > LEVELS, LEVELS, 255 - LEVELS)
    if name == "SolarizeAdd":
        added = np.minimum(LEVELS + np.minimum(np.floor(110 * level), 128), 255)
        return np.where(LEVELS < 128, added, LEVELS)
    return np.clip(LEVELS * build_factor(increasing, level, sign), 0, 255)  # Brightness


def build_factor(increasing: bool, level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """Factor of Brightness, Color, Contrast and Sharpness; 1 leaves the image unchanged."""
    factor = np.maximum(1 + 0.9 * sign * level, 0.1) if increasing else 1.8 * level + 0.1
    return np.rint(factor / FACTOR_STEP) * FACTOR_STEP


def build_affine(name: str, value: np.ndarray, height: int, width: int) -> np.ndarray:
    """Coefficients (a, b, c, d, e, f) of the source (a x + b y + c, d x + e y + f) of the pixel at (x, y).

    Args:
        value: (K,), sign times level.

    Returns:
        (K, 6). x and y are in pixels, from the top left corner; the source is in [-1, 1] as in ``grid_sample``.
    """
    one, zero = np.ones_like(value), np.zeros_like(value)
    if name == "Rotate":
        cosine, sine = np.cos(np.radians(30 * value)), np.sin(np.radians(30 * value))
        x = cosine, -sine, width / 2 * (1 - cosine) + height / 2 * sine
        y = sine, cosine, height / 2 * (1 - cosine) - width / 2 * sine
    else:
        x = one, 0.3 * value if name == "ShearX" else zero, 0.45 * width * value if name == "TranslateXRel" else zero
        y = 0.3 * value if name == "ShearY" else zero, one, 0.45 * height * value if name == "TranslateYRel" else zero
    coefficients = np.stack([*x, *y], axis=-1).reshape(-1, 2, 3) * (2 / np.array([width, height]))[:, None]
    coefficients[:, :, 2] -= 1
    return coefficients.reshape(-1, 6)


class RandAugment:
    """RandAugment of uint8 images, seeded from (seed, epoch, index).

    Args:
        policy: RandAugment policy of timm, such as ``rand-m9-mstd0.5-inc1``.
        mean: of the pixel values in [0, 1], per channel; fills the area that geometric operations uncover.
        interpolation: of geometric operations, ``bilinear`` or ``bicubic``; ``random``, in timm a choice per image, is bicubic.
        seed: the run's seed.
        device: device of the images.

    Raises:
        DataError: the policy is not supported.
    """

    def __init__(self, policy: str, *, mean: Sequence[float], interpolation: str, seed: int, device: torch.device):
        parsed: Any = rand_augment_transform(policy, {})
        self.names = [operation.name for operation in parsed.ops]
        unsupported = [name for name in self.names if name.removesuffix("Increasing") not in KINDS]
        if unsupported or parsed.choice_weights is not None:
            raise DataError(
                f"AUG.DEVICE_RANDAUGMENT does not support AUG.AUTO_AUGMENT={policy!r}, which selects operations with -t; "
                "remove this section, or set AUG.DEVICE_RANDAUGMENT False"
            )
        self.num_layers = parsed.num_layers
        operation = parsed.ops[0]  # the operations differ only in their names
        self.probability, self.magnitude = operation.prob, operation.magnitude
        self.magnitude_std, self.max_magnitude = operation.magnitude_std, operation.magnitude_max or 10
        self.mode = "bilinear" if interpolation == "bilinear" else "bicubic"
        self.fill = torch.tensor([min(255, round(255 * x)) for x in mean], dtype=torch.float32, device=device).view(3, 1, 1)
        self.luma = torch.tensor(LUMA, device=device).view(3, 1, 1)
        self.seed = seed
        self.device = device

    def __call__(self, images: Tensor, keys: np.ndarray) -> Tensor:
        """Augment images. images: (B, 3, H, W) uint8; keys: (B, 2) epoch and index of each image. Returns uint8."""
        choices, levels, signs = self.draw(hash_keys(self.seed, keys, Stream.RAND_AUGMENT))
        return self.apply(images, choices, levels, signs)

    def draw(self, state: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw the operations of a batch.

        Args:
            state: (B,) from ``hash_keys``.

        Returns:
            Positions in ``names``, or -1 for no operation; levels (magnitude / 10); and signs, 1 or -1. Each is (B, L).
        """
        draws = draw_uniform(state, NUM_DRAWS * self.num_layers).reshape(len(state), self.num_layers, NUM_DRAWS)
        choice, applied, first, second, sign = np.moveaxis(draws, -1, 0)
        if math.isinf(self.magnitude_std):
            magnitudes = self.magnitude * first
        else:  # Box-Muller transform
            normal = np.sqrt(-2 * np.log(1 - first)) * np.cos(2 * np.pi * second)
            magnitudes = self.magnitude + self.magnitude_std * normal
        choices = np.where(applied < self.probability, (choice * len(self.names)).astype(int), -1)
        return choices, np.clip(magnitudes, 0, self.max_magnitude) / 10, np.where(sign < 0.5, 1.0, -1.0)

    def apply(self, images: Tensor, choices: np.ndarray, levels: np.ndarray, signs: np.ndarray) -> Tensor:
        """Apply the operations of ``draw``, layer by layer."""
        kinds = np.array([Kind.NONE, *(KINDS[name.removesuffix("Increasing")] for name in self.names)])[choices + 1]  # (B, L)
        height, width = images.shape[-2:]
        numbers = np.zeros((self.num_layers + 1, len(images), Columns.COUNT), dtype=np.float32)
        previous, slices = np.arange(len(images)), []  # previous: the image at each position of the sorted batch
        for layer in range(self.num_layers):
            order = kinds[:, layer].argsort(kind="stable")
            numbers[layer, :, Columns.POSITION] = previous.argsort()[order]
            for position, name in enumerate(self.names):
                chosen = np.nonzero(choices[order, layer] == position)[0]
                if len(chosen):
                    level, sign = levels[order[chosen], layer], signs[order[chosen], layer]
                    self._fill_numbers(numbers[layer], chosen, name, level, sign, height, width)
            slices.append(np.searchsorted(kinds[order, layer], np.arange(len(Kind) + 1)).tolist())
            previous = order
        numbers[-1, :, Columns.POSITION] = previous.argsort()
        on_device = self._to_device(numbers)
        positions = on_device[:, :, Columns.POSITION].long()
        for layer in range(self.num_layers):
            images = images.index_select(0, positions[layer])
            self._apply_layer(images, on_device[layer], slices[layer])
        return images.index_select(0, positions[-1])

    @staticmethod
    def _fill_numbers(
        numbers: np.ndarray, chosen: np.ndarray, name: str, level: np.ndarray, sign: np.ndarray, height: int, width: int
    ) -> None:
        """Write the numbers of the images at the positions ``chosen``, whose operation is ``name``."""
        base, increasing = name.removesuffix("Increasing"), name.endswith("Increasing")
        kind = KINDS[base]
        if kind == Kind.TABLE:
            numbers[chosen, Columns.TABLE] = build_table(base, increasing, level[:, None], sign[:, None])
        elif kind in (Kind.COLOR, Kind.CONTRAST, Kind.SHARPNESS):
            numbers[chosen, Columns.FACTOR] = build_factor(increasing, level, sign)[:, None]
        elif kind == Kind.AFFINE:
            numbers[chosen, Columns.COEFFICIENTS] = build_affine(base, sign * level, height, width)

    def _to_device(self, numbers: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(numbers)
        if self.device.type == "cuda":  # from pinned memory, the copy does not wait for the device
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _apply_layer(self, images: Tensor, numbers: Tensor, bounds: list[int]) -> None:
        """Apply one layer to the sorted batch, in place. numbers: (B, P); bounds: the first position of each kind."""

        def part(first: Kind, last: Kind, values: Tensor) -> Tensor:
            return values[bounds[first] : bounds[last + 1]]

        sizes = [end - start for start, end in pairwise(bounds)]  # number of images of each kind
        pointwise = part(Kind.TABLE, Kind.EQUALIZE, images)
        if len(pointwise):
            tables = part(Kind.TABLE, Kind.TABLE, numbers)[:, None, Columns.TABLE].expand(-1, 3, -1).to(torch.uint8)
            indices = pointwise.flatten(2).long()
            if len(tables) < len(indices):
                counts = count_levels(indices[len(tables) :])
                tables = torch.cat([tables, build_histogram_tables(counts, indices.shape[2], sizes[Kind.STRETCH])])
            pointwise.copy_(tables.gather(2, indices).view_as(pointwise))
        blended = part(Kind.COLOR, Kind.SHARPNESS, images)
        if len(blended):
            factors = part(Kind.COLOR, Kind.SHARPNESS, numbers)[:, Columns.FACTOR, None, None]
            blended.copy_(blend(blended.float(), factors, sizes[Kind.COLOR : Kind.SHARPNESS + 1], self.luma))
        moved = part(Kind.AFFINE, Kind.AFFINE, images)
        if len(moved):
            moved.copy_(warp(moved, part(Kind.AFFINE, Kind.AFFINE, numbers)[:, Columns.COEFFICIENTS], self.fill, self.mode))


def count_levels(pixels: Tensor) -> Tensor:
    """Histogram of each channel. (K, 3, H * W) int64 -> (K, 3, 256) int64."""
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int64, device=pixels.device)
    return counts.scatter_add_(2, pixels, counts.new_ones(()).expand_as(pixels))


def build_histogram_tables(counts: Tensor, num_pixels: int, num_stretched: int) -> Tensor:
    """Look-up tables of AutoContrast and Equalize, computed in integers as in Pillow.

    AutoContrast maps the darkest level to 0 and the brightest to 255. Equalize makes the histogram as flat as possible.

    Args:
        counts: (K, 3, 256), histograms of ``num_pixels`` pixels each; first the ``num_stretched`` images for AutoContrast.

    Returns:
        (K, 3, 256) uint8.
    """
    levels = torch.arange(256, device=counts.device)
    cumulative = counts.cumsum(-1)
    highest = (cumulative < num_pixels).sum(-1, keepdim=True)
    lowest = (cumulative[:num_stretched] == 0).sum(-1, keepdim=True)
    span = highest[:num_stretched] - lowest
    step = (num_pixels - counts[num_stretched:].gather(-1, highest[num_stretched:])) // 255
    num_darker = (cumulative - counts)[num_stretched:]
    numerators = torch.cat([(levels - lowest) * 255, num_darker + step // 2])
    denominators = torch.cat([span, step])
    # A channel with one level has the denominator 0, and is not changed.
    tables = torch.where(denominators > 0, numerators // denominators.clamp(min=1), levels)
    return tables.clamp_(0, 255).to(torch.uint8)


def blend(images: Tensor, factors: Tensor, sizes: Sequence[int], luma: Tensor) -> Tensor:
    """Blend images with their degenerate form: degenerate + factor * (image - degenerate), clamped to [0, 255].

    Args:
        images: (K, 3, H, W) float32 with integer values, sorted by operation.
        factors: (K, 1, 1, 1).
        sizes: number of images for Color, Contrast and Sharpness.
        luma: (3, 1, 1), weights of the channels in the grey value.
    """
    degenerate = []
    if num_grey := sizes[0] + sizes[1]:
        grey = (images[:num_grey] * luma).sum(1, keepdim=True).add_(0.5).floor_()
        mean = grey[sizes[0] :].mean(dim=(2, 3), keepdim=True, dtype=torch.float64).add_(0.5).floor_()
        degenerate = [grey[: sizes[0]].expand(-1, *images.shape[1:]), mean.float().expand(-1, *images.shape[1:])]
    if len(sharpened := images[num_grey:]):
        # Pillow's smoothing filter: 5 in the centre and 1 around it, divided by 13 and rounded. At the border, where Pillow
        # does not smooth, the average is over the pixels inside the image.
        average = F.avg_pool2d(sharpened, 3, stride=1, padding=1, count_include_pad=False)
        degenerate.append(average.mul_(9 / 13).add_(sharpened, alpha=4 / 13).add_(0.5 + TRUNCATION_MARGIN).floor_())
    return torch.cat(degenerate).lerp_(images, factors).clamp_(0, 255)


def warp(images: Tensor, coefficients: Tensor, fill: Tensor, mode: str) -> Tensor:
    """Affine transforms. images: (K, 3, H, W) uint8; coefficients: (K, 6), see ``build_affine``. Returns float32."""
    height, width = images.shape[-2:]
    x = torch.arange(0.5, width, device=images.device).view(width, 1)
    y = torch.arange(0.5, height, device=images.device).view(height, 1, 1)
    slope_x, slope_y, offset = coefficients.view(-1, 1, 1, 2, 3).unbind(-1)
    grid = (slope_x * x + offset) + slope_y * y  # (K, H, W, 2)
    warped = F.grid_sample(images - fill, grid, mode=mode, padding_mode="zeros", align_corners=False)
    return warped.add_(fill + TRUNCATION_MARGIN).clamp_(0, 255)
