"""Mixup (https://arxiv.org/abs/1710.09412) and CutMix (https://arxiv.org/abs/1905.04899), seeded from (seed, step, rank)."""

import math

import torch
from timm.data import Mixup
from torch import Tensor

from utils.random import Stream, draw_seed, restore_generators, seed_generators


class StepMixup:
    """timm's Mixup, seeded for each forward pass from (seed, step, rank), where ``step`` counts forward passes.

    Args:
        seed: the run's seed.
        rank: rank of this process.
        end: number of forward passes of the run after which nothing is mixed. As in timm, label smoothing remains.
        options: arguments of ``timm.data.Mixup``.
    """

    def __init__(self, *, seed: int, rank: int = 0, end: float = math.inf, **options):
        self.seed = seed
        self.rank = rank
        self.end = end
        self.mixup = Mixup(**options)

    def __call__(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mix a batch with the same batch in reverse order, in place if B is even.

        If B is odd, the middle image is mixed with the first one.

        Args:
            images: (B, 3, H, W), normalised.
            targets: (B,) class ids.
            step: number of forward passes of the run before this one.

        Returns:
            Images and (B, num_classes) probabilities, including label smoothing.
        """
        self.mixup.mixup_enabled = step < self.end
        count = len(images)
        middle = count // 2
        if count % 2:  # timm would mix the middle image with itself; insert a copy of the first image as its partner
            images, targets = (
                torch.cat([values[: middle + 1], values[:1], values[middle + 1 :]]) for values in (images, targets)
            )
        with restore_generators():
            seed_generators(draw_seed(self.seed, step, self.rank, Stream.MIXUP))
            images, targets = self.mixup(images, targets)
        if count % 2:
            images, targets = (torch.cat([values[: middle + 1], values[middle + 2 :]]) for values in (images, targets))
        return images, targets
