"""Run each part of training once, to find errors before a long run, and report the bottleneck."""

import logging
import math
import shutil
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice, repeat
from pathlib import Path

import torch
from torch import Tensor

from data.loader import Batch
from engine.distillation import Targets
from engine.evaluation import evaluate
from engine.largest_batch import check_batch_size
from engine.loading_speed import describe_loading
from engine.optim import eval_dtype
from engine.profiler import SUFFIX, profile_updates
from engine.schedule import find_size, remaining_updates
from engine.trainer import Trainer
from models.checkpoints.reader import read_checkpoint
from utils.config.loading import train_sizes
from utils.distributed import on_main, sum_over_processes
from utils.run_files import checkpoint_path
from utils.text import format_duration

logger = logging.getLogger(__name__)

MEASUREMENT_SECONDS = 8.0  # approximate duration of a measurement
MAX_UPDATES = 50  # maximum number of updates in the measurement of the update time


def dry_run(trainer: Trainer, profile: Path | None = None) -> None:
    """Run some training steps, one evaluation batch and one checkpoint round trip, and report the bottleneck.

    On GPUs, also report the largest batch that fits. This function changes the state of ``trainer`` and writes a checkpoint to
    its output directory, which should be temporary.

    Args:
        profile: existing directory for a trace of some updates; None: no profile.

    Raises:
        ConfigError, TrainingError, DataError, CheckpointError: an error that the run would have raised.
    """
    world, cfg, state = trainer.world, trainer.cfg, trainer.state
    epoch, remaining = choose_epoch(trainer)

    started = time.monotonic()
    trainer.train_loader.set_position(epoch)
    first = next(iter(trainer.train_loader))
    logger.info("data: loading the first images took %.1f s", time.monotonic() - started)

    trainer.model.train()
    check_batch_size(trainer, first)
    update_seconds = _measure_updates(trainer, first)
    if profile is not None:
        batches = trainer.mix(repeat(first))
        profile_updates(lambda: trainer.update(batches), world, profile / f"{cfg.MODEL.NAME}{SUFFIX}")
        trainer.collect_reports(max_pending=0)
    loading_seconds = _time_loading(trainer, epoch) * trainer.accumulation

    evaluate({"raw": state.model}, list(islice(trainer.val_loader, 1)), amp_dtype=eval_dtype(cfg), world=world)
    logger.info("evaluation: one batch computed")

    started = time.monotonic()
    trainer.save()
    trainer.finish_saving()
    path = checkpoint_path(trainer.output, state.num_updates)
    state.load_dict(read_checkpoint(path))
    size, free = path.stat().st_size, shutil.disk_usage(trainer.output).free
    logger.info("checkpoint: %.1f MiB, written, verified and read in %.1f s", size / 2**20, time.monotonic() - started)
    # 1: the file being written. ``best.pth`` is one of the KEEP_BEST files.
    needed = size * (cfg.KEEP_CHECKPOINTS + cfg.KEEP_BEST + 1)
    if needed > free + size:
        logger.warning(
            "the disk has %.1f GiB free, but the run's checkpoints need %.1f GiB: free space, lower KEEP_CHECKPOINTS, "
            "or choose another --output",
            free / 2**30,
            needed / 2**30,
        )
    # This sum also makes every process wait until all have read the checkpoint, since the caller then deletes the directory.
    averages = sum_over_processes(torch.tensor([update_seconds, loading_seconds], device=world.device)) / world.size
    _log_bottleneck(trainer, remaining, *averages.tolist())


def choose_epoch(trainer: Trainer) -> tuple[int, float]:
    """The epoch to measure, and the remaining updates of the run in units of its updates, see ``remaining_updates``.

    If the run has several input sizes, it is the first remaining epoch with the largest size, which needs the most memory.
    """
    sizes, num_updates = train_sizes(trainer.cfg), trainer.state.num_updates
    first = num_updates // trainer.updates_per_epoch
    epochs = [first, *(epoch for epoch, _ in sizes if epoch > first)]
    epoch = max(epochs, key=lambda epoch: math.prod(find_size(sizes, epoch)))
    size = find_size(sizes, epoch)
    if len(sizes) > 1:
        logger.info("TRAIN.SIZE_SCHEDULE: measured with its largest images, of %d x %d pixels (epoch %d)", *size, epoch + 1)
    length = {"updates_per_epoch": trainer.updates_per_epoch, "num_epochs": trainer.num_epochs}
    return epoch, remaining_updates(sizes, num_updates, **length, size=size)


def _measure_updates(trainer: Trainer, batch: Batch) -> float:
    """Seconds per update on one batch, over about ``MEASUREMENT_SECONDS``. Logs the first one, and the loss after the last."""
    batches = trainer.mix(repeat(batch))
    logger.info("training: the first update took %.1f s", _time_updates(trainer, batches, 1))
    seconds = _time_updates(trainer, batches, 1)  # the first update includes warm-up and compilation, so time the second
    # Rank 0 chooses the number of updates for all processes, since each update needs all of them.
    count = on_main(trainer.world, lambda: max(1, min(MAX_UPDATES, int(MEASUREMENT_SECONDS / max(seconds, 1e-3)))))
    update_seconds = _time_updates(trainer, batches, count) / count
    report = trainer.collect_reports(max_pending=0)[-1]
    logger.info(
        "training: loss %.4f, gradient norm %.3f after %d updates on one batch", report.loss, report.grad_norm, count + 2
    )
    return update_seconds


def _time_updates(trainer: Trainer, batches: Iterator[tuple[Tensor, Targets]], count: int) -> float:
    """Seconds that ``count`` updates take, including their kernels on the GPU."""
    wait = partial(torch.cuda.synchronize, trainer.world.device) if trainer.world.device.type == "cuda" else lambda: None
    wait()
    started = time.monotonic()
    for _ in range(count):
        trainer.update(batches)
    wait()
    return time.monotonic() - started


def _time_loading(trainer: Trainer, epoch: int) -> float:
    """Seconds per batch, over ``MEASUREMENT_SECONDS`` or the rest of the epoch, after each worker has delivered one batch."""
    loader = trainer.train_loader
    loader.set_position(epoch)
    batches = iter(loader)
    for _ in islice(batches, min(max(loader.loader.num_workers, 1), len(loader) - 1)):
        pass
    started, count = time.monotonic(), 0
    for _ in batches:
        count += 1
        if time.monotonic() - started > MEASUREMENT_SECONDS:
            break
    return (time.monotonic() - started) / count


def _log_bottleneck(trainer: Trainer, remaining: float, update_seconds: float, loading_seconds: float) -> None:
    """Log speeds, expected durations and the bottleneck.

    Args:
        remaining: updates until the end of the run, in units of ``update_seconds``.
        update_seconds: seconds per update on batches that are already loaded.
        loading_seconds: seconds to load the batches of an update.
    """
    images_per_update = trainer.metadata["global_batch_size"]
    seconds_per_update = max(update_seconds, loading_seconds)
    needed_workers = describe_loading(
        trainer.train_loader,
        num_images=images_per_update // trainer.world.size,
        update_seconds=update_seconds,
        num_cores=trainer.world.num_cores,
    )
    logger.info(
        "model alone: %.1f images/s; loading alone: %.1f images/s; without evaluation, "
        "an epoch takes %s and the rest of the run %s",
        images_per_update / update_seconds,
        images_per_update / loading_seconds,
        format_duration(trainer.updates_per_epoch * seconds_per_update),
        format_duration(remaining * seconds_per_update),
    )
    if loading_seconds > update_seconds:
        logger.warning(
            "loading is the bottleneck, %.1f times as slow as the model: %s", loading_seconds / update_seconds, needed_workers
        )
    else:
        logger.info(
            "the model is the bottleneck: loading is %.1f times as fast; %s", update_seconds / loading_seconds, needed_workers
        )
