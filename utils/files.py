"""Atomic replacement of files, and identity of directories."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, then rename that file to ``path`` atomically; on an error, delete it."""
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.incomplete{path.suffix}")  # unique per writer
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def can_write(path: Path) -> bool:
    """Whether ``replacing`` can write a file: its directory exists and is writable, and the path is no directory."""
    return os.access(path.parent, os.W_OK | os.X_OK) and not path.is_dir()


def identify(folder: Path) -> tuple[int, int] | None:
    """Device and inode of a directory, which it keeps when it is renamed; None if there is nothing at the path."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def check_same(folder: Path, identity: tuple[int, int] | None) -> None:
    """Check that a path still is the directory that ``identify`` has identified; None accepts any directory.

    Raises:
        OSError: the directory was moved or removed.
    """
    if identity is not None and identify(folder) != identity:
        raise OSError(f"{folder} was moved or removed")
