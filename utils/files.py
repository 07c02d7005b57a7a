"""Atomic replacement of files, and identity of directories."""

import csv
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from utils.text import csv_cell


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, then rename that file to ``path`` atomically; on an error, delete it."""
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.incomplete{path.suffix}")  # unique per writer
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
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
