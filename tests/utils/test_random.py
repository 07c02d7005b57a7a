"""The seeds of a run's random draws, compared with values recorded from an earlier version."""

import random

import numpy as np
import torch

from data.samplers import epoch_order
from utils.random import Stream, draw_seed, hash_keys, restore_generators, seed_generators, seed_of_pass


def test_seeds_are_those_of_earlier_versions_so_that_their_runs_resume_with_the_same_draws():
    assert {stream.name: stream.value for stream in Stream} == {
        "ERASING": 1,
        "MIXUP": 2,
        "MODEL": 3,
        "REPLACEMENT": 4,
        "RAND_AUGMENT": 5,
    }
    assert draw_seed(7, 3, 11) == 3011630493
    assert draw_seed(7, 5, 1, Stream.MIXUP) == 3599739310
    assert seed_of_pass(7, 5, 1) == 562649653
    assert draw_seed(7, 3, 11, Stream.REPLACEMENT, 1) == 3581981290
    assert hash_keys(7, [(3, 11)], Stream.ERASING).tolist() == [7428708843995214849]
    assert epoch_order(6, 7, 3).tolist() == [1, 5, 2, 4, 0, 3]


def test_the_states_of_the_generators_are_restored_after_draws():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    seed_generators(1)
    expected = draw()
    seed_generators(1)
    with restore_generators():
        draw()
    assert draw() == expected
