"""From a config to batches on the device."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data.datasets import DataError, FolderDataset, ImageDataset, ZipDataset, check_classes
from data.mixup import StepMixup
from data.samplers import EvalBatches, TrainBatches
from data.transforms import Erase, Normalize, Transform, create_eval_transform, create_train_transform

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """images: (B, 3, H, W), normalised; targets: (B,) class ids; both on the device. indices: into the dataset."""

    images: Tensor
    targets: Tensor
    indices: list[int]


class DeviceLoader:
    """Batches on the device: normalised there, and erased there in training."""

    def __init__(self, loader: DataLoader, normalize: Normalize, device: torch.device, erase: Erase | None = None):
        self.loader, self.normalize, self.device, self.erase = loader, normalize, device, erase

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        epoch = getattr(self.loader.batch_sampler, "epoch", 0)
        for images, targets, indices in self.loader:
            indices = indices.tolist()
            images = self.normalize(images.to(self.device, non_blocking=True))
            if self.erase is not None:
                images = self.erase(images, epoch, indices)
            yield Batch(images, targets.to(self.device, non_blocking=True), indices)


class TrainLoader(DeviceLoader):
    """An epoch's batches from a given update on."""

    @property
    def updates_per_epoch(self) -> int:
        return self.loader.batch_sampler.updates_per_epoch

    def set_position(self, epoch: int, first_update: int = 0) -> None:
        self.loader.batch_sampler.set_position(epoch, first_update)


@dataclass(frozen=True)
class Datasets:
    """train is None for evaluation alone."""

    train: ImageDataset | None
    val: ImageDataset


def build_datasets(cfg: CfgNode, *, training: bool, rank: int = 0, world_size: int = 1) -> Datasets:
    """Scan the splits and hold them against each other and the model, before anything costly is built.

    Raises:
        DataError: missing folders, classes that do not fit, or fewer images than one update takes.
    """
    if not cfg.DATA.DATA_PATH:
        raise DataError("DATA.DATA_PATH is empty: name the folder that holds train/ and val/ with --data-path")
    root = Path(cfg.DATA.DATA_PATH)

    def read(split: str, transform: Transform) -> ImageDataset:
        if not cfg.DATA.ZIP_MODE:
            return FolderDataset(root / split, transform, seed=cfg.SEED)
        placement = {"rank": rank, "world_size": world_size, "cache_mode": cfg.DATA.CACHE_MODE}
        return ZipDataset(root, split, transform, seed=cfg.SEED, **placement)

    train = None
    if training:
        train = read("train", build_train_transform(cfg))
    transform = create_eval_transform(cfg.DATA.IMG_SIZE, interpolation=cfg.DATA.INTERPOLATION, crop=cfg.TEST.CROP)
    val = read("val", transform)
    check_classes(train.classes if train else None, val.classes, cfg.MODEL.NUM_CLASSES, str(root))
    logger.info(
        "data: %s%d images to evaluate on, %d classes",
        f"{len(train)} images to train on, " if train else "",
        len(val),
        len(val.classes),
    )
    return Datasets(train, val)


def build_train_transform(cfg: CfgNode) -> Transform:
    """The recipe's augmentation.

    Raises:
        DataError: a policy that timm does not know.
    """
    try:
        return create_train_transform(
            cfg.DATA.IMG_SIZE,
            interpolation=cfg.DATA.INTERPOLATION,
            mean=cfg.DATA.MEAN,
            scale=cfg.AUG.SCALE,
            ratio=cfg.AUG.RATIO,
            hflip=cfg.AUG.HFLIP,
            color_jitter=cfg.AUG.COLOR_JITTER,
            auto_augment=cfg.AUG.AUTO_AUGMENT,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise DataError(
            f"AUG.AUTO_AUGMENT={cfg.AUG.AUTO_AUGMENT!r}: is no policy of timm ({error}); use one like "
            "rand-m9-mstd0.5-inc1, or none"
        ) from None


def build_train_loader(cfg: CfgNode, dataset: ImageDataset, *, rank: int, world_size: int, device: torch.device) -> TrainLoader:
    batches = TrainBatches(
        len(dataset),
        cfg.DATA.BATCH_SIZE,
        accumulation=max(cfg.TRAIN.ACCUMULATION_STEPS, 1),
        rank=rank,
        world_size=world_size,
        seed=cfg.SEED,
    )
    if batches.updates_per_epoch == 0:
        global_batch = batches.batch_size * batches.accumulation * world_size
        raise DataError(
            f"{dataset.source}: {len(dataset)} images are fewer than one update takes, {global_batch} "
            f"(DATA.BATCH_SIZE={cfg.DATA.BATCH_SIZE} in each of {world_size} processes); lower --batch-size"
        )
    erase = None
    if cfg.AUG.REPROB > 0:
        erase = Erase(cfg.AUG.REPROB, mode=cfg.AUG.REMODE, max_count=cfg.AUG.RECOUNT, seed=cfg.SEED, device=device)
    loader = _create_loader(cfg, dataset, batches, device)
    return TrainLoader(loader, Normalize(cfg.DATA.MEAN, cfg.DATA.STD, device), device, erase)


def build_eval_loader(cfg: CfgNode, dataset: ImageDataset, *, rank: int, world_size: int, device: torch.device) -> DeviceLoader:
    batch_size = cfg.TEST.BATCH_SIZE or cfg.DATA.BATCH_SIZE
    batches = EvalBatches(len(dataset), batch_size, rank=rank, world_size=world_size)
    loader = _create_loader(cfg, dataset, batches, device)
    return DeviceLoader(loader, Normalize(cfg.DATA.MEAN, cfg.DATA.STD, device), device)


def build_mixup(cfg: CfgNode) -> StepMixup | None:
    """None where batches are not mixed, so that targets stay class ids.

    Raises:
        DataError: batches of odd size.
    """
    if not (cfg.AUG.MIXUP > 0 or cfg.AUG.CUTMIX > 0 or cfg.AUG.CUTMIX_MINMAX is not None):
        return None
    if cfg.DATA.BATCH_SIZE % 2:
        raise DataError(
            f"DATA.BATCH_SIZE={cfg.DATA.BATCH_SIZE}: mixup and cutmix mix the pairs of a batch; make it even, or switch "
            "both off with --opts AUG.MIXUP 0 AUG.CUTMIX 0"
        )
    return StepMixup(
        seed=cfg.SEED,
        mixup_alpha=cfg.AUG.MIXUP,
        cutmix_alpha=cfg.AUG.CUTMIX,
        cutmix_minmax=cfg.AUG.CUTMIX_MINMAX,
        prob=cfg.AUG.MIXUP_PROB,
        switch_prob=cfg.AUG.MIXUP_SWITCH_PROB,
        mode=cfg.AUG.MIXUP_MODE,
        label_smoothing=cfg.MODEL.LABEL_SMOOTHING,
        num_classes=cfg.MODEL.NUM_CLASSES,
    )


def _create_loader(cfg: CfgNode, dataset: ImageDataset, batches, device: torch.device) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=cfg.DATA.NUM_WORKERS,
        pin_memory=cfg.DATA.PIN_MEMORY and device.type == "cuda",
        persistent_workers=cfg.DATA.NUM_WORKERS > 0,
    )
