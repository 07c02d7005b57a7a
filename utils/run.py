"""The output directory of a run: its path, checks before writing, and a lock against a second run."""

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

from utils.checkpoint import is_intact, list_checkpoints, num_updates_of, rename_damaged
from utils.config import ConfigError
from utils.files import replacing

logger = logging.getLogger(__name__)

LOCK = ".lock"
SECONDS_UNTIL_STALE = 3600  # minimum age at which an incomplete file is deleted


def build_output_path(cfg: CfgNode) -> Path:
    """Output directory of a run, ``<OUTPUT>/<MODEL.NAME>/<TAG>``."""
    return Path(cfg.OUTPUT) / cfg.MODEL.NAME / cfg.TAG


def create_output_directory(output: Path) -> None:
    """Create a directory and check that it is writable.

    Raises:
        ConfigError: the directory cannot be created or written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ConfigError(f"{output} cannot be written to ({error.strerror}); choose another --output") from None


def check_is_newest(output: Path, *, num_updates: int) -> None:
    """Reject a run if its directory has an intact checkpoint of a later update.

    Otherwise, the directory would contain checkpoints of two runs.

    Args:
        num_updates: number of updates completed before the start: 0, or that of the resumed checkpoint.

    Raises:
        ConfigError: the directory has an intact checkpoint of a later update.
    """
    for path in list_checkpoints(output):
        if num_updates_of(path) <= num_updates:
            return
        if is_intact(path):
            raise ConfigError(
                f"{output} contains {path.name}, but this run starts from the earlier update {num_updates}, so the directory "
                "would then contain checkpoints of two runs. Resume from that checkpoint (TRAIN.AUTO_RESUME True, no "
                "--resume), or choose another --tag"
            )


def check_available(output: Path) -> Path:
    """Check that a run could create and lock a directory, without creating or locking it.

    Returns:
        The directory, or its nearest existing ancestor.

    Raises:
        ConfigError: the path or an ancestor is a file, or another run has locked the directory.
    """
    existing = next(path for path in (output, *output.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ConfigError(f"{existing} is a file; choose another --output or --tag")
    RunLock(output).check()
    return existing


class RunDirectory:
    """The locked output directory of a run."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = RunLock(path)
        self._created: list[Path] = []

    def open(self, *, num_updates: int) -> None:
        """Create, lock and clean up the directory: delete old incomplete files, and rename damaged checkpoints.

        Args:
            num_updates: number of updates completed before the start: 0, or that of the resumed checkpoint.

        Raises:
            ConfigError: the directory cannot be written to, is locked by another run, or has a checkpoint of a later update.
        """
        missing = [path for path in (self.path, *self.path.parents) if not os.path.exists(path)]
        create_output_directory(self.path)
        self._created = missing
        self._lock.acquire()
        self._remove_leftovers()
        rename_damaged(self.path, num_updates=num_updates)
        check_is_newest(self.path, num_updates=num_updates)

    def _remove_leftovers(self) -> None:
        """Delete incomplete files of killed processes, except recent files, which a running evaluation may be writing."""
        for path in self.path.glob(".*.incomplete*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > SECONDS_UNTIL_STALE:
                    path.unlink()

    def write_config(self, text: str) -> None:
        """Write ``config.yaml``. A failure causes only a warning, since checkpoints contain the config too."""
        path = self.path / "config.yaml"
        try:
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            logger.warning("%s: not written (%s)", path, error)

    def close(self) -> None:
        self._lock.release()

    def discard(self) -> None:
        """Release the lock and remove the directories that this run created. Call it only before the first update."""
        self._lock.release()
        if self.path in self._created:
            shutil.rmtree(self.path, ignore_errors=True)
        for parent in self._created[1:]:
            with contextlib.suppress(OSError):  # not empty: another run uses it
                parent.rmdir()


class RunLock:
    """Lock that prevents a second run in an output directory. The kernel releases it when the process ends or is killed."""

    def __init__(self, output: Path):
        self.path = output / LOCK
        self._file: IO | None = None

    def acquire(self) -> None:
        """Acquire the lock, and write the process id and the host name to the lock file.

        Raises:
            ConfigError: another run has the lock; the message gives its process id and host name.
        """
        self._file = self._open()
        self._lock(self._file)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def check(self) -> None:
        """Check that no other run has the lock.

        Raises:
            ConfigError: another run has the lock.
        """
        if os.path.exists(self.path):
            with self._open() as file:
                self._lock(file)

    def _open(self) -> IO:
        try:
            return open(self.path, "a+")
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be opened ({error.strerror}); choose another --tag or --output") from None

    def _lock(self, file: IO) -> None:
        try:
            import fcntl

            # Unlike flock locks, lockf locks belong to a single process, so loader workers do not inherit them.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "unknown process"
            raise ConfigError(
                f"{self.path.parent}: another run is writing to this directory ({holder}); wait for it, stop it, "
                "or choose another --tag"
            ) from None
        except (ImportError, OSError):
            pass  # this platform or file system does not support locks

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
