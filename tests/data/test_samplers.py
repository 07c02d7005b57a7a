from collections import Counter
from itertools import chain

import numpy as np
import pytest

from data.samplers import TrainBatches

LABELS = np.array([0] * 50 + [1] * 4 + [2] * 7)[np.random.default_rng(0).permutation(61)]  # 61 = 3 * 20 + 1


def flat(lists):
    return list(chain.from_iterable(lists))


def read_epoch(epoch, *, world_size=1, batch_size=4, accumulation=1, first_update=0, seed=3, repeats=1):
    """Keys of each update of an epoch, sorted within updates."""
    updates = []
    for rank in range(world_size):
        options = {"accumulation": accumulation, "repeats": repeats, "drop_last": False, "labels": LABELS, "seed": seed}
        batches = TrainBatches(61, batch_size, rank=rank, world_size=world_size, **options)
        batches.set_position(epoch, first_update)
        keys = list(batches)
        updates.append([flat(keys[i : i + accumulation]) for i in range(0, len(keys), accumulation)])
    return [sorted(flat(parts)) for parts in zip(*updates, strict=True)]


def test_a_balanced_epoch_has_as_many_images_of_each_class_and_uses_those_of_a_class_equally_often():
    positions = [np.flatnonzero(np.equal(LABELS, label)).tolist() for label in range(3)]
    for epoch in range(3):
        keys = list(dict.fromkeys(flat(read_epoch(epoch))))  # the last update repeats the first three keys
        assert len(keys) == 61
        images = Counter(index for _, index in keys)
        assert sorted(Counter(LABELS[index] for _, index in keys).values()) == [20, 20, 21]
        for label, counts in ((0, {0, 1}), (1, {5, 6}), (2, {2, 3})):
            assert {images[index] for index in positions[label]} <= counts
        batches = TrainBatches(61, 4, accumulation=1, drop_last=False, labels=LABELS, rank=0, world_size=1, seed=3)
        assert 0 <= len(images) - batches.count_images() <= 1
    assert read_epoch(0) != read_epoch(1)


def test_all_copies_of_an_image_in_all_balanced_epochs_have_different_keys_and_thus_augmentations():
    for repeats in (1, 3):
        keys = [key for epoch in range(4) for key in set(flat(read_epoch(epoch, repeats=repeats)))]
        assert len(keys) == len(set(keys)) == 4 * 61


@pytest.mark.parametrize("division", [{"world_size": 2, "batch_size": 2}, {"batch_size": 1, "accumulation": 4}])
def test_balanced_updates_are_the_same_for_any_number_of_processes_and_from_any_position(division):
    assert read_epoch(2, **division) == read_epoch(2)
    assert read_epoch(2, first_update=5, **division) == read_epoch(2)[5:]
