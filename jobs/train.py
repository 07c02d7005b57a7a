"""Train a model, or run each part of training once (``--check``).

Argument: ``saved`` has the contents of the checkpoint to resume from; it is None if the run does not resume.
"""

import contextlib
import gc
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from yacs.config import CfgNode

from data.build import DeviceLoader, TrainLoader, build_datasets, build_eval_loader, build_mixup, build_train_loader
from data.index import describe_index
from data.splits import digest_held_out
from engine.checkpoint_writer import FORMAT, set_aside
from engine.dry_run import dry_run
from engine.metrics_writer import MetricsWriter
from engine.optim import amp_dtype, build_criterion, build_ema, build_optimizer, build_scaler, eval_dtype
from engine.profiler import check_directory
from engine.remaining_work import work_after
from engine.run_contents import check_unchanged
from engine.run_directory import SECONDS_UNTIL_STALE, RunDirectory, RunLock, RunRecord, write_record
from engine.schedule import REFERENCE_BATCH, accumulation_steps, build_schedule, count_epochs, global_batch_size
from engine.state import TrainState
from engine.tracker import build_tracker
from engine.trainer import Trainer
from jobs.few_images import warn_about_few_images, warn_about_patience
from jobs.initialization import Initialization, choose_initialization, normalise
from jobs.locate_checkpoint import check_same_file
from jobs.model import choose_attention, load_pretrained
from jobs.resume import (
    check_data,
    describe_finished_run,
    end_finished_run,
    prepare_best,
    read_resumed_checkpoint,
    resume,
    warn_about_environment,
    warn_about_learning_rate,
)
from jobs.teacher import build_teacher
from models import build_model
from models.checkpoints.reader import sha256
from utils.config.loading import to_dict
from utils.distributed import World, is_lost_connection, lost_rank_error, on_all, on_main, wrap
from utils.environment import apply_numerical_settings, describe_environment
from utils.errors import ConfigError
from utils.log import FILE_ONLY, collect_records, setup_logging
from utils.run_files import build_output_path
from utils.stop import StopRequest

if TYPE_CHECKING:
    from jobs.inspect import AttentionPictures

logger = logging.getLogger(__name__)

DRY_RUN_PREFIX = ".dry_run"  # prefix of the temporary directory of --check


def train(cfg: CfgNode, world: World, stop: StopRequest, *, find_unused_parameters: bool) -> None:
    """Train to the end, or until a signal requests a stop. If the run has already finished, only log a message.

    Nothing is written to the output directory before every check of the config, the data and the checkpoint has passed.

    Raises:
        Stopped: a signal requested a stop; all updates so far are saved, and the same command resumes the run.
    """
    earlier = collect_records()
    apply_numerical_settings(cfg)
    init, output = choose_initialization(cfg, world), build_output_path(cfg)
    logger.info("%s, output in %s; start: %s", world, output, init)
    saved = read_resumed_checkpoint(cfg, world, init)
    if saved is not None and work_after(saved, cfg).is_finished:
        end_finished_run(saved, cfg, world, init)
        return
    environment = on_main(world, partial(describe_environment, world.device, world.size))
    logger.info("environment:\n%s", "\n".join(f"{name}: {value}" for name, value in environment.items() if value))
    logger.info("config:\n%s", cfg.dump(), extra=FILE_ONLY)
    if saved is not None and world.is_main:
        warn_about_environment(saved, environment, init.checkpoint)
    data = build_data(cfg, world, init, saved)
    trainer = build_trainer(cfg, world, init, saved, data, output=output, find_unused_parameters=find_unused_parameters)
    directory = RunDirectory(output)
    metrics, finished = None, False
    world.position.describe = lambda: f"{trainer.phase} after update {trainer.state.num_updates}"
    try:
        run_id, reset_best = on_main(world, partial(open_directory, directory, cfg, init, saved, data.changes))
        setup_logging(world.rank, output, earlier=earlier)
        state = trainer.state
        if reset_best:
            state.reset_best()
        del saved  # the state was loaded into the trainer; free the host memory of this copy
        if world.is_main:
            directory.write_config(cfg.dump())
            metrics = build_metrics(cfg, state, output, run_id)
        trainer = replace(
            trainer,
            metadata=trainer.metadata | {"environment": environment | trainer.metadata["environment"], "run_id": run_id},
            metrics=metrics,
            stop=stop.requested,
            check_output=directory.check,
        )
        gc.collect()
        gc.freeze()  # collections then skip the objects created so far, and loader workers do not copy the memory of them
        trainer.fit()
        finished = True
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise lost_rank_error(world, error) from None
    finally:
        gc.unfreeze()  # otherwise, objects are not destroyed at exit, and Triton's bindings report them as leaked
        trainer.saver.background_write.close()
        if metrics is not None:
            metrics.close(finished=finished)
        directory.close()


def build_metrics(cfg: CfgNode, state: TrainState, output: Path, run_id: str) -> MetricsWriter:
    """Build the writer of a run's metrics, with its tracker, and write the config to TensorBoard."""
    evaluated = state.last_evaluation == state.num_updates
    tracker = build_tracker(cfg, run_id, output)
    metrics = MetricsWriter(output, state.num_updates, evaluated=evaluated, evaluations=state.evaluations, tracker=tracker)
    metrics.text("config", f"```\n{cfg.dump()}\n```", state.num_updates)
    return metrics


def open_directory(
    directory: RunDirectory, cfg: CfgNode, init: Initialization, saved: dict | None, changed_data: Mapping[str, str]
) -> tuple[str, bool]:
    """Lock the output directory and prepare it for the run. On rank 0, after all checks.

    Files that cannot be resumed from are renamed, ``best.pth`` is repaired, and ``run.json`` is written.

    Args:
        changed_data: accepted changes of the data, from ``check_data``.

    Returns:
        The id of the run, and whether the best accuracy has to be reset.

    Raises:
        ConfigError: the directory cannot be written to, is locked by another run, or has changed since the decision.
        CheckpointError: ``best.pth`` cannot be repaired.
    """
    output, contents = directory.path, init.contents
    try:
        directory.open()
        check_unchanged(contents)
    except ConfigError:
        directory.discard()
        raise
    try:
        directory.remove_leftovers()
        for path, reason in contents.unusable.items():
            set_aside(path, reason)
        run_id = (saved or {}).get("run_id") or contents.run_id or uuid.uuid4().hex
        if contents.record is None or not contents.record.has_saved:
            resumed_from = normalise(cfg.MODEL.RESUME) if cfg.MODEL.RESUME else ""
            write_record(output, RunRecord(run_id, has_saved=bool(contents.usable), resumed_from=resumed_from))
        if saved is None:
            return run_id, False
        return run_id, prepare_best(saved, cfg, output, init.checkpoint, changed_data=changed_data)
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written to ({error.strerror}); free disk space or choose another --output"
        ) from None


def dry_run_training(cfg: CfgNode, world: World, *, find_unused_parameters: bool, profile: Path | None) -> None:
    """Run each part of training once in a temporary output directory, and report the bottleneck.

    What the run would refuse is refused here too; the run's own directory is only read.

    Args:
        profile: directory for a trace of some updates, which is created; None: no profile.
    """
    apply_numerical_settings(cfg)
    if profile is not None:
        on_main(world, partial(check_directory, profile))
    init = choose_initialization(cfg, world)
    directory = on_main(world, lambda: create_temporary_directory(init.contents.output))
    lock = RunLock(directory)
    logger.info("%s, start: %s", world, init)
    try:
        on_main(world, lock.acquire)
        for path, reason in init.contents.unusable.items() if world.is_main else ():
            logger.warning("%s: %s; the run will rename this file", path, reason)
        saved = read_resumed_checkpoint(cfg, world, init)
        if saved is not None and work_after(saved, cfg).is_finished:
            logger.warning("%s", describe_finished_run(saved, cfg, init))
        if saved is not None and world.is_main:
            warn_about_environment(saved, describe_environment(world.device, world.size), init.checkpoint)
        data = build_data(cfg, world, init, saved)
        trainer = build_trainer(cfg, world, init, saved, data, output=directory, find_unused_parameters=find_unused_parameters)
        dry_run(trainer, profile)
        logger.info("no problem found: leave out --check to start")
    finally:
        lock.release()
        if world.is_main:
            shutil.rmtree(directory, ignore_errors=True)


class RunData(NamedTuple):
    """The data of a run.

    Attributes:
        train, val: loaders of this process.
        classes: class names by class id.
        description: of the images, see ``describe_index``. Checkpoints store it to detect changed data on resume.
        changes: accepted changes since the checkpoint was saved, see ``check_data``.
    """

    train: TrainLoader
    val: DeviceLoader
    classes: Sequence[str]
    description: dict
    changes: Mapping[str, str]


def build_data(cfg: CfgNode, world: World, init: Initialization, saved: dict | None) -> RunData:
    """Build the loaders of a run, and check that its data are those of the checkpoint."""
    scan = partial(on_main, world, long_timeout=True)  # rank 0 lists the images
    datasets = build_datasets(cfg, training=True, rank=world.rank, world_size=world.size, run_once=scan)
    assert datasets.train is not None  # because of ``training``
    splits = {"train": datasets.train.index, "val": datasets.val.index}
    description = scan(lambda: {split: describe_index(index) for split, index in splits.items()})
    if cfg.DATA.VAL_FRACTION:
        description["val"]["held_out"] = digest_held_out(splits["val"])
    placement: dict[str, Any] = {
        "rank": world.rank,
        "world_size": world.size,
        "device": world.device,
        "num_cores": world.num_cores,
    }
    train_loader = build_train_loader(cfg, datasets.train, accumulation=accumulation_steps(cfg, world.size), **placement)
    val_loader = build_eval_loader(cfg, datasets.val, **placement)
    changes = {}
    if saved is not None:
        can_accept = saved["updates_per_epoch"] == train_loader.updates_per_epoch
        accept = cfg.DATA.ACCEPT_CHANGES
        changes = check_data(saved, description, init.checkpoint, accept_changes=accept, advise_acceptance=can_accept)
    for split, change in changes.items() if world.is_main else ():
        logger.warning("DATA.ACCEPT_CHANGES=True: the run resumes with changed data: in %s/, %s", split, change)
    return RunData(train_loader, val_loader, datasets.train.index.classes, description, changes)


def build_trainer(
    cfg: CfgNode,
    world: World,
    init: Initialization,
    saved: dict | None,
    data: RunData,
    *,
    output: Path,
    find_unused_parameters: bool,
) -> Trainer:
    """Build the trainer of a run in its initial or resumed state. It writes checkpoints and replay files to ``output``."""
    updates_per_epoch = data.train.updates_per_epoch
    mixup = build_mixup(cfg, rank=world.rank, passes_per_epoch=data.train.passes_per_epoch)
    teacher, teacher_digest = build_teacher(cfg, world, data.classes, saved, init.checkpoint)
    state = build_initial_state(cfg, world, init, data.classes)
    model: Any = state.model
    if saved is not None:
        on_all(world, partial(resume, state, saved, cfg, updates_per_epoch, init.checkpoint))

    schedule = build_schedule(cfg, updates_per_epoch=updates_per_epoch, world_size=world.size)
    if saved is not None and world.is_main:
        warn_about_learning_rate(saved, cfg, schedule, world.size, init.checkpoint)
    log_recipe(cfg, world, model, schedule.base_lr, data.train)
    if saved is None and world.is_main:
        num_images = len(data.train.loader.dataset)  # type: ignore[arg-type]  # an ImageDataset
        warn_about_few_images(cfg, num_images, updates_per_epoch, world.size)
        warn_about_patience(cfg)
    attended = [model, state.ema.module] if state.ema else [model]
    attention = choose_attention(attended, [amp_dtype(cfg), eval_dtype(cfg)], cfg, world)
    # One graph per input size: torch would otherwise compile a graph for all sizes, which is slow where windows are padded.
    dynamic = False if cfg.TRAIN.SIZE_SCHEDULE else None
    trained: Any = torch.compile(model, dynamic=dynamic) if cfg.TRAIN.COMPILE else model
    return Trainer(
        cfg=cfg,
        world=world,
        state=state,
        model=wrap(trained, world, find_unused_parameters=find_unused_parameters),
        criterion=build_criterion(cfg, mixed=mixup is not None, labels=data.train.labels, device=world.device),
        schedule=schedule,
        train_loader=data.train,
        val_loader=data.val,
        mixup=mixup,
        output=output,
        metadata={
            "format": FORMAT,
            "environment": {"attention": attention},
            "config": to_dict(cfg),
            "class_names": list(data.classes),
            "data": data.description,
            "updates_per_epoch": updates_per_epoch,
            "global_batch_size": global_batch_size(cfg, world.size),
            **({"teacher_digest": teacher_digest} if teacher_digest else {}),
        },
        draw=build_attention_pictures(cfg, world),
        teacher=teacher,
    )


def build_initial_state(cfg: CfgNode, world: World, init: Initialization, classes: Sequence[str]) -> TrainState:
    """Build the model with random or pretrained weights, and its optimizer, loss scaler and EMA."""
    torch.manual_seed(cfg.SEED)
    model: Any = build_model(cfg).to(world.device)
    if init.kind == "pretrained":
        on_all(world, partial(load_pretrained, model, init.checkpoint, classes, cfg, world, released=init.released))
        check_same_file(world, init.checkpoint, partial(sha256, Path(init.checkpoint)))
    model.set_grad_checkpointing(cfg.TRAIN.USE_CHECKPOINT)
    if cfg.TRAIN.FREEZE_BACKBONE:
        model.freeze_features()
    return TrainState(
        model,
        build_optimizer(cfg, model),
        build_scaler(cfg, world.device),
        build_ema(cfg, model),
    )


def build_attention_pictures(cfg: CfgNode, world: World) -> "AttentionPictures | None":
    """Build the object that draws attention maps of ATTENTION_IMAGE for TensorBoard; None if ATTENTION_IMAGE is empty.

    Raises:
        ConfigError: in every process, if the image cannot be read.
    """
    if not cfg.ATTENTION_IMAGE:
        return None
    from jobs.inspect import AttentionPictures  # imports matplotlib, which takes a second

    return on_all(world, partial(AttentionPictures, cfg, world.device))


def log_recipe(cfg: CfgNode, world: World, model: torch.nn.Module, learning_rate: float, loader) -> None:
    """Log model size, epochs, batch size and learning rate; warn if the batch size is not TRAIN.RECIPE_BATCH_SIZE."""
    updates_per_epoch, num_images = loader.updates_per_epoch, len(loader.loader.dataset)
    global_batch, steps = global_batch_size(cfg, world.size), accumulation_steps(cfg, world.size)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    logger.info(
        "%s: %.2fM parameters%s",
        cfg.MODEL.NAME,
        sum(size for size, _ in sizes) / 1e6,
        f", {sum(size for size, trained in sizes if trained)} of them trained" if cfg.TRAIN.FREEZE_BACKBONE else "",
    )
    epochs = count_epochs(cfg)
    logger.info(
        "epochs: %d%s, updates per epoch: %d, images used per epoch: %s%d of %d",
        epochs,
        f" ({cfg.TRAIN.EPOCHS} + {cfg.TRAIN.COOLDOWN_EPOCHS} cooldown)" if cfg.TRAIN.COOLDOWN_EPOCHS else "",
        updates_per_epoch,
        "about " if cfg.DATA.SAMPLING == "balanced" else "",
        loader.sampler.count_images(),
        num_images,
    )
    recipe_batch = cfg.TRAIN.RECIPE_BATCH_SIZE
    if world.is_main:
        logger.log(
            logging.WARNING if global_batch != recipe_batch <= num_images else logging.INFO,
            "global batch size %d (batch size %d, %s, forward passes per update: %d), learning rate %.3e; "
            "recipe: global batch size %d, learning rate %.3e%s",
            global_batch,
            cfg.DATA.BATCH_SIZE,
            world.processes,
            steps,
            learning_rate,
            recipe_batch,
            cfg.TRAIN.BASE_LR * recipe_batch / REFERENCE_BATCH,
            _batch_advice(recipe_batch, global_batch // steps, num_images) if global_batch != recipe_batch else "",
        )
        warn_about_ema(cfg, epochs * updates_per_epoch, world)


def _batch_advice(recipe_batch: int, images_per_pass: int, num_images: int) -> str:
    """Advice on how to train with the recipe's global batch size.

    Args:
        images_per_pass: images per forward pass, over all processes.
        num_images: size of the training set.
    """
    advice = f"for the recipe's batch size, add --opts DATA.GLOBAL_BATCH_SIZE {recipe_batch}"
    if recipe_batch > num_images:
        advice = f"{num_images} images are too few for the recipe's batch size"
    elif recipe_batch % images_per_pass:
        factors = "--batch-size times the number of processes"
        advice = f"for the recipe's batch size, choose --batch-size such that {factors} divides {recipe_batch}"
    return f". The learning rate is scaled with the batch size; {advice}"


def warn_about_ema(cfg: CfgNode, num_updates: int, world: World) -> None:
    """Warn if the EMA slows training down, or if the run is so short that the EMA stays near the initial weights."""
    if not cfg.EMA.ENABLED:
        return
    if cfg.EMA.FORCE_CPU and world.device.type != "cpu":
        logger.warning(
            "EMA.FORCE_CPU copies all weights to host memory at every update, and the GPU waits for the copy; use it only if "
            "GPU memory is insufficient"
        )
    if cfg.EMA.DECAY >= 1 or cfg.EMA.WARMUP:
        return
    averaging_updates = 1 / (1 - cfg.EMA.DECAY)
    if averaging_updates > num_updates:
        logger.warning(
            "EMA.DECAY=%g averages over about %.0f updates, but the run has %d: the average will stay near the initial "
            "weights; add --opts EMA.WARMUP True, or try --model-ema-decay %.3g, or --no-model-ema",
            cfg.EMA.DECAY,
            averaging_updates,
            num_updates,
            max(1 - 10 / max(num_updates, 20), 0.5),
        )


def create_temporary_directory(output: Path) -> Path:
    """Create the temporary directory of --check next to the run's directory, on the same file system where possible.

    Directories that killed --check processes left there are deleted.

    Raises:
        ConfigError: the nearest existing parent of ``output`` cannot be written.
    """
    parent = next(path for path in Path(os.path.realpath(output)).parents if path.is_dir())
    for old in parent.glob(f"{DRY_RUN_PREFIX}*"):
        with contextlib.suppress(ConfigError, OSError):  # keep a directory that a running --check still uses
            if RunLock(old).check() or time.time() - old.stat().st_mtime > SECONDS_UNTIL_STALE:
                shutil.rmtree(old, ignore_errors=True)
    try:
        return Path(tempfile.mkdtemp(prefix=DRY_RUN_PREFIX, dir=parent))
    except OSError as error:
        raise ConfigError(f"{parent} cannot be written to ({error.strerror}); choose another --output") from None
