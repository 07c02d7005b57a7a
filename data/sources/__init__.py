"""The layouts in which a split may be stored. To add one, write a class in a file here, and add it to ``LAYOUTS``."""

import logging
import os
import re
from pathlib import Path

from data.files import DataError
from data.index import Index, read_index
from data.sources.folder import Folder
from data.sources.layout import Layout, MissingSplitError
from data.sources.tar import TarShards
from data.sources.zip import ZipArchive

logger = logging.getLogger(__name__)

# By name; if a split is stored in several layouts, the first one is read.
LAYOUTS: dict[str, type[Layout]] = {"folder": Folder, "tar": TarShards, "zip": ZipArchive}
# Words in the names of directories and archives that identify the split.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation", "test", "testing", "dev", "eval"},
}


def find_layout(root: Path, split: str) -> str:
    """Name of the layout in which a split is stored; "folder" if there is none. Warn about other layouts of the split."""
    splits = {name: layout(root, split) for name, layout in LAYOUTS.items() if not layout.needs_flag}
    present = [name for name, layout in splits.items() if layout.files()]
    for other in present[1:]:
        used, unused = splits[present[0]], splits[other]
        logger.warning("%s is read, but not the %s beside it, such as %s", used.path, unused.title, unused.files()[0])
    return present[0] if present else "folder"


def index_split(layout: str, root: str | Path, split: str, *, cache: Path | None = None) -> Index:
    """List the images of a split.

    Args:
        layout: key of ``LAYOUTS``.
        cache: see ``read_index``.

    Raises:
        DataError: no such split; the message suggests what to do with what lies in its place. Or invalid data, see the
            ``scan`` method of the layout.
    """
    try:
        return read_index(LAYOUTS[layout](Path(root), split), cache=cache)
    except MissingSplitError as error:
        raise DataError(f"{error}{_suggest(Path(root), split)}") from None


def _suggest(root: Path, split: str) -> str:
    """Suggest, as the end of an error message, what to do if a split is missing.

    Only files and directories whose name contains a word for this split are suggested: validation must never use training
    images. If there are none, the names in ``root`` are listed.
    """
    try:
        entries = sorted(path for path in root.iterdir() if path.name != split and not path.name.startswith("."))
        inside = sorted((root / split).iterdir()) if os.path.isdir(root / split) else []
    except FileNotFoundError:
        return f". {root} does not exist"
    except OSError as error:
        return f". {root} cannot be listed ({error.strerror}); check its permissions"
    related = [path for path in inside if not os.path.isdir(path) and _remedy(path, split)]
    related += [path for path in entries if _split_of(path.name) == split]
    if not related:
        shown = ", ".join(map(_show, entries[:5]))
        return f". {root} contains {shown or 'nothing else'}{f' and {len(entries) - 5} more' if len(entries) > 5 else ''}"
    more = f" (and {len(related) - 1} more)" if len(related) > 1 else ""
    return f". Found {_show(related[0])}{more}: {_remedy(related[0], split) or 'this format is not read'}"


def _remedy(found: Path, split: str) -> str:
    """What to do with a file or directory in place of a split; "" if no layout has a hint."""
    return next(filter(None, (layout.hint(found, split) for layout in LAYOUTS.values())), "")


def _show(path: Path) -> str:
    return f"{path.name}/" if os.path.isdir(path) else path.name


def _split_of(name: str) -> str | None:
    """Split that a word in a file name identifies; None if there is none, or words of several splits."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    splits = [split for split, known in SPLIT_WORDS.items() if words & known]
    return splits[0] if len(splits) == 1 else None
