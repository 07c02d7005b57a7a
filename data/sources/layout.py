"""The interface of a data layout: how the images of a split and their class ids are stored."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from data.files import DataError
from data.index import Index, Scan

# Names under which a split is found if none is requested; the first one that exists is used.
DEFAULT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation", "test")}
# Words in the names of directories and archives that identify the split.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation", "test", "testing", "dev", "eval"},
}


def split_of(name: str) -> str | None:
    """Split ("train" or "val") that a word in a name identifies; None if there is none, or words of several splits."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    splits = [split for split, known in SPLIT_WORDS.items() if words & known]
    return splits[0] if len(splits) == 1 else None


def run_option(split: str) -> str:
    """Command-line option that selects a split of a run, "train" or "val"."""
    return f"--opts DATA.{split.upper()}_SPLIT"


def has_class_directories(root: Path) -> bool:
    """Whether a directory seems to contain class directories, and no splits."""
    try:
        folders = [entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return False
    return len(folders) > 1 and not any(map(split_of, folders))


class MissingSplitError(DataError):
    """There is no split where it is expected; ``data.sources`` adds what lies in its place."""


class Layout(ABC):
    """A split in the directory ``root``, stored in one layout.

    The constructor takes ``root`` and the name of the split: a name from which the layout forms the names of its archives,
    such as "train"; or the path of a directory or archive, or a pattern of archives, relative to ``root`` or absolute.

    Attributes:
        title: plural noun for log lines.
        needs_flag: whether the layout is read only on request, since its files may also lie beside another layout.
        path: identifies the split; a pattern if the split has several archives.
        source: directory or archive to which the names of the images are relative.
        archives: archive files, sorted; [] for a directory.
    """

    title: ClassVar[str]
    needs_flag: ClassVar[bool] = False
    path: Path
    source: Path
    archives: list[Path]

    @abstractmethod
    def __init__(self, root: Path, split: str): ...

    @abstractmethod
    def files(self) -> list[Path]:
        """Files or directories of the split that exist; [] if the split is not stored in this layout."""

    @abstractmethod
    def scan(self) -> Scan:
        """List all images.

        Raises:
            DataError: invalid data; ``MissingSplitError`` if there are none.
        """

    def list_classes(self) -> list[str] | None:
        """Class names, if they are known without listing the images; else None.

        Raises:
            DataError: invalid data, see ``scan``.
        """
        return None

    def count_files(self, limit: int) -> int | None:
        """Number of files, thus the maximum number of images, if it is below ``limit``; else, or if it is not known, None.

        It reads few more than ``limit`` directory entries.
        """
        return None

    @staticmethod
    @abstractmethod
    def hint(root: Path, name: str, option: str) -> str:
        """How to read the file or directory ``root/name`` as a split in this layout; "" if it cannot be one.

        It is shown if a split is missing, and must lead to a command that works. Example: "add --opts DATA.VAL_SPLIT dev".

        Args:
            option: command-line option that selects the missing split, such as ``--opts DATA.VAL_SPLIT``.
        """

    def write(self, index: Index, images: Iterable[bytes], shard_size: int) -> None:
        """Pack a split, for layouts that ``scripts/pack_dataset.py`` offers.

        Args:
            index: names and labels of the images.
            images: their files, in the order of ``index``.
            shard_size: images per archive, if the layout has several.

        Raises:
            DataError: an archive of this layout cannot contain the name of an image; nothing is written.
            OSError: the archives cannot be written.
        """
        raise NotImplementedError
