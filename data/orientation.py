"""Warn about photographs that are read sideways, since their EXIF orientation is not applied (DATA.EXIF)."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from data.decoding import UPRIGHT, open_image, read_orientation

logger = logging.getLogger(__name__)

NUM_SAMPLES = 256  # images of which the beginning is read
NUM_ENTIRE = 32  # images that are read to the end, if the beginning does not suffice


def warn_if_turned(
    title: str, num_images: int, *, read_beginning: Callable[[int], bytes], read: Callable[[int], bytes]
) -> None:
    """Warn if images of a sample have an EXIF orientation other than upright.

    Args:
        title: what the images are, for the message, such as "the training images in photos".
        read_beginning: returns the first bytes of an image, given its position; called by several threads.
        read: returns all bytes of an image.
    """
    positions = _evenly_spaced(range(num_images), NUM_SAMPLES)
    with ThreadPoolExecutor(8) as pool:  # network disks have a high latency
        found = list(pool.map(partial(_is_turned, read_beginning), positions))
    # Files of some formats have their EXIF data at the end, and the beginning of an archive's data may be compressed.
    unknown = [position for position, turned in zip(positions, found, strict=True) if turned is None]
    found += [_is_turned(read, position) for position in _evenly_spaced(unknown, NUM_ENTIRE)]
    if num_turned := found.count(True):
        logger.warning(
            "%s: %d of the %d looked at are stored sideways, upside down or mirrored, and their EXIF orientation is not "
            "applied; --opts DATA.EXIF True turns them upright (it is off for the published accuracies)",
            title,
            num_turned,
            num_turned + found.count(False),
        )


def _evenly_spaced(positions: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the positions."""
    chosen = np.linspace(0, len(positions) - 1, min(count, len(positions))).astype(int)
    return [positions[number] for number in chosen]


def _is_turned(read: Callable[[int], bytes], position: int) -> bool | None:
    """Whether an image has an orientation other than upright; None if the bytes that are read are not an image."""
    try:
        with open_image(read(position)) as file:
            return read_orientation(file) != UPRIGHT
    except Exception:  # too few bytes, or an unreadable image, which is reported when it is used
        return None
