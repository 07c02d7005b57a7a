"""Repeat a training update with a non-finite loss or gradient, and find the first module with a non-finite output."""

import copy
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from data.build import TrainLoader, build_datasets, build_mixup, build_train_loader
from data.index import Index, compare_descriptions, describe_index
from engine.checkpoint_writer import check_format, save_checkpoint
from engine.distillation import Targets, Teacher
from engine.optim import amp_dtype, build_criterion
from engine.schedule import accumulation_steps
from engine.step import as_tuple, mix_batches
from models import build_model
from models.checkpoints.reader import MAX_COUNT, CheckpointError, read_checkpoint
from utils.config.keys import RECIPE_KEY_PREFIXES
from utils.config.loading import load_stored_config, option_keys
from utils.config.rules import mixes
from utils.distributed import World
from utils.environment import apply_numerical_settings
from utils.errors import ConfigError, one_line
from utils.random import seed_device, seed_of_pass

logger = logging.getLogger(__name__)


def replay_update(path: str, opts: Sequence, world: World, *, build_teacher: Callable[..., tuple[Teacher | None, str]]) -> None:
    """Repeat the forward and backward passes of a training update, and log where the first non-finite value occurs.

    The passes of all processes of the run are repeated sequentially, on one device.

    Args:
        path: ``replay_*.pth`` of a training run.
        opts: KEY, VALUE, ... that override the stored config, for example DATA.DATA_PATH.
        build_teacher: ``jobs.teacher.build_teacher``.

    Raises:
        CheckpointError: ``path`` is not a replay file or does not match its own config, or there are several processes.
        ConfigError: the training images have changed since the file was written, or ``opts`` lack the teacher.
    """
    if world.size > 1:
        raise CheckpointError(f"{path}: --replay runs in one process; start without torchrun")
    state = read_checkpoint(path)
    check_replay_file(state, path)
    cfg = load_stored_config(state["config"], opts, source=path, sections=RECIPE_KEY_PREFIXES)
    if cfg.TRAIN.TEACHER and "TRAIN.TEACHER" not in option_keys(opts):  # a weight file determines no path
        option = f"--opts TRAIN.TEACHER {shlex.quote(cfg.TRAIN.TEACHER)}"
        raise ConfigError(f"{path}: the run had a teacher; to read it, add {option}")
    update = state["replay"]["update"]
    apply_numerical_settings(cfg)
    check_format(state, path)
    dataset = build_datasets(cfg, training=True).train
    assert dataset is not None  # because of ``training``
    check_images(state, dataset.index, path, accept_changes=cfg.DATA.ACCEPT_CHANGES)
    teacher, _ = build_teacher(cfg, world, dataset.index.classes, state, path)
    model = build_model(cfg).to(world.device).train()
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its weights do not match its config ({error})") from None
    criterion = build_criterion(cfg, mixed=mixes(cfg), labels=dataset.index.labels, device=world.device)
    for rank, names in enumerate(state["replay"]["images"]):
        placement: dict[str, Any] = {"rank": rank, "world_size": len(state["replay"]["images"]), "device": world.device}
        passes = read_update(cfg, dataset, update, **placement, teacher=teacher)
        for (images, targets, seed), image_names in zip(passes, names, strict=True):
            logger.info("rank %d: %d images, %s", rank, len(image_names), ", ".join(image_names[:3]) + ", ...")
            seed_device(seed, images.device)
            finding = find_non_finite(model, criterion, images, targets, amp_dtype(cfg))
            if finding:
                logger.info("update %d of the run, rank %d: %s", update + 1, rank, finding)
                logger.info("images of this batch: %s", ", ".join(image_names))
                return
    logger.info(
        "update %d of the run: every output and gradient is finite on this device with torch %s", update + 1, torch.__version__
    )


def describe_update(loader: TrainLoader, update: int, accumulation: int, num_processes: int) -> dict:
    """Position and images of an update, for its replay file."""
    index: Index = loader.loader.dataset.index  # type: ignore[attr-defined]  # a dataset of data.build.build_datasets
    epoch, first_update = divmod(update, loader.updates_per_epoch)
    images = []  # [rank][forward pass] -> image names
    for rank in range(num_processes):
        sampler = copy.copy(loader.sampler)
        sampler.rank = rank
        sampler.set_position(epoch, first_update)
        images.append([[index.name(position) for _, position in keys] for keys in islice(sampler, accumulation)])
    return {"update": update, "epoch": epoch, "images": images}


def replay_command(path: Path, cfg: CfgNode) -> str:
    """The command that repeats an update. Its options are the paths of the run, since a replay file determines none."""
    command = f"main.py --replay {shlex.quote(str(path))} --data-path {shlex.quote(cfg.DATA.DATA_PATH)}"
    return f"{command} --opts TRAIN.TEACHER {shlex.quote(cfg.TRAIN.TEACHER)}" if cfg.TRAIN.TEACHER else command


def try_to_save(describe: Callable[[], dict], path: Path, check_output: Callable[[], None]) -> str:
    """Save a replay file. Returns the reason if it was not written, else "": it must not hide the error that ends the run."""
    try:
        check_output()
        save_checkpoint(describe(), path)
    except Exception as error:
        return one_line(error.__cause__ or error)
    return ""


def check_replay_file(state: dict, path: str) -> None:
    """Check types and structure of a replay file.

    Raises:
        CheckpointError: an entry is missing or invalid.
    """
    if "replay" not in state:
        raise CheckpointError(f"{path} is not a replay file; give the replay_*.pth of a training run")
    content = state["replay"]
    valid = isinstance(content, dict) and all(isinstance(state.get(key), dict) for key in ("config", "model"))
    if valid:
        update, ranks = content.get("update"), content.get("images")
        valid = type(update) is int and 0 <= update <= MAX_COUNT and isinstance(ranks, list) and bool(ranks)
        valid = valid and all(isinstance(rank, list) for rank in ranks)
        valid = valid and all(isinstance(images, list) for rank in ranks for images in rank)
        valid = valid and all(isinstance(name, str) for rank in ranks for images in rank for name in images)
    if not valid:
        raise CheckpointError(f"{path} is damaged: its entries config, model or replay are invalid; repeat the run to write it")


def check_images(state: Mapping, index: Index, path: str, *, accept_changes: bool) -> None:
    """Check that the training images are those of the update, since images are selected by position.

    Args:
        state: contents of the replay file.
        accept_changes: DATA.ACCEPT_CHANGES: warn instead of raising the error.

    Raises:
        ConfigError: the images have changed.
    """
    data = state.get("data")
    if not isinstance(data, Mapping):  # the file was written by a version without data descriptions
        return
    change = compare_descriptions(data["train"], describe_index(index))
    if change and not accept_changes:
        raise ConfigError(
            f"{path}: the training images have changed since the update: {change}. Restore them, give their directory with "
            "--data-path, or add --opts DATA.ACCEPT_CHANGES True to use the images as they are now"
        )
    if change:
        logger.warning("DATA.ACCEPT_CHANGES=True: the training images are not those of the update: %s", change)


def read_update(
    cfg: CfgNode,
    dataset,
    update: int,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    teacher: Teacher | None = None,
) -> Iterator[tuple[Tensor, Targets, int]]:
    """Yield the batches that one process used in one update: images, targets and the seed of the forward pass."""
    accumulation = accumulation_steps(cfg, world_size)
    loader = build_train_loader(cfg, dataset, accumulation=accumulation, rank=rank, world_size=world_size, device=device)
    loader.set_position(*divmod(update, loader.updates_per_epoch))
    first = update * accumulation
    mixup = build_mixup(cfg, rank=rank, passes_per_epoch=loader.passes_per_epoch)
    batches = mix_batches(islice(loader, accumulation), mixup, teacher, forward_pass=first)
    for forward_pass, (images, targets) in enumerate(batches, first):
        yield images, targets, seed_of_pass(cfg.SEED, forward_pass, rank)


def find_non_finite(model: nn.Module, criterion: nn.Module, images: Tensor, targets: Targets, dtype: torch.dtype) -> str:
    """Run a forward and backward pass, and describe the first non-finite value; "" if there is none.

    Args:
        images: (B, 3, H, W).
        targets: (B,) class ids, or (B, num_classes) probabilities, or ``DistillationTargets``.
        dtype: precision of autocast; float32 disables it.
    """
    findings: list[str] = []
    handles = [
        module.register_forward_hook(_check_output(name or "the model", findings), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    handles += [parameter.register_hook(_check_gradient(name, findings)) for name, parameter in model.named_parameters()]
    try:
        if not images.isfinite().all():
            findings.append(f"the input images are not finite ({_count_not_finite(images)})")
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = as_tuple(criterion(model(images), targets))[0]
        if not loss.isfinite():
            findings.append(f"the loss is {loss.item()}, although the logits are finite")
        loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return findings[0] if findings else ""


def _count_not_finite(values: Tensor) -> str:
    return f"{int((~values.isfinite()).sum())} of {values.numel()} values"


def _check_output(name: str, findings: list[str]):
    """Create a forward hook that records non-finite outputs. The innermost module is recorded first."""

    def check(module: nn.Module, inputs: tuple, named_inputs: dict, output: object) -> None:
        outputs = [value for value in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(value, Tensor)]
        non_finite = next((value for value in outputs if not value.isfinite().all()), None)
        if non_finite is None:
            return
        float_inputs = [v for v in (*inputs, *named_inputs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
        if not all(value.isfinite().all() for value in float_inputs):
            parent, _, child = name.rpartition(".")
            findings.append(
                f"the first non-finite values are computed by {parent or 'the model'} itself, which passes them to its "
                f"submodule {child}"
            )
            return
        largest_input = max((value.detach().abs().max().item() for value in float_inputs), default=float("nan"))
        largest_weight = max((p.detach().abs().max().item() for p in module.parameters()), default=float("nan"))
        findings.append(
            f"the output of {name} ({type(module).__name__}) is the first non-finite output: {_count_not_finite(non_finite)} "
            f"are not finite, shape {tuple(non_finite.shape)}; the largest absolute input is {largest_input:.3g}, the largest "
            f"absolute weight {largest_weight:.3g}"
        )

    return check


def _check_gradient(name: str, findings: list[str]):
    def check(gradient: Tensor) -> None:
        if not gradient.isfinite().all():
            findings.append(
                f"the gradient of {name} is the first non-finite gradient: {_count_not_finite(gradient)} are not finite; "
                "outputs and loss are finite"
            )

    return check
