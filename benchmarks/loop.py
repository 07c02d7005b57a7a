"""Benchmark the training loop: cost of data loader, EMA and the loop itself relative to the bare training step."""

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from benchmarks.timing import speedup, time_in_turn
from engine.metrics_writer import MetricsWriter
from engine.optim import amp_dtype
from engine.run_contents import Contents
from engine.trainer import Trainer
from jobs.initialization import Initialization
from jobs.train import build_data, build_trainer
from utils.distributed import World

LOOP = "loop on one batch"
LOADER = "loop with the data loader"
WITHOUT_EMA = "loop on one batch, without EMA"
BARE = "bare step"


def measure_loop(cfg: CfgNode, world: World, *, updates: int, rounds: int) -> list[dict]:
    """Time ``updates`` optimizer updates of the training loop relative to bare steps.

    A bare step consists of forward pass, backward pass, gradient clipping and optimizer update, always on the same batch.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        init = Initialization("scratch", "", Contents(folder))
        data, metrics = build_data(cfg, world, init, None), MetricsWriter(folder, 0)
        trainer = build_trainer(cfg, world, init, None, data, output=folder, find_unused_parameters=False)
        tasks = create_tasks(replace(trainer, metrics=metrics), cfg, updates)
        timings = time_in_turn(tasks, rounds=rounds, device=world.device)
        metrics.close()
    # The time of a task divided by that of the bare step is the speed-up of the bare step over the task.
    return [{"task": name, "time_over_bare_step": speedup(timings[BARE], timing)} for name, timing in timings.items()]


def create_tasks(trainer: Trainer, cfg: CfgNode, updates: int) -> dict[str, Callable[[], None]]:
    """Create the tasks to compare, by name. Each runs ``updates`` optimizer updates."""
    loader, state, accumulation = trainer.train_loader, trainer.state, trainer.accumulation

    def batches_of_all_epochs() -> Iterator:
        for epoch in range(10**6):
            loader.set_position(epoch)
            yield from loader

    loader_batches = batches_of_all_epochs()
    batch = next(loader_batches)
    original_ema = state.ema

    def run_loop(batches: Iterator, ema: object) -> None:
        """Train as ``Trainer.run_epoch`` does, with a log line at the end."""
        trainer.model.train()
        state.ema = ema
        trainer.training_log.start_interval()
        mixed = trainer.mix(batches)
        for _ in range(updates):
            trainer.update(mixed)
            trainer.collect_reports(max_pending=1)
        trainer.log()

    criterion, dtype = nn.CrossEntropyLoss(label_smoothing=cfg.MODEL.LABEL_SMOOTHING), amp_dtype(cfg)
    scaler = torch.amp.GradScaler(trainer.world.device.type, enabled=dtype == torch.float16)

    def run_bare() -> None:
        state.model.train()
        for _ in range(updates):
            for _ in range(accumulation):
                with torch.autocast(trainer.world.device.type, dtype=dtype, enabled=dtype != torch.float32):
                    loss = criterion(state.model(batch.images), batch.targets) / accumulation
                scaler.scale(loss).backward()
            scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.model.parameters(), cfg.TRAIN.CLIP_GRAD or math.inf)
            scaler.step(state.optimizer)
            scaler.update()
            state.optimizer.zero_grad()

    def repeated_batch() -> Iterator:
        while True:  # clone, since mixup changes a batch in place
            yield replace(batch, images=batch.images.clone())

    tasks = {
        BARE: run_bare,
        LOOP: lambda: run_loop(repeated_batch(), original_ema),
        LOADER: lambda: run_loop(loader_batches, original_ema),
    }
    if original_ema is not None:
        tasks[WITHOUT_EMA] = lambda: run_loop(repeated_batch(), None)
    return tasks
