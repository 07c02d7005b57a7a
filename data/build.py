"""Build datasets, loaders and mixup from a config."""

import logging
import math
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data.classes import (
    check_class_names,
    check_classes,
    check_real_labels,
    predictable_classes,
    read_class_map,
    read_real_labels,
)
from data.datasets import ImageDataset
from data.decoding import decode_image, decode_pixels
from data.erasing import Erase
from data.files import DataError
from data.index import Index, read_beginning
from data.loader import DeviceLoader, TrainLoader, collate
from data.mixup import StepMixup
from data.orientation import warn_if_turned
from data.rand_augment import RandAugment
from data.rows import CACHE_SIZE
from data.samplers import EvalBatches, TrainBatches, count_copies
from data.sources.folder import find_linked_class
from data.splits import build_indices, build_too_few_images_error
from data.transforms import (
    Normalize,
    Transform,
    TransformSchedule,
    check_policy,
    create_eval_transform,
    create_train_transform,
)
from data.workers import BATCHES_PER_WORKER, WatchedDataset, create_loader, warn_about_shared_memory
from models.preprocessing import MAX_SMALL_SIZE
from models.registry import build_preprocessing
from utils.config.arguments import check_data_path
from utils.config.loading import image_size, train_sizes
from utils.config.rules import mixes
from utils.devices import count_cores
from utils.random import restore_generators

logger = logging.getLogger(__name__)

MAX_DEFAULT_WORKERS = 16  # enough for one H100: 3,900 images/s at 280 images/s per core; more only use memory
NUM_COMPARED_IMAGES = 16  # images that are compared if two splits have the same labels


@dataclass(frozen=True)
class Datasets:
    """Datasets of a run; ``train`` is None if the run only evaluates.

    class_ids: with TEST.CLASS_MAP, the model's class id for each class that can be predicted, those of the dataset first; else
        None.
    real_labels: all correct labels of each validation image, if TEST.REAL_LABELS is set.
    restriction: if the dataset has a part of the model's classes, says whether predictions are restricted to them; else "".
    """

    train: ImageDataset | None
    val: ImageDataset
    class_ids: list[int] | None = None
    real_labels: list[list[int]] | None = None
    restriction: str = ""


def build_datasets(
    cfg: CfgNode,
    *,
    training: bool,
    rank: int = 0,
    world_size: int = 1,
    run_once: Callable[[Callable[[], Any]], Any] = lambda task: task(),
    model_classes: Sequence[str] = (),
) -> Datasets:
    """Build the datasets of a run, and check that the classes of the splits match each other and the model.

    Args:
        run_once: calls its argument on one process, and returns the result on every process. It is used for tasks that read
            many files or log warnings.
        model_classes: class names with which the evaluated checkpoint was trained, by class id; () if unknown.

    Raises:
        ConfigError: DATA.DATA_PATH is empty.
        DataError: missing directories, or classes that do not match.
    """
    check_data_path(cfg)
    indices = run_once(lambda: build_indices(cfg, ("train", "val") if training else ("val",)))
    train = None
    if training:
        index = indices["train"]
        in_memory = build_positions_in_memory(cfg, len(index), rank=rank, world_size=world_size)
        run_once(lambda: warn_if_slow(indices["train"], cfg.DATA.DATA_PATH))
        train = _build_train_dataset(cfg, index, in_memory)
    index = indices["val"]
    in_memory = build_positions_in_memory(cfg, len(index), rank=rank, world_size=world_size)
    preprocessing = build_preprocessing(cfg)
    decoder = partial(decode_image, exif=preprocessing.exif)
    val = ImageDataset(index, create_eval_transform(preprocessing), decoder=decoder, in_memory=in_memory)
    if train is not None and not cfg.DATA.VAL_FRACTION:
        run_once(lambda: warn_if_shared(train.index, val.index))
    if train is not None:
        check_classes(train.index.classes, index.classes, cfg.MODEL.NUM_CLASSES, cfg.DATA.DATA_PATH)
    class_ids, restriction = (
        (None, "") if training else run_once(lambda: build_class_ids(cfg, val.index.classes, model_classes))
    )
    real_labels = None
    if cfg.TEST.REAL_LABELS:
        real_labels = read_real_labels(cfg.TEST.REAL_LABELS, [index.name(position) for position in range(len(index))])
        targets = index.labels if class_ids is None else np.array(class_ids)[index.labels]
        check_real_labels(real_labels, targets.tolist(), cfg.TEST.REAL_LABELS)
    if not cfg.DATA.EXIF:
        images = {"validation images": val} if train is None else {"training images": train, "validation images": val}
        run_once(partial(_warn_if_turned, images))
    logger.info(
        "data: %s%d validation images, %d classes",
        f"{len(train)} training images, " if train else "",
        len(val),
        len(index.classes),
    )
    return Datasets(train, val, class_ids, real_labels, restriction)


def _build_train_dataset(cfg: CfgNode, index: Index, in_memory: range) -> ImageDataset:
    # ``decode_pixels`` is faster, but the transform for small sizes accepts only Pillow images.
    decode = decode_pixels if min(max(size) for _, size in train_sizes(cfg)) > MAX_SMALL_SIZE else decode_image
    # The epochs in the keys of images count the copies of an image in an epoch, see ``TrainBatches``.
    copies = cfg.AUG.REPEATS * (count_copies(index.labels) if cfg.DATA.SAMPLING == "balanced" else 1)
    return ImageDataset(
        index,
        build_train_transform(cfg, copies=copies),
        decoder=partial(decode, exif=cfg.DATA.EXIF),
        seed=cfg.SEED,
        unreadable=cfg.DATA.UNREADABLE,
        in_memory=in_memory,
    )


def build_class_ids(cfg: CfgNode, classes: Sequence[str], model_classes: Sequence[str]) -> tuple[list[int] | None, str]:
    """Match the classes of a dataset with those of the evaluated model. Returns ``class_ids`` and ``restriction`` of Datasets.

    Raises:
        DataError: the classes do not match.
    """
    if not cfg.TEST.CLASS_MAP:
        check_classes(None, classes, cfg.MODEL.NUM_CLASSES, cfg.DATA.DATA_PATH, model_classes)
        check_class_names(classes, model_classes, cfg.DATA.DATA_PATH)
        return None, ""
    class_ids = read_class_map(cfg.TEST.CLASS_MAP, classes, cfg.MODEL.NUM_CLASSES, model_classes)
    class_ids, restriction = predictable_classes(class_ids, cfg.MODEL.NUM_CLASSES, restrict=cfg.TEST.RESTRICT_CLASSES)
    if restriction:
        logger.warning("TEST.CLASS_MAP=%s: %s", cfg.TEST.CLASS_MAP, restriction)
    return class_ids, restriction


def _warn_if_turned(datasets: dict[str, ImageDataset]) -> None:
    for title, dataset in datasets.items():
        index = dataset.index
        read = ImageDataset(index, dataset.transform).read  # a copy, which keeps no files open
        warn_if_turned(f"{title} in {index.source}", len(index), read_beginning=partial(read_beginning, index), read=read)


def warn_if_shared(train: Index, val: Index) -> None:
    """Warn if validation images are also training images: the same directories or archives, or splits with the same labels and
    contents.
    """
    if archives := set(map(os.path.realpath, train.archives)) & set(map(os.path.realpath, val.archives)):
        logger.warning(
            "%s is read for training and for validation: the validation accuracy does not measure generalisation",
            min(archives),
        )
        return
    shared = find_linked_class(val, train) if not train.archives and not val.archives else ""
    if not shared and np.array_equal(train.labels, val.labels):
        positions = range(0, len(val), max(len(val) // NUM_COMPARED_IMAGES, 1))
        pairs = ((read_beginning(train, position), read_beginning(val, position)) for position in positions)
        if all(first == second != b"" for first, second in pairs):
            shared = val.classes[0]
    if shared:
        logger.warning(
            "%s and %s have the same images, in class %s for example: the validation accuracy does not measure generalisation",
            train.source,
            val.source,
            shared,
        )


def warn_if_slow(train: Index, root: str) -> None:
    """Warn if training in random order decompresses a row group of a parquet file for each image, see ``data.rows``."""
    if train.has_rows and train.sizes.sum() > CACHE_SIZE:
        logger.warning(
            "%s: from parquet shards, training decompresses a whole row group for each image, which may halve the throughput; "
            "to avoid this, pack the images once: python scripts/pack_dataset.py %s DIRECTORY",
            train.source,
            shlex.quote(root),
        )


def build_positions_in_memory(cfg: CfgNode, num_images: int, *, rank: int, world_size: int) -> range:
    """Positions of the zip archive's images that this process keeps in memory: none, all, or every ``world_size``-th."""
    if not cfg.DATA.ZIP_MODE or cfg.DATA.CACHE_MODE == "no":
        return range(0)
    return range(num_images) if cfg.DATA.CACHE_MODE == "full" else range(rank, num_images, world_size)


def build_train_transform(cfg: CfgNode, *, copies: int = 1) -> Transform | TransformSchedule:
    """Build the training augmentation in the loader workers, for each size of TRAIN.SIZE_SCHEDULE.

    Args:
        copies: number of epochs in the keys of images per epoch of the run.

    Raises:
        DataError: an invalid AUG.AUTO_AUGMENT.
    """
    policy, on_device = cfg.AUG.AUTO_AUGMENT, cfg.AUG.DEVICE_RANDAUGMENT
    options = {
        "interpolation": cfg.DATA.INTERPOLATION,
        "mean": cfg.DATA.MEAN,
        "scale": cfg.AUG.SCALE,
        "ratio": cfg.AUG.RATIO,
        "hflip": cfg.AUG.HFLIP,
        "color_jitter": 0 if on_device else cfg.AUG.COLOR_JITTER,
        "auto_augment": "none" if on_device else policy,
    }
    try:
        check_policy(policy)
        transforms = [(epoch, create_train_transform(size, **options)) for epoch, size in train_sizes(cfg)]
        with restore_generators():
            transforms[0][1](Image.new("RGB", (64, 64)))
        if on_device:
            build_rand_augment(cfg, torch.device("cpu"))
    except (AssertionError, KeyError, ValueError) as error:
        raise DataError(
            f"AUG.AUTO_AUGMENT={policy!r}: not a timm policy ({error}); use, for example, rand-m9-mstd0.5-inc1, or none"
        ) from None
    if len(transforms) == 1:
        return transforms[0][1]
    return TransformSchedule([(epoch * copies, transform) for epoch, transform in transforms])


def build_rand_augment(cfg: CfgNode, device: torch.device) -> RandAugment | None:
    """Build RandAugment on the device; None if AUG.AUTO_AUGMENT is applied in the loader workers.

    Raises:
        DataError: an unsupported AUG.AUTO_AUGMENT.
    """
    if not cfg.AUG.DEVICE_RANDAUGMENT:
        return None
    policy, interpolation = cfg.AUG.AUTO_AUGMENT, cfg.DATA.INTERPOLATION
    return RandAugment(policy, mean=cfg.DATA.MEAN, interpolation=interpolation, seed=cfg.SEED, device=device)


def build_train_loader(
    cfg: CfgNode,
    dataset: ImageDataset,
    *,
    accumulation: int = 1,
    rank: int,
    world_size: int,
    device: torch.device,
    num_cores: int | None = None,
) -> TrainLoader:
    """Build the training loader.

    Args:
        num_cores: CPU cores for this process; all that it may use by default.

    Raises:
        DataError: fewer images than one update needs.
    """
    batches = TrainBatches(
        len(dataset),
        cfg.DATA.BATCH_SIZE,
        accumulation=accumulation,
        repeats=cfg.AUG.REPEATS,
        drop_last=cfg.DATA.DROP_LAST,
        labels=dataset.index.labels if cfg.DATA.SAMPLING == "balanced" else None,
        rank=rank,
        world_size=world_size,
        seed=cfg.SEED,
    )
    if batches.updates_per_epoch == 0:
        raise build_too_few_images_error(cfg, dataset.index.source, len(dataset), accumulation, world_size)
    if batches.max_copies > 1:
        logger.info("DATA.SAMPLING=balanced: an image of the rarest class occurs up to %d times per epoch", batches.max_copies)
    erase = None
    if cfg.AUG.REPROB > 0:
        erase = Erase(cfg.AUG.REPROB, mode=cfg.AUG.REMODE, max_count=cfg.AUG.RECOUNT, seed=cfg.SEED, device=device)
    normalize = Normalize(cfg.DATA.MEAN, cfg.DATA.STD, device)
    loader = _create_loader(cfg, dataset, batches, device, num_cores)
    logger.info("loader workers: %d for each process, which has %d CPU core(s)", loader.num_workers, num_cores or count_cores())
    # During an evaluation, its batches and those of the next epoch are in memory.
    num_pixels = max(math.prod(size) for size in (image_size(cfg), *(size for _, size in train_sizes(cfg))))
    warn_about_shared_memory(2 * loader.num_workers * BATCHES_PER_WORKER * cfg.DATA.BATCH_SIZE * 3 * num_pixels)
    rand_augment = build_rand_augment(cfg, device)
    limit = cfg.DATA.MAX_UNREADABLE
    return TrainLoader(loader, normalize, device, rand_augment=rand_augment, erase=erase, max_unreadable=limit)


def build_eval_loader(
    cfg: CfgNode, dataset: ImageDataset, *, rank: int, world_size: int, device: torch.device, num_cores: int | None = None
) -> DeviceLoader:
    """Build the loader of the validation images. Args: see ``build_train_loader``."""
    batch_size = cfg.TEST.BATCH_SIZE or cfg.DATA.BATCH_SIZE
    batches = EvalBatches(len(dataset), batch_size, rank=rank, world_size=world_size)
    loader = _create_loader(cfg, dataset, batches, device, num_cores)
    return DeviceLoader(loader, Normalize(cfg.DATA.MEAN, cfg.DATA.STD, device), device)


def build_mixup(cfg: CfgNode, *, rank: int = 0, passes_per_epoch: int = 1) -> StepMixup | None:
    """Build mixup and CutMix; None if both are disabled. Without them, targets remain class ids.

    Args:
        passes_per_epoch: forward passes per epoch, for AUG.MIXUP_OFF_EPOCH.
    """
    if not mixes(cfg):
        return None
    return StepMixup(
        seed=cfg.SEED,
        rank=rank,
        end=cfg.AUG.MIXUP_OFF_EPOCH * passes_per_epoch or math.inf,
        mixup_alpha=cfg.AUG.MIXUP,
        cutmix_alpha=cfg.AUG.CUTMIX,
        cutmix_minmax=cfg.AUG.CUTMIX_MINMAX,
        prob=cfg.AUG.MIXUP_PROB,
        switch_prob=cfg.AUG.MIXUP_SWITCH_PROB,
        mode=cfg.AUG.MIXUP_MODE,
        label_smoothing=cfg.MODEL.LABEL_SMOOTHING,
        num_classes=cfg.MODEL.NUM_CLASSES,
    )


def build_num_workers(cfg: CfgNode, num_cores: int) -> int:
    """Number of loader workers: DATA.NUM_WORKERS, or the number of CPU cores for this process if that is lower.

    By default (-1), one core is left to the training process.
    """
    if cfg.DATA.NUM_WORKERS < 0:
        return min(max(num_cores - 1, 1), MAX_DEFAULT_WORKERS)
    return min(cfg.DATA.NUM_WORKERS, num_cores)


def _create_loader(cfg: CfgNode, dataset: ImageDataset, batches, device: torch.device, num_cores: int | None) -> DataLoader:
    num_workers = build_num_workers(cfg, num_cores or count_cores())
    return create_loader(
        WatchedDataset(dataset, num_workers),
        num_workers=num_workers,
        batch_sampler=batches,
        collate_fn=collate,
        prefetch_factor=BATCHES_PER_WORKER if num_workers else None,
        pin_memory=cfg.DATA.PIN_MEMORY and device.type == "cuda",
        timeout=cfg.DATA.WORKER_TIMEOUT if num_workers else 0,
        persistent_workers=num_workers > 0,
    )
