"""The directory of a run: where it is, whether it can be written, and the lock that keeps a second run out of it."""

import logging
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import IO

from yacs.config import CfgNode

from utils.checkpoint import list_checkpoints, num_updates_of, set_damaged_aside
from utils.config import ConfigError
from utils.files import replacing

logger = logging.getLogger(__name__)

LOCK = ".lock"


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
    """Refuse a start that is behind the newest checkpoint of the folder: two branches of a run would mix.

    Raises:
        ConfigError: the folder has a checkpoint of a later update, or is a file.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: is a file; choose another --output or --tag")
    newest = next(iter(list_checkpoints(output)), None)
    if newest is not None and num_updates_of(newest) > num_updates:
        raise ConfigError(
            f"{output}: holds {newest.name}, further than this start (update {num_updates}): checkpoints would mix. Resume "
            "from it (TRAIN.AUTO_RESUME True, no --resume), or choose another --tag"
        )


class RunDirectory:
    """The directory of a run that writes there."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = RunLock(path)
        self._is_new = False

    def open(self, *, num_updates: int) -> None:
        """Create and lock it, and rename damaged checkpoints of later updates than the run starts from.

        Args:
            num_updates: updates done at the start.

        Raises:
            ConfigError: it cannot be written, another run writes there, or it has a checkpoint of a later update.
        """
        is_new = not self.path.exists()
        make_folder(self.path)
        self._is_new = is_new
        self._lock.acquire()
        set_damaged_aside(self.path, num_updates=num_updates)
        check_is_newest(self.path, num_updates=num_updates)

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
        """Remove the directory if this run created it: it was refused before its first update."""
        self._lock.release()
        if self._is_new:
            shutil.rmtree(self.path, ignore_errors=True)


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
        self._file = open(self.path, "a+")  # noqa: SIM115 - open for the whole run
        try:
            import fcntl

            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: its workers do not inherit it
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown process"
            raise ConfigError(
                f"{self.path.parent}: another run writes there ({holder}); wait for it, stop it, or choose another --tag"
            ) from None
        except (ImportError, OSError):
            pass  # this platform or file system has no locks
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
