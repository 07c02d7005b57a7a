"""Train a model, or run each part of training once (``--check``)."""

import contextlib
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from yacs.config import CfgNode

from data.build import build_datasets, build_eval_loader, build_mixup, build_train_loader
from data.classes import ClassMatch, compare_classes, find_order
from engine.checkpoint_writer import FORMAT, is_best_current, restore_best, set_aside
from engine.dry_run import dry_run
from engine.metrics_writer import MetricsWriter, lacks_evaluations, restore_evaluations
from engine.optim import amp_dtype, build_criterion, build_ema, build_optimizer, build_scaler, eval_dtype
from engine.run_directory import SECONDS_UNTIL_STALE, RunDirectory, RunLock, RunRecord, build_output_path, write_record
from engine.schedule import REFERENCE_BATCH, accumulation_steps, build_schedule, global_batch_size
from engine.trainer import NO_BEST, Recipe, Trainer, TrainState, check_trained
from jobs.attention_backend import choose_attention
from jobs.initialization import (
    Initialization,
    check_data,
    choose_initialization,
    describe_data,
    find_evaluation_change,
    is_finished,
    read_resumed_checkpoint,
    restore_or_reset_best,
    resume,
    warn_about_environment,
    warn_about_learning_rate,
)
from jobs.locate_checkpoint import check_same_file, stored_class_names
from jobs.start import check_unchanged, is_inside, normalise
from models import build_model
from models.checkpoints.loading import fill_model
from models.checkpoints.reader import CheckpointError, read_checkpoint, sha256
from utils.config.loading import ConfigError, to_dict
from utils.distributed import World, is_lost_connection, lost_rank_error, on_all, on_main, wrap
from utils.environment import apply_numerical_settings, describe_environment
from utils.log import FILE_ONLY, collect_records, setup_logging
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
    logger.info("%s on %s, output in %s; start: %s %s", format_process_count(world), world.device.type, output, *init[:2])
    saved = read_resumed_checkpoint(cfg, world, init)
    if saved is not None and is_finished(saved, cfg):
        end_finished_run(saved, world, init)
        return
    environment = on_main(world, partial(describe_environment, world.device, world.size))
    logger.info("environment: %s", ", ".join(f"{name} {value}" for name, value in environment.items() if value))
    logger.info("config:\n%s", cfg.dump(), extra=FILE_ONLY)
    if saved is not None and world.is_main:
        warn_about_environment(saved, environment, init.checkpoint)
    trainer = build_trainer(cfg, world, init, saved, output=output, find_unused_parameters=find_unused_parameters)
    directory = RunDirectory(output)
    run_id, reset_best = on_main(world, partial(open_directory, directory, cfg, init, saved, trainer.metadata["data"]))
    setup_logging(world.rank, output, earlier=earlier)
    if reset_best:
        trainer.state.best = dict(NO_BEST)
    trainer.metadata |= {"environment": environment | trainer.metadata["environment"], "run_id": run_id}
    trainer.stop = stop.requested
    del saved  # the state was loaded into the trainer; free the host memory of this copy
    if world.is_main:
        trainer.check_output = directory.check
        directory.write_config(cfg.dump())
        state = trainer.state
        evaluated = state.last_evaluation == state.num_updates
        trainer.metrics = MetricsWriter(output, state.num_updates, evaluated=evaluated, evaluations=state.evaluations)
        trainer.metrics.text("config", f"```\n{cfg.dump()}\n```", trainer.state.num_updates)
    try:
        trainer.fit()
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        where = f"{trainer.phase} after update {trainer.state.num_updates}"
        raise lost_rank_error(world, error, where) from None
    finally:
        trainer.background_write.close()
        if trainer.metrics is not None:
            trainer.metrics.close()
        directory.close()


def open_directory(
    directory: RunDirectory, cfg: CfgNode, init: Initialization, saved: dict | None, data: dict
) -> tuple[str, bool]:
    """Lock the output directory and prepare it for the run. On rank 0, after all checks.

    Files that cannot be resumed from are renamed, ``best.pth`` is repaired, and ``run.json`` is written.

    Args:
        saved: the checkpoint to resume from; None if the run does not resume.
        data: description of the current data, from ``describe_data``.

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
        accepted = check_data(saved, data, init.checkpoint, accept_changes=True)
        change = find_evaluation_change(saved, cfg, accepted)
        return run_id, restore_or_reset_best(saved, output, init.checkpoint, evaluation_change=change)
    except OSError as error:
        directory.close()
        raise ConfigError(
            f"{output} cannot be written to ({error.strerror}); free disk space or choose another --output"
        ) from None
    except CheckpointError:
        directory.close()
        raise


def end_finished_run(saved: dict, world: World, init: Initialization) -> None:
    """Log that a run is finished. If ``best.pth`` or the evaluations in ``metrics.jsonl`` are incomplete, repair them first."""
    check_trained(num_updates=saved["num_updates"], num_skipped=saved.get("num_skipped", 0))
    output, path = init.contents.output, Path(init.checkpoint)
    if is_inside(path, output):
        on_main(world, partial(repair_finished_run, saved, output, path))
    logger.info("%s", describe_finished_run(init))


def describe_finished_run(init: Initialization) -> str:
    """Message that the run is finished, with the remedy."""
    if is_inside(Path(init.checkpoint), init.contents.output):
        return f"{init.checkpoint}: this run is finished; raise TRAIN.EPOCHS to continue, or choose another --tag"
    return (
        f"{init.checkpoint}: this run is finished, so nothing is written to {init.contents.output}; raise "
        "TRAIN.EPOCHS to continue it there, or start a new run from its weights with --pretrained instead of --resume"
    )


def repair_finished_run(saved: dict, output: Path, path: Path) -> None:
    """Repair ``best.pth`` and ``metrics.jsonl`` of a finished run, if necessary, under the lock of its directory."""
    evaluations = saved.get("evaluations", [])
    lacks_metrics = lacks_evaluations(output, evaluations)
    if is_best_current(output, saved) and not lacks_metrics:
        return
    directory = RunDirectory(output)
    directory.open()
    try:
        if lacks_metrics:
            restore_evaluations(output, saved["num_updates"], evaluations)
        repaired = restore_best(output, saved, path)
    finally:
        directory.close()
    if not repaired:
        logger.warning(
            "%s: the best checkpoint of this run (after update %d, Acc@1 %.3f) is lost: neither best.pth nor a numbered "
            "checkpoint contains it",
            output,
            saved["best"]["num_updates"],
            saved["best"]["acc1"],
        )


def dry_run_training(cfg: CfgNode, world: World, *, find_unused_parameters: bool) -> None:
    """Run each part of training once in a temporary output directory, and report the bottleneck.

    What the run would refuse is refused here too; the run's own directory is only read.
    """
    apply_numerical_settings(cfg)
    init = choose_initialization(cfg, world)
    directory = on_main(world, lambda: create_temporary_directory(init.contents.output))
    lock = RunLock(directory)
    logger.info("%s on %s, start: %s %s", format_process_count(world), world.device.type, *init[:2])
    try:
        on_main(world, lock.acquire)
        for path, reason in init.contents.unusable.items() if world.is_main else ():
            logger.warning("%s: %s; the run will rename this file", path, reason)
        saved = read_resumed_checkpoint(cfg, world, init)
        if saved is not None and is_finished(saved, cfg):
            logger.warning("%s", describe_finished_run(init))
        if saved is not None and world.is_main:
            warn_about_environment(saved, describe_environment(world.device, world.size), init.checkpoint)
        trainer = build_trainer(cfg, world, init, saved, output=directory, find_unused_parameters=find_unused_parameters)
        dry_run(trainer)
        logger.info("no problem found: leave out --check to start")
    finally:
        lock.release()
        if world.is_main:
            shutil.rmtree(directory, ignore_errors=True)


def build_trainer(
    cfg: CfgNode, world: World, init: Initialization, saved: dict | None, *, output: Path, find_unused_parameters: bool
) -> Trainer:
    """Build the trainer of a run in its initial or resumed state, and check that the data and the checkpoint match.

    Args:
        saved: the checkpoint to resume from; None if the run does not resume.
        output: directory of checkpoints and replay files.
    """
    datasets = build_datasets(
        cfg, training=True, rank=world.rank, world_size=world.size, run_once=partial(on_main, world, long_timeout=True)
    )
    data = describe_data(datasets, world)
    placement = {"rank": world.rank, "world_size": world.size, "device": world.device}
    train_loader = build_train_loader(cfg, datasets.train, accumulation=accumulation_steps(cfg, world.size), **placement)
    val_loader = build_eval_loader(cfg, datasets.val, **placement)
    can_accept = saved is not None and saved["updates_per_epoch"] == train_loader.updates_per_epoch
    changes = check_data(saved, data, init.checkpoint, accept_changes=cfg.DATA.ACCEPT_CHANGES, advise_acceptance=can_accept)
    for split, change in changes.items() if world.is_main else ():
        logger.warning("DATA.ACCEPT_CHANGES=True: the run resumes with changed data: in %s/, %s", split, change)
    mixup = build_mixup(cfg, rank=world.rank)
    state = build_initial_state(cfg, world, init, datasets.train.index.classes)
    model = state.model
    if saved is not None:
        on_all(world, partial(resume, state, saved, cfg, train_loader.updates_per_epoch, init.checkpoint))

    schedule = build_schedule(cfg, updates_per_epoch=train_loader.updates_per_epoch, world_size=world.size)
    if saved is not None and world.is_main:
        warn_about_learning_rate(saved, cfg, schedule, world.size, init.checkpoint)
    log_recipe(cfg, world, model, schedule.base_lr, train_loader)
    attended = [model, state.ema.module] if state.ema else [model]
    attention = choose_attention(attended, [amp_dtype(cfg), eval_dtype(cfg)], cfg, world)
    return Trainer(
        state=state,
        model=wrap(torch.compile(model) if cfg.TRAIN.COMPILE else model, world, find_unused_parameters=find_unused_parameters),
        criterion=build_criterion(cfg, mixed=mixup is not None),
        schedule=schedule,
        train_loader=train_loader,
        val_loader=val_loader,
        mixup=mixup,
        recipe=build_recipe(cfg, world),
        world=world,
        output=output,
        metadata={
            "format": FORMAT,
            "environment": {"attention": attention},
            "config": to_dict(cfg),
            "class_names": list(datasets.train.index.classes),
            "data": data,
            "updates_per_epoch": train_loader.updates_per_epoch,
            "global_batch_size": global_batch_size(cfg, world.size),
        },
        draw=build_attention_pictures(cfg, world),
    )


def build_initial_state(cfg: CfgNode, world: World, init: Initialization, classes: Sequence[str]) -> TrainState:
    """Build the model with random or pretrained weights, and its optimizer, loss scaler and EMA.

    Args:
        classes: class names of the training data.
    """
    torch.manual_seed(cfg.SEED)
    model = build_model(cfg).to(world.device)
    if init.kind == "pretrained":
        on_all(world, partial(load_pretrained, model, init.checkpoint, classes, world))
        check_same_file(world, init.checkpoint, partial(sha256, Path(init.checkpoint)))
    model.set_grad_checkpointing(cfg.TRAIN.USE_CHECKPOINT)
    if cfg.TRAIN.FREEZE_BACKBONE:
        model.freeze_features()
    return TrainState(
        model,
        build_optimizer(cfg, model),
        build_scaler(cfg, world.device),
        build_ema(cfg, model),
        scales_loss=amp_dtype(cfg) == torch.float16,
    )


def load_pretrained(model: nn.Module, path: str, classes: Sequence[str], world: World) -> None:
    """Load pretrained weights. A head for the same number of classes is loaded even if it was trained with other classes.

    If it was trained with the same classes in another order, its rows are reordered.

    Args:
        classes: class names of the training data.
    """
    state = read_checkpoint(path)
    report = fill_model(model, state, weights="auto", path=path)
    names = stored_class_names(state)
    if report.head is not None:  # trained with another number of classes
        return
    match, difference = compare_classes(classes, names)
    if match is ClassMatch.REORDERED and names:
        reorder_head(model, find_order(classes, names))
    if not difference or not world.is_main:
        return
    if match is ClassMatch.UNVERIFIED:
        logger.info("%s: the rows of the loaded head are matched with the classes by class id: %s", path, difference)
    elif match is ClassMatch.REORDERED:
        consequence = "its rows have been reordered" if names else "its rows are kept in their order"
        logger.warning("%s: the loaded head may have another order of classes: %s; %s", path, difference, consequence)
    else:
        logger.warning("%s: the loaded head was trained with other classes: %s", path, difference)


@torch.no_grad()
def reorder_head(model: nn.Module, order: Sequence[int]) -> None:
    """Reorder the classes of a model's head.

    Args:
        order: the present class id of each new class id.
    """
    head = model.get_classifier()
    for parameter in head.parameters():
        parameter.copy_(parameter[list(order)])


def build_attention_pictures(cfg: CfgNode, world: World) -> "AttentionPictures | None":
    """Build the object that draws attention maps of ATTENTION_IMAGE for TensorBoard; None if ATTENTION_IMAGE is empty.

    Raises:
        ConfigError: in every process, if the image cannot be read.
    """
    if not cfg.ATTENTION_IMAGE:
        return None
    from jobs.inspect import AttentionPictures  # imports matplotlib, which takes a second

    return on_all(world, partial(AttentionPictures, cfg, world.device))


def check_model(cfg: CfgNode) -> None:
    """Check that the model can be built, without allocating memory.

    Raises:
        ConfigError: the model cannot be built.
    """
    try:
        with torch.device("meta"):
            build_model(cfg)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(f"MODEL.TYPE={cfg.MODEL.TYPE} cannot be built from this config: {error}") from None


def format_process_count(world: World) -> str:
    """Format the number of processes, as in "1 process" or "8 processes"."""
    return "1 process" if world.size == 1 else f"{world.size} processes"


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
    epochs = cfg.TRAIN.EPOCHS + cfg.TRAIN.COOLDOWN_EPOCHS
    logger.info(
        "epochs: %d%s, updates per epoch: %d, images used per epoch: %d of %d",
        epochs,
        f" ({cfg.TRAIN.EPOCHS} + {cfg.TRAIN.COOLDOWN_EPOCHS} cooldown)" if cfg.TRAIN.COOLDOWN_EPOCHS else "",
        updates_per_epoch,
        updates_per_epoch * global_batch // cfg.AUG.REPEATS if cfg.AUG.REPEATS > 1 else updates_per_epoch * global_batch,
        num_images,
    )
    recipe_batch = cfg.TRAIN.RECIPE_BATCH_SIZE
    if world.is_main:
        logger.log(
            logging.WARNING if global_batch != recipe_batch else logging.INFO,
            "global batch size %d (batch size %d, %s, forward passes per update: %d), learning rate %.3e; "
            "recipe: global batch size %d, learning rate %.3e%s",
            global_batch,
            cfg.DATA.BATCH_SIZE,
            format_process_count(world),
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
        recipe_batch: global batch size of the recipe.
        images_per_pass: images per forward pass, over all processes.
        num_images: size of the training set.
    """
    if recipe_batch > num_images:
        return f". The learning rate is scaled with the batch size; {num_images} images are too few for the recipe's batch size"
    if recipe_batch % images_per_pass:
        return (
            f". The learning rate is scaled with the batch size; for the recipe's batch size, choose --batch-size such that "
            f"--batch-size times the number of processes divides {recipe_batch}"
        )
    return (
        f". The learning rate is scaled with the batch size; for the recipe's batch size, add --opts DATA.GLOBAL_BATCH_SIZE "
        f"{recipe_batch}"
    )


def warn_about_ema(cfg: CfgNode, num_updates: int, world: World) -> None:
    """Warn if the EMA slows training down, or if the run is so short that the EMA stays near the initial weights."""
    if not cfg.EMA.ENABLED:
        return
    if cfg.EMA.FORCE_CPU and world.device.type != "cpu":
        logger.warning(
            "EMA.FORCE_CPU copies all weights to host memory at every update, and the GPU waits for the copy; use it only if "
            "GPU memory is insufficient"
        )
    if cfg.EMA.DECAY >= 1:
        return
    averaging_updates = 1 / (1 - cfg.EMA.DECAY)
    if averaging_updates > num_updates:
        logger.warning(
            "EMA.DECAY=%g averages over about %.0f updates, but the run has %d: the average will stay near the initial "
            "weights; try --model-ema-decay %.3g, or --no-model-ema",
            cfg.EMA.DECAY,
            averaging_updates,
            num_updates,
            max(1 - 10 / max(num_updates, 20), 0.5),
        )


def build_recipe(cfg: CfgNode, world: World) -> Recipe:
    """Build the settings of the training loop."""
    return Recipe(
        num_epochs=cfg.TRAIN.EPOCHS + cfg.TRAIN.COOLDOWN_EPOCHS,
        accumulation=accumulation_steps(cfg, world.size),
        amp_dtype=amp_dtype(cfg),
        eval_dtype=eval_dtype(cfg),
        max_grad_norm=cfg.TRAIN.CLIP_GRAD or float("inf"),
        seed=cfg.SEED,
        print_freq=cfg.PRINT_FREQ,
        save_freq=cfg.SAVE_FREQ,
        save_steps=cfg.SAVE_STEPS,
        save_minutes=cfg.SAVE_MINUTES,
        eval_freq=cfg.EVAL_FREQ,
        keep_checkpoints=cfg.KEEP_CHECKPOINTS,
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
