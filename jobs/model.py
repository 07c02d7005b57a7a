"""The model of a job: build it, load the weights of a checkpoint, and choose how it computes focused linear attention."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from yacs.config import CfgNode

from data.classes import ClassMatch, compare_classes, imagenet_classes, propose_class_map, read_class_map
from data.files import DataError
from jobs.locate_checkpoint import Checkpoint, choose_config, open_checkpoint, stored_class_names
from models import build_arguments, build_model
from models.checkpoints.loading import fill_model
from models.checkpoints.reader import CheckpointError, choose_weights, read_checkpoint, stored_weights
from models.checkpoints.released import Released
from models.kernel_selection import choose_backend, set_backend
from utils.config.keys import STORED_KEY_PREFIXES, WINDOW_KEYS
from utils.config.loading import image_size, load_config, load_stored_config, train_sizes
from utils.distributed import World, gather_on_main, on_all, on_main
from utils.errors import ConfigError

logger = logging.getLogger(__name__)

# The maximum number of values in a model is MAX_GROWTH times the number of weights in its file, plus MAX_NEW_VALUES.
MAX_GROWTH = 4
MAX_NEW_VALUES = 100_000_000


def check_model(cfg: CfgNode) -> nn.Module:
    """Build the model on the meta device, without allocating memory.

    Raises:
        ConfigError: the model cannot be built, or a size of TRAIN.SIZE_SCHEDULE is too small for it.
    """
    try:
        with torch.device("meta"):
            model: Any = build_model(cfg)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(f"MODEL.TYPE={cfg.MODEL.TYPE} cannot be built from this config: {error}") from None
    for _, size in train_sizes(cfg):
        if min(size) < model.min_img_size:
            raise ConfigError(
                f"TRAIN.SIZE_SCHEDULE={cfg.TRAIN.SIZE_SCHEDULE}: images of {size[0]} x {size[1]} pixels are too small for "
                f"MODEL.TYPE={cfg.MODEL.TYPE}; give sizes of at least {model.min_img_size} pixels"
            )
    return model


def attention_windows(model: Any) -> dict[tuple[int, str], tuple[int | None, ...]]:
    """Sides of the windows or stripes of Swin and CSwin in tokens, by (stage, attention type L or S).

    A side is None where the window covers the map of the native input size, and thus the map of every input size.
    """
    return {
        (stage, block.attention_type): block.window_sides
        for stage, blocks in enumerate(model.stage_blocks())
        for block in blocks
        if hasattr(block, "window_sides")
    }


def has_same_windows(stored: Mapping, cfg: CfgNode, path: Path | str) -> bool:
    """Whether the model of ``cfg`` has the windows of the config in a checkpoint, although their numbers may differ.

    A window that covers the whole token map equals a larger one, and 0.
    """
    try:
        former = check_model(with_stored_windows(stored, cfg, path))
    except ConfigError:
        return False
    return attention_windows(former) == attention_windows(check_model(cfg))


def with_stored_windows(stored: Mapping, cfg: CfgNode, path: Path | str) -> CfgNode:
    """Copy of ``cfg`` with the image size and the windows of the config in a checkpoint.

    Raises:
        ConfigError: the stored config has an illegal value, or belongs to a model of another type.
    """
    former = load_stored_config(stored, source=str(path), sections=("MODEL.TYPE", "DATA.IMG_SIZE", *WINDOW_KEYS))
    if former.MODEL.TYPE != cfg.MODEL.TYPE:
        raise ConfigError(f"{path}: MODEL.TYPE is {former.MODEL.TYPE} in the checkpoint, not {cfg.MODEL.TYPE}")
    combined = cfg.clone()
    combined.defrost()
    combined.DATA.IMG_SIZE = former.DATA.IMG_SIZE
    for section, key in ((key.split(".")[1], key.split(".")[2]) for key in WINDOW_KEYS):
        combined.MODEL[section][key] = former.MODEL[section][key]
    return combined


def check_windows(model: Any, cfg: CfgNode, stored: object, path: Path | str, *, is_main: bool = True) -> None:
    """Check, before weights are loaded, whether attention over the whole token map would become attention in windows.

    This happens if DATA.IMG_SIZE grows and the windows do not. If the weights fit nevertheless, rank 0 logs a warning.

    Args:
        cfg: the config of ``model``.
        stored: the config in the file of the weights; other values than a mapping are ignored.
        path: path of the file, for the message.

    Raises:
        ConfigError: the weights do not fit, since CSwin would divide the map into stripes of two directions.
    """
    if not isinstance(stored, Mapping):
        return
    try:
        former = with_stored_windows(stored, cfg, path)
        if former == cfg:
            return
        before, after = attention_windows(check_model(former)), attention_windows(model)
    except ConfigError:  # the stored config is only compared; this version may reject its values
        return
    lost = sorted(key for key in before.keys() & after.keys() if not any(before[key]) and any(after[key]))
    if not lost:
        return
    stages = ", ".join(f"{stage + 1} ({'linear' if letter == 'L' else 'softmax'} attention)" for stage, letter in lost)
    message = (
        f"{path}: these weights were trained with windows that cover the whole token map in stage {stages}; at DATA.IMG_SIZE="
        f"{cfg.DATA.IMG_SIZE}, the windows of this config do not cover it"
    )
    if options := _covering_options(model, cfg, lost):
        message = f"{message}; to cover it, add --opts {options}"
    if any(len(before[key]) != len(after[key]) for key in lost):
        raise ConfigError(message)
    if is_main:
        logger.warning("%s", message)


def _covering_options(model: Any, cfg: CfgNode, lost: Sequence[tuple[int, str]]) -> str:
    """Options with which windows cover the map in the given (stage, attention type); "" if no option changes them."""
    is_linear = any(letter == "L" for _, letter in lost)
    if cfg.MODEL.TYPE != "flatten_swin":
        return "MODEL.LA.CSWIN_LA_SPLIT_SIZE 0-0-0-0" if is_linear else ""
    grids = model.stage_grids(image_size(cfg))
    present = build_arguments(cfg)[1]["softmax_window"]  # its default depends on MODEL.SWIN.WINDOW_SIZE
    softmax_window = max((max(grids[stage]) for stage, letter in lost if letter == "S"), default=present)
    return f"{'MODEL.SWIN.WINDOW_SIZE 0 ' if is_linear else ''}MODEL.SWIN.SOFTMAX_WINDOW {softmax_window}"


def choose_attention(models: Iterable[nn.Module], dtypes: Iterable[torch.dtype], cfg: CfgNode, world: World) -> str:
    """Choose the backend of the models, which have the same architecture, according to MODEL.LA.BACKEND, and log it.

    The kernels are used only if they pass the self-check in every process, so that all processes compute the same.

    Args:
        dtypes: precisions of the forward passes of this job.

    Returns:
        ``triton kernels``, or ``torch, because ...``.

    Raises:
        ConfigError: MODEL.LA.BACKEND is ``triton``, but a process cannot use the kernels.
    """
    models, requested = list(models), cfg.MODEL.LA.BACKEND
    obstacle = on_all(world, lambda: choose_backend(models[0], world.device, sorted(set(dtypes), key=str), requested))
    reasons = gather_on_main(world, obstacle)
    reason = on_main(world, lambda: next(filter(None, reasons or ()), ""))
    if reason and requested == "triton":
        raise ConfigError(f"MODEL.LA.BACKEND=triton: {reason}; to use torch operations, set --opts MODEL.LA.BACKEND auto")
    for model in models:
        set_backend(model, "torch" if reason else "triton")
    description = f"torch, because {reason}" if reason else "triton kernels"
    logger.info("attention: %s", description)
    return description


def load_models(
    checkpoint: Checkpoint, cfg: CfgNode, *, labels: Sequence[str], device: torch.device, is_main: bool = True
) -> dict[str, nn.Module]:
    """Build one model per label, with the checkpoint's weights of that label.

    Args:
        labels: labels of the weights, each raw or ema.
        is_main: whether this process is rank 0, which logs warnings.

    Raises:
        ConfigError: see ``check_windows``.
        CheckpointError: a weight of the model is missing or has another shape, or a weight of the file is unused.
    """
    model = check_model(cfg)
    check_size(checkpoint, model)
    check_windows(model, cfg, checkpoint.state.get("config"), checkpoint.path, is_main=is_main)
    models = {}
    for label in labels:
        models[label] = build_model(cfg).to(device)
        report = fill_model(models[label], checkpoint.state, weights=label, path=checkpoint.path)
        if report.missing or report.reinitialised or report.unused:
            remedy = "choose the config that this file was trained with, or leave out --cfg if the file contains its config"
            if report.head is not None:
                remedy = f"set MODEL.NUM_CLASSES {report.head[0]}; data with other classes need TEST.CLASS_MAP"
            raise CheckpointError(f"{report}. Every weight is required: {remedy}")
    return models


def check_size(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Check, before memory is allocated, that a model on the meta device is not much larger than the one in the file.

    Raises:
        CheckpointError: the model is too large.
    """
    size = sum(value.numel() for value in model.state_dict().values())
    sizes = [sum(value.numel() for value in weights.values()) for weights in stored_weights(checkpoint.state).values()]
    stored = max(sizes, default=0)
    if size > MAX_GROWTH * stored + MAX_NEW_VALUES:  # position tables grow with the input size
        raise CheckpointError(
            f"{checkpoint.path} contains {stored} weights, but its config describes a model of {size}; choose the config that "
            "this file was trained with"
        )


class OpenedModel(NamedTuple):
    """A model in evaluation mode, its checkpoint, its config, and the label of its weights (raw or ema)."""

    model: nn.Module
    checkpoint: Checkpoint
    cfg: CfgNode
    weights: str


def open_model(
    reference: str,
    config: Sequence[str] | None,
    opts: Sequence,
    *,
    weights: str,
    device: torch.device | str = "cpu",
    prefixes: Sequence[str] = STORED_KEY_PREFIXES,
    tta: bool = False,
) -> OpenedModel:
    """Open a model with the weights of a checkpoint, in evaluation mode.

    Args:
        reference: checkpoint, in any form that --resume accepts.
        config: paths of config files; None or empty for the checkpoint's own config.
        opts: KEY, VALUE, ... that override the config.
        weights: raw, ema or auto.
        prefixes: prefixes of the keys to read from the checkpoint's own config, see ``stored_config``.
        tta: whether the caller applies TEST.TTA.

    Raises:
        ConfigError: config and checkpoint do not match, or TEST.TTA has no effect.
        CheckpointError: config and checkpoint do not match, or weights are not finite.
    """
    checkpoint = open_checkpoint(reference)
    cfg = choose_config(checkpoint, load_config(config, opts) if config else None, opts, prefixes=prefixes)
    if cfg.TEST.TTA != "none" and not tta:
        raise ConfigError(f"TEST.TTA={cfg.TEST.TTA} has no effect on this command; add --opts TEST.TTA none, or remove the key")
    label, _ = choose_weights(checkpoint.state, weights, checkpoint.path)
    model = load_models(checkpoint, cfg, labels=(label,), device=torch.device(device))[label]
    check_finite_weights(model, checkpoint.path, label)
    return OpenedModel(model.eval(), checkpoint, cfg, label)


def check_finite_weights(model: nn.Module, path: Path | str, label: str) -> None:
    """Check that all weights of a model are finite.

    Raises:
        CheckpointError: a tensor has values that are not finite; the message names the file and the first such tensor.
    """
    for name, value in model.state_dict().items():
        if num_invalid := int((~value.isfinite()).sum()):
            raise CheckpointError(
                f"{path}: {num_invalid} of {value.numel()} values of {name} in the {label} weights are not finite; use an "
                "earlier checkpoint of the run, or other weights of this one (raw or ema)"
            )


def load_pretrained(
    model: nn.Module, path: str, classes: Sequence[str], cfg: CfgNode, world: World, *, released: Released | None = None
) -> None:
    """Load pretrained weights. A head for the same number of classes is loaded, even if it was trained with other classes.

    Its rows are reordered if it was trained with the same classes in another order, or according to TEST.CLASS_MAP.

    Args:
        classes: class names of the training data.
        cfg: the config of ``model``.
        released: the released model of which these are the weights, if any.

    Raises:
        DataError: the order of the classes is ambiguous, or TEST.CLASS_MAP does not match them.
        ConfigError: TEST.CLASS_MAP for a head with another number of classes, which is not loaded.
    """
    state = read_checkpoint(path)
    check_windows(model, cfg, state.get("config"), path, is_main=world.is_main)
    report = fill_model(model, state, weights="auto", path=path)
    names = imagenet_classes(len(classes)) if report.mapped else stored_class_names(state, released)
    class_map = cfg.TEST.CLASS_MAP
    if report.head is not None and not report.mapped:  # trained with another number of classes
        if class_map:
            raise ConfigError(
                f"TEST.CLASS_MAP={class_map} has no effect: the head of {path} has {report.head[0]} classes, but the model "
                f"has {report.head[1]}, so that its head is not loaded; remove TEST.CLASS_MAP"
            )
        return
    if class_map:
        reorder_head(model, read_class_map(class_map, classes, len(classes), names))
        return
    match, difference = compare_classes(classes, names)
    if match is ClassMatch.AMBIGUOUS:
        raise DataError(
            f"{path}: its head was trained with {match.value}: {difference}. {propose_class_map(classes, len(classes), names)}"
        )
    if match is ClassMatch.REORDERED:
        reorder_head(model, read_class_map("names", classes, len(classes), names))
    if not difference or not world.is_main:
        return
    if match is ClassMatch.UNVERIFIED:
        logger.info("%s: the rows of the loaded head are matched with the classes by class id: %s", path, difference)
    elif match is ClassMatch.REORDERED:
        logger.warning("%s: %s; the rows of the loaded head are matched with the classes by name", path, difference)
    else:
        logger.warning("%s: the loaded head was trained with other classes: %s", path, difference)


@torch.no_grad()
def reorder_head(model: nn.Module, order: Sequence[int]) -> None:
    """Reorder the classes of a model's head.

    Args:
        order: the present class id of each new class id.
    """
    head = model.get_classifier()  # type: ignore[operator]  # a method of our models
    for parameter in head.parameters():
        parameter.copy_(parameter[list(order)])
