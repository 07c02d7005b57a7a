"""The output directory of a run: its path, checks before writing, and a lock against a second run."""

import contextlib
import json
import logging
import os
import socket
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from models.checkpoints.reader import CheckpointError
from utils.errors import ConfigError
from utils.files import identify, try_lock, write_text
from utils.run_files import CONFIG, LOCK, RECORD

logger = logging.getLogger(__name__)

RECORD_FORMAT = 1  # of run.json; raise it when code that reads the previous format would misread a new file
MAX_ATTEMPTS = 10  # maximum number of attempts to lock a file that other processes delete
SECONDS_UNTIL_STALE = 3600  # minimum age at which an incomplete file is deleted


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


def check_available(output: Path) -> None:
    """Check that a run could create and lock a directory, without creating or locking it.

    Raises:
        ConfigError: the path or an ancestor is a file or not writable, or another run has locked the directory.
    """
    check_writable(output)
    RunLock(output).check()


def check_writable(output: Path) -> None:
    """Check that a directory exists and is writable, or could be created.

    Raises:
        ConfigError: the path or an ancestor is a file or not writable.
    """
    existing = next(path for path in (output, *output.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ConfigError(f"{existing} is a file; choose another --output (or another --tag of a run)")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{output} cannot be written to (no permission for {existing}); choose another --output")


@dataclass(frozen=True)
class RunRecord:
    """Contents of ``run.json``: the identity of the run to which a directory belongs.

    Args:
        run_id: the run's id, which its checkpoints contain too.
        has_saved: whether a checkpoint was ever written to the directory. If not, nothing is lost when the run starts again.
        resumed_from: the value of --resume with which the run was started here, see ``jobs.initialization``; "" without it.
    """

    run_id: str
    has_saved: bool
    resumed_from: str = ""


def read_record(folder: Path) -> RunRecord | None:
    """Read ``run.json``; None if it is missing or invalid, as in the directories of earlier versions.

    Raises:
        ConfigError: a later version of this project wrote the file.
    """
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        stored = content.pop("format", 1)  # the first version wrote no number
        record = RunRecord(**content) if stored == RECORD_FORMAT else None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    if isinstance(stored, int) and stored > RECORD_FORMAT:
        raise ConfigError(
            f"{folder / RECORD} has format {stored}, but this version of the project reads formats up to {RECORD_FORMAT}. "
            "Update the project to the version that wrote the file, or choose another --tag"
        )
    if record is None or not record.run_id:
        return None
    return record if all(isinstance(getattr(record, name), kind) for name, kind in RunRecord.__annotations__.items()) else None


def write_record(folder: Path, record: RunRecord) -> None:
    """Write ``run.json``.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged.
    """
    write_text(folder / RECORD, json.dumps({"format": RECORD_FORMAT, **asdict(record)}) + "\n")


def record_save(folder: Path) -> None:
    """Record in ``run.json``, if it exists, that a checkpoint was written to the directory."""
    record = read_record(folder)
    if record is not None and not record.has_saved:
        with contextlib.suppress(OSError):  # the checkpoint itself is written; the record is only needed once it is deleted
            write_record(folder, replace(record, has_saved=True))


class RunDirectory:
    """The locked output directory of a run."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = RunLock(path)
        self._created: list[Path] = []

    def open(self) -> None:
        """Create and lock the directory.

        Raises:
            ConfigError: the directory cannot be written to, or is locked by another run.
        """
        self._created = [path for path in (self.path, *self.path.parents) if not os.path.exists(path)]
        create_output_directory(self.path)
        self._lock.acquire()

    def check(self) -> None:
        """Check that the path still is the directory that this run has locked. Call it before every write to the path.

        Raises:
            CheckpointError: the directory was moved or removed, or another run has started in it.
        """
        self._lock.check_held()

    def remove_leftovers(self) -> None:
        """Delete incomplete files of killed processes, except recent files, which a running evaluation may be writing."""
        for path in self.path.glob(".*.incomplete*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > SECONDS_UNTIL_STALE:
                    path.unlink()

    def write_config(self, text: str) -> None:
        """Write ``config.yaml``. A failure causes only a warning, since checkpoints contain the config too."""
        path = self.path / CONFIG
        try:
            write_text(path, text)
        except OSError as error:
            logger.warning("%s: not written (%s)", path, error)

    def close(self) -> None:
        self._lock.release()

    def discard(self) -> None:
        """Remove the lock file and the directories that this run created, if they are empty, then release the lock.

        Call it only if nothing else was written to the directory.
        """
        self._lock.delete()
        for path in self._created:
            with contextlib.suppress(OSError):  # not empty: another run uses it
                path.rmdir()
        self._lock.release()


class RunLock:
    """Lock that prevents a second run in an output directory. It is released when the process ends or is killed.

    On file systems without locks, the run that started last wins: the earlier run ends before its next write.
    """

    def __init__(self, output: Path):
        self.path = output / LOCK
        self._file: IO | None = None
        self._holder = ""
        self._folder: tuple[int, int] | None = None

    def acquire(self) -> None:
        """Acquire the lock, and write the process id and the host name to the lock file.

        Raises:
            ConfigError: another run has the lock, whose process id and host name are in the message, or the disk is full.
        """
        for _ in range(MAX_ATTEMPTS):
            self._file = self._open()
            try:
                is_locked = self._lock(self._file)
            except ConfigError:
                self.release()
                raise
            if self._is_at_path(self._file):
                break
            self.release()  # another process deleted the file after it was opened here
        else:
            raise ConfigError(f"{self.path} is deleted by another process again and again; choose another --tag")
        if not is_locked:
            logger.warning(
                "%s: this file system does not support locks, so a second run in the directory cannot be refused: never start "
                "two runs with the same --output and --tag",
                self.path.parent,
            )
        self._holder = f"process {os.getpid()} on {socket.gethostname()}, id {uuid.uuid4().hex[:8]}\n"
        try:  # without Python's buffer, whose content would be written again when the file is closed
            os.truncate(self._file.fileno(), 0)
            os.write(self._file.fileno(), self._holder.encode())
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written to ({error.strerror}); free disk space or choose another --output"
            ) from None
        self._folder = identify(self.path.parent)

    def check(self) -> bool:
        """Check that no other run has the lock.

        Returns:
            False if this is unknown, since there is no lock file, or the file system does not support locks.

        Raises:
            ConfigError: another run has the lock.
        """
        if not os.path.exists(self.path):
            return False
        with self._open() as file:
            return self._lock(file)

    def check_held(self) -> None:
        """Check that the lock file at the path is the one that this process has locked, and names this process.

        A deleted lock file is created and locked again.

        Raises:
            CheckpointError: the directory was moved or removed, or another run has started in it.
        """
        assert self._file is not None, "call acquire() first"
        folder = self.path.parent
        if not self._is_at_path(self._file):
            if os.path.lexists(self.path) or identify(folder) != self._folder:
                raise CheckpointError(
                    f"{folder} was moved or removed while the run was writing to it; nothing more is written to this path. To "
                    "resume from the last checkpoint, move the directory back and repeat the same command"
                )
            logger.warning("%s was deleted while the run was active; it is created and locked again", self.path)
            self.release()
            try:
                self.acquire()
            except ConfigError as error:
                raise CheckpointError(str(error)) from None
        # Read through the open file: closing another descriptor of the file would release the lock.
        elif os.pread(self._file.fileno(), 1000, 0).decode(errors="replace") != self._holder:
            raise CheckpointError(
                f"{folder}: another run has started in this directory, on a file system without locks; this run ends. Choose "
                "another --tag for one of them"
            )

    def _is_at_path(self, file: IO) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # a temporary failure of the file system; if it persists, the write itself fails
            return True

    def _open(self) -> IO:
        try:
            return open(self.path, "a+")
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be opened ({error.strerror}); choose another --tag or --output") from None

    def _lock(self, file: IO) -> bool:
        """Lock a file; False if the platform or the file system does not support locks."""
        try:
            return try_lock(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().split(", id")[0].strip() or "unknown process"
            raise ConfigError(
                f"{self.path.parent}: another run is writing to this directory ({holder}); wait for it, stop it, "
                "or choose another --tag"
            ) from None

    def delete(self) -> None:
        """Delete the lock file while its lock is held: a process that has opened it meanwhile notices, see ``acquire``."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
