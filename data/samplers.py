"""Which images make up which batch: pure functions of (seed, epoch, update), for any number of processes."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from data.datasets import Key, draw_seed


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """The permutation of one epoch's images."""
    generator = torch.Generator().manual_seed(draw_seed(seed, epoch))
    return torch.randperm(num_samples, generator=generator)


class TrainBatches(Sampler[list[Key]]):
    """Batches of one process for one epoch, whole updates only.

    Update u takes images u * G to (u + 1) * G of the epoch's order, G being the global batch; its forward passes and
    processes divide those among themselves. So the images of an update do not depend on how many processes there are.

    With repeats (https://arxiv.org/abs/1902.05509, 3 in DeiT's recipe) each image comes ``repeats`` times in a row, augmented
    anew each time. An epoch keeps its number of updates, so it uses fewer images. ``separate_copies`` keeps mixup from mixing
    an image with itself.

    Args:
        num_samples: size of the dataset.
        batch_size: images per process and forward pass.
        accumulation: forward passes per update.
        repeats: how often an image comes in its epoch.
        rank, world_size: of this process.
        seed: of the run.
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
        self.num_samples, self.batch_size, self.accumulation, self.repeats = num_samples, batch_size, accumulation, repeats
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.global_batch_size = batch_size * accumulation * world_size
        self.updates_per_epoch = num_samples // self.global_batch_size
        self.set_position(0, 0)

    def set_position(self, epoch: int, first_update: int) -> None:
        """The epoch to read next, and where in it to begin."""
        self.epoch, self.first_update = epoch, first_update

    def __len__(self) -> int:
        return (self.updates_per_epoch - self.first_update) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        order = epoch_order(self.num_samples, self.seed, self.epoch)
        for update in range(self.first_update, self.updates_per_epoch):
            positions = update * self.global_batch_size + torch.arange(self.global_batch_size)
            positions = positions[(positions % self.repeats).argsort(stable=True)]
            for forward_pass in range(self.accumulation):
                start = (forward_pass * self.world_size + self.rank) * self.batch_size
                mine = positions[start : start + self.batch_size]
                indices = order[mine // self.repeats].tolist()
                rounds = (self.epoch * self.repeats + mine % self.repeats).tolist()  # what an image's draws are seeded from
                yield list(zip(rounds, indices, strict=True))


def partner(position: int, count: int) -> int:
    """The image that mixup mixes with the one at ``position``: the first with the last, the second with the last but one ...

    In batches of an odd number the one in the middle is mixed with the first, see ``data.mixup``.
    """
    opposite = count - 1 - position
    return opposite if opposite != position else 0


def separate_copies(indices: list[int]) -> list[int]:
    """An order of a batch in which mixup mixes no image with a copy of itself.

    In batches of a few images, copies may meet: the search is greedy, and there may be no such order.

    Args:
        indices: (B,) index of each image; equal ones are copies.

    Returns:
        (B,) positions, from 0 to B - 1 if there is nothing to change.
    """
    count, order = len(indices), list(range(len(indices)))

    def collides(*positions: int) -> bool:
        return any(indices[order[position]] == indices[order[partner(position, count)]] for position in positions)

    middle = [count // 2] * (count % 2)  # it is mixed with the first, which may move
    for first in range((count + 1) // 2):
        if not collides(first):
            continue
        for other in range(count):
            order[first], order[other] = order[other], order[first]
            if not collides(first, other, *middle):
                break
            order[first], order[other] = order[other], order[first]
    return order


class EvalBatches(Sampler[list[Key]]):
    """Every image once: process r takes images r, r + world, r + 2 * world ... and the last batch may be short."""

    def __init__(self, num_samples: int, batch_size: int, *, rank: int, world_size: int):
        self.indices, self.batch_size = range(rank, num_samples, world_size), batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]
