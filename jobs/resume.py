"""Resume a run: check its checkpoint against config and data, load its state, and complete what is left of its end.

Arguments: ``saved`` has the contents of the checkpoint to resume from, ``path`` is its path, ``output`` the run's directory.
"""

import logging
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from yacs.config import CfgNode

from data.index import compare_descriptions
from engine.checkpoint_writer import find_best, find_top_changes, keep_former_best, link_top, restore_best
from engine.compatibility import ParameterGroupsError, check_state
from engine.metrics import list_top
from engine.metrics_writer import lacks_evaluations, restore_evaluations
from engine.remaining_work import BestFile, describe_early_end, work_after
from engine.run_contents import check_training_state
from engine.run_directory import RunDirectory
from engine.schedule import Schedule, build_schedule, global_batch_size
from engine.state import TrainState, check_trained, describe_best
from jobs.initialization import Initialization
from jobs.locate_checkpoint import check_same_file
from jobs.model import has_same_windows
from models.checkpoints.reader import CheckpointError, read_checkpoint, sha256
from utils.config.keys import KEYS, LINEAR_ATTENTION_KEYS, WINDOW_KEYS
from utils.config.loading import flatten, load_stored_config, show
from utils.distributed import World, on_all, on_main
from utils.errors import ConfigError
from utils.run_files import BEST, checkpoint_path

logger = logging.getLogger(__name__)

# Prefixes of the keys that determine the architecture of the model; a resumed run must not change them.
ARCHITECTURE_KEY_PREFIXES = (
    *("MODEL.TYPE", "MODEL.NUM_CLASSES", "MODEL.SWIN.", "MODEL.DEIT.", "DATA.IMG_SIZE"),
    *LINEAR_ATTENTION_KEYS,
)
# Keys that determine the parameter groups of the optimizer; a resumed run must not change the groups.
GROUP_KEYS = ("TRAIN.LAYER_DECAY", "TRAIN.HEAD_LR_SCALE", "TRAIN.FREEZE_BACKBONE")
# Keys on which the accuracy of given weights depends.
EVALUATION_KEYS = (
    *("DATA.INTERPOLATION", "DATA.MEAN", "DATA.STD", "DATA.EXIF"),
    *("TEST.CLASS_MAP", "TEST.CROP", "TEST.CROP_MODE", "TEST.CROP_PCT", "TEST.INTERPOLATION", "TEST.PRECISION"),
)
MAX_LR_RATIO = 2.0  # a warning is logged if the learning rate grows by more than this factor on resume


def read_resumed_checkpoint(cfg: CfgNode, world: World, init: Initialization) -> dict | None:
    """Read the checkpoint to resume from, and check it against the config; None if the run does not resume."""
    if init.kind != "resume":
        return None
    path = init.checkpoint
    saved = on_all(world, partial(read_checkpoint, path))
    check_same_file(world, path, partial(sha256, Path(path)))
    on_all(world, partial(check_resumable, saved, cfg, world, path))
    if not world.is_main:
        return saved
    if Path(path).name == BEST and not cfg.MODEL.RESUME:
        repeated = "" if work_after(saved, cfg).is_finished else "; epochs after it are repeated"
        logger.warning(
            "%s: the run resumes from update %d, since no numbered checkpoint is as new%s", path, saved["num_updates"], repeated
        )
    log_config_changes(saved["config"], cfg, path)
    if cfg.MODEL.PRETRAINED and flatten(saved["config"]).get("MODEL.PRETRAINED") != cfg.MODEL.PRETRAINED:
        logger.warning(
            "MODEL.PRETRAINED=%s: not read, since the run resumes from %s; choose another --tag to start from these weights",
            cfg.MODEL.PRETRAINED,
            path,
        )
    return saved


def log_config_changes(stored: Mapping, cfg: CfgNode, path: str) -> None:
    """Log how the config differs from that of the checkpoint to resume from.

    The log line is a warning if the new value is the default: the command may not request this change, since the version that
    wrote the checkpoint may have had another default.
    """
    old, new = flatten(stored), flatten(cfg)
    for key in sorted(key for key in old.keys() & new.keys() if old[key] != new[key]):
        change = f"{key} was {show(old[key])} in the checkpoint, but is {show(new[key])} now"
        if new[key] == KEYS[key].default:
            logger.warning("%s: %s, the default", path, change)
        else:
            logger.info("%s: %s", path, change)
    if added := [f"{key} {new[key]!r}" for key in sorted(new.keys() - old.keys())]:
        logger.warning("%s: keys that are not stored in the checkpoint, and their values now: %s", path, ", ".join(added))


def warn_about_environment(saved: dict, environment: Mapping, path: str) -> None:
    """Warn if the checkpoint was written by another version of the project or of its packages, or on other hardware."""
    stored = saved.get("environment")
    if not isinstance(stored, Mapping):
        return
    changes = [
        f"{name} was {show(stored[name])} and is {show(value)} now"
        for name, value in environment.items()
        if name != "command" and name in stored and stored[name] != value
    ]
    if changes:
        logger.warning(
            "%s was saved in another environment, so results may differ slightly from those of an uninterrupted run: %s",
            path,
            ", ".join(changes),
        )


def check_resumable(saved: dict, cfg: CfgNode, world: World, path: str) -> None:
    """Reject a file that is not a checkpoint of a run, and a config that is incompatible with the checkpoint.

    Raises:
        CheckpointError: the file does not contain the complete state of a run, or a later version of the project wrote it.
        ConfigError: the architecture, the global batch size or the optimizer differs.
    """
    check_training_state(saved, path)
    configured, stored = flatten(cfg), flatten(saved["config"])
    for key, value in configured.items():
        stored_value = stored.get(key, value)
        if stored_value == value or (key in WINDOW_KEYS and has_same_windows(saved["config"], cfg, path)):
            continue
        if key.startswith(ARCHITECTURE_KEY_PREFIXES):
            raise ConfigError(
                f"{path} was saved with {key}={stored_value!r}, but the config has {value!r}; this key cannot change on "
                "resume. Start a new run with another --tag, and add --pretrained to start from these weights"
            )
    fraction = stored.get("DATA.VAL_FRACTION", 0.0)
    if fraction != cfg.DATA.VAL_FRACTION:
        raise ConfigError(
            f"{path} was saved with DATA.VAL_FRACTION={fraction}, but the config has {cfg.DATA.VAL_FRACTION}: the run would "
            f"validate on images that it was trained on. Add --opts DATA.VAL_FRACTION {fraction}, or start a new run with "
            "another --tag"
        )
    batch = global_batch_size(cfg, world.size)
    if saved["global_batch_size"] != batch:
        raise ConfigError(
            f"{path} was saved with a global batch size of {saved['global_batch_size']}, but it is now {batch}. Keep the "
            "product of the number of processes, --batch-size and TRAIN.ACCUMULATION_STEPS unchanged, or start a new run with "
            "--pretrained and another --tag"
        )
    optimizer = cfg.TRAIN.OPTIMIZER.NAME
    stored_optimizer = stored.get("TRAIN.OPTIMIZER.NAME", optimizer)
    if stored_optimizer != optimizer:
        raise ConfigError(
            f"{path} was saved with TRAIN.OPTIMIZER.NAME={stored_optimizer}; {optimizer} cannot load this optimizer state. "
            "Restore the old optimizer, or start a new run with --pretrained and another --tag"
        )


def resume(state: TrainState, saved: dict, cfg: CfgNode, updates_per_epoch: int, path: str) -> None:
    """Load the state of a run from its checkpoint.

    Raises:
        ConfigError: the number of updates per epoch or the parameter groups have changed.
        CheckpointError: the checkpoint belongs to another model or optimizer.
    """
    if saved["updates_per_epoch"] != updates_per_epoch:
        dropped = flatten(saved["config"]).get("DATA.DROP_LAST", True)
        cause = "so the data have changed. Restore them"
        if dropped != cfg.DATA.DROP_LAST:
            cause = f"since DATA.DROP_LAST was {dropped}. Add --opts DATA.DROP_LAST {dropped}"
        raise ConfigError(
            f"{path} was saved with {saved['updates_per_epoch']} updates per epoch, but there are {updates_per_epoch} now, "
            f"{cause}, or start a new run with --pretrained and another --tag"
        )
    try:
        check_state(state, saved)
        state.load_dict(saved)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, ParameterGroupsError):
            check_group_keys(saved, cfg, path)
        raise CheckpointError(f"{path} does not match this model and optimizer ({error})") from None
    logger.info("resumed after update %d", state.num_updates)


def check_group_keys(saved: dict, cfg: CfgNode, path: str) -> None:
    """Reject a config whose keys give the optimizer other parameter groups than those of the checkpoint.

    Raises:
        ConfigError: the message names the keys that changed.
    """
    stored, configured = flatten(saved["config"]), flatten(cfg)
    before = {key: stored.get(key, KEYS[key].default) for key in GROUP_KEYS}
    changed = [key for key in GROUP_KEYS if before[key] != configured[key]]
    if changed:
        former = {key: f"was {before[key]!r}" if key in stored else f"is not stored, as if {before[key]!r}," for key in changed}
        changes = ", ".join(f"{key} {former[key]} and is {configured[key]!r} now" for key in changed)
        raise ConfigError(
            f"{path}: the parameter groups of the optimizer cannot change on resume: {changes}. Restore the value (--opts "
            f"{' '.join(f'{key} {before[key]}' for key in changed)}), or start a new run with --pretrained and another --tag"
        )


def warn_about_learning_rate(saved: dict, cfg: CfgNode, schedule: Schedule, world_size: int, path: str) -> None:
    """Warn if the learning rate grows suddenly on resume, as when TRAIN.EPOCHS of a finished run is raised.

    Args:
        schedule: schedule of the resumed run.
    """
    update = saved["num_updates"] - saved.get("num_skipped", 0)
    if "TRAIN.EPOCHS" not in flatten(saved["config"]):
        return  # the former schedule is not known
    try:
        former = load_stored_config(
            saved["config"],
            source=path,
            sections=("TRAIN.", "DATA.BATCH_SIZE", "DATA.GLOBAL_BATCH_SIZE", "MODEL.NUM_CLASSES"),  # TRAIN.CLASS_WEIGHTS
        )
        before = build_schedule(former, updates_per_epoch=saved["updates_per_epoch"], world_size=world_size)
    except ConfigError:  # the stored config is only compared; this version may reject its values
        return
    if before == schedule or update == 0 or schedule(update) <= MAX_LR_RATIO * before(update - 1):
        return
    logger.warning(
        "the learning rate grows from %.3g at update %d to %.3g at update %d, since the schedule has changed (TRAIN.EPOCHS was "
        "%d and is %d now), which may undo a part of the training. %s",
        before(update - 1),
        update - 1,
        schedule(update),
        update,
        former.TRAIN.EPOCHS,
        cfg.TRAIN.EPOCHS,
        advise_finetuning(path, cfg, num_epochs=max(cfg.TRAIN.EPOCHS - former.TRAIN.EPOCHS, 1)),
    )


def check_data(
    saved: Mapping, data: dict, path: str, *, accept_changes: bool = False, advise_acceptance: bool = True
) -> dict[str, str]:
    """Refuse to resume if the data have changed.

    Otherwise, the run would continue with different images, or class ids would refer to different classes.

    Args:
        data: description of the current data: split -> result of ``describe_index``.
        accept_changes: DATA.ACCEPT_CHANGES: allow changes that leave the names and the order of the classes as they are.
        advise_acceptance: propose DATA.ACCEPT_CHANGES for such changes; False if the run could not resume with it either.

    Returns:
        The accepted changes: split -> description.

    Raises:
        ConfigError: the data have changed; the message describes the difference.
    """
    stored, names = saved.get("data"), saved.get("class_names")
    if not stored:  # checkpoints of earlier versions have no description of their data
        current = class_names(data["train"])
        if names and list(names) != current:
            raise ConfigError(f"{path} was saved with the classes {names}, but the classes are now {current}. Restore the data")
        return {}
    changes = {}
    for split in ("train", "val"):
        change = compare_descriptions(stored[split], data[split])
        if not change:
            continue
        same_classes = class_names(stored[split]) == class_names(data[split])
        if accept_changes and same_classes:
            changes[split] = change
            continue
        advice = "restore them"
        if same_classes and advise_acceptance:
            advice = (
                "if the change is intended, for example after an unreadable image was removed, add --opts DATA.ACCEPT_CHANGES "
                "True; else restore the data"
            )
        raise ConfigError(
            f"{path}: the data have changed since it was saved: in {split}/, {change}; {advice}, or start a new run with "
            "--pretrained and another --tag"
        )
    return changes


def class_names(description: Mapping) -> list[str] | None:
    """Names of the classes in a result of ``describe_index``, by class id; None if it is malformed."""
    try:
        return [name for name, *_ in description["classes"]]
    except (KeyError, TypeError, ValueError):
        return None


def find_evaluation_change(saved: dict, cfg: CfgNode, accepted: Mapping[str, str]) -> str:
    """Why accuracies of the resumed run cannot be compared with earlier ones; "" if they can.

    Args:
        accepted: accepted changes of the data, from ``check_data``.
    """
    stored, configured = flatten(saved["config"]), flatten(cfg)
    changed = [key for key in EVALUATION_KEYS if stored.get(key, configured[key]) != configured[key]]
    metric = saved["best"].get("metric", "acc1")
    if metric != cfg.BEST_METRIC and saved["best"]["num_updates"] >= 0:
        changed.append(f"BEST_METRIC (from {metric} to {cfg.BEST_METRIC})")
    if "val" in accepted:
        changed.append("the validation images")
    return f"{' and '.join(changed)} changed after the best accuracy was measured" if changed else ""


def prepare_best(saved: dict, cfg: CfgNode, output: Path, path: str, *, changed_data: Mapping[str, str]) -> bool:
    """Repair the ``best.pth`` of the run that is resumed. On rank 0, after all checks.

    Args:
        changed_data: accepted changes of the data, from ``check_data``.

    Returns:
        Whether the best accuracy has to be reset, since its checkpoint is lost or it is not comparable. An existing
        ``best.pth`` is then kept under another name.
    """
    reason = find_evaluation_change(saved, cfg, changed_data)
    found = None if reason else find_best(output, saved, Path(path))
    work = work_after(saved, cfg, best=locate_best(found, output))
    if work.link and found is not None:
        restore_best(found, output)
    if work.reset:
        if saved["best"]["num_updates"] >= 0:
            reason = reason or "the best checkpoint of its run is not in the output directory"
            logger.warning("%s: %s; the best accuracy is reset", path, reason)
        keep_former_best(output)
    else:
        link_top(output, list_top(saved, cfg.BEST_METRIC, cfg.KEEP_BEST), newest=checkpoint_path(output, saved["num_updates"]))
    return work.reset


def locate_best(found: Path | None, output: Path) -> BestFile:
    """The kind of a result of ``find_best``."""
    if found is None:
        return BestFile.UNUSABLE
    return BestFile.IN_PLACE if found == output / BEST else BestFile.ELSEWHERE


def end_finished_run(saved: dict, cfg: CfgNode, world: World, init: Initialization) -> None:
    """Log that a run is finished. If ``best.pth`` or the evaluations in ``metrics.jsonl`` are incomplete, repair them first."""
    check_trained(num_updates=saved["num_updates"], num_skipped=saved.get("num_skipped", 0))
    if init.is_inside:
        on_main(world, partial(repair_finished_run, saved, cfg, init.contents.output, Path(init.checkpoint)))
    logger.info("%s", describe_finished_run(saved, cfg, init))


def describe_finished_run(saved: Mapping, cfg: CfgNode, init: Initialization) -> str:
    """Message that the run is finished, with the remedy."""
    early_end = describe_early_end(saved, cfg)
    remedy = "raise TRAIN.PATIENCE or set it to 0" if early_end else "raise TRAIN.EPOCHS"
    if not init.is_inside:
        return (
            f"{init.checkpoint}: this run is finished{early_end}, so nothing is written to {init.contents.output}; {remedy} to "
            "continue it there, or start a new run from its weights with --pretrained instead of --resume"
        )
    message = f"{init.checkpoint}: this run is finished{early_end}; {remedy} to continue, or choose another --tag"
    if early_end:
        return message
    advice = advise_finetuning(init.checkpoint, cfg, num_epochs=max(cfg.TRAIN.EPOCHS // 10, 1))
    return f"{message}. With more epochs, the learning rate starts again from a higher value. {advice}"


def advise_finetuning(path: str, cfg: CfgNode, *, num_epochs: int) -> str:
    """How to train the best weights of a run further at a low learning rate. path: a checkpoint of the run.

    Options for epochs that the fine-tuning does not have are reset: it continues with the last phase of the run.
    """
    options = {"TRAIN.EPOCHS": num_epochs, "TRAIN.WARMUP_EPOCHS": 0, "TRAIN.BASE_LR": f"{cfg.TRAIN.BASE_LR / 10:.3g}"}
    if sizes := cfg.TRAIN.SIZE_SCHEDULE:
        options["TRAIN.SIZE_SCHEDULE"] = [[0, *sizes[-1][1:]]]
    if cfg.AUG.MIXUP_OFF_EPOCH:
        options |= {"AUG.MIXUP_OFF_EPOCH": 0, "AUG.MIXUP": 0, "AUG.CUTMIX": 0, "AUG.CUTMIX_MINMAX": None}
    if cfg.TRAIN.LR_SCHEDULER.NAME == "multistep":
        options |= {
            "TRAIN.LR_SCHEDULER.NAME": "cosine",
            "TRAIN.LR_SCHEDULER.MILESTONES": KEYS["TRAIN.LR_SCHEDULER.MILESTONES"].default,
        }
    best, tag = shlex.quote(str(Path(path).parent / BEST)), shlex.quote(f"{cfg.TAG}_longer")
    opts = " ".join(f"{key} {shlex.quote(str(value))}" for key, value in options.items())
    return f"To train further at a low learning rate, fine-tune the best weights: --pretrained {best} --tag {tag} --opts {opts}"


def repair_finished_run(saved: dict, cfg: CfgNode, output: Path, path: Path) -> None:
    """Repair ``best.pth`` and ``metrics.jsonl`` of a finished run, if necessary, under the lock of its directory."""
    evaluations = saved.get("evaluations", [])
    lacks_metrics, found = lacks_evaluations(output, evaluations), find_best(output, saved, path)
    work = work_after(saved, cfg, best=locate_best(found, output))
    top, newest = list_top(saved, cfg.BEST_METRIC, cfg.KEEP_BEST), checkpoint_path(output, saved["num_updates"])
    if work.link or lacks_metrics or any(find_top_changes(output, top, newest=newest)):
        directory = RunDirectory(output)
        directory.open()
        try:
            if lacks_metrics:
                restore_evaluations(output, saved["num_updates"], evaluations)
            if work.link and found is not None:
                restore_best(found, output)
            link_top(output, top, newest=newest)
        finally:
            directory.close()
    if found is None:
        logger.warning(
            "%s: the best checkpoint of this run (after update %d, %s) is lost: neither best.pth nor a numbered "
            "checkpoint contains it",
            output,
            saved["best"]["num_updates"],
            describe_best(saved["best"]),
        )
