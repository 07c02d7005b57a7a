"""Composition of batches, a pure function of (seed, epoch, update), so that checkpoints store no state of a sampler."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from data.datasets import Key, draw_seed


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """Permutation of the images in one epoch."""
    generator = torch.Generator().manual_seed(draw_seed(seed, epoch))
    return torch.randperm(num_samples, generator=generator)


class TrainBatches(Sampler[list[Key]]):
    """Training batches of one process for one epoch, complete updates only.

    Update u uses images u * G to (u + 1) * G of the epoch's order, where G is the global batch size. They are divided among
    forward passes and processes, so the images of an update do not depend on the number of processes.

    With ``repeats`` above 1 (https://arxiv.org/abs/1902.05509, 3 in DeiT's recipe), each image occupies ``repeats`` consecutive
    places of that order, with different augmentations, and each update reads all first copies before the second ones. The
    number of updates per epoch is unchanged, so an epoch uses fewer images.
    ``separate_copies`` prevents mixup of an image with itself.

    Args:
        num_samples: size of the dataset.
        batch_size: images per process and forward pass.
        accumulation: forward passes per update.
        repeats: copies of an image per epoch.
        rank, world_size: rank of this process, and number of processes.
        seed: the run's seed.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        accumulation: int,
        repeats: int = 1,
        rank: int,
        world_size: int,
        seed: int,
    ):
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.repeats = repeats
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.global_batch_size = batch_size * accumulation * world_size
        self.updates_per_epoch = num_samples // self.global_batch_size
        self.set_position(0, 0)

    def set_position(self, epoch: int, first_update: int) -> None:
        """Set the epoch to read next and its first update."""
        self.epoch = epoch
        self.first_update = first_update

    def __len__(self) -> int:
        return (self.updates_per_epoch - self.first_update) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        order = epoch_order(self.num_samples, self.seed, self.epoch)
        for update in range(self.first_update, self.updates_per_epoch):
            positions = update * self.global_batch_size + torch.arange(self.global_batch_size)
            positions = positions[(positions % self.repeats).argsort(stable=True)]
            for forward_pass in range(self.accumulation):
                start = (forward_pass * self.world_size + self.rank) * self.batch_size
                batch = positions[start : start + self.batch_size]
                indices = order[batch // self.repeats].tolist()
                epochs = (self.epoch * self.repeats + batch % self.repeats).tolist()  # differ between copies, see ``Key``
                yield list(zip(epochs, indices, strict=True))


def partner(position: int, count: int) -> int:
    """Position of the image that mixup mixes with the one at ``position``: the same position in the reversed batch.

    In batches of odd size, the middle image is mixed with the first, see ``data.mixup``.
    """
    opposite = count - 1 - position
    return opposite if opposite != position else 0


def separate_copies(indices: list[int]) -> list[int]:
    """Order of a batch in which mixup does not mix an image with a copy of itself.

    In small batches, copies may still be mixed: the search is greedy, and such an order may not exist.

    Args:
        indices: (B,) index of each image; equal indices are copies.

    Returns:
        (B,) positions of the images in their new order; 0, 1, ..., B - 1 if no change is needed.
    """
    count, order = len(indices), list(range(len(indices)))

    def mixes_copies(*positions: int) -> bool:
        return any(indices[order[position]] == indices[order[partner(position, count)]] for position in positions)

    middle = [count // 2] * (count % 2)  # mixed with the first image, which a swap may replace; empty if B is even
    for first in range((count + 1) // 2):
        if not mixes_copies(first):
            continue
        for other in range(count):
            order[first], order[other] = order[other], order[first]
            if not mixes_copies(first, other, *middle):
                break
            order[first], order[other] = order[other], order[first]
    return order


class EvalBatches(Sampler[list[Key]]):
    """Evaluation batches, each image once: rank r reads images r, r + world_size, ...; the last batch may be smaller."""

    def __init__(self, num_samples: int, batch_size: int, *, rank: int, world_size: int):
        self.indices = range(rank, num_samples, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]
