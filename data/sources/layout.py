"""The interface of a data layout: how the images of a split and their class ids are stored."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from data.files import DataError
from data.index import Index, Scan


class MissingSplitError(DataError):
    """There is no split where it is expected; ``data.sources`` adds what lies in its place."""


class Layout(ABC):
    """A split in the directory ``root``, stored in one layout. The constructor takes ``root`` and the name of the split.

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

    @staticmethod
    @abstractmethod
    def hint(found: Path, split: str) -> str:
        """What to do with a file or directory that could be a split in this layout under another name; "" if it cannot be.

        It is shown if the split is missing. Example: "rename it to val/".
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
