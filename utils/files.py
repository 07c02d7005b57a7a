"""Atomic replacement of files, file locks, and identity of directories."""

import csv
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from utils.errors import ConfigError
from utils.text import csv_cell

logger = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path to write to, then rename that file to ``path`` atomically; on an error, delete it.

    Args:
        temporary: the temporary path, for a file with a single writer; by default, a unique path next to ``path``.
    """
    if temporary is None:
        temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.incomplete{path.suffix}")
    else:
        temporary.unlink(missing_ok=True)  # left by a process that was killed
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # an error here would hide the reason of an earlier one
            temporary.unlink(missing_ok=True)


def sync_directory(folder: Path) -> None:
    """Flush the entries of a directory to the disk, on file systems that support this."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        logger.debug("%s: the directory could not be synced (%s)", folder, error)


def try_lock(file: IO) -> bool:
    """Lock an open file for this process. The lock is released when the process closes the file, ends or is killed.

    Returns:
        False if the platform or the file system does not support locks.

    Raises:
        BlockingIOError: another process has locked the file.
    """
    try:
        import fcntl

        # Unlike flock locks, lockf locks belong to a single process, so loader workers do not inherit them.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise BlockingIOError(*error.args) from None
    except (ImportError, OSError):
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, atomically.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write a JSON file.

    Raises:
        ValueError: the content has NaN or infinity, which JSON does not have.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable]) -> None:
    """Write a CSV file. Text cannot become a formula (see ``csv_cell``), and names that are not UTF-8 keep their bytes."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(map(csv_cell, row) for row in rows)


def read_csv(path: Path, row_type: Callable[..., Any], key: Sequence[str]) -> list:
    """Read the rows of a CSV file as named tuples.

    Args:
        row_type: a named tuple with fields of type str, int and float.
        key: fields that identify a row.

    Raises:
        ConfigError: the file has other columns, a row does not fit them, or two rows have the same key.
    """
    types, rows = row_type.__annotations__, {}
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:  # spreadsheets write a byte order mark
        reader = csv.DictReader(file)
        try:
            if reader.fieldnames != list(types):
                raise ConfigError(f"{path}: expected a CSV file with the columns {','.join(types)}, separated by commas")
            for cells in reader:
                row = row_type(**{name: types[name](value) for name, value in cells.items()})
                identity = tuple(getattr(row, name) for name in key)
                if identity in rows:
                    raise ConfigError(f"{path}:{reader.line_num}: a second row with {key} = {identity}; remove one of them")
                rows[identity] = row
            return list(rows.values())
        except (KeyError, TypeError, csv.Error):
            problem = "the row has more or fewer values than columns"
        except ConfigError:
            raise
        except ValueError as error:
            problem = str(error)
        raise ConfigError(f"{path}:{reader.line_num}: {problem}; correct the row, or write the file again with --csv")


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
