"""Find the largest batch per process that fits into GPU memory."""

import copy
import gc
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import NoReturn

import torch
from yacs.config import CfgNode

from data.loader import Batch
from engine.checkpoint_writer import to_host
from engine.optim import build_scaler
from engine.schedule import global_batch_size
from engine.step import Reports
from engine.trainer import Trainer
from utils.distributed import alone, on_all, on_main, sum_over_processes, unwrap
from utils.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_GROWTH = 16  # largest batch to try, relative to DATA.BATCH_SIZE
PRECISION = 8  # the search ends when the smallest batch that does not fit is at most 1 / PRECISION larger than one that fits
# Parts of the messages of torch's allocators, of CUDA outside of them, and of cuBLAS and cuDNN, if there is not enough memory.
OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator: can't allocate memory", "STATUS_ALLOC_FAILED")
# Remedy for any job that runs out of memory.
OUT_OF_MEMORY_REMEDY = (
    "Lower --batch-size (set DATA.GLOBAL_BATCH_SIZE to keep the global batch size; a training command with --check reports the "
    "values that fit), or add --use-checkpoint or --amp"
)


def can_measure(device: torch.device) -> bool:
    """Whether a process that runs out of memory gets an error. On a CPU, the system swaps memory or kills the process."""
    return device.type == "cuda"


def check_batch_size(trainer: Trainer, batch: Batch) -> None:
    """Log the largest batch per process that fits into GPU memory. The state of ``trainer`` is restored.

    The result is the same in all processes: the largest batch that fits in each of them.

    Args:
        batch: a batch of the run; its images are repeated to larger batches.

    Raises:
        ConfigError, OtherRankError: DATA.BATCH_SIZE does not fit. The message has options that keep the global batch size.
    """
    world, configured = trainer.world, trainer.cfg.DATA.BATCH_SIZE
    if not can_measure(world.device):
        logger.info("memory: the largest batch that fits is measured only on GPUs")
        return
    started = time.monotonic()
    state = to_host(trainer.state.to_dict(), copy=True)
    num_images = len(trainer.train_loader.dataset) // world.size
    limit = max(configured, min(MAX_GROWTH * configured, num_images))
    largest = search_largest(partial(_fits, trainer, batch, state), configured, limit)
    _restore(trainer, state)
    if trainer.cfg.TRAIN.COMPILE:
        torch.compiler.reset()  # after several batch sizes, the step would run slower kernels for any size
    if largest < configured:
        on_main(world, partial(_refuse, trainer.cfg, world.size, largest))
    logger.info(
        "memory: the largest batch size per process that fits is %s%d; the run uses %d (searched in %.1f s)",
        "at least " if largest == limit else "",
        largest,
        configured,
        time.monotonic() - started,
    )


def search_largest(fits: Callable[[int], bool], configured: int, limit: int) -> int:
    """Find the largest batch size that fits, by doubling or halving, then by bisection to 1 / ``PRECISION``.

    Args:
        fits: whether a batch size fits; called first with ``configured``.
        limit: largest size to try, at least ``configured``.

    Returns:
        The size; 0 if not even 1 fits.
    """
    largest, failure = configured, None
    while largest and not fits(largest):
        largest, failure = largest // 2, largest
    while failure is None and largest < limit:
        size = min(2 * largest, limit)
        if fits(size):
            largest = size
        else:
            failure = size
    while failure is not None and failure - largest > max(largest // PRECISION, 1):
        middle = (largest + failure) // 2
        if fits(middle):
            largest = middle
        else:
            failure = middle
    return largest


def keep_global_batch(cfg: CfgNode, world_size: int, largest: int) -> str:
    """The options with which an update uses as many images as configured, in batches of at most ``largest`` per process."""
    global_batch = global_batch_size(cfg, world_size)
    size = next(size for size in range(largest, 0, -1) if global_batch // world_size % size == 0)
    steps = " TRAIN.ACCUMULATION_STEPS 0" if cfg.TRAIN.ACCUMULATION_STEPS > 1 else ""
    return f"--batch-size {size} --opts DATA.GLOBAL_BATCH_SIZE {global_batch}{steps}"


def _refuse(cfg: CfgNode, world_size: int, largest: int) -> NoReturn:
    flags = {"--use-checkpoint": cfg.TRAIN.USE_CHECKPOINT, "--amp": cfg.AMP}
    savings = " or ".join(flag for flag, is_set in flags.items() if not is_set)
    what = f"DATA.BATCH_SIZE={cfg.DATA.BATCH_SIZE}: a training step runs out of GPU memory"
    if not largest:
        remedy = f"add {savings}, or choose" if savings else "choose"
        raise ConfigError(f"{what}, even with one image; {remedy} a smaller model or a smaller DATA.IMG_SIZE")
    raise ConfigError(
        f"{what}; the largest batch size per process that fits is {largest}. To keep the global batch size, add "
        f"{keep_global_batch(cfg, world_size, largest)}{f'; {savings} also saves memory' if savings else ''}"
    )


def _fits(trainer: Trainer, batch: Batch, state: dict, size: int) -> bool:
    """Whether every process has enough memory for an update on batches of ``size`` images.

    Args:
        state: the state to restore after a failed update.
    """
    failed = not on_all(trainer.world, partial(_update_alone, trainer, batch, size))
    if failed:
        gc.collect()  # the error's traceback refers to the activations
    torch.cuda.empty_cache()
    if failed:
        _restore(trainer, state)  # an update that fails in the optimizer leaves incomplete entries in its state
    return not sum_over_processes(torch.tensor(float(failed), device=trainer.world.device)).item()


def _restore(trainer: Trainer, state: dict) -> None:
    """Restore the state of ``trainer``, with a new loss scaler: the old one may be in the middle of an update."""
    trainer.state.scaler = build_scaler(trainer.cfg, trainer.world.device)
    trainer.state.load_dict(copy.deepcopy(state))  # the optimizer may keep tensors of the copy, and change them


def _update_alone(trainer: Trainer, batch: Batch, size: int) -> bool:
    """Run an update without the other processes, which may run out of memory. Returns False if this process does."""
    wrapped, accumulation = trainer.model, trainer.accumulation
    trainer.model = unwrap(wrapped)
    trainer.accumulation = min(accumulation, 2)  # later forward passes need no more memory than the second one
    try:
        with alone():
            positions = torch.arange(size, device=batch.images.device) % len(batch.images)
            enlarged = replace(batch, images=batch.images[positions], targets=batch.targets[positions])
            trainer.update(trainer.mix(repeat(enlarged)))
        if trainer.world.device.type == "cuda":
            torch.cuda.synchronize(trainer.world.device)
    except RuntimeError as error:
        # Larger batches than the run's may also exceed other limits, such as 32-bit indices of a kernel.
        if size <= trainer.cfg.DATA.BATCH_SIZE and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        return False
    finally:
        trainer.model, trainer.accumulation = wrapped, accumulation
        trainer.state.optimizer.zero_grad(set_to_none=True)
        trainer.reports = Reports()
        trainer.failed.zero_()
        trainer.skipped_in_a_row, trainer.changing_state = 0, False
    return True
