"""The layouts in which a split may be stored. To add one, write a class in a file here, and add it to ``LAYOUTS``."""

from pathlib import Path

from data.files import DataError
from data.index import Index, read_index
from data.sources.folder import Folder
from data.sources.hints import suggest
from data.sources.layout import Layout, MissingSplitError
from data.sources.parquet import ParquetShards
from data.sources.tar import TarShards
from data.sources.zip import ZipArchive

# By name; if a split is stored in several layouts, the first one is read.
LAYOUTS: dict[str, type[Layout]] = {"folder": Folder, "tar": TarShards, "parquet": ParquetShards, "zip": ZipArchive}


def list_layouts(root: Path, name: str, *, zip_mode: bool = False) -> list[Layout]:
    """The layouts in which a split is stored; [] if it does not exist.

    Args:
        name: see ``Layout``.
        zip_mode: look for zip archives, and for nothing else.
    """
    splits = [layout(root, name) for layout in LAYOUTS.values() if layout.needs_flag == zip_mode]
    return [split for split in splits if split.files()]


def index_split(layout: str, root: str | Path, name: str, *, cache: Path | None = None, option: str = "") -> Index:
    """List the images of a split in a given layout.

    Args:
        layout: key of ``LAYOUTS``.
        name, cache, option: see ``read_split``.

    Raises:
        DataError: see ``read_split``.
    """
    return read_split(LAYOUTS[layout](Path(root), name), Path(root), name, cache=cache, option=option)


def read_split(split: Layout, root: Path, name: str, *, cache: Path | None = None, option: str = "") -> Index:
    """List the images of a split.

    Args:
        root, name: the arguments from which ``split`` was created.
        cache: see ``read_index``.
        option: see ``missing_split``.

    Raises:
        DataError: there is no such split, or its data are invalid, see the ``scan`` method of the layout.
    """
    try:
        return read_index(split, cache=cache)
    except MissingSplitError as error:
        raise missing_split(str(error), root, name, zip_mode=split.needs_flag, option=option) from None


def missing_split(reason: str, root: Path, name: str, *, zip_mode: bool, option: str = "") -> DataError:
    """The error for a missing split, which ends with a remedy, see ``suggest``.

    Args:
        option: command-line option that selects the split, such as ``--opts DATA.VAL_SPLIT``; by default according to ``name``.
    """
    return DataError(f"{reason}{suggest(root, name, LAYOUTS, zip_mode=zip_mode, option=option)}")
