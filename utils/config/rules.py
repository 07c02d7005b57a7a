"""Legal values of the config: choices, ranges, and settings that conflict or have no effect together."""

import os
import re
import shlex
from difflib import get_close_matches
from typing import Any

from yacs.config import CfgNode

from utils.config.key import MAX_SIDE, Key
from utils.config.keys import KEYS
from utils.config.model_keys import MODEL_TYPES
from utils.config.optimizers import OPTIMIZERS, OPTIONS
from utils.config.reading import show
from utils.config.training_keys import TIMM_PREFIX
from utils.errors import ConfigError

MAX_NAME_BYTES = 255  # maximum length of a file name on common file systems
# Range of TRAIN.CLASS_WEIGHTS, far inside that of float32, so that losses and gradients are finite too.
MIN_WEIGHT, MAX_WEIGHT = 1e-9, 1e9
# Key prefix -> model types that use the keys with this prefix. With other types, these keys must have their default values.
_FAMILY_KEYS = {
    "MODEL.SWIN.": ("flatten_swin",),
    "MODEL.DEIT.": ("flatten_deit",),
    "MODEL.LA.PVT_LA_SR_RATIOS": tuple(name for name in MODEL_TYPES if name.startswith("flatten_pvt")),
    "MODEL.LA.CSWIN_LA_SPLIT_SIZE": tuple(name for name in MODEL_TYPES if name.startswith("FLatten_CSWin")),
}


def check_rules(cfg: CfgNode, leaves: dict[str, object]) -> None:
    """Check the values of a config.

    Args:
        leaves: the same config as one dictionary with dotted keys.

    Raises:
        ConfigError: an illegal value, or values that conflict.
    """
    for name, key in KEYS.items():
        _check_key(name, key, leaves[name], cfg.MODEL.TYPE)
    for name, text in (("MODEL.NAME", cfg.MODEL.NAME), ("TAG", cfg.TAG)):
        if not text or text in (".", "..") or re.search(r"[/\\]", text):
            raise ConfigError(
                f"{name}={show(text)} is used as a directory name; give a name other than . and .., without / and \\"
            )
        if len(os.fsencode(text)) > MAX_NAME_BYTES:
            raise ConfigError(f"{name}={show(text)} is used as a directory name; give it at most {MAX_NAME_BYTES} bytes")
    _check_attention(cfg.MODEL.LA)
    _check_widths(cfg.MODEL.SWIN, cfg.MODEL.DEIT)
    _check_recipe(cfg)
    _check_optimizer(cfg.TRAIN)
    _check_loss(cfg)
    _check_phases(cfg)
    _check_distillation(cfg.TRAIN)
    _check_lists(cfg)


def _check_key(name: str, key: Key, value: Any, model_type: str) -> None:
    if key.choices and value not in key.choices:
        text = str(value)[:100]
        near = [choice for choice in key.choices if choice.lower() == text.lower()] or get_close_matches(text, key.choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name}={show(value)}: choose one of {', '.join(filter(None, key.choices))}{hint}")
    numbers = value if isinstance(value, list) else [value]
    if key.minimum is not None and value is not None and not all(key.minimum <= number <= key.maximum for number in numbers):
        raise ConfigError(f"{name}={show(value)}: give {key.legal_numbers(several=isinstance(value, list))}")
    types = next((types for prefix, types in _FAMILY_KEYS.items() if name.startswith(prefix)), None)
    if types is not None and model_type not in types and value != key.default:
        raise ConfigError(f"{name}={show(value)} has no effect with MODEL.TYPE={model_type}; remove it")


def _check_attention(keys: CfgNode) -> None:
    if keys.KERNEL_SIZE % 2 == 0:
        raise ConfigError(
            f"MODEL.LA.KERNEL_SIZE={keys.KERNEL_SIZE}: an even kernel changes the size of the token map; use an odd number"
        )
    formats = {
        "ATTN_TYPE": (
            r"[LS]+|(?=[LS]*M)[LSM]+[0-9]{1,4}",
            "letter per stage: L (linear), S (softmax) or M (mixed); with M, the number of linear blocks in that stage follows "
            "the last letter, as in LLMS3",
        ),
        "PVT_LA_SR_RATIOS": (r"[1-9]{4}", "digit per stage, as in 8421"),
        "CSWIN_LA_SPLIT_SIZE": (
            r"(0|[1-9][0-9]{0,3})(-(0|[1-9][0-9]{0,3})){3}",
            "number per stage, as in 56-28-14-7, or 0-0-0-0 for the whole token map",
        ),
    }
    for name, (pattern, meaning) in formats.items():
        if not re.fullmatch(pattern, keys[name]):
            raise ConfigError(f"MODEL.LA.{name}={show(keys[name])}: give one {meaning}")


def _check_widths(swin: CfgNode, deit: CfgNode) -> None:
    if not swin.DEPTHS:
        raise ConfigError("MODEL.SWIN.DEPTHS=[]: give the number of blocks of each stage")
    if len(swin.DEPTHS) != len(swin.NUM_HEADS):
        raise ConfigError(
            f"MODEL.SWIN.DEPTHS={swin.DEPTHS} and MODEL.SWIN.NUM_HEADS={swin.NUM_HEADS}: both need one number per stage; give "
            "lists of the same length"
        )
    for stage, heads in enumerate(swin.NUM_HEADS):
        if (channels := swin.EMBED_DIM * 2**stage) % heads:
            raise ConfigError(
                f"MODEL.SWIN.NUM_HEADS={swin.NUM_HEADS}: {heads} heads do not divide the {channels} channels of stage "
                f"{stage + 1}; change the heads or MODEL.SWIN.EMBED_DIM"
            )
    if deit.EMBED_DIM % deit.NUM_HEADS:
        raise ConfigError(
            f"MODEL.DEIT.NUM_HEADS={deit.NUM_HEADS} does not divide MODEL.DEIT.EMBED_DIM={deit.EMBED_DIM}; change one of them"
        )


def _check_recipe(cfg: CfgNode) -> None:
    """Check settings that conflict or have no effect together."""
    if not cfg.TEST.CROP and cfg.TEST.CROP_MODE == "short":
        raise ConfigError(
            "TEST.CROP=False: disables the crop, which conflicts with TEST.CROP_MODE=short; give only one of them"
        )
    if cfg.DATA.VAL_SPLIT and cfg.DATA.VAL_FRACTION:
        raise ConfigError(
            f"DATA.VAL_SPLIT={cfg.DATA.VAL_SPLIT}: conflicts with DATA.VAL_FRACTION={cfg.DATA.VAL_FRACTION:g}, which holds out "
            "training images for validation; give only one of them (DATA.VAL_FRACTION 0 overrides a config or checkpoint)"
        )
    epochs, warmup = cfg.TRAIN.EPOCHS, cfg.TRAIN.WARMUP_EPOCHS
    if warmup > epochs:
        raise ConfigError(
            f"TRAIN.WARMUP_EPOCHS={warmup}: longer than TRAIN.EPOCHS={epochs}; shorten the warm-up: add --opts "
            f"TRAIN.WARMUP_EPOCHS {max(epochs // 10, min(epochs - 1, 1))}"
        )
    if cfg.DATA.GLOBAL_BATCH_SIZE and cfg.TRAIN.ACCUMULATION_STEPS > 1:
        raise ConfigError(
            f"TRAIN.ACCUMULATION_STEPS={cfg.TRAIN.ACCUMULATION_STEPS}: conflicts with DATA.GLOBAL_BATCH_SIZE="
            f"{cfg.DATA.GLOBAL_BATCH_SIZE}, which determines the number of forward passes; give only one of them"
        )
    if cfg.TRAIN.FREEZE_BACKBONE and cfg.TRAIN.LAYER_DECAY < 1:
        raise ConfigError(
            f"TRAIN.LAYER_DECAY={cfg.TRAIN.LAYER_DECAY} has no effect with TRAIN.FREEZE_BACKBONE, which trains only the head; "
            "remove one of them"
        )
    if cfg.AUG.DEVICE_RANDAUGMENT and not cfg.AUG.AUTO_AUGMENT.startswith("rand"):
        raise ConfigError(
            f"AUG.DEVICE_RANDAUGMENT=True has no effect with AUG.AUTO_AUGMENT={show(cfg.AUG.AUTO_AUGMENT)}, which is not "
            "RandAugment; remove one of them, or set AUG.AUTO_AUGMENT rand-m9-mstd0.5-inc1"
        )
    if cfg.MODEL.RESUME and cfg.MODEL.PRETRAINED:
        raise ConfigError(
            f"MODEL.RESUME={cfg.MODEL.RESUME} and MODEL.PRETRAINED={cfg.MODEL.PRETRAINED}: a resumed run already has weights; "
            "give only one of --resume and --pretrained"
        )


def _check_optimizer(keys: CfgNode) -> None:
    """Check that optimizer and schedule take the options that are set, and that the schedule ends within the run."""
    optimizer, schedule = keys.OPTIMIZER, keys.LR_SCHEDULER
    defaults = OPTIMIZERS[optimizer.NAME]
    for option in OPTIONS:
        ignored = KEYS[f"TRAIN.OPTIMIZER.{option}"].default  # accepted, since the config file of a run contains every key
        if option not in defaults and optimizer[option] != ignored:
            raise ConfigError(
                f"TRAIN.OPTIMIZER.{option}={optimizer[option]} has no effect with TRAIN.OPTIMIZER.NAME={optimizer.NAME}, which "
                f"takes {' and '.join(defaults)}; remove it; if a config file contains it, add "
                f"--opts TRAIN.OPTIMIZER.{option} {shlex.quote(str(ignored))}"
            )
    example: Any = defaults.get("BETAS", KEYS["TRAIN.OPTIMIZER.BETAS"].default)
    if len(optimizer.BETAS) != len(example) or not all(0 <= beta < 1 for beta in optimizer.BETAS):
        raise ConfigError(
            f"TRAIN.OPTIMIZER.BETAS={optimizer.BETAS}: give {'two' if len(example) == 2 else 'three'} numbers, each at least 0 "
            f"and below 1, such as the default of {optimizer.NAME}: {show(example)}"
        )
    if optimizer.NAME == "muon" and optimizer.MOMENTUM == 1:
        raise ConfigError("TRAIN.OPTIMIZER.MOMENTUM=1.0: muon needs a number below 1, such as its default 0.9")
    for name, option in (("multistep", "MILESTONES"), ("poly", "POWER")):
        ignored = KEYS[f"TRAIN.LR_SCHEDULER.{option}"].default
        if name != schedule.NAME and schedule[option] != ignored:
            raise ConfigError(
                f"TRAIN.LR_SCHEDULER.{option}={schedule[option]} has no effect with TRAIN.LR_SCHEDULER.NAME={schedule.NAME}; "
                f"remove it, or set TRAIN.LR_SCHEDULER.NAME {name}; if a config file contains it, add "
                f"--opts TRAIN.LR_SCHEDULER.{option} {shlex.quote(str(ignored))}"
            )
    epochs = schedule.MILESTONES
    is_legal = epochs and epochs == sorted(set(epochs)) and epochs[-1] < keys.EPOCHS
    if schedule.NAME == "multistep" and not is_legal:
        raise ConfigError(
            f"TRAIN.LR_SCHEDULER.MILESTONES={epochs}: give increasing epochs below TRAIN.EPOCHS={keys.EPOCHS}; with one epoch, "
            "choose another TRAIN.LR_SCHEDULER.NAME"
        )


def _check_distillation(keys: CfgNode) -> None:
    for option, value in keys.DISTILLATION.items():
        name = f"TRAIN.DISTILLATION.{option}"
        ignored, cause = KEYS[name].default, ""  # accepted, since the config file of a run contains every key
        if not keys.TEACHER:
            cause = "without TRAIN.TEACHER"
        elif option == "TEMPERATURE" and keys.DISTILLATION.KIND == "hard":
            cause = "with TRAIN.DISTILLATION.KIND=hard"
        if cause and value != ignored:
            raise ConfigError(
                f"{name}={value} has no effect {cause}; remove it; if a config file contains it, add --opts {name} {ignored}"
            )
    if keys.TEACHER == TIMM_PREFIX:
        raise ConfigError(f"TRAIN.TEACHER={TIMM_PREFIX}: add the name of a model, such as {TIMM_PREFIX}regnety_160")


def _check_loss(cfg: CfgNode) -> None:
    """Check the loss, the weights of the classes and the sampling, which must not both balance the classes."""
    loss, threshold, weights = cfg.TRAIN.LOSS, cfg.TRAIN.BCE_THRESHOLD, cfg.TRAIN.CLASS_WEIGHTS
    if threshold and loss != "bce":
        raise ConfigError(
            f"TRAIN.BCE_THRESHOLD={threshold} has no effect with TRAIN.LOSS={loss}; remove it, or set TRAIN.LOSS bce"
        )
    if isinstance(weights, str):
        if weights not in ("none", "balanced"):
            raise ConfigError(
                f"TRAIN.CLASS_WEIGHTS={show(weights)}: choose none or balanced, or give a list with a number per class"
            )
    elif len(weights) != cfg.MODEL.NUM_CLASSES:
        raise ConfigError(
            f"TRAIN.CLASS_WEIGHTS={show(weights)} has {len(weights)} numbers; give one from {MIN_WEIGHT:g} to "
            f"{MAX_WEIGHT:g} for each of the {cfg.MODEL.NUM_CLASSES} classes (MODEL.NUM_CLASSES), or balanced"
        )
    elif illegal := [(i, weight) for i, weight in enumerate(weights) if not MIN_WEIGHT <= weight <= MAX_WEIGHT]:
        class_id, weight = illegal[0]
        raise ConfigError(
            f"TRAIN.CLASS_WEIGHTS={show(weights)}: the weight of the class with id {class_id} is {weight:g}; give numbers from "
            f"{MIN_WEIGHT:g} to {MAX_WEIGHT:g}, or balanced"
        )
    if weights == cfg.DATA.SAMPLING == "balanced":
        raise ConfigError(
            "TRAIN.CLASS_WEIGHTS=balanced and DATA.SAMPLING=balanced correct the class frequencies twice; give only one of them"
        )


def _check_phases(cfg: CfgNode) -> None:
    """Check the input sizes of training, and the epoch at which mixup ends."""
    num_epochs, sizes = cfg.TRAIN.EPOCHS + cfg.TRAIN.COOLDOWN_EPOCHS, cfg.TRAIN.SIZE_SCHEDULE
    for entry in sizes:
        if len(entry) not in (2, 3) or not all(1 <= side <= MAX_SIDE for side in entry[1:]):
            raise ConfigError(
                f"TRAIN.SIZE_SCHEDULE={show(sizes)}: {show(entry)} is not [epochs, size] or [epochs, height, width] with sizes "
                f"from 1 to {MAX_SIDE} pixels; give, for example, [[0, 128], [100, 224]]"
            )
    starts = [epoch for epoch, *_ in sizes]
    if sizes and (starts[0] != 0 or starts != sorted(set(starts))):
        raise ConfigError(
            f"TRAIN.SIZE_SCHEDULE={show(sizes)}: the epochs must begin with 0 and increase, as in [[0, 128], [100, 224]]"
        )
    if sizes and starts[-1] >= num_epochs:
        used = str([entry for entry in sizes if entry[0] < num_epochs]).replace(" ", "")
        raise ConfigError(
            f"TRAIN.SIZE_SCHEDULE={show(sizes)}: the run ends after epoch {num_epochs}, so the last size would never be used; "
            f"change the epochs, or add --opts TRAIN.SIZE_SCHEDULE '{used}'"
        )
    end = cfg.AUG.MIXUP_OFF_EPOCH
    if end and not mixes(cfg):
        raise ConfigError(
            f"AUG.MIXUP_OFF_EPOCH={end} has no effect without mixup and CutMix; remove it, or add --opts AUG.MIXUP_OFF_EPOCH 0"
        )
    if end >= num_epochs:
        raise ConfigError(
            f"AUG.MIXUP_OFF_EPOCH={end} has no effect, since the run ends after epoch {num_epochs}; give a smaller number, or "
            "add --opts AUG.MIXUP_OFF_EPOCH 0"
        )


def mixes(cfg: CfgNode) -> bool:
    """Whether mixup or CutMix is enabled, at least in the first epoch."""
    return cfg.AUG.MIXUP > 0 or cfg.AUG.CUTMIX > 0 or cfg.AUG.CUTMIX_MINMAX is not None


def _check_lists(cfg: CfgNode) -> None:
    """Check the lengths of lists and the order of their values."""
    if not isinstance(cfg.DATA.IMG_SIZE, int) and len(cfg.DATA.IMG_SIZE) != 2:
        raise ConfigError(f"DATA.IMG_SIZE={cfg.DATA.IMG_SIZE}: give one number of pixels, or [height, width]")
    for key in ("MEAN", "STD"):
        if len(cfg.DATA[key]) != 3 or (key == "STD" and min(cfg.DATA[key]) <= 0):
            raise ConfigError(f"DATA.{key}={cfg.DATA[key]}: give three numbers; STD must be above 0")
    for key in ("SCALE", "RATIO"):
        if len(cfg.AUG[key]) != 2 or not 0 < cfg.AUG[key][0] <= cfg.AUG[key][1]:
            raise ConfigError(f"AUG.{key}={cfg.AUG[key]}: give [minimum, maximum] with 0 < minimum <= maximum")
    minmax = cfg.AUG.CUTMIX_MINMAX
    if minmax is not None and not (len(minmax) == 2 and 0 < minmax[0] < minmax[1] <= 1):
        raise ConfigError(f"AUG.CUTMIX_MINMAX={minmax}: give [minimum, maximum] with 0 < minimum < maximum <= 1, or None")
