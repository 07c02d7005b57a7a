"""Train, evaluate or measure a FLatten Transformer: ``torchrun --nproc_per_node=8 main.py --cfg configs/X.yaml ...``

Without torchrun it runs as one process.
"""

import argparse
import logging
import platform
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch.distributed.elastic.multiprocessing.errors import record
from yacs.config import CfgNode

from data.build import build_datasets, build_eval_loader, build_mixup, build_train_loader
from data.index import DataError
from data.transforms import resized_side
from models import build_model
from utils.arguments import overrides, parse_arguments
from utils.checkpoint import checkpoint_path, fill_model, list_checkpoints, load_weights, newest_whole_checkpoint
from utils.config import ConfigError, flatten, load_config, to_dict
from utils.distributed import RankZeroError, World, cleanup, on_main, setup, wrap
from utils.engine import Recipe, Trainer, TrainingError, TrainState, evaluate
from utils.log import MetricsWriter, setup_logging
from utils.optim import amp_dtype, build_criterion, build_ema, build_optimizer, build_scaler, eval_dtype
from utils.rehearsal import rehearse
from utils.report import write_evaluation
from utils.schedule import REFERENCE_BATCH, accumulation_steps, build_schedule, global_batch_size
from weights.reader import CheckpointError, read_checkpoint, sha256, stored_weights

logger = logging.getLogger("main")

WRONG_USE = 2  # exit status
REHEARSAL = ".rehearsal"  # begins the name of the folder that --check writes to
USER_ERRORS = (ConfigError, DataError, CheckpointError, TrainingError)


class Start(NamedTuple):
    """kind: evaluate, resume, pretrained or scratch; checkpoint: the file, "" for none."""

    kind: str
    checkpoint: str


@record
def main() -> None:
    args = parse_arguments(__doc__)
    try:
        cfg = load_config(args.cfg, overrides(args))
        check(cfg, args)
        world = setup()
        accumulation_steps(cfg, world.size)  # which refuses a global batch that does not divide
    except ValueError as error:  # nothing is set up yet, the log neither
        print(f"main.py: error: {error}", file=sys.stderr)
        sys.exit(WRONG_USE)
    setup_logging(world.rank)
    try:
        if args.throughput:
            measure_throughput(cfg, world)
        else:
            start = choose_start(cfg, world, evaluating=args.eval)
            if args.eval:
                evaluate_checkpoint(cfg, world, start.checkpoint)
            elif args.check:
                rehearse_run(cfg, world, start, find_unused_parameters=args.find_unused_params)
            else:
                train(cfg, world, start, find_unused_parameters=args.find_unused_params)
    except USER_ERRORS as error:  # the text names the remedy: no traceback
        logger.error("%s", without_traceback(error))
        sys.exit(1 if isinstance(error, TrainingError) else WRONG_USE)
    except torch.OutOfMemoryError as error:
        logger.error(
            "%s; lower --batch-size (DATA.GLOBAL_BATCH_SIZE keeps the images of an update), or add --use-checkpoint or --amp",
            str(error).splitlines()[0],
        )
        sys.exit(1)
    except RankZeroError:  # which says why itself
        sys.exit(WRONG_USE)
    cleanup()  # not after an error: other processes may be waiting, and would make this one wait


def train(cfg: CfgNode, world: World, start: Start, *, find_unused_parameters: bool) -> None:
    """Train to the end."""
    output = output_folder(cfg)
    saved = read_run(cfg, world, start)
    if saved is not None and finished(saved, cfg):
        logger.info("%s: this run is finished; raise TRAIN.EPOCHS or change TAG to train more", start.checkpoint)
        return
    num_updates = saved["num_updates"] if saved else 0
    on_main(world, lambda: open_output(output, num_updates=num_updates))
    setup_logging(world.rank, output)
    logger.info("%d processes on %s, output in %s; start: %s %s", world.size, world.device.type, output, *start)
    trainer = build_trainer(cfg, world, start, saved, output=output, find_unused_parameters=find_unused_parameters)
    del saved  # a copy of everything, in host memory
    if world.is_main:
        (output / "config.yaml").write_text(cfg.dump())
        trainer.metrics = MetricsWriter(output, trainer.state.num_updates)
        trainer.metrics.text("config", f"```\n{cfg.dump()}\n```", trainer.state.num_updates)
    trainer.fit()
    if trainer.metrics is not None:
        trainer.metrics.close()


def rehearse_run(cfg: CfgNode, world: World, start: Start, *, find_unused_parameters: bool) -> None:
    """Go through all that training does, in a folder that goes again, and say what will bound the run."""
    root = Path(cfg.OUTPUT)
    there = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
    folder = on_main(world, lambda: make_temporary_folder(there))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # torchrun's, where another process failed
    logger.info("%d processes on %s, start: %s %s", world.size, world.device.type, *start)
    try:
        saved = read_run(cfg, world, start)
        if saved is not None and finished(saved, cfg):
            logger.warning("%s: this run is finished; raise TRAIN.EPOCHS or change TAG to train more", start.checkpoint)
        rehearse(build_trainer(cfg, world, start, saved, output=folder, find_unused_parameters=find_unused_parameters))
        logger.info("all is well: leave out --check to start")
    finally:
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def build_trainer(
    cfg: CfgNode, world: World, start: Start, saved: dict | None, *, output: Path, find_unused_parameters: bool
) -> Trainer:
    """All that a run needs, in the state that it starts from."""
    datasets = build_datasets(cfg, training=True, rank=world.rank, world_size=world.size, share=partial(on_main, world))
    mixup = build_mixup(cfg)
    placement = {"rank": world.rank, "world_size": world.size, "device": world.device}
    train_loader = build_train_loader(cfg, datasets.train, accumulation=accumulation_steps(cfg, world.size), **placement)
    val_loader = build_eval_loader(cfg, datasets.val, **placement)

    torch.manual_seed(cfg.SEED)
    model = build_model(cfg).to(world.device)
    if start.kind == "pretrained":
        load_weights(model, start.checkpoint)
    model.set_grad_checkpointing(cfg.TRAIN.USE_CHECKPOINT)
    if cfg.TRAIN.FREEZE_BACKBONE:
        model.freeze_features()
    state = TrainState(model, build_optimizer(cfg, model), build_scaler(cfg, world.device), build_ema(cfg, model))
    if saved is not None:
        resume(state, saved, cfg, train_loader.updates_per_epoch, start.checkpoint)

    schedule = build_schedule(cfg, updates_per_epoch=train_loader.updates_per_epoch, world_size=world.size)
    report_recipe(cfg, world, model, schedule.base_lr, train_loader.updates_per_epoch)
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
        header={
            "config": to_dict(cfg),
            "updates_per_epoch": train_loader.updates_per_epoch,
            "global_batch_size": global_batch_size(cfg, world.size),
        },
    )


def evaluate_checkpoint(cfg: CfgNode, world: World, checkpoint: str) -> None:
    """Evaluate the raw weights of a file and their average, whichever it has; the result goes to ``eval.json``."""
    digest = sha256(Path(checkpoint))
    saved = read_checkpoint(checkpoint)
    if digest != sha256(Path(checkpoint)) or digest != on_main(world, lambda: digest):
        raise CheckpointError(f"{checkpoint}: was replaced while it was read; evaluate it again, or a copy that stays")
    output = output_folder(cfg)
    on_main(world, lambda: make_folder(output))
    logger.info("%d processes on %s, output in %s; start: evaluate %s", world.size, world.device.type, output, checkpoint)
    datasets = build_datasets(cfg, training=False, rank=world.rank, world_size=world.size, share=partial(on_main, world))
    loader = build_eval_loader(cfg, datasets.val, rank=world.rank, world_size=world.size, device=world.device)
    models = {}
    for weights in stored_weights(saved) or ("raw",):
        models[weights] = build_model(cfg).to(world.device)
        loaded = fill_model(models[weights], saved, weights=weights, path=checkpoint)
        if loaded.missing or loaded.reinitialised or loaded.unused:
            raise CheckpointError(
                f"{loaded}; evaluation needs every weight: choose the config, and the MODEL.NUM_CLASSES, that this file was "
                "trained with"
            )
    options = {"class_ids": datasets.class_ids, "keep_answers": True}
    results = evaluate(models, loader, amp_dtype=eval_dtype(cfg), world=world, **options)
    on_main(
        world,
        lambda: write_evaluation(
            output,
            results,
            about=describe_evaluation(cfg, checkpoint, digest),
            classes=datasets.val.index.classes,
            names=[datasets.val.index.name(position) for position in range(len(datasets.val))],
            real_labels=datasets.real_labels,
            predictions=cfg.TEST.PREDICTIONS,
        ),
    )
    logger.info("%s", results.get("ema") or results["raw"])


def measure_throughput(cfg: CfgNode, world: World) -> None:
    """Images per second of the forward pass alone, on random images: 30 batches after 50 to warm up."""
    model = build_model(cfg).to(world.device).eval()
    images = torch.randn(cfg.DATA.BATCH_SIZE, 3, cfg.DATA.IMG_SIZE, cfg.DATA.IMG_SIZE, device=world.device)
    precision = amp_dtype(cfg)
    synchronise = torch.cuda.synchronize if world.device.type == "cuda" else lambda: None
    with torch.inference_mode(), torch.autocast(world.device.type, precision, enabled=precision != torch.float32):
        for batches in (50, 30):
            synchronise()
            started = time.perf_counter()
            for _ in range(batches):
                model(images)
            synchronise()
    seconds = (time.perf_counter() - started) / batches
    logger.info("batch_size %d throughput %.1f images/s, %s", len(images), len(images) / seconds, precision)


def choose_start(cfg: CfgNode, world: World, *, evaluating: bool) -> Start:
    """What a run starts from, in this order.

    1. ``evaluate``: with --eval the file that --resume names, or --pretrained; none of the folder's own.
    2. ``resume``: the checkpoint that --resume names.
    3. ``resume``: the newest whole checkpoint of the output folder, with TRAIN.AUTO_RESUME: the same command, given
       again, goes on, one with --pretrained too.
    4. ``pretrained``: the weights that --pretrained names.
    5. ``scratch``.

    --resume and --pretrained together are refused, and so is --eval with neither: see ``load_config`` and ``check``.
    """
    if evaluating:
        return Start("evaluate", cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED)
    if cfg.MODEL.RESUME:
        return Start("resume", cfg.MODEL.RESUME)
    if cfg.TRAIN.AUTO_RESUME:
        newest = on_main(world, lambda: newest_whole_checkpoint(output_folder(cfg)))
        if newest is not None:
            return Start("resume", str(newest))
    if cfg.MODEL.PRETRAINED:
        return Start("pretrained", cfg.MODEL.PRETRAINED)
    if cfg.TRAIN.FREEZE_BACKBONE:
        raise ConfigError("TRAIN.FREEZE_BACKBONE=True: a head on random features learns little; name weights, --pretrained")
    return Start("scratch", "")


def read_run(cfg: CfgNode, world: World, start: Start) -> dict | None:
    """The state of the run to go on with, if that is the start, held against what is asked for now."""
    if start.kind != "resume":
        return None
    saved = read_checkpoint(start.checkpoint)
    check_resumable(saved, cfg, world, start.checkpoint)
    report_differences(saved, cfg, start.checkpoint)
    return saved


def check(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Refuse in a second what would fail in minutes: a model that cannot be built, files that are not there."""
    if args.cache_mode and not cfg.DATA.ZIP_MODE:
        raise ConfigError(f"--cache-mode {args.cache_mode}: is of archives; add --zip, or leave it out")
    jobs = [f"--{job}" for job in ("throughput", "eval", "check") if getattr(args, job)]
    if len(jobs) > 1:
        raise ConfigError(f"{' and '.join(jobs)}: give one of them")
    for key in ("CLASS_MAP", "REAL_LABELS", "PREDICTIONS"):
        if cfg.TEST[key] and not args.eval:
            raise ConfigError(f"TEST.{key}={cfg.TEST[key]}: has an effect with --eval alone; add it, or remove the key")
    if args.eval and not (cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED):
        raise ConfigError("--eval: no weights to evaluate; name a checkpoint with --resume")
    files = {f"MODEL.{key}": cfg.MODEL[key] for key in ("RESUME", "PRETRAINED")}
    files |= {"TEST.REAL_LABELS": cfg.TEST.REAL_LABELS}
    files |= {"TEST.CLASS_MAP": cfg.TEST.CLASS_MAP if cfg.TEST.CLASS_MAP != "imagenet" else ""}
    for key, path in files.items():
        if path and not Path(path).is_file():
            raise ConfigError(f"{key}={path}: no such file")
    try:
        with torch.device("meta"):
            build_model(cfg)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(f"MODEL.TYPE={cfg.MODEL.TYPE} cannot be built from this config: {error}") from None


def check_resumable(saved: dict, cfg: CfgNode, world: World, path: str) -> None:
    """Refuse a file that is no run's state, or a run that would not see the same images as before."""
    if "num_updates" not in saved:
        raise CheckpointError(f"{path}: holds weights, but no state of a run; start from them with --pretrained")
    for key, now in (("NUM_CLASSES", cfg.MODEL.NUM_CLASSES), ("PRETRAINED", cfg.MODEL.PRETRAINED)):
        before = saved["config"]["MODEL"][key]
        if now and before != now:
            raise ConfigError(
                f"{path}: the run in this folder has MODEL.{key}={before!r}, now it is {now!r}: that is another run; give it "
                "another --tag"
            )
    before, now = saved["global_batch_size"], global_batch_size(cfg, world.size)
    if before != now:
        raise ConfigError(
            f"{path}: was saved with {before} images an update, now there would be {now}. Keep the product of processes, "
            "--batch-size and TRAIN.ACCUMULATION_STEPS, or start anew with --pretrained and another --tag"
        )
    before, now = saved["config"]["TRAIN"]["OPTIMIZER"]["NAME"], cfg.TRAIN.OPTIMIZER.NAME
    if before != now:
        raise ConfigError(
            f"{path}: TRAIN.OPTIMIZER.NAME was {before}, whose state {now} cannot take over; keep it, or start anew with "
            "--pretrained and another --tag"
        )


def report_differences(saved: dict, cfg: CfgNode, path: str) -> None:
    before, now = flatten(saved["config"]), flatten(cfg)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key not in ("MODEL.RESUME", "OUTPUT"):
            logger.info("%s: %s was %r, now it is %r", path, key, before.get(key), now.get(key))


def finished(saved: dict, cfg: CfgNode) -> bool:
    num_epochs = cfg.TRAIN.EPOCHS + cfg.TRAIN.COOLDOWN_EPOCHS
    return saved["num_updates"] >= num_epochs * saved["updates_per_epoch"]


def resume(state: TrainState, saved: dict, cfg: CfgNode, updates_per_epoch: int, path: str) -> None:
    """Put a run's state back."""
    if saved["updates_per_epoch"] != updates_per_epoch:
        raise ConfigError(
            f"{path}: was saved with {saved['updates_per_epoch']} updates an epoch, now there are {updates_per_epoch}: the "
            "data have changed. Put them back, or start anew with --pretrained and another --tag"
        )
    try:
        state.load_dict(saved)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: is not of this model and optimizer ({error})") from None
    logger.info("goes on after update %d", state.num_updates)


def report_recipe(cfg: CfgNode, world: World, model: torch.nn.Module, learning_rate: float, updates_per_epoch: int) -> None:
    """What is trained how fast, beside what the recipe says."""
    images, steps = global_batch_size(cfg, world.size), accumulation_steps(cfg, world.size)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    logger.info(
        "%s: %.2fM parameters%s; %d updates an epoch",
        cfg.MODEL.NAME,
        sum(size for size, _ in sizes) / 1e6,
        f", {sum(size for size, trained in sizes if trained)} of them trained" if cfg.TRAIN.FREEZE_BACKBONE else "",
        updates_per_epoch,
    )
    recipe = cfg.TRAIN.RECIPE_BATCH_SIZE
    advice = f". The rate follows the images; for the recipe's own add --opts DATA.GLOBAL_BATCH_SIZE {recipe}"
    logger.log(
        logging.WARNING if images != recipe else logging.INFO,
        "%d images an update (%d in each of %d processes, %d times), learning rate %.3e; the recipe has %d images, %.3e%s",
        images,
        cfg.DATA.BATCH_SIZE,
        world.size,
        steps,
        learning_rate,
        recipe,
        cfg.TRAIN.BASE_LR * recipe / REFERENCE_BATCH,
        advice if images != recipe else "",
    )


def build_recipe(cfg: CfgNode, world: World) -> Recipe:
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
        eval_freq=cfg.EVAL_FREQ,
        keep_checkpoints=cfg.KEEP_CHECKPOINTS,
    )


def output_folder(cfg: CfgNode) -> Path:
    return Path(cfg.OUTPUT) / cfg.MODEL.NAME / cfg.TAG


def make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written to ({error.strerror}); choose another --output") from None


def open_output(output: Path, *, num_updates: int) -> None:
    """The run's folder, which no other branch of the run may have gone further in."""
    make_folder(output)
    newest = next(iter(list_checkpoints(output)), None)
    if newest is not None and newest > checkpoint_path(output, num_updates):
        raise ConfigError(
            f"{output}: holds {newest.name}, further than this start (update {num_updates}): checkpoints would mix. Go on "
            "from it (TRAIN.AUTO_RESUME True, no --resume), or choose another --tag"
        )


def without_traceback(error: Exception) -> str:
    """What a loader's worker raised comes with its traceback around it; the last line says what is wrong."""
    text = str(error).strip()
    return text.splitlines()[-1].split(": ", 1)[-1] if "Original Traceback" in text else text


def make_temporary_folder(parent: Path) -> Path:
    for old in parent.glob(f"{REHEARSAL}*"):  # of processes that were killed
        if time.time() - old.stat().st_mtime > 3600:
            shutil.rmtree(old, ignore_errors=True)
    try:
        return Path(tempfile.mkdtemp(prefix=REHEARSAL, dir=parent))
    except OSError as error:
        raise ConfigError(f"{parent}: cannot be written to ({error.strerror}); choose another --output") from None


def describe_evaluation(cfg: CfgNode, checkpoint: str, digest: str) -> dict:
    """What ``eval.json`` says besides the results."""
    return {
        "model": cfg.MODEL.NAME,
        "checkpoint": str(checkpoint),
        "sha256": digest,
        "preprocessing": {
            "img_size": cfg.DATA.IMG_SIZE,
            "resized_to": resized_side(cfg.DATA.IMG_SIZE, crop=cfg.TEST.CROP),
            "interpolation": cfg.DATA.INTERPOLATION,
            "mean": cfg.DATA.MEAN,
            "std": cfg.DATA.STD,
        },
        "data": cfg.DATA.DATA_PATH,
        "class_map": cfg.TEST.CLASS_MAP,
        "precision": str(eval_dtype(cfg)).removeprefix("torch."),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }


if __name__ == "__main__":
    main()
