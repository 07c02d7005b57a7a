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

    With repeats (https://arxiv.org/abs/1902.05509, 3 in DeiT's recipe) each image comes so often in a row, every time
    drawn anew, and an epoch, as long as before, sees that much fewer images; the copies of an image are set apart, so
    that mixup, which mixes the first image of a batch with the last one, never mixes an image with itself.

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
                batch = list(zip(rounds, indices, strict=True))
                yield batch if self.repeats == 1 else separate_copies(batch)


def separate_copies(batch: list[Key]) -> list[Key]:
    """The batch with copies moved, so that no image is as far from the start as a copy of it is from the end.

    Where that is impossible, in batches of one or two images, the batch stays as it is.
    """
    batch, count = list(batch), len(batch)

    def collides(position: int) -> bool:
        return position != count - 1 - position and batch[position][1] == batch[count - 1 - position][1]

    for first in range(count // 2):
        if not collides(first):
            continue
        for other in range(count):
            if other in (first, count - 1 - first):
                continue
            batch[first], batch[other] = batch[other], batch[first]
            if not collides(first) and not collides(other):
                break
            batch[first], batch[other] = batch[other], batch[first]
    return batch


class EvalBatches(Sampler[list[Key]]):
    """Every image once: process r takes images r, r + world, r + 2 * world ... and the last batch may be short."""

    def __init__(self, num_samples: int, batch_size: int, *, rank: int, world_size: int):
        self.indices, self.batch_size = range(rank, num_samples, world_size), batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]
