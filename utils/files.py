"""Atomic replacement of files."""

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
