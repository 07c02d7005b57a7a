"""The learning rate as a function of the update: nothing to restore, nothing to drift."""

import math
from dataclasses import dataclass

from yacs.config import CfgNode

from utils.config import ConfigError

LINEAR_END = 0.01  # share of the base rate at which the linear schedule ends
REFERENCE_BATCH = 512  # images that TRAIN.BASE_LR, WARMUP_LR and MIN_LR are given for


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then a decay; after ``num_updates`` the rate stays where the decay ended. Lengths are in updates.

    cosine: to ``min_lr``, computed as if there had been no warm-up. linear: from the end of the warm-up to
    ``LINEAR_END`` of ``base_lr``, as the reference (``min_lr`` plays no part). step: ``base_lr`` times ``decay_rate`` for
    every ``decay_updates``.
    """

    name: str
    base_lr: float
    warmup_lr: float
    min_lr: float
    num_updates: int
    warmup_updates: int = 0
    decay_updates: int = 1  # step only
    decay_rate: float = 0.1

    def __call__(self, update: int) -> float:
        """Learning rate of one update, counted from 0."""
        if update < self.warmup_updates:
            return self.warmup_lr + (self.base_lr - self.warmup_lr) * update / self.warmup_updates
        if self.name == "step":
            return self.base_lr * self.decay_rate ** (update // self.decay_updates)
        if self.name == "linear":
            if update >= self.num_updates:
                return LINEAR_END * self.base_lr
            progress = (update - self.warmup_updates) / (self.num_updates - self.warmup_updates)
            return self.base_lr * (1 - (1 - LINEAR_END) * progress)
        if update >= self.num_updates:
            return self.min_lr
        progress = update / self.num_updates
        return self.min_lr + 0.5 * (self.base_lr - self.min_lr) * (1 + math.cos(math.pi * progress))


def accumulation_steps(cfg: CfgNode, world_size: int) -> int:
    """Forward passes per update: TRAIN.ACCUMULATION_STEPS, or as many as DATA.GLOBAL_BATCH_SIZE takes.

    Raises:
        ConfigError: the processes' batches do not divide it.
    """
    wanted, at_once = cfg.DATA.GLOBAL_BATCH_SIZE, cfg.DATA.BATCH_SIZE * world_size
    if not wanted:
        return max(cfg.TRAIN.ACCUMULATION_STEPS, 1)
    if wanted % at_once:
        raise ConfigError(
            f"DATA.GLOBAL_BATCH_SIZE={wanted}: is no multiple of {at_once} (DATA.BATCH_SIZE={cfg.DATA.BATCH_SIZE} in each of "
            f"{world_size} processes); change --batch-size or the number of processes"
        )
    return wanted // at_once


def global_batch_size(cfg: CfgNode, world_size: int) -> int:
    """Images per update, over all processes and forward passes."""
    return cfg.DATA.BATCH_SIZE * world_size * accumulation_steps(cfg, world_size)


def build_schedule(cfg: CfgNode, *, updates_per_epoch: int, world_size: int) -> Schedule:
    """TRAIN.*LR scaled to the global batch, TRAIN.*EPOCHS in updates."""
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
    )
