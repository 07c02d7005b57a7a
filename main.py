"""Train, evaluate or measure a FLatten Transformer: ``torchrun --nproc_per_node=8 main.py --cfg configs/X.yaml ...``

Without torchrun it runs as one process.
"""

import argparse
import json
import logging
import platform
import sys
import tempfile
import time
from difflib import get_close_matches
from pathlib import Path

import timm
import torch
from torch.distributed.elastic.multiprocessing.errors import record
from yacs.config import CfgNode

from data.build import build_datasets, build_eval_loader, build_mixup, build_train_loader
from data.datasets import DataError
from models import build_model
from utils.checkpoint import (
    CheckpointError,
    checkpoint_path,
    fill_model,
    list_checkpoints,
    load_weights,
    newest_whole_checkpoint,
    read_checkpoint,
    sha256,
    stored_weights,
)
from utils.config import ConfigError, flatten, load_config, to_dict
from utils.distributed import RankZeroError, World, cleanup, on_main, setup, wrap
from utils.engine import Recipe, Trainer, TrainingError, TrainState, evaluate
from utils.log import MetricsWriter, setup_logging
from utils.optim import amp_dtype, build_criterion, build_ema, build_optimizer, build_scaler
from utils.schedule import build_schedule, global_batch_size

logger = logging.getLogger("main")

WRONG_USE = 2  # exit status
USER_ERRORS = (ConfigError, DataError, CheckpointError, TrainingError)


@record
def main() -> None:
    args = parse_arguments()
    try:
        cfg = load_config(args.cfg, overrides(args))
        check(cfg, args)
        world = setup()
    except ValueError as error:  # nothing is set up yet, the log neither
        print(f"main.py: error: {error}", file=sys.stderr)
        sys.exit(WRONG_USE)
    setup_logging(world.rank)
    try:
        if args.throughput:
            measure_throughput(cfg, world)
        elif args.eval:
            evaluate_checkpoint(cfg, world)
        else:
            train(cfg, world, find_unused_parameters=args.find_unused_params)
    except USER_ERRORS as error:  # the text names the remedy: no traceback
        logger.error("%s", without_traceback(error))
        sys.exit(1 if isinstance(error, TrainingError) else WRONG_USE)
    except RankZeroError:  # which says why itself
        sys.exit(WRONG_USE)
    cleanup()  # not after an error: other processes may be waiting, and would make this one wait


def train(cfg: CfgNode, world: World, *, find_unused_parameters: bool) -> None:
    """Start or go on, whichever ``choose_start`` says, and train to the end."""
    output = output_folder(cfg)
    start, checkpoint = choose_start(cfg, world)
    saved = read_checkpoint(checkpoint) if start == "resume" else None
    if saved is not None:
        check_resumable(saved, cfg, world, checkpoint)
        report_differences(saved, cfg, checkpoint)
        if finished(saved, cfg):
            logger.info("%s: this run is finished; raise TRAIN.EPOCHS or change TAG to train more", checkpoint)
            return
    on_main(world, lambda: open_output(output, num_updates=saved["num_updates"] if saved else 0))
    setup_logging(world.rank, output)
    logger.info("%d processes on %s, output in %s; start: %s %s", world.size, world.device.type, output, start, checkpoint)

    datasets = build_datasets(cfg, training=True, rank=world.rank, world_size=world.size)
    mixup = build_mixup(cfg)
    placement = {"rank": world.rank, "world_size": world.size, "device": world.device}
    train_loader = build_train_loader(cfg, datasets.train, **placement)
    val_loader = build_eval_loader(cfg, datasets.val, **placement)

    torch.manual_seed(cfg.SEED)
    model = build_model(cfg).to(world.device)
    if start == "pretrained":
        load_weights(model, checkpoint)
    model.set_grad_checkpointing(cfg.TRAIN.USE_CHECKPOINT)
    state = TrainState(model, build_optimizer(cfg, model), build_scaler(cfg, world.device), build_ema(cfg, model))
    if saved is not None:
        resume(state, saved, cfg, train_loader.updates_per_epoch, checkpoint)
        saved = None  # a copy of everything, in host memory

    schedule = build_schedule(cfg, updates_per_epoch=train_loader.updates_per_epoch, world_size=world.size)
    logger.info(
        "%s: %.2fM parameters; %d images an update, %d updates an epoch, learning rate %.3e (per 512 images: %.3e)",
        cfg.MODEL.NAME,
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        global_batch_size(cfg, world.size),
        train_loader.updates_per_epoch,
        schedule.base_lr,
        cfg.TRAIN.BASE_LR,
    )
    metrics = None
    if world.is_main:
        (output / "config.yaml").write_text(cfg.dump())
        metrics = MetricsWriter(output, state.num_updates)
        metrics.text("config", f"```\n{cfg.dump()}\n```", state.num_updates)
    trainer = Trainer(
        state=state,
        model=wrap(torch.compile(model) if cfg.TRAIN.COMPILE else model, world, find_unused_parameters=find_unused_parameters),
        criterion=build_criterion(cfg, mixed=mixup is not None),
        schedule=schedule,
        train_loader=train_loader,
        val_loader=val_loader,
        mixup=mixup,
        recipe=build_recipe(cfg),
        world=world,
        output=output,
        metrics=metrics,
        header={
            "config": to_dict(cfg),
            "updates_per_epoch": train_loader.updates_per_epoch,
            "global_batch_size": global_batch_size(cfg, world.size),
        },
    )
    trainer.fit()
    if metrics is not None:
        metrics.close()


def evaluate_checkpoint(cfg: CfgNode, world: World) -> None:
    """Evaluate the raw weights of a file and their average, whichever it has; the result goes to ``eval.json``."""
    checkpoint = cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED
    saved = read_checkpoint(checkpoint)
    output = output_folder(cfg)
    on_main(world, lambda: make_folder(output))
    datasets = build_datasets(cfg, training=False, rank=world.rank, world_size=world.size)
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
    precision = build_recipe(cfg).eval_dtype
    results = evaluate(models, loader, amp_dtype=precision, world=world)

    def write() -> None:
        record = evaluation_record(cfg, checkpoint, results, precision)
        (output / "eval.json").write_text(json.dumps(record, indent=2) + "\n")
        logger.info("written to %s", output / "eval.json")

    on_main(world, write)
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


def choose_start(cfg: CfgNode, world: World) -> tuple[str, str]:
    """Where training starts, in this order, and from which file.

    1. ``resume``: the checkpoint that --resume names.
    2. ``resume``: the newest whole checkpoint of the output folder, with TRAIN.AUTO_RESUME: the same command, given
       again, goes on, one with --pretrained too.
    3. ``pretrained``: the weights that --pretrained names.
    4. ``scratch``.
    """
    if cfg.MODEL.RESUME:
        return "resume", cfg.MODEL.RESUME
    if cfg.TRAIN.AUTO_RESUME:
        newest = on_main(world, lambda: newest_whole_checkpoint(output_folder(cfg)))
        if newest is not None:
            return "resume", str(newest)
    if cfg.MODEL.PRETRAINED:
        return "pretrained", cfg.MODEL.PRETRAINED
    return "scratch", ""


def check(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Refuse in a second what would fail in minutes: a model that cannot be built, files that are not there."""
    if args.cache_mode and not cfg.DATA.ZIP_MODE:
        raise ConfigError(f"--cache-mode {args.cache_mode}: is of archives; add --zip, or leave it out")
    if args.throughput and args.eval:
        raise ConfigError("--throughput and --eval: give one of them")
    if args.eval and not (cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED):
        raise ConfigError("--eval: no weights to evaluate; name a checkpoint with --resume")
    for key in ("RESUME", "PRETRAINED"):
        if cfg.MODEL[key] and not Path(cfg.MODEL[key]).is_file():
            raise ConfigError(f"MODEL.{key}={cfg.MODEL[key]}: no such file")
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


def build_recipe(cfg: CfgNode) -> Recipe:
    return Recipe(
        num_epochs=cfg.TRAIN.EPOCHS + cfg.TRAIN.COOLDOWN_EPOCHS,
        accumulation=max(cfg.TRAIN.ACCUMULATION_STEPS, 1),
        amp_dtype=amp_dtype(cfg),
        eval_dtype=amp_dtype(cfg) if cfg.TEST.PRECISION == "train" else torch.float32,
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


def evaluation_record(cfg: CfgNode, checkpoint: str, results: dict, precision: torch.dtype) -> dict:
    return {
        "model": cfg.MODEL.NAME,
        "checkpoint": str(checkpoint),
        "sha256": sha256(Path(checkpoint)),
        "results": {
            weights: {
                "correct1": result.correct1,
                "correct5": result.correct5,
                "num_images": result.num_images,
                "acc1": result.acc1,
                "acc5": result.acc5,
                "loss": result.loss,
            }
            for weights, result in results.items()
        },
        "preprocessing": {
            "img_size": cfg.DATA.IMG_SIZE,
            "crop": cfg.TEST.CROP,
            "interpolation": cfg.DATA.INTERPOLATION,
            "mean": cfg.DATA.MEAN,
            "std": cfg.DATA.STD,
        },
        "data": cfg.DATA.DATA_PATH,
        "precision": str(precision).removeprefix("torch."),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    for name, (_, options) in FLAGS.items():
        parser.add_argument(name, **options)
    args, unknown = parser.parse_known_args()
    if unknown:
        near = get_close_matches(unknown[0], FLAGS, n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f": did you mean {near[0]}?" if near else "; see --help"))
    return args


# Flag -> (the config key that it sets, if any; how it is read). Flags override --opts.
FLAGS = {
    "--cfg": (None, {"required": True, "metavar": "FILE", "help": "YAML config, see configs/"}),
    "--opts": (None, {"nargs": "+", "default": [], "metavar": "KEY VALUE", "help": "config keys to override"}),
    "--batch-size": ("DATA.BATCH_SIZE", {"type": int, "help": "images per process and forward pass"}),
    "--data-path": ("DATA.DATA_PATH", {"help": "folder that holds train/ and val/"}),
    "--zip": ("DATA.ZIP_MODE", {"action": "store_true", "help": "read <split>.zip and <split>_map.txt"}),
    "--cache-mode": ("DATA.CACHE_MODE", {"choices": ("no", "full", "part"), "help": "of --zip: bytes to keep in memory"}),
    "--resume": ("MODEL.RESUME", {"metavar": "FILE", "help": "checkpoint to go on from, or to evaluate"}),
    "--pretrained": ("MODEL.PRETRAINED", {"metavar": "FILE", "help": "checkpoint whose weights are the start"}),
    "--use-checkpoint": (
        "TRAIN.USE_CHECKPOINT",
        {"action": "store_true", "help": "gradient checkpointing, to save memory"},
    ),
    "--amp": ("AMP", {"action": "store_true", "help": "mixed precision, AMP_DTYPE bf16 or fp16"}),
    "--output": ("OUTPUT", {"metavar": "FOLDER", "help": "root of the output folders"}),
    "--tag": ("TAG", {"help": "names the run"}),
    "--eval": (None, {"action": "store_true", "help": "evaluate the checkpoint that --resume names"}),
    "--throughput": (None, {"action": "store_true", "help": "measure images/s of the forward pass"}),
    "--find-unused-params": (
        None,
        {"action": "store_true", "help": "for DDP; no model here has any"},
    ),
    "--model-ema": ("EMA.ENABLED", {"action": "store_true", "help": "average the weights"}),
    "--no-model-ema": ("EMA.ENABLED", {"action": "store_true", "help": "do not average the weights"}),
    "--model-ema-force-cpu": ("EMA.FORCE_CPU", {"action": "store_true", "help": "keep the average in host memory"}),
    "--model-ema-decay": ("EMA.DECAY", {"type": float, "help": "per update"}),
}


def overrides(args: argparse.Namespace) -> list:
    """KEY, VALUE, ... of the command line, in the order in which they hold."""
    if args.model_ema and args.no_model_ema:
        raise ConfigError("--model-ema and --no-model-ema: give one of them")
    pairs = list(args.opts)
    for flag, (key, _) in FLAGS.items():
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if key is not None and value is not None and value is not False:
            pairs += [key, flag != "--no-model-ema" if value is True else value]
    return pairs


if __name__ == "__main__":
    main()
