"""The training and validation images of a run: where they are, and how DATA.VAL_FRACTION divides them. Without torch."""

import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from yacs.config import CfgNode

from data.files import DataError
from data.index import PARQUET, Index, select_images
from data.sources import list_layouts, missing_split, read_split
from data.sources.class_list import normalise
from data.sources.layout import DEFAULT_NAMES, Layout, has_class_directories, run_option

logger = logging.getLogger(__name__)

_TITLES = {"train": "training", "val": "validation"}


def build_index(cfg: CfgNode, split: str) -> Index:
    """List the images of one split, see ``build_indices``."""
    return build_indices(cfg, [split])[split]


def build_indices(cfg: CfgNode, splits: Sequence[str]) -> dict[str, Index]:
    """List the images of splits, in the layout in which each is found; only zip archives are read with --zip.

    Args:
        splits: "train", "val" or both.

    Returns:
        The index of each split. With DATA.VAL_FRACTION, "val" are the images held out from the training images.

    Raises:
        DataError: see ``build_split``, ``read_split`` and ``hold_out``.
    """
    # The path still starts with ~ if the home directory is unknown; the cache is then disabled.
    cache = Path(cfg.DATA.INDEX_CACHE) if cfg.DATA.INDEX_CACHE and not cfg.DATA.INDEX_CACHE.startswith("~") else None
    root, fraction = Path(cfg.DATA.DATA_PATH), cfg.DATA.VAL_FRACTION

    def read(split: str) -> Index:
        name, layout = build_split(cfg, split)
        return read_split(layout, root, name, cache=cache, option=run_option(split))

    if not fraction:
        return {split: read(split) for split in splits}
    index = read("train")
    positions = hold_out(index, fraction)
    logger.info(
        "%s: %d of %d images are held out for validation (DATA.VAL_FRACTION=%g)",
        index.source,
        len(positions["val"]),
        len(index),
        fraction,
    )
    return {split: select_images(index, positions[split]) for split in splits}


def build_split(cfg: CfgNode, split: str) -> tuple[str, Layout]:
    """Find the split of a run, "train" or "val", see ``find_split``.

    Training, evaluation and the checks of the command line use this function, so that they read the same images.

    Raises:
        DataError: see ``find_split``; or DATA.VAL_FRACTION is set although there is a validation split.
    """
    root, zip_mode = Path(cfg.DATA.DATA_PATH), cfg.DATA.ZIP_MODE
    requested = {"train": cfg.DATA.TRAIN_SPLIT, "val": cfg.DATA.VAL_SPLIT}[split]
    if cfg.DATA.VAL_FRACTION and not requested:
        _check_undivided(root, cfg.DATA.VAL_FRACTION, zip_mode=zip_mode)
        if not zip_mode and not list_layouts(root, "train") and has_class_directories(root):
            requested = "."
    return find_split(root, split, requested, zip_mode=zip_mode, option=run_option(split))


def find_split(root: Path, split: str, requested: str = "", *, zip_mode: bool = False, option: str) -> tuple[str, Layout]:
    """Find a split: the requested one, or else the first default name that exists in any layout. Log what may be unexpected.

    Args:
        split: "train" or "val".
        requested: name, path or pattern, see ``Layout``.
        option: command-line option that selects the split, for messages.

    Returns:
        Name of the split, and its layout.

    Raises:
        DataError: there is no such split; the message suggests how to read what lies in its place.
    """
    names = [requested] if requested else DEFAULT_NAMES[split]
    found = {name: layouts for name in names if (layouts := list_layouts(root, name, zip_mode=zip_mode))}
    if not found:
        kind = "zip archive" if zip_mode else "directory or archives"
        alternatives = f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
        reason = f"{root}: no {_TITLES[split]} split: no {kind} named {alternatives}"
        raise missing_split(reason, root, names[0], zip_mode=zip_mode, option=option)
    name, (layout, *others) = next(iter(found.items()))
    for other in others:
        logger.warning("%s is read, but not the %s beside it, such as %s", layout.path, other.title, other.files()[0])
    # A test set beside a validation set is usual.
    if unused := [layouts[0].path for other, layouts in found.items() if other not in (name, "test")]:
        logger.warning("%s is read for validation, but not %s; choose with %s NAME", layout.path, unused[0], option)
    elif name != names[0]:
        logger.info("%s is read for %s; choose another split with %s NAME", layout.path, _TITLES[split], option)
    return name, layout


def lacks_splits(root: Path) -> bool:
    """Whether a directory has class directories, as that of ImageNet-A, and no validation split in any layout."""
    return has_class_directories(root) and not any(list_layouts(root, name) for name in DEFAULT_NAMES["val"])


def build_too_few_images_error(
    cfg: CfgNode, source: Path, num_images: int, accumulation: int, world_size: int, *, bound: str = ""
) -> DataError:
    """The error for fewer training images than one update needs.

    Args:
        accumulation: forward passes per update.
        bound: "at most " if the number of images is not known exactly.
    """
    size = suggest_batch_size(num_images, world_size)
    if num_images < world_size:
        advice = f"start at most {num_images} processes, or add images"
    elif cfg.DATA.GLOBAL_BATCH_SIZE:
        advice = f"add --batch-size {size} --opts DATA.GLOBAL_BATCH_SIZE {size * world_size}"
    else:
        advice = f"add --batch-size {size}{' --opts TRAIN.ACCUMULATION_STEPS 1' if accumulation > 1 else ''}"
    return DataError(
        f"{source} has {bound}{num_images} images, but one update needs {cfg.DATA.BATCH_SIZE * accumulation * world_size} "
        f"(DATA.BATCH_SIZE={cfg.DATA.BATCH_SIZE}, forward passes per update: {accumulation}, processes: {world_size}); {advice}"
    )


def suggest_batch_size(num_images: int, world_size: int) -> int:
    """Images per process and update: a power of two for at least five updates per epoch, divided among the processes."""
    global_batch = 2 ** (max(num_images // 5, 1).bit_length() - 1)
    return max(global_batch // world_size, 1)


def _check_undivided(root: Path, fraction: float, *, zip_mode: bool) -> None:
    """Check that there is no validation split beside the training images of which a fraction is to be held out.

    A test split is no validation split: it may be meant for a final evaluation.
    """
    for name in DEFAULT_NAMES["val"]:
        if name != "test" and (layouts := list_layouts(root, name, zip_mode=zip_mode)):
            raise DataError(
                f"DATA.VAL_FRACTION={fraction:g} holds out a part of the training images for validation, but there is "
                f"{layouts[0].path}: add --opts DATA.VAL_FRACTION 0 to validate on it, or --opts DATA.TRAIN_SPLIT train to "
                "hold out training images anyway"
            )


def hold_out(index: Index, fraction: float) -> dict[str, np.ndarray]:
    """Divide images into training and validation images, each class in the same proportion.

    The choice depends on nothing but the names of the files: the images of each class are ordered by a hash of the name, see
    ``_hashed_name``, and the first ones are held out. The same images are therefore held out for every seed, layout and order
    of the files.

    Args:
        fraction: fraction of the images of each class to hold out, rounded; at least one image, but not all.

    Returns:
        Positions of the images of "train" and "val", ascending.

    Raises:
        DataError: a class has only one image.
    """
    groups: list[list[tuple[bytes, int]]] = [[] for _ in index.classes]
    for position, label in enumerate(index.labels):
        groups[label].append((hashlib.blake2b(_hashed_name(index.name(position)), digest_size=8).digest(), position))
    is_held_out = np.zeros(len(index), dtype=bool)
    for label, group in enumerate(groups):
        if len(group) < 2:
            raise DataError(
                f"{index.source}: class {index.classes[label]} has only one image, but DATA.VAL_FRACTION={fraction:g} needs "
                "one for training and one for validation; add images, or remove this class"
            )
        count = min(max(math.floor(len(group) * fraction + 0.5), 1), len(group) - 1)
        is_held_out[[position for _, position in sorted(group)[:count]]] = True
    return {"train": np.flatnonzero(~is_held_out), "val": np.flatnonzero(is_held_out)}


def digest_held_out(index: Index) -> str:
    """Digest of the class ids and names of held-out images: equal for all copies, as the choice of ``hold_out``."""
    names = sorted((int(label), _hashed_name(index.name(position))) for position, label in enumerate(index.labels))
    return hashlib.sha256(repr(names).encode()).hexdigest()[:16]


def _hashed_name(path: str) -> bytes:
    """The name of an image that determines whether it is held out: equal for all copies in other directories and archives.

    It is the file name without directory and extension. Dots count as underscores, as in tar shards, and both Unicode forms of
    a name are equal, since copies from macOS change the form. Unnamed rows of a parquet shard, and their copies in archives,
    are named by shard and number.
    """
    folder, _, name = path.rpartition("/")
    stem = (name.rpartition(".")[0] or name).replace(".", "_")
    if folder.endswith(PARQUET):
        stem = f"{folder.rpartition('/')[2]}/{stem}"
    return normalise(stem).encode(errors="surrogateescape")
