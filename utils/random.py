"""Random numbers: the streams of a run, the seed of each draw, and the states of the global generators.

A draw is seeded from the numbers that identify it, so checkpoints need no generator state:

| draw | seeded from |
|---|---|
| order of the images in an epoch | seed, epoch |
| augmentation of an image | seed, epoch, index |
| random erasing of an image | seed, epoch, index; ``Stream.ERASING`` |
| RandAugment of an image on the device | seed, epoch, index; ``Stream.RAND_AUGMENT`` |
| mixup of a batch | seed, forward pass, rank; ``Stream.MIXUP`` |
| the model's drop path and dropout | seed, forward pass, rank; ``Stream.MODEL`` |
| replacement of an unreadable image | seed, epoch, index; ``Stream.REPLACEMENT``; number of the attempt |
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum, unique

import numpy as np
import torch

GOLDEN = 0x9E3779B97F4A7C15  # increment of SplitMix64


@unique
class Stream(IntEnum):
    """A number that is hashed into seeds, so that different kinds of draws with equal identifiers differ.

    A resumed run needs the same draws as before, so these numbers must not change.
    """

    ERASING = 1
    MIXUP = 2
    MODEL = 3
    REPLACEMENT = 4
    RAND_AUGMENT = 5


def draw_seed(*identifiers: int) -> int:
    """Hash the numbers that identify a draw, such as (seed, epoch, index), to a 32-bit seed."""
    return int(np.random.SeedSequence(identifiers).generate_state(1)[0])


def mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele et al., OOPSLA 2014), elementwise. uint64 -> uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_keys(seed: int, keys: np.ndarray | Sequence[tuple[int, int]], stream: Stream) -> np.ndarray:
    """Hash (seed, epoch, index) of each image of a batch. Returns (B,) uint64."""
    state = mix(np.full(len(keys), (seed + 1) * GOLDEN + stream & (2**64 - 1), dtype=np.uint64))
    for values in np.array(keys, dtype=np.uint64).reshape(-1, 2).T:
        state = mix(state + (values + np.uint64(1)) * np.uint64(GOLDEN))
    return state


def draw_uniform(state: np.ndarray, num_draws: int) -> np.ndarray:
    """Uniform draws in [0, 1). (B,) -> (B, num_draws)."""
    steps = np.arange(1, num_draws + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return (mix(state[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def seed_of_pass(seed: int, forward_pass: int, rank: int) -> int:
    """Seed of the model's draws (drop path, dropout) in one forward pass of one process."""
    return draw_seed(seed, forward_pass, rank, Stream.MODEL)


def seed_generators(seed: int) -> None:
    """Seed the CPU generators of ``random``, ``numpy`` and ``torch``."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also seeds the GPU backends, which takes 300 times as long


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the generators of torch on the CPU and on one device; ``torch.manual_seed`` would seed those of all GPUs."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def restore_generators() -> Iterator[None]:
    """Restore the states of the CPU generators of ``random``, ``numpy`` and ``torch`` on exit."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
