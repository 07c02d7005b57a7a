"""Random access to the images in parquet files, by row."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from data.files import MAX_FILE_SIZE, DataError, check_unchanged

MAX_OPEN_FILES = 128
CACHE_SIZE = 2**26  # bytes of decompressed images that each process keeps; the row group read last is always kept
IMAGE_COLUMNS = ("image", "img")  # names that decide if several columns could contain the images


def import_pyarrow(path: str | Path) -> Any:
    """Import the package ``pyarrow``, which is not a requirement of the project, and its module ``parquet``.

    Args:
        path: the data, for the message.

    Raises:
        DataError: pyarrow cannot be imported.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading parquet files needs pyarrow ({error}); install it: pip install pyarrow") from None
    return pyarrow


def open_parquet(path: str | Path) -> Any:
    """Open a parquet file as a ``pyarrow.parquet.ParquetFile``, which a forked process may use too.

    It has no thread pool, and reads by offset: forked processes share the position of an open file.
    """
    pyarrow = import_pyarrow(path)
    file = pyarrow.OSFile(str(path))
    return pyarrow.parquet.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)


def find_image_column(schema: Any) -> tuple[str, str] | None:
    """Find the column with the encoded images: binary, or a struct with a binary field ``bytes``.

    Args:
        schema: a ``pyarrow.Schema``.

    Returns:
        The name of the column, and the path of its bytes in the parquet file, such as ``image.bytes``; None if there is no such
        column, or if there are several and none of them has a name of ``IMAGE_COLUMNS``.
    """
    paths: dict[str, str] = {}
    for field in schema:
        if _is_binary(field.type):
            paths[field.name] = field.name
        elif str(field.type).startswith("struct<") and any(
            part.name == "bytes" and _is_binary(part.type) for part in field.type
        ):
            paths[field.name] = f"{field.name}.bytes"
    name = next((name for name in IMAGE_COLUMNS if name in paths), next(iter(paths), "") if len(paths) == 1 else "")
    return (name, paths[name]) if name else None


def _is_binary(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary")


class RowReader:
    """Reads images of parquet files by row.

    The columns of parquet files are compressed per row group, of 100 to 1,000 images in most data sets: to read one image, its
    whole row group is decompressed. The row groups read last are kept (see ``CACHE_SIZE``), so that images that are read in
    their order cost no more than that of each row group.

    Args:
        paths: the files.
        stamps: ``file_stamp`` of each file at the time when its images were listed.

    Raises:
        DataError: pyarrow cannot be imported.
    """

    def __init__(self, paths: Sequence[str], stamps: Sequence[tuple[int, int] | None]):
        import_pyarrow(paths[0])  # before the loader workers are forked
        self._paths = paths
        self._stamps = stamps
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()  # images by file and row group

    def read(self, number: int, row: int) -> bytes:
        """Read an image.

        Args:
            number: position of the file in ``paths``.

        Raises:
            OSError, ValueError: the file cannot be read, is damaged or was changed, or the row has no image.
        """
        try:
            file = self._open(number)
            group = bisect_right(file.starts, row) - 1
            image = self._read_group(number, group, file)[row - file.starts[group]]
            size = 0 if image.as_buffer() is None else image.as_buffer().size
        except (MemoryError, OSError, ValueError):
            raise
        except Exception as error:  # pyarrow raises many exception types on damaged files
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if not 0 < size <= MAX_FILE_SIZE:
            raise ValueError(f"{size} bytes, too large for an image" if size else "the row has no image")
        return image.as_py()

    def _read_group(self, number: int, group: int, file: "_File") -> Any:
        """The images of a row group, as a ``pyarrow.ChunkedArray`` of bytes."""
        key = number, group
        if key not in self._groups:
            try:
                images = file.parquet.read_row_group(group, columns=[file.column], use_threads=False).flatten().column(0)
            finally:  # a file that has changed may also seem damaged
                check_unchanged(self._paths[number], os.stat(self._paths[number]), self._stamps[number])
            self._groups[key] = images
            while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > CACHE_SIZE:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _open(self, number: int) -> "_File":
        """Open a file; above ``MAX_OPEN_FILES``, close the one that was used longest ago."""
        if number not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                self._files.popitem(last=False)
            self._files[number] = _File(self._paths[number], self._stamps[number])
        self._files.move_to_end(number)
        return self._files[number]


class _File:
    """An open parquet file. starts: number of the first row of each row group."""

    def __init__(self, path: str, stamp: tuple[int, int] | None):
        self.parquet = open_parquet(path)
        check_unchanged(path, os.stat(path), stamp)
        metadata = self.parquet.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.starts = [0, *accumulate(sizes)][:-1]
        column = find_image_column(self.parquet.schema_arrow)
        if column is None:
            raise ValueError("it has no column with images")
        self.column = column[1]
