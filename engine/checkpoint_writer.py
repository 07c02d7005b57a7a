"""Write, verify, rotate and repair checkpoints. A new file is verified before it replaces another one.

A checkpoint is a dictionary of plain data. Its keys include ``model``, ``state_dict_ema``, ``optimizer``, ``scaler``,
``num_updates``, ``best``, ``config``, ``class_names``, ``run_id`` and ``format``. The reference implementation (the authors'
code) also stores weights under the keys ``model`` and ``state_dict_ema``.
"""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.reader import CheckpointError, read_checkpoint, sha256, verify, with_metadata
from utils.errors import ConfigError, one_line
from utils.files import replacing, sync_directory
from utils.run_files import (
    BEST,
    DAMAGED,
    INCOMPLETE,
    checkpoint_path,
    is_numbered,
    is_top,
    list_checkpoints,
    num_updates_of,
    top_path,
)

logger = logging.getLogger(__name__)

# Version of the layout of checkpoints, stored as ``format``. Raise it when code that reads the previous format would misread a
# new checkpoint. Checkpoints without this entry have format 0; they lack only ``run_id`` and the names of the parameters in the
# state of the optimizer, and can be resumed.
FORMAT = 1
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # error numbers of writes that exceed a disk, quota or limit


def save_checkpoint(state: dict, path: Path) -> None:
    """Write a checkpoint to a temporary file, verify it, and rename it to ``path``: a file at ``path`` is always complete.

    Raises:
        CheckpointError: the disk is full or not writable; an existing file at ``path`` is unchanged.
    """
    state = to_host(state)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        verify(temporary)

    _replace(path, write, size=_num_bytes(state))


def check_format(state: Mapping, path: Path | str) -> None:
    """Reject a checkpoint that a later version of this project has written, whose entries may have another meaning.

    Raises:
        ConfigError: the format of the checkpoint is later than ``FORMAT``.
        CheckpointError: the format is not a number.
    """
    stored = state.get("format", 0)
    if not isinstance(stored, int):
        raise CheckpointError(f"{path}: invalid checkpoint format {stored!r}; use an intact copy of the file")
    if stored > FORMAT:
        raise ConfigError(
            f"{path} has checkpoint format {stored}, but this version of the project reads formats up to {FORMAT}. Update the "
            "project to the version that wrote the file"
        )


def _replace(path: Path, write: Callable[[Path], None], *, size: int) -> None:
    """Let ``write`` create a temporary file next to ``path``, then rename it to ``path``.

    Args:
        size: size of the file in bytes, for the error message.

    Raises:
        CheckpointError: writing or renaming failed; an existing file at ``path`` is unchanged, and no temporary file is left.
    """
    try:
        with replacing(path, path.with_name(path.name + INCOMPLETE)) as temporary:
            write(temporary)
    except (OSError, RuntimeError, CheckpointError) as error:  # torch raises RuntimeError for some failed writes
        raise CheckpointError(
            f"{path}: checkpoint not written; existing checkpoints are untouched. Reason: {one_line(error)}. "
            f"{_advise(path.parent, error, size)}, then repeat the same command to resume the run"
        ) from error
    sync_directory(path.parent)


def _advise(folder: Path, error: Exception, size: int) -> str:
    """Facts about the file system of ``folder`` that explain a failed write, and the remedy.

    Args:
        size: bytes that the write needs.
    """
    try:
        free = shutil.disk_usage(folder).free
        no_inodes = hasattr(os, "statvfs") and (disk := os.statvfs(folder)).f_files > 0 and disk.f_favail == 0
    except OSError as reason:
        return f"{folder} cannot be accessed ({reason.strerror}): restore it"
    if no_inodes:
        return f"The file system of {folder} has no inodes left: delete files there"
    number = getattr(error, "errno", None)
    if number is None or number in FULL or free < size:  # torch's errors have no number
        return f"({size} bytes needed, {free} free) Free disk space (see quotas and limits too) or lower KEEP_CHECKPOINTS"
    return f"Check the file system and the permissions of {folder}"


def _num_bytes(value: object) -> int:
    """Number of bytes of all tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_num_bytes, value)) if isinstance(value, list) else 0


def remove_surplus(folder: Path, keep: int, *, newest: Path) -> None:
    """Delete all but the ``keep`` newest numbered checkpoints. Also delete incomplete files left behind by killed processes.

    The newest checkpoint must be verified before the call. ``best.pth`` is not numbered, so it is never deleted.

    Args:
        newest: the checkpoint that was just written; later numbers are neither counted nor deleted, since this run did not
            write them.
    """
    incomplete = [path for path in folder.glob(f"*{INCOMPLETE}") if is_numbered(path.with_suffix("")) or is_top(path)]
    numbered = [path for path in list_checkpoints(folder) if num_updates_of(path) <= num_updates_of(newest)]
    for path in [*incomplete, folder / f"{BEST}{INCOMPLETE}", *numbered[keep:]]:
        path.unlink(missing_ok=True)


def link_best(path: Path, best: Path) -> None:
    """Make ``best`` a hard link to ``path``, or a verified copy on file systems without hard links."""

    def write(temporary: Path) -> None:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            verify(temporary)

    _replace(best, write, size=path.stat().st_size if path.exists() else 0)


def find_top_changes(folder: Path, top: Sequence[int] | None, *, newest: Path) -> tuple[list[int], list[Path]]:
    """Which of the best checkpoints have no ``top_<updates>.pth``, and which of these files are of other checkpoints.

    Later files than the newest checkpoint do not count, since this run did not write them.

    Args:
        top: numbers of updates of the best checkpoints; None or empty: nothing changes.
        newest: the numbered checkpoint that was just written, or from which the run resumes.
    """
    if not top:
        return [], []
    linked = {number: top_path(folder, number) for number in top}
    missing = [
        number
        for number, path in linked.items()
        if (numbered := checkpoint_path(folder, number)).exists()
        and not (path.exists() and (numbered != newest or _are_equal(path, numbered)))
    ]
    others = [path for path in folder.glob("top_*.pth") if is_top(path) and path not in linked.values()]
    return missing, [path for path in others if num_updates_of(path) <= num_updates_of(newest)]


def link_top(folder: Path, top: Sequence[int] | None, *, newest: Path) -> None:
    """Make ``top_<updates>.pth`` a link to each of the best checkpoints, and delete those of other checkpoints.

    Arguments: see ``find_top_changes``.

    Raises:
        CheckpointError: a link cannot be written.
    """
    missing, surplus = find_top_changes(folder, top, newest=newest)
    for number in missing:
        link_best(checkpoint_path(folder, number), top_path(folder, number))
    for path in surplus:
        path.unlink(missing_ok=True)


def set_aside(path: Path, reason: str) -> None:
    """Rename a file that cannot be resumed from to ``*.damaged``; resume and rotation ignore such files.

    Args:
        reason: why the file cannot be used, for the log.
    """
    damaged = path.with_name(path.name + DAMAGED)
    while os.path.lexists(damaged):
        damaged = damaged.with_name(damaged.name + DAMAGED)
    os.replace(path, damaged)
    logger.warning("%s: %s, renamed to %s", path, reason, damaged.name)


def find_best(folder: Path, state: Mapping, path: Path) -> Path | None:
    """Find the file of the checkpoint that ``state`` records as the best one; None if it is lost.

    This is ``best.pth``, also before the first evaluation. It is another file if the process was killed after it wrote the
    checkpoint and before it linked ``best.pth``.

    Args:
        folder: the run's directory.
        state: contents of the checkpoint at ``path``, from which the run resumes.
    """
    num_updates, best = state["best"]["num_updates"], folder / BEST
    if num_updates < 0:
        return best
    if num_updates == state["num_updates"]:
        return best if _are_equal(best, path) else path
    for candidate in (best, checkpoint_path(folder, num_updates)):
        try:
            stored = read_checkpoint(candidate)
        except CheckpointError:
            continue
        if stored.get("num_updates") == num_updates and stored.get("best") == state["best"]:
            return candidate
    return None


def restore_best(path: Path, folder: Path) -> None:
    """Link ``best.pth`` to the checkpoint that ``find_best`` has found elsewhere.

    Raises:
        CheckpointError: the link cannot be written.
    """
    link_best(path, folder / BEST)
    logger.warning("%s: restored from %s", folder / BEST, path.name)


def _are_equal(path: Path, other: Path) -> bool:
    """Whether two paths are the same file, or files with the same contents; False if one of them cannot be read."""
    try:
        return os.path.samefile(path, other) or sha256(path) == sha256(other)
    except OSError:
        return False


def keep_former_best(folder: Path) -> None:
    """Rename ``best.pth`` and every ``top_<updates>.pth`` to ``best_<updates>.pth``: the next best ones do not replace them.

    A damaged ``best.pth`` is set aside instead.
    """
    best = folder / BEST
    if os.path.isfile(best):
        try:
            _rename_former_best(best, read_checkpoint(best)["num_updates"])
        except CheckpointError:
            set_aside(best, "damaged")
    for path in sorted(filter(is_top, folder.glob("top_*.pth"))):
        if _are_equal(path, _former_best_path(folder, num_updates_of(path))):  # os.replace does nothing for two links to a file
            path.unlink()
        else:
            _rename_former_best(path, num_updates_of(path))


def _former_best_path(folder: Path, num_updates: int) -> Path:
    return folder / f"best_{num_updates:09d}.pth"


def _rename_former_best(path: Path, num_updates: int) -> None:
    kept = _former_best_path(path.parent, num_updates)
    while os.path.lexists(kept):
        kept = kept.with_name(f"{kept.stem}_{kept.suffix}")
    os.replace(path, kept)
    logger.warning("%s: kept as %s, since the next best checkpoint is not compared with it", path, kept.name)


def to_host(value: Any, *, copy: bool = False) -> Any:
    """Convert a state to plain data with its tensors in host memory; tuples become lists.

    Args:
        copy: also copy tensors that are already in host memory, so that later training steps do not modify the copy.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=copy)
    if isinstance(value, dict):
        plain = {key: to_host(item, copy=copy) for key, item in value.items()}
        # The metadata of a state dict contain the height and width of position tables, which their shapes do not determine.
        return with_metadata(plain, value) if hasattr(value, "_metadata") else plain
    if isinstance(value, (list, tuple)):
        return [to_host(item, copy=copy) for item in value]
    assert value is None or type(value) in (str, int, float, bool), f"{type(value)}: read_checkpoint would reject it"
    return value
