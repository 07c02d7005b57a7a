"""Random erasing (https://arxiv.org/abs/1708.04896) as in timm, but with all random numbers of a batch drawn at once.

Shapes: B images, at most R rectangles per image, K rectangles in total.
"""

import math

import numpy as np
import torch
from torch import Tensor

from utils.random import Stream, draw_uniform, hash_keys

AREA = (0.02, 1 / 3)  # range of a rectangle's area, as a fraction of the image's area
LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))  # range of log(height / width)
NUM_ATTEMPTS = 10  # maximum number of attempts to draw a rectangle that fits into the image


def draw_rectangles(
    state: np.ndarray, height: int, width: int, *, probability: float, max_count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the rectangles to erase in a batch.

    Args:
        state: (B,) from ``hash_keys``.
        height, width: image size in pixels.
        probability, max_count: see ``Erase``.

    Returns:
        For each rectangle, the position of its image in the batch, (K,), and its top, left, height and width, (K, 4).
    """
    draws = draw_uniform(state, 2 + max_count * NUM_ATTEMPTS * 4)
    counts = np.where(draws[:, 0] < probability, 1 + (draws[:, 1] * max_count).astype(int), 0)  # (B,)
    area, aspect, top, left = np.moveaxis(draws[:, 2:].reshape(-1, max_count, NUM_ATTEMPTS, 4), -1, 0)  # (B, R, attempts)
    area = (AREA[0] + (AREA[1] - AREA[0]) * area) * (height * width) / np.maximum(counts, 1)[:, None, None]
    aspect = np.exp(LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * aspect)
    heights, widths = np.rint(np.sqrt(area * aspect)).astype(int), np.rint(np.sqrt(area / aspect)).astype(int)
    fits = (heights < height) & (widths < width)
    tops, lefts = (top * (height - heights + 1)).astype(int), (left * (width - widths + 1)).astype(int)
    boxes = np.stack([tops, lefts, heights, widths], axis=-1)
    first_fit = fits.argmax(axis=-1)[..., None, None]
    boxes = np.take_along_axis(boxes, first_fit, axis=2)[:, :, 0]  # (B, R, 4)
    is_erased = (np.arange(max_count) < counts[:, None]) & fits.any(axis=-1)  # (B, R)
    return np.nonzero(is_erased)[0], boxes[is_erased]


class Erase:
    """Random erasing of normalised images, seeded from (seed, epoch, index).

    Args:
        probability: probability that parts of an image are erased.
        mode: ``pixel`` fills with normal noise, ``rand`` with one normal draw per channel, ``const`` with 0.
        max_count: maximum number of rectangles per image; the erased area is divided among them.
        seed: the run's seed.
        device: device of the images.
    """

    def __init__(self, probability: float, *, mode: str, max_count: int, seed: int, device: torch.device):
        self.probability = probability
        self.mode = mode
        self.max_count = max_count
        self.seed = seed
        self.generator = torch.Generator(device)

    def __call__(self, images: Tensor, keys: np.ndarray) -> Tensor:
        """Erase rectangles in place. images: (B, C, H, W); keys: (B, 2) epoch and index of each image."""
        state = hash_keys(self.seed, keys, Stream.ERASING)
        height, width = images.shape[-2:]
        positions, boxes = draw_rectangles(state, height, width, probability=self.probability, max_count=self.max_count)
        for number, (position, (top, left, height, width)) in enumerate(zip(positions.tolist(), boxes.tolist(), strict=True)):
            region = images[position, :, top : top + height, left : left + width]
            if self.mode == "const":
                region.zero_()
                continue
            # Each rectangle of an image has its own seed. The shift keeps the seed below 2^63.
            number_in_image = number - int(np.searchsorted(positions, position))
            self.generator.manual_seed(int(state[position] >> np.uint64(1)) ^ number_in_image)
            if self.mode == "pixel":
                region.normal_(generator=self.generator)
            else:
                color = torch.empty(len(region), 1, 1, dtype=images.dtype, device=images.device)
                region.copy_(color.normal_(generator=self.generator))
        return images
