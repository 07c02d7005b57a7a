"""Files that are whole or as they were."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place at the end, or goes if something fails."""
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.incomplete{path.suffix}")  # other processes write too
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
