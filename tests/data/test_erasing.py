"""Random erasing: the distribution is the same as in timm, and draws depend only on (seed, epoch, index)."""

import random

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from timm.data.random_erasing import RandomErasing

from data.erasing import Erase, draw_rectangles
from utils.random import Stream, draw_uniform, hash_keys

CPU = torch.device("cpu")
SIDE = 40


def boxes_of_timm(count: int, max_count: int) -> list[tuple[int, int, int, int]]:
    """Rectangles that timm erases in ``count`` images, recorded when timm overwrites their pixels."""
    boxes = []

    class RecordingTensor(torch.Tensor):
        def __setitem__(self, key, value):
            rows, columns = key[1:]
            boxes.append((rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))

    erase = RandomErasing(1.0, mode="const", max_count=max_count, device="cpu")
    image = torch.zeros(3, SIDE, SIDE).as_subclass(RecordingTensor)
    random.seed(0)
    for _ in range(count):
        erase(image)
    return boxes


def with_area_and_aspect(boxes: np.ndarray) -> list[np.ndarray]:
    """Columns of (N, 4) rectangles, their areas and their aspect ratios, which depend on both sides together."""
    _, _, heights, widths = boxes.T
    return [*boxes.T, heights * widths, heights / widths]


@pytest.mark.parametrize("max_count", [1, 3])
def test_rectangles_have_the_same_distribution_as_in_timm(max_count):
    state = hash_keys(0, [(0, index) for index in range(20_000)], Stream.ERASING)
    _, ours = draw_rectangles(state, SIDE, SIDE, probability=1.0, max_count=max_count)
    theirs = np.array(boxes_of_timm(5_000, max_count))
    assert len(ours) / 20_000 == pytest.approx(len(theirs) / 5_000, rel=0.02)
    for measured, expected in zip(with_area_and_aspect(ours), with_area_and_aspect(theirs), strict=True):
        assert ks_2samp(measured, expected).pvalue > 1e-3


def test_configured_fraction_of_images_is_erased_with_rectangles_inside_the_image():
    state = hash_keys(3, [(1, index) for index in range(20_000)], Stream.ERASING)
    positions, boxes = draw_rectangles(state, SIDE, SIDE, probability=0.25, max_count=1)
    assert len(positions) == pytest.approx(5000, rel=0.05)
    assert (np.diff(positions) > 0).all()
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= SIDE).all()
    assert (boxes[:, 1] + boxes[:, 3] <= SIDE).all()


def test_uniform_draws_are_uniform_and_independent():
    draws = draw_uniform(hash_keys(0, [(epoch, index) for epoch in range(4) for index in range(5000)], Stream.ERASING), 4)
    assert ((draws >= 0) & (draws < 1)).all()
    for column in draws.T:
        counts = np.histogram(column, bins=50, range=(0, 1))[0]
        assert ((counts - 400) ** 2 / 400).sum() < 94  # chi-square with 49 degrees of freedom, p = 1e-4
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.03


def test_splitmix64_reproduces_the_published_sequence():
    """The expected values are the first outputs of Vigna's reference implementation for the seed 1234567."""
    draws = draw_uniform(np.array([1234567], dtype=np.uint64), 3)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert draws[0].tolist() == [(value >> 11) * 2.0**-53 for value in expected]


def test_random_state_is_unique_for_each_seed_epoch_and_index():
    states = [
        hash_keys(seed, [(epoch, index)], Stream.ERASING)[0]
        for seed in (0, 1, 2**32 - 1)
        for epoch in range(3)
        for index in range(3)
    ]
    assert len(set(states)) == 27


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erasing_of_an_image_does_not_depend_on_its_batch(mode):
    keys = [(2, index) for index in range(16)]
    erase = Erase(0.5, mode=mode, max_count=2, seed=5, device=CPU)
    torch.manual_seed(1)
    images = torch.randn(16, 3, SIDE, SIDE)
    generator_state = torch.get_rng_state()
    batched = erase(images.clone(), keys)
    separate = torch.cat([erase(images[i : i + 1].clone(), keys[i : i + 1]) for i in reversed(range(16))]).flip(0)
    assert torch.equal(batched, separate)
    assert torch.equal(torch.get_rng_state(), generator_state)
    changed = (batched != images).any(dim=1)
    assert 4 <= changed.flatten(1).any(dim=1).sum() < 16
    values = batched.movedim(1, -1)[changed]  # (pixels, 3)
    if mode == "const":
        assert (values == 0).all()
    elif mode == "rand":
        assert len(values.unique(dim=0)) <= 32  # one colour per rectangle, and at most 2 rectangles in each of 16 images
        assert len(values.unique(dim=0)) >= 4
    else:
        assert abs(values.mean()) < 0.05
        assert values.std() == pytest.approx(1, abs=0.05)


def test_exactly_the_drawn_rectangles_are_erased():
    keys = [(0, index) for index in range(40)]
    erased = Erase(0.5, mode="const", max_count=2, seed=0, device=CPU)(torch.ones(40, 3, SIDE, SIDE), keys)
    expected = torch.ones(40, 3, SIDE, SIDE)
    positions, boxes = draw_rectangles(hash_keys(0, keys, Stream.ERASING), SIDE, SIDE, probability=0.5, max_count=2)
    for position, (top, left, height, width) in zip(positions, boxes, strict=True):
        expected[position, :, top : top + height, left : left + width] = 0
    assert torch.equal(erased, expected)


def test_two_rectangles_in_one_image_have_different_colours():
    erase = Erase(1.0, mode="rand", max_count=2, seed=0, device=CPU)
    keys = [(0, index) for index in range(40)]
    erased = erase(torch.full((40, 3, SIDE, SIDE), 9.0), keys)
    positions, _ = draw_rectangles(hash_keys(0, keys, Stream.ERASING), SIDE, SIDE, probability=1.0, max_count=2)
    images_with_two_rectangles = np.flatnonzero(np.bincount(positions) == 2)
    assert len(images_with_two_rectangles) > 5
    # Subtract 1 for the background. If one rectangle covers the other, only one colour remains.
    num_colours = [len(erased[image, 0].unique()) - 1 for image in images_with_two_rectangles.tolist()]
    assert max(num_colours) == 2
