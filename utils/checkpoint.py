"""Write checkpoints so that none is ever lost, and load weights into a model with a report of every entry.

A file is a dictionary of plain data: ``model``, ``state_dict_ema``, ``optimizer``, ``scaler``, ``num_updates``, ``best``,
``config`` and ``class_names``; the first two under the names that the reference gives them.
"""

import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from weights.reader import WEIGHTS, CheckpointError, choose_weights, read_checkpoint, sha256, verify

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint_(\d{9,})\.pth")
BEST = "best.pth"  # name of the checkpoint with the best accuracy of a run
_TEMPORARY = ".incomplete"
_DAMAGED = ".damaged"
MIN_COVERAGE = 0.8  # share of the model that a file must fill, and of the file that must find a place, to be of this model


@dataclass
class LoadReport:
    """What became of every entry when weights were loaded.

    ``mapped``: rows of a head of ImageNet-22k and its like, taken by class. ``head``: (classes of the file's head, of the
    model's) where they differ. ``coverage``: share of the model's numbers that came.
    """

    path: str
    weights: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    mapped: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    head: tuple[int, int] | None = None
    coverage: float = 0.0

    def __str__(self) -> str:
        share = math.floor(1000 * self.coverage) / 10  # 100 only where all came
        parts = [f"{self.path}: {self.weights} weights, {len(self.loaded)} entries loaded ({share}% of the model)"]
        for name in ("resized", "mapped", "reinitialised", "missing", "unused"):
            if names := getattr(self, name):
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                parts.append(f"{len(names)} {name} ({shown})")
        if self.head is not None:
            parts.append(f"head: {self.head[0]} classes in the file, {self.head[1]} in the model")
        return "; ".join(parts)


def save_checkpoint(state: dict, path: Path) -> None:
    """Write a checkpoint to a temporary file, verify it, and rename it: a file at ``path`` is always complete.

    Raises:
        CheckpointError: the disk is full or not writable; what was at ``path`` is untouched.
    """
    state = to_host(state)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        verify(temporary)

    _replace(path, write, size=_num_bytes(state))


def _replace(path: Path, write: Callable[[Path], None], *, size: int) -> None:
    """Let ``write`` create a temporary file beside ``path``, then rename it to ``path``.

    Args:
        write: gets the temporary path.
        size: bytes that it needs, for the message.

    Raises:
        CheckpointError: it failed; what was at ``path`` is untouched, and no temporary file is left.
    """
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        temporary.unlink(missing_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, CheckpointError) as error:  # torch turns some failed writes into RuntimeError
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        raise CheckpointError(
            f"{path}: checkpoint not written, the old ones are untouched: {error} (it needs {size} bytes, {free} are free); "
            "make room, or lower KEEP_CHECKPOINTS; the same command resumes"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _num_bytes(value: object) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_num_bytes, value)) if isinstance(value, list) else 0


def list_checkpoints(folder: Path) -> list[Path]:
    """Numbered checkpoints of a run, newest first."""
    try:
        found = [path for path in folder.glob("checkpoint_*.pth") if _NAME.fullmatch(path.name)]
    except OSError:  # a folder that cannot be entered; who writes there reports it
        return []
    return sorted(found, key=num_updates_of, reverse=True)


def num_updates_of(path: Path) -> int:
    """Updates done, which the name of a numbered checkpoint gives."""
    return int(_NAME.fullmatch(path.name).group(1))


def checkpoint_path(folder: Path, num_updates: int) -> Path:
    return folder / f"checkpoint_{num_updates:09d}.pth"


def remove_surplus(folder: Path, keep: int) -> None:
    """Delete all numbered checkpoints but the newest; call it when the newest is verified. ``best.pth`` has no number.

    Files that a kill left incomplete are deleted too.
    """
    incomplete = [
        path for path in folder.glob(f"*{_TEMPORARY}") if _NAME.fullmatch(path.name.removesuffix(_TEMPORARY)) is not None
    ]
    for path in [*incomplete, folder / f"{BEST}{_TEMPORARY}", *list_checkpoints(folder)[keep:]]:
        path.unlink(missing_ok=True)


def link_best(path: Path, best: Path) -> None:
    """Make ``best`` the same file as ``path``, without writing it again where the disk can link."""

    def write(temporary: Path) -> None:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            verify(temporary)

    _replace(best, write, size=path.stat().st_size)


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that can be read completely; damaged ones are named in the log and passed over."""
    for path in list_checkpoints(folder):
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            logger.warning("%s; trying the one before", error)
        else:
            return path
    return None


def is_whole(path: Path) -> bool:
    """Whether a checkpoint can be read completely."""
    try:
        read_checkpoint(path)
    except CheckpointError:
        return False
    return True


def set_damaged_aside(folder: Path, *, num_updates: int) -> None:
    """Rename the damaged checkpoints of later updates to ``*.damaged``, so that neither resume nor rotation counts them."""
    for path in list_checkpoints(folder):
        if num_updates_of(path) <= num_updates:
            return
        if not is_whole(path):
            damaged = path.with_name(path.name + _DAMAGED)
            while os.path.lexists(damaged):
                damaged = damaged.with_name(damaged.name + _DAMAGED)
            os.replace(path, damaged)
            logger.warning("%s: damaged, renamed to %s", path, damaged.name)


def repair_best(best: Path, state: dict, path: Path) -> bool:
    """Restore ``best.pth`` where a kill prevented its link to the checkpoint that a run resumes from.

    Args:
        state: the checkpoint at ``path``.

    Returns:
        False if the best state that the checkpoint records is in no file of the run.
    """
    num_updates = state["best"]["num_updates"]
    if num_updates < 0:  # not evaluated yet
        return True
    if num_updates == state["num_updates"]:
        if not best.is_file() or sha256(best) != sha256(path):
            link_best(path, best)
            logger.warning("%s: restored from %s", best, path.name)
        return True
    try:
        stored = read_checkpoint(best)
    except CheckpointError:
        return False
    return stored.get("num_updates") == num_updates and stored.get("best") == state["best"]


def load_weights(model: nn.Module, path: str | Path, *, weights: str = "auto") -> LoadReport:
    """Fill a model from a file of the same family: another input size and another number of classes are fine.

    Position tables are resized (bicubic, as the reference does). A head of ImageNet-22k (or another set that timm knows by
    its number of classes) gives a model of 1000 classes their rows; any other head of another number of classes keeps its
    fresh values. Entries are matched by name.

    Args:
        model: of ``models``.
        weights: ``raw``, ``ema``, or ``auto`` for those with the best accuracy in training (see ``preferred_weights``).

    Raises:
        CheckpointError: the file cannot be read, or is of another model; the text names the nearest one.
    """
    return fill_model(model, read_checkpoint(path), weights=weights, path=path)


def fill_model(model: nn.Module, state: dict, *, weights: str, path: str | Path) -> LoadReport:
    """``load_weights`` from a checkpoint that is read already; ``path`` is for messages."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}: choose one of {', '.join(WEIGHTS)}")
    label, stored = choose_weights(state, weights, path)
    origin, img_size = _stored_value(state, "MODEL", "NAME"), _stored_value(state, "DATA", "IMG_SIZE")
    sides = img_size if isinstance(img_size, (list, tuple)) else [img_size]
    if not all(isinstance(side, int) for side in sides) or len(sides) > 2:
        img_size = None  # none, or not a size
    fitting, report = _match(model, stored, LoadReport(str(path), label), origin=origin, img_size=img_size)
    model.load_state_dict(fitting, strict=False)
    logger.info("%s", report)
    return report


def _stored_value(state: Mapping, section: str, key: str) -> object:
    """A value of the config that a checkpoint carries; None where it has none."""
    config = state.get("config")
    node = config.get(section) if isinstance(config, Mapping) else None
    return node.get(key) if isinstance(node, Mapping) else None


def _match(
    model: nn.Module, stored: dict[str, Tensor], report: LoadReport, *, origin: str | None, img_size: int | list[int] | None
) -> tuple[dict[str, Tensor], LoadReport]:
    """The weights of a file that fit a model, and the report of all of them.

    Args:
        origin: name of the model that the file's config gives, for messages.
        img_size: input size that it gives, which says how the file's position tables are laid out.
    """
    own, head = model.state_dict(), _head_names(model)

    def refuse(reason: str) -> CheckpointError:
        hint = f": by its own config it is of {origin}" if origin else model.nearest_model(stored)
        return CheckpointError(f"{report.path}: {reason}; choose the config that this file was trained with{hint}")

    try:
        resized = model.resize_position_tables(stored, img_size=img_size)
    except ValueError as error:
        raise refuse(str(error)) from None
    fitting, untouched = {}, 0
    for name, value in (stored | resized).items():
        if name not in own:
            if not model.leftovers.fullmatch(name):
                report.unused.append(name)
        elif value.shape == own[name].shape:
            fitting[name] = value
            (report.resized if name in resized else report.loaded).append(name)
        elif name in head and value.shape[1:] == own[name].shape[1:]:
            report.head = len(value), len(own[name])
            rows = _imagenet_rows(*report.head)
            if rows is None:
                report.reinitialised.append(name)
            else:
                fitting[name] = own[name].clone()
                fitting[name][list(rows)] = value[list(rows.values())].to(own[name])
                report.mapped.append(name)
                if fresh := len(own[name]) - len(rows):
                    report.reinitialised.append(f"{fresh} rows of {name}")
                    untouched += fresh * own[name][0].numel()
        else:
            raise refuse(f"{name} is {tuple(value.shape)}, but the model's is {tuple(own[name].shape)}")
    report.missing = [name for name in own if name not in fitting and name not in report.reinitialised]
    filled = sum(own[name].numel() for name in fitting) - untouched
    report.coverage = filled / max(sum(value.numel() for value in own.values()), 1)
    body = [name for name in own if name not in head]
    numbers = {name: value.numel() for name, value in own.items()}
    unused, placed = sum(stored[name].numel() for name in report.unused), sum(numbers[name] for name in fitting)
    shares = {
        "fills only {:.0%} of the model": sum(name in fitting for name in body) / len(body),
        "fills only {:.0%} of the model's numbers": sum(numbers[name] for name in body if name in fitting)
        / sum(numbers[name] for name in body),
        "only {:.0%} of the file finds a place in the model": placed / max(unused + placed, 1),
    }
    reason, share = min(shares.items(), key=lambda item: item[1])
    if share < MIN_COVERAGE:
        examples = ", ".join((report.missing + report.unused)[:5])
        raise refuse(f"{reason.format(share)}; {len(report.missing)} missing, {len(report.unused)} unused: {examples} ...")
    return fitting, report


def _imagenet_rows(num_stored: int, num_classes: int) -> dict[int, int] | None:
    """Class of ImageNet-1k -> its row in a head of a larger set, which timm knows by its number of classes.

    A class or two of the 1000 are not in every such set: those keep fresh rows.
    """
    subset = infer_imagenet_subset({"num_classes": num_stored})
    if num_classes != 1000 or subset is None:
        return None
    position = {name: row for row, name in enumerate(ImageNetInfo(subset).label_names())}
    names = ImageNetInfo("imagenet-1k").label_names()
    return {index: position[name] for index, name in enumerate(names) if name in position}


def _head_names(model: nn.Module) -> set[str]:
    head = model.get_classifier()
    parameters = {id(parameter) for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in parameters}


def to_host(value: object, *, copy: bool = False) -> object:
    """A state with its tensors in host memory.

    Args:
        copy: copy the tensors that are there already, so that training may change them.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=copy)
    if isinstance(value, dict):
        return {key: to_host(item, copy=copy) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_host(item, copy=copy) for item in value]
    assert value is None or type(value) in (str, int, float, bool), f"{type(value)}: the safe reader refuses it"
    return value


def _sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk, on file systems that can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        logger.debug("%s: no fsync of folders (%s)", folder, error)
