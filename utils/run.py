"""The directory of a run: where it is, whether it can be written, and the lock that keeps a second run out of it."""

import contextlib
import logging
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import IO

from yacs.config import CfgNode

from utils.checkpoint import is_whole, list_checkpoints, num_updates_of, set_damaged_aside
from utils.config import ConfigError
from utils.files import replacing

logger = logging.getLogger(__name__)

LOCK = ".lock"
SECONDS_UNTIL_STALE = 3600  # age at which an incomplete file or directory counts as left over


def build_output_folder(cfg: CfgNode) -> Path:
    """``<OUTPUT>/<MODEL.NAME>/<TAG>``."""
    return Path(cfg.OUTPUT) / cfg.MODEL.NAME / cfg.TAG


def make_folder(output: Path) -> None:
    """Create a folder and check that it can be written.

    Raises:
        ConfigError: it cannot.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written to ({error.strerror}); choose another --output") from None


def check_is_newest(output: Path, *, num_updates: int) -> None:
    """Refuse a start that is behind the newest intact checkpoint of the folder: two branches of a run would mix.

    Raises:
        ConfigError: the folder has an intact checkpoint of a later update.
    """
    for path in list_checkpoints(output):
        if num_updates_of(path) <= num_updates:
            return
        if is_whole(path):
            raise ConfigError(
                f"{output}: holds {path.name}, further than this start (update {num_updates}): checkpoints would mix. Resume "
                "from it (TRAIN.AUTO_RESUME True, no --resume), or choose another --tag"
            )


def check_available(output: Path) -> Path:
    """Refuse a directory that a run could not create or lock, without changing it.

    Returns:
        Its nearest ancestor that exists, or itself.

    Raises:
        ConfigError: a file is in its place, or another run writes there.
    """
    existing = next(path for path in (output, *output.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ConfigError(f"{existing}: is a file; choose another --output or --tag")
    RunLock(output).check()
    return existing


class RunDirectory:
    """The directory of a run that writes there."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = RunLock(path)
        self._created: list[Path] = []

    def open(self, *, num_updates: int) -> None:
        """Create and lock it, and rename damaged checkpoints of later updates than the run starts from.

        Args:
            num_updates: updates done at the start.

        Raises:
            ConfigError: it cannot be written, another run writes there, or it has a checkpoint of a later update.
        """
        missing = [path for path in (self.path, *self.path.parents) if not os.path.exists(path)]
        make_folder(self.path)
        self._created = missing
        self._lock.acquire()
        self._remove_leftovers()
        set_damaged_aside(self.path, num_updates=num_updates)
        check_is_newest(self.path, num_updates=num_updates)

    def _remove_leftovers(self) -> None:
        """Delete files that a kill left incomplete, but none that an evaluation may be writing now."""
        for path in self.path.glob(".*.incomplete*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > SECONDS_UNTIL_STALE:
                    path.unlink()

    def write_config(self, text: str) -> None:
        """Write ``config.yaml``; checkpoints have the config too, so that a failure ends no run."""
        path = self.path / "config.yaml"
        try:
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            logger.warning("%s: not written (%s)", path, error)

    def close(self) -> None:
        self._lock.release()

    def discard(self) -> None:
        """Remove the directories that this run created: it was refused before its first update."""
        self._lock.release()
        if self.path in self._created:
            shutil.rmtree(self.path, ignore_errors=True)
        for parent in self._created[1:]:
            with contextlib.suppress(OSError):  # another run is there
                parent.rmdir()


class RunLock:
    """Keeps a second run out of a run's directory. The kernel releases it when the process ends, however it ends."""

    def __init__(self, output: Path):
        self.path = output / LOCK
        self._file: IO | None = None

    def acquire(self) -> None:
        """
        Raises:
            ConfigError: another run holds it; the message names its process and host.
        """
        self._file = self._open()
        self._lock(self._file)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def check(self) -> None:
        """
        Raises:
            ConfigError: another run holds it.
        """
        if os.path.exists(self.path):
            with self._open() as file:
                self._lock(file)

    def _open(self) -> IO:
        try:
            return open(self.path, "a+")
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be opened ({error.strerror}); choose another --tag or --output") from None

    def _lock(self, file: IO) -> None:
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: its workers do not inherit it
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "unknown process"
            raise ConfigError(
                f"{self.path.parent}: another run writes there ({holder}); wait for it, stop it, or choose another --tag"
            ) from None
        except (ImportError, OSError):
            pass  # this platform or file system has no locks

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
