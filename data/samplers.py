"""Batch samplers that depend only on (seed, epoch, update), so that checkpoints need no sampler state."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from data.datasets import Key
from utils.random import draw_seed


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """Permutation of the images in one epoch."""
    generator = torch.Generator().manual_seed(draw_seed(seed, epoch))
    return torch.randperm(num_samples, generator=generator)


def balanced_order(images_of_class: Sequence[Tensor], seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Images of one epoch in random order, with equal numbers of each class, up to one image.

    A class with fewer images than its share repeats all of them in turn, each time in another order; a class with more images
    uses a random part of them.

    Args:
        images_of_class: indices of the images of each class, at least one.

    Returns:
        (N,) image indices, and (N,) how often each image occurred before in this epoch, for N images in all classes.
    """
    generator = torch.Generator().manual_seed(draw_seed(seed, epoch))
    num_samples, num_classes = sum(map(len, images_of_class)), len(images_of_class)
    shares = torch.full((num_classes,), num_samples // num_classes)
    shares[torch.randperm(num_classes, generator=generator)[: num_samples % num_classes]] += 1
    chosen, copies = [], []
    for images, share in zip(images_of_class, shares.tolist(), strict=True):
        rounds = [images[torch.randperm(len(images), generator=generator)] for _ in range(math.ceil(share / len(images)))]
        chosen.append(torch.cat(rounds)[:share])
        copies.append(torch.arange(share) // len(images))
    order = torch.randperm(num_samples, generator=generator)
    return torch.cat(chosen)[order], torch.cat(copies)[order]


def count_copies(labels: np.ndarray) -> int:
    """Maximum number of times that an image occurs in an epoch of ``balanced_order``. labels: class id of each image."""
    _, counts = np.unique(labels, return_counts=True)
    return math.ceil(math.ceil(len(labels) / len(counts)) / counts.min())


class TrainBatches(Sampler[list[Key]]):
    """Training batches of one process for one epoch. All batches have the same size.

    If the images of an epoch do not fill the last update, its images are dropped, or, without ``drop_last``, it is completed
    with the first images of the epoch.

    Update u uses positions u * G to (u + 1) * G - 1 of the epoch's permutation of the images, where G is the global batch size.
    These images are divided among forward passes and processes, so that an update uses the same images with any number of
    processes, if G is the same.

    With ``repeats`` above 1 (repeated augmentation, https://arxiv.org/abs/1902.05509; 3 in DeiT's recipe), an update uses
    ``repeats`` copies of each of its images, with different augmentations: first one copy of every image, then the second
    copies, and so on. The number of updates per epoch is unchanged, so an epoch uses fewer distinct images. The collate
    function then reorders each batch with ``separate_copies``, so that, if possible, mixup does not mix an image with its own
    copy.

    Args:
        num_samples: size of the dataset.
        batch_size: images per process and forward pass.
        accumulation: forward passes per update.
        repeats: copies of an image per epoch.
        rank, world_size: rank of this process, and number of processes.
        seed: the run's seed.
        labels: class id of each image, for epochs with equal numbers of images of each class, see ``balanced_order``; None for
            epochs with each image once.
        drop_last: see above. Even without it, there must be enough images for one update.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        accumulation: int,
        repeats: int = 1,
        drop_last: bool = True,
        labels: np.ndarray | None = None,
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
        if self.updates_per_epoch and not drop_last:
            self.updates_per_epoch = math.ceil(num_samples / self.global_batch_size)
        self.images_of_class: list[Tensor] = []
        self.max_copies = 1  # maximum number of times that an image occurs in an epoch, apart from repeated augmentation
        if labels is not None and num_samples:
            _, counts = np.unique(labels, return_counts=True)
            self.images_of_class = list(torch.from_numpy(np.argsort(labels, kind="stable")).split(counts.tolist()))
            self.max_copies = count_copies(labels)
        self.set_position(0, 0)

    def count_images(self) -> int:
        """Number of distinct images in an epoch.

        With balanced classes, this is an estimate: the class sizes are rounded, and if images do not fill the last update, or
        with repeated augmentation, the part of an epoch that is used is random.
        """
        used = min(self.updates_per_epoch * self.global_batch_size, self.num_samples) // self.repeats
        if not self.images_of_class:
            return used
        share = used // len(self.images_of_class)
        return sum(min(len(images), share) for images in self.images_of_class)

    def set_position(self, epoch: int, first_update: int) -> None:
        """Set the epoch to read next, and the update of this epoch to start from."""
        self.epoch = epoch
        self.first_update = first_update

    def __len__(self) -> int:
        return (self.updates_per_epoch - self.first_update) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        if self.images_of_class:
            order, copies = balanced_order(self.images_of_class, self.seed, self.epoch)
        else:
            order = epoch_order(self.num_samples, self.seed, self.epoch)
            copies = torch.zeros_like(order)
        for update in range(self.first_update, self.updates_per_epoch):
            positions = update * self.global_batch_size + torch.arange(self.global_batch_size)
            positions = positions[(positions % self.repeats).argsort(stable=True)]
            for forward_pass in range(self.accumulation):
                start = (forward_pass * self.world_size + self.rank) * self.batch_size
                batch = positions[start : start + self.batch_size] % self.num_samples
                sources = batch // self.repeats
                # An epoch number per copy, so that augmentations differ.
                epochs = (self.epoch * self.repeats + batch % self.repeats) * self.max_copies + copies[sources]
                yield list(zip(epochs.tolist(), order[sources].tolist(), strict=True))


def partner(position: int, count: int) -> int:
    """Position of the image that mixup mixes with the image at ``position`` in a batch of ``count`` images.

    Mixup mixes a batch with the same batch in reverse order; if ``count`` is odd, it mixes the middle image with the first one.
    """
    opposite = count - 1 - position
    return opposite if opposite != position else 0


def separate_copies(indices: list[int]) -> list[int]:
    """Find an order of a batch in which mixup does not mix an image with a copy of itself.

    In small batches, copies may still be mixed: such an order may not exist, and the greedy search may not find it.

    Args:
        indices: (B,) index of each image; equal indices are copies.

    Returns:
        (B,) positions of the images in their new order; 0, 1, ..., B - 1 if no change is needed.
    """
    count, order = len(indices), list(range(len(indices)))

    def mixes_copies(*positions: int) -> bool:
        return any(indices[order[position]] == indices[order[partner(position, count)]] for position in positions)

    middle = [count // 2] * (count % 2)  # its partner is position 0, whose image a swap may have replaced
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
