"""Choose how a run is initialised, and check that a checkpoint to resume from matches the run's config and data."""

import logging
from functools import partial
from pathlib import Path
from typing import NamedTuple

from yacs.config import CfgNode

from data.build import Datasets
from data.index import compare_descriptions, describe_index
from jobs.checkpoints import locate, log_differences
from utils.checkpoint import BEST, newest_intact_checkpoint, repair_best
from utils.config import ConfigError, flatten
from utils.distributed import World, on_all, on_main
from utils.run import build_output_path
from utils.schedule import global_batch_size
from utils.trainer import NO_BEST, TrainState
from weights.reader import CheckpointError, read_checkpoint

logger = logging.getLogger(__name__)

# Prefixes of the keys that determine the architecture of the model; a resumed run must not change them.
ARCHITECTURE_KEY_PREFIXES = ("MODEL.TYPE", "MODEL.NUM_CLASSES", "MODEL.SWIN.", "MODEL.DEIT.", "MODEL.LA.", "DATA.IMG_SIZE")
# Entries that a checkpoint must have to be resumed, and their types.
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


class Initialization(NamedTuple):
    """Where the initial state of a run comes from.

    Attributes:
        kind: resume, pretrained or scratch.
        checkpoint: path of the checkpoint to resume from, or of the pretrained weights; "" for scratch.
    """

    kind: str
    checkpoint: str


def choose_initialization(cfg: CfgNode, world: World) -> Initialization:
    """Choose the initial state of training, in this order of precedence.

    1. ``resume``: the checkpoint of --resume.
    2. ``resume``: the newest intact checkpoint of the output directory, if TRAIN.AUTO_RESUME is True. Repeating the
       command of an interrupted run thus resumes the run, even with --pretrained.
    3. ``pretrained``: the weights of --pretrained.
    4. ``scratch``: random weights.

    --resume and --pretrained together are rejected, see ``utils.config``. --eval does not use this function, see
    ``jobs.evaluation.choose_checkpoint``.

    Raises:
        ConfigError: TRAIN.FREEZE_BACKBONE without weights to start from.
    """
    if cfg.MODEL.RESUME:
        return Initialization("resume", str(on_all(world, partial(locate, cfg.MODEL.RESUME)).path))
    if cfg.TRAIN.AUTO_RESUME:
        newest = on_main(world, lambda: newest_intact_checkpoint(build_output_path(cfg)))
        if newest is not None:
            return Initialization("resume", str(newest))
    if cfg.MODEL.PRETRAINED:
        return Initialization("pretrained", str(on_all(world, partial(locate, cfg.MODEL.PRETRAINED)).path))
    if cfg.TRAIN.FREEZE_BACKBONE:
        raise ConfigError(
            "TRAIN.FREEZE_BACKBONE=True: a head trained on random features has a low accuracy; give weights with --pretrained"
        )
    return Initialization("scratch", "")


def read_resumed_checkpoint(cfg: CfgNode, world: World, init: Initialization) -> dict | None:
    """Read the checkpoint to resume from, and check it against the config; None if the run does not resume."""
    if init.kind != "resume":
        return None
    saved = on_all(world, partial(read_checkpoint, init.checkpoint))
    check_resumable(saved, cfg, world, init.checkpoint)
    log_differences(saved["config"], cfg, init.checkpoint)
    if cfg.MODEL.PRETRAINED and flatten(saved["config"]).get("MODEL.PRETRAINED") != cfg.MODEL.PRETRAINED:
        logger.warning(
            "MODEL.PRETRAINED=%s: not read, since the run resumes from %s; choose another --tag to start from these weights",
            cfg.MODEL.PRETRAINED,
            init.checkpoint,
        )
    return saved


def check_resumable(saved: dict, cfg: CfgNode, world: World, path: str) -> None:
    """Reject a file that is not a checkpoint of a run, and a config that is incompatible with the checkpoint.

    Raises:
        CheckpointError: the file does not contain the complete state of a run.
        ConfigError: the architecture, the global batch size or the optimizer differs.
    """
    if unusable := find_unusable_entries(saved):
        raise CheckpointError(
            f"{path} is not a training checkpoint that can be resumed (missing or invalid: {', '.join(unusable)}); load only "
            "its weights with --pretrained"
        )
    configured, stored = flatten(cfg), flatten(saved["config"])
    for key, value in configured.items():
        stored_value = stored.get(key, value)
        if stored_value != value and key.startswith(ARCHITECTURE_KEY_PREFIXES):
            raise ConfigError(
                f"{path} was saved with {key}={stored_value!r}, but the config has {value!r}; this key cannot change on "
                "resume. Start a new run with another --tag, and add --pretrained to start from these weights"
            )
    stored_batch, batch = saved["global_batch_size"], global_batch_size(cfg, world.size)
    if stored_batch != batch:
        raise ConfigError(
            f"{path} was saved with a global batch size of {stored_batch}, but it is now {batch}. Keep the product of the "
            "number of processes, --batch-size and TRAIN.ACCUMULATION_STEPS unchanged, or start a new run with --pretrained "
            "and another --tag"
        )
    stored_optimizer, optimizer = stored.get("TRAIN.OPTIMIZER.NAME"), cfg.TRAIN.OPTIMIZER.NAME
    if stored_optimizer != optimizer:
        raise ConfigError(
            f"{path} was saved with TRAIN.OPTIMIZER.NAME={stored_optimizer}; {optimizer} cannot load this optimizer state. "
            "Restore the old optimizer, or start a new run with --pretrained and another --tag"
        )


def find_unusable_entries(saved: dict) -> list[str]:
    """Names of the checkpoint entries that are missing or have an unexpected type or value."""
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


def is_finished(saved: dict, cfg: CfgNode) -> bool:
    """Whether a run has completed all its epochs and its last evaluation."""
    num_epochs = cfg.TRAIN.EPOCHS + cfg.TRAIN.COOLDOWN_EPOCHS
    evaluated = saved.get("last_evaluation", saved["num_updates"]) == saved["num_updates"]
    return saved["num_updates"] >= num_epochs * saved["updates_per_epoch"] and evaluated


def resume(state: TrainState, saved: dict, cfg: CfgNode, updates_per_epoch: int, path: str) -> None:
    """Load the state of a run from its checkpoint ``saved``.

    Args:
        path: path of the checkpoint to resume from, for messages.

    Raises:
        ConfigError: the number of updates per epoch has changed.
        CheckpointError: the checkpoint belongs to another model or optimizer.
    """
    if saved["updates_per_epoch"] != updates_per_epoch:
        raise ConfigError(
            f"{path} was saved with {saved['updates_per_epoch']} updates per epoch, but there are {updates_per_epoch} now, "
            "so the data have changed. Restore them, or start a new run with --pretrained and another --tag"
        )
    try:
        state.load_dict(saved)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not match this model and optimizer ({error})") from None
    logger.info("resumed after update %d", state.num_updates)


def describe_data(datasets: Datasets, world: World) -> dict:
    """Describe the training and validation images. Checkpoints store this description to detect changed data on resume."""
    return on_main(
        world,
        lambda: {"train": describe_index(datasets.train.index), "val": describe_index(datasets.val.index)},
        long_timeout=True,
    )


def check_data(saved: dict | None, data: dict, path: str) -> None:
    """Refuse to resume if the data have changed.

    Otherwise, the run would continue with different images, or class ids would refer to different classes.

    Args:
        saved: the checkpoint to resume from; None if the run does not resume.
        data: description of the current data, from ``describe_data``.
        path: path of the checkpoint to resume from, for messages.

    Raises:
        ConfigError: the data have changed; the message describes the difference.
    """
    saved = saved or {}
    stored, names = saved.get("data"), saved.get("class_names")
    current = [name for name, *_ in data["train"]["classes"]]
    if not stored and names and list(names) != current:  # checkpoints of earlier versions have no description of their data
        raise ConfigError(f"{path} was saved with the classes {names}, but the classes are now {current}. Restore the data")
    for split in ("train", "val") if stored else ():
        if change := compare_descriptions(stored[split], data[split]):
            raise ConfigError(
                f"{path}: the data have changed since it was saved: in {split}/, {change}. Restore them, or start a new run "
                "with --pretrained and another --tag"
            )


def restore_best(saved: dict, world: World, output: Path, path: str) -> None:
    """Repair the ``best.pth`` of the run that is resumed. If the best checkpoint is lost, reset the best accuracy in ``saved``.

    Args:
        saved: the checkpoint to resume from.
        output: directory with ``best.pth``.
        path: path of the checkpoint to resume from.
    """
    if not on_main(world, lambda: repair_best(output / BEST, saved, Path(path))):
        logger.warning("%s: the best checkpoint of its run is not in the output directory; the best accuracy is reset", path)
        saved["best"] = dict(NO_BEST)
