"""Where a run starts from, and whether what it resumes from belongs to it."""

import logging
from functools import partial
from pathlib import Path
from typing import NamedTuple

from yacs.config import CfgNode

from data.build import Datasets
from data.index import compare_descriptions, describe_index
from jobs.checkpoints import locate, log_differences
from utils.checkpoint import BEST, newest_whole_checkpoint, repair_best
from utils.config import ConfigError, flatten
from utils.distributed import World, on_all, on_main
from utils.run import build_output_folder
from utils.schedule import global_batch_size
from utils.trainer import NO_BEST, TrainState
from weights.reader import CheckpointError, read_checkpoint

logger = logging.getLogger(__name__)

# Keys that decide the shape of the model: a run that resumes keeps them.
MODEL_KEYS = ("MODEL.TYPE", "MODEL.NUM_CLASSES", "MODEL.SWIN.", "MODEL.DEIT.", "MODEL.LA.", "DATA.IMG_SIZE")
# What the state of a run consists of, and its types.
STATE_TYPES = {
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "num_updates": int,
    "best": dict,
    "config": dict,
    "updates_per_epoch": int,
    "global_batch_size": int,
}


class Start(NamedTuple):
    """kind: resume, pretrained or scratch; checkpoint: the file, "" for none."""

    kind: str
    checkpoint: str


def choose_start(cfg: CfgNode, world: World) -> Start:
    """What training starts from, in this order.

    1. ``resume``: the checkpoint that --resume names.
    2. ``resume``: the newest whole checkpoint of the output folder, with TRAIN.AUTO_RESUME: the same command, given
       again, continues, one with --pretrained too.
    3. ``pretrained``: the weights that --pretrained names.
    4. ``scratch``.

    --resume and --pretrained together are refused, see ``utils.config``. --eval reads the file that --resume or
    --pretrained names and nothing else, see ``jobs.evaluation``.
    """
    if cfg.MODEL.RESUME:
        return Start("resume", str(on_all(world, partial(locate, cfg.MODEL.RESUME)).path))
    if cfg.TRAIN.AUTO_RESUME:
        newest = on_main(world, lambda: newest_whole_checkpoint(build_output_folder(cfg)))
        if newest is not None:
            return Start("resume", str(newest))
    if cfg.MODEL.PRETRAINED:
        return Start("pretrained", str(on_all(world, partial(locate, cfg.MODEL.PRETRAINED)).path))
    if cfg.TRAIN.FREEZE_BACKBONE:
        raise ConfigError("TRAIN.FREEZE_BACKBONE=True: a head on random features learns little; name weights, --pretrained")
    return Start("scratch", "")


def read_run(cfg: CfgNode, world: World, start: Start) -> dict | None:
    """The state of the run to resume, compared with what is asked for now; None for another start."""
    if start.kind != "resume":
        return None
    saved = on_all(world, partial(read_checkpoint, start.checkpoint))
    check_resumable(saved, cfg, world, start.checkpoint)
    log_differences(saved["config"], cfg, start.checkpoint, level=logging.INFO)
    if cfg.MODEL.PRETRAINED and flatten(saved["config"]).get("MODEL.PRETRAINED") != cfg.MODEL.PRETRAINED:
        logger.warning(
            "MODEL.PRETRAINED=%s: not read, since the run resumes from %s; choose another --tag to start from these weights",
            cfg.MODEL.PRETRAINED,
            start.checkpoint,
        )
    return saved


def check_resumable(saved: dict, cfg: CfgNode, world: World, path: str) -> None:
    """Refuse a file that is not the state of a run, or a config that would make another run of it."""
    if unusable := find_unusable(saved):
        raise CheckpointError(
            f"{path}: holds no state of a run ({', '.join(unusable)} missing or of another type); start from its weights with "
            "--pretrained"
        )
    configured, stored = flatten(cfg), flatten(saved["config"])
    for key, now in configured.items():
        before = stored.get(key, now)
        if before != now and key.startswith(MODEL_KEYS):
            raise ConfigError(
                f"{path}: the run in this folder has {key}={before!r}, now it is {now!r}: that is another run; give it another "
                "--tag, and start from these weights with --pretrained if you like"
            )
    before, now = saved["global_batch_size"], global_batch_size(cfg, world.size)
    if before != now:
        raise ConfigError(
            f"{path}: was saved with {before} images per update, now there would be {now}. Keep the product of processes, "
            "--batch-size and TRAIN.ACCUMULATION_STEPS, or start anew with --pretrained and another --tag"
        )
    before, now = stored.get("TRAIN.OPTIMIZER.NAME"), cfg.TRAIN.OPTIMIZER.NAME
    if before != now:
        raise ConfigError(
            f"{path}: TRAIN.OPTIMIZER.NAME was {before}, whose state {now} cannot take over; keep it, or start anew with "
            "--pretrained and another --tag"
        )


def find_unusable(saved: dict) -> list[str]:
    """Names of the entries of a checkpoint that are missing, or not what a run saves there."""
    names = [name for name, kind in STATE_TYPES.items() if not isinstance(saved.get(name), kind)]
    counts = {name: saved.get(name, 0) for name in ("num_updates", "num_skipped", "last_evaluation")}
    names += [name for name, count in counts.items() if not isinstance(count, int) or count < 0]
    if "updates_per_epoch" not in names and saved["updates_per_epoch"] < 1:
        names.append("updates_per_epoch")
    if "best" not in names and any(
        not isinstance(saved["best"].get(name), (int, type(value))) for name, value in NO_BEST.items()
    ):
        names.append("best")
    data = saved.get("data", {"train": {}, "val": {}})
    if not isinstance(data, dict) or not all(isinstance(data.get(split), dict) for split in ("train", "val")):
        names.append("data")
    return sorted(set(names))


def finished(saved: dict, cfg: CfgNode) -> bool:
    num_epochs = cfg.TRAIN.EPOCHS + cfg.TRAIN.COOLDOWN_EPOCHS
    evaluated = saved.get("last_evaluation", saved["num_updates"]) == saved["num_updates"]
    return saved["num_updates"] >= num_epochs * saved["updates_per_epoch"] and evaluated


def resume(state: TrainState, saved: dict, cfg: CfgNode, updates_per_epoch: int, path: str) -> None:
    """Put a run's state back."""
    if saved["updates_per_epoch"] != updates_per_epoch:
        raise ConfigError(
            f"{path}: was saved with {saved['updates_per_epoch']} updates per epoch, now there are {updates_per_epoch}: the "
            "data have changed. Put them back, or start anew with --pretrained and another --tag"
        )
    try:
        state.load_dict(saved)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is not of this model and optimizer ({error})") from None
    logger.info("resumed after update %d", state.num_updates)


def describe_data(datasets: Datasets, world: World) -> dict:
    """What identifies the images of a run, for its checkpoints."""
    return on_main(
        world,
        lambda: {"train": describe_index(datasets.train.index), "val": describe_index(datasets.val.index)},
        patient=True,
    )


def check_data(saved: dict | None, data: dict, path: str) -> None:
    """Refuse to resume on other data: an epoch would see other images, or labels would have another meaning.

    Raises:
        ConfigError: with what has changed.
    """
    before, names = (saved or {}).get("data"), (saved or {}).get("class_names")
    current = [name for name, *_ in data["train"]["classes"]]
    if not before and names and list(names) != current:  # saved before checkpoints recorded their data
        raise ConfigError(f"{path}: was saved with the classes {names}, now they are {current}. Put them back")
    for split in ("train", "val") if before else ():
        if change := compare_descriptions(before[split], data[split]):
            raise ConfigError(
                f"{path}: the data have changed since it was saved: {split}/: {change}. Put them back, or start anew with "
                "--pretrained and another --tag"
            )


def restore_best(saved: dict, world: World, output: Path, path: str) -> None:
    """Repair ``best.pth`` of the run to resume; where no file of its folder has the best state, the best is counted anew."""
    if not on_main(world, lambda: repair_best(output / BEST, saved, Path(path))):
        logger.warning("%s: its best state is not in this folder; the best is counted anew", path)
        saved["best"] = dict(NO_BEST)
