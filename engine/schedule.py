"""Learning-rate schedules as pure functions of the update index, without state to restore."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from yacs.config import CfgNode

from utils.errors import ConfigError

LINEAR_END = 0.01  # final learning rate of the linear schedule, as a fraction of the base rate
REFERENCE_BATCH = 512  # global batch size to which TRAIN.BASE_LR, WARMUP_LR and MIN_LR refer


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then decay. Lengths are in updates.

    Args:
        name: ``cosine``: half a cosine from ``base_lr`` at update 0 to ``min_lr`` at ``num_updates``; the warm-up replaces its
            first part. ``linear``: from ``base_lr`` after the warm-up to ``LINEAR_END * base_lr`` at ``num_updates``, as in the
            reference implementation; ``min_lr`` is unused. ``poly``: ``min_lr + (base_lr - min_lr) * (1 - u / num_updates) **
            power`` at update u, also if a warm-up replaces the first part. These three are constant after ``num_updates``.
            ``step``: ``base_lr`` is multiplied by ``decay_rate`` every ``decay_updates`` updates, counted from update 0; as in
            timm, this continues after ``num_updates``. ``multistep``: it is multiplied by ``decay_rate`` at each update of
            ``milestones``. ``constant``: ``base_lr`` after the warm-up.
    """

    name: str
    base_lr: float
    warmup_lr: float
    min_lr: float
    num_updates: int
    warmup_updates: int = 0
    decay_updates: int = 1  # used by ``step``
    decay_rate: float = 0.1  # used by ``step`` and ``multistep``
    milestones: tuple[int, ...] = ()  # used by ``multistep``
    power: float = 1.0  # used by ``poly``

    def __call__(self, update: int) -> float:
        """Learning rate of one update, counted from 0."""
        if update < self.warmup_updates:
            return self.warmup_lr + (self.base_lr - self.warmup_lr) * update / self.warmup_updates
        if self.name == "step":
            return self.base_lr * self.decay_rate ** (update // self.decay_updates)
        if self.name == "multistep":
            return self.base_lr * self.decay_rate ** bisect_right(self.milestones, update)
        if self.name == "constant":
            return self.base_lr
        if self.name == "linear":
            if update >= self.num_updates:
                return LINEAR_END * self.base_lr
            progress = (update - self.warmup_updates) / (self.num_updates - self.warmup_updates)
            return self.base_lr * (1 - (1 - LINEAR_END) * progress)
        if update >= self.num_updates:
            return self.min_lr
        progress = update / self.num_updates
        if self.name == "poly":
            return self.min_lr + (self.base_lr - self.min_lr) * (1 - progress) ** self.power
        return self.min_lr + 0.5 * (self.base_lr - self.min_lr) * (1 + math.cos(math.pi * progress))


def count_epochs(cfg: CfgNode) -> int:
    """Epochs of a run, including the cooldown epochs."""
    return cfg.TRAIN.EPOCHS + cfg.TRAIN.COOLDOWN_EPOCHS


def find_size(sizes: Sequence[tuple[int, tuple[int, int]]], epoch: int) -> tuple[int, int]:
    """Input size of an epoch. sizes: from ``utils.config.loading.train_sizes``."""
    return next(size for first_epoch, size in reversed(sizes) if first_epoch <= epoch)


def remaining_updates(
    sizes: Sequence[tuple[int, tuple[int, int]]],
    num_updates: int,
    *,
    updates_per_epoch: int,
    num_epochs: int,
    size: tuple[int, int],
) -> float:
    """Updates that remain in a run, each weighted by the ratio of its pixels per image to those of ``size``.

    An estimate of the remaining time divided by the time of an update with images of ``size``.

    Args:
        sizes: from ``utils.config.loading.train_sizes``.
        num_epochs: including cooldown epochs.
    """
    starts = [epoch * updates_per_epoch for epoch, _ in sizes]
    ends = [*starts[1:], num_epochs * updates_per_epoch]
    pixels = (
        max(end - max(start, num_updates), 0) * math.prod(own) for start, end, (_, own) in zip(starts, ends, sizes, strict=True)
    )
    return sum(pixels) / math.prod(size)


def accumulation_steps(cfg: CfgNode, world_size: int) -> int:
    """Forward passes per update: TRAIN.ACCUMULATION_STEPS, or the number that DATA.GLOBAL_BATCH_SIZE requires.

    Raises:
        ConfigError: DATA.GLOBAL_BATCH_SIZE is not a multiple of the images per forward pass.
    """
    global_size, images_per_pass = cfg.DATA.GLOBAL_BATCH_SIZE, cfg.DATA.BATCH_SIZE * world_size
    if not global_size:
        return max(cfg.TRAIN.ACCUMULATION_STEPS, 1)
    if global_size % images_per_pass:
        raise ConfigError(
            f"DATA.GLOBAL_BATCH_SIZE={global_size} is not a multiple of {images_per_pass} "
            f"(DATA.BATCH_SIZE={cfg.DATA.BATCH_SIZE} in each of {world_size} processes); "
            "change --batch-size or the number of processes"
        )
    return global_size // images_per_pass


def global_batch_size(cfg: CfgNode, world_size: int) -> int:
    """Images per update, over all processes and forward passes."""
    return cfg.DATA.BATCH_SIZE * world_size * accumulation_steps(cfg, world_size)


def build_schedule(cfg: CfgNode, *, updates_per_epoch: int, world_size: int) -> Schedule:
    """Build the schedule: learning rates are scaled to the global batch, and epochs are converted to updates."""
    factor = global_batch_size(cfg, world_size) / REFERENCE_BATCH
    return Schedule(
        name=cfg.TRAIN.LR_SCHEDULER.NAME,
        base_lr=cfg.TRAIN.BASE_LR * factor,
        warmup_lr=cfg.TRAIN.WARMUP_LR * factor,
        min_lr=cfg.TRAIN.MIN_LR * factor,
        num_updates=cfg.TRAIN.EPOCHS * updates_per_epoch,
        warmup_updates=cfg.TRAIN.WARMUP_EPOCHS * updates_per_epoch,
        decay_updates=cfg.TRAIN.LR_SCHEDULER.DECAY_EPOCHS * updates_per_epoch,
        decay_rate=cfg.TRAIN.LR_SCHEDULER.DECAY_RATE,
        milestones=tuple(epoch * updates_per_epoch for epoch in cfg.TRAIN.LR_SCHEDULER.MILESTONES),
        power=cfg.TRAIN.LR_SCHEDULER.POWER,
    )
