"""Parquet shards as on the Hugging Face hub: ``<split>-00000-of-00014.parquet``, also in ``data/``."""

import glob
import json
import os
import re
import shlex
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.files import DataError
from data.index import PARQUET, Scan, create_index, row_name
from data.rows import find_image_column, open_parquet
from data.sources.class_list import check_distinct_names, class_names, first_duplicate
from data.sources.shards import Shards
from utils.progress import progress

MAX_ROW_GROUP = 2**31  # bytes; each loader worker needs the memory for a whole row group
NUM_IMAGENET_CLASSES = 1000
LABEL_COLUMNS = ("label", "labels")  # names of the column of class ids, if its type does not decide
MAX_OTHER_NAMES = 10  # names of ImageNet's classes that may differ from timm's
_REMOVE_ROWS = "remove these rows, with filter of the library datasets"


class ParquetShards(Shards):
    """Parquet shards, beside each other in the data path or, as on the Hugging Face hub, in its directory ``data``.

    Class names are those in the metadata, else the lines of ``classes.txt``, else numbers.
    """

    title = "parquet shards"
    extension = PARQUET
    other_extensions = r"\.(parquet\b.*|arrow)"

    def __init__(self, root: Path, split: str):
        super().__init__(root, split)
        self.beside: list[Path] = []  # shards of the same name in the data path, if those in ``data`` are used
        if self.is_pattern:
            return
        beside = self.archives
        super().__init__(root, f"data/{split}")
        if self.archives:
            self.beside = beside
        else:
            super().__init__(root, split)

    @staticmethod
    def hint(root: Path, name: str, option: str) -> str:
        if not name.lower().endswith(PARQUET) or os.path.isdir(root / name):
            return ""
        pattern = re.sub(r"[0-9]+(-of-[0-9]+.*)?$", "", name[: -len(PARQUET)])
        return f"add {option} {shlex.quote(f'{glob.escape(pattern)}*{name[-len(PARQUET) :]}')}"

    def list_classes(self) -> list[str] | None:
        with _reading_errors(self.archives[0]):
            _, classes = _find_labels(self.archives[0], open_parquet(self.archives[0]).schema_arrow)
        return super().list_classes() if classes is None else _wordnet_ids(classes)

    def count_files(self, limit: int) -> int | None:
        num_rows = 0
        for shard in self.archives:
            with _reading_errors(shard):
                num_rows += open_parquet(shard).metadata.num_rows
            if num_rows >= limit:
                return None
        return num_rows

    def scan(self) -> Scan:
        """List the images. Only the labels, the file names and the metadata of the shards are read.

        Raises:
            DataError: pyarrow is missing; a shard cannot be read, is missing from a numbered sequence, or has no images or no
                labels; a row has no image or no label; or classes and labels do not match.
        """
        if self.beside:
            raise DataError(
                f"{self.beside[0]} and {self.archives[0]} are shards of the same split; remove those in one of the directories"
            )
        self.check_shards()
        names: list[str] = []
        labels, archive, offsets, sizes = array("q"), array("i"), array("q"), array("q")
        classes: list[str] | None = None
        for number, shard in enumerate(progress(self.archives, len(self.archives), f"{self.path}: shards listed")):
            rows = _read_rows(shard)
            if number == 0:
                classes = rows.classes
            if rows.classes != classes:
                raise DataError(f"{shard} has other class names than {self.archives[0].name}; download the shards again")
            names += [row_name(shard, row, name) for row, name in enumerate(rows.names)]
            labels.extend(rows.labels)
            archive.extend([number] * len(rows.names))
            offsets.extend(rows.offsets)
            sizes.extend(rows.sizes)
        if classes is None:
            classes = class_names(self.class_lists, labels, self.path)
        else:
            _check_labels(labels, classes, self.path)
            classes = _wordnet_ids(classes)
        storage: dict[str, Any] = {"archive": archive, "offsets": offsets, "sizes": sizes, "deflated": [False] * len(names)}
        index = create_index(self.source, classes, names, labels, archives=self.archives, **storage)
        notes = [*check_distinct_names(classes, self.path), *self.unread_files()]
        return Scan(index, [*self.archives, *self.class_lists], notes)


class _Rows(NamedTuple):
    """The images of a shard. classes: class names of its metadata, None if it has none; the others are values per image."""

    classes: list[str] | None
    labels: Sequence[int]
    names: list[str]
    offsets: Sequence[int]
    sizes: Sequence[int]


def _read_rows(shard: Path) -> _Rows:
    """List the images of a shard, see ``ParquetShards.scan``."""
    with _reading_errors(shard):
        parquet = open_parquet(shard)
        column = find_image_column(parquet.schema_arrow)
        if column is None:
            found = ", ".join(f"{field.name} ({field.type})" for field in parquet.schema_arrow)
            raise DataError(f"{shard}: expected a column image with the bytes of the images, but the columns are {found}")
        name, path = column
        label, classes = _find_labels(shard, parquet.schema_arrow)
        offsets, sizes = _divide_row_groups(shard, parquet.metadata, path)
        columns = [label, f"{name}.path"] if path != name else [label]  # pyarrow ignores a column that does not exist
        table = parquet.read(columns=columns, use_threads=False)
        if table.column(label).null_count:
            raise DataError(f"{shard}: {table.column(label).null_count} rows have no {label}; {_REMOVE_ROWS}")
        names = table.column(name).to_pylist() if name in table.column_names else [None] * table.num_rows
        return _Rows(classes, table.column(label).to_pylist(), [_base_name(entry) for entry in names], offsets, sizes)


@contextmanager
def _reading_errors(shard: Path) -> Iterator[None]:
    """Raise DataError for any error of the file or of pyarrow, which raises many exception types on damaged files."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{shard} cannot be read ({error}); download it again (in a git clone: git lfs pull)") from None


def _base_name(entry: dict | None) -> str:
    """Name of an image's file without directories; "" if it is unknown."""
    return re.split(r"[/\\]", str((entry or {}).get("path") or ""))[-1]


def _find_labels(shard: Path, schema: Any) -> tuple[str, list[str] | None]:
    """Find the column with the class ids, and its class names in the metadata that the library ``datasets`` writes.

    Raises:
        DataError: there is no such column, or there are several.
    """
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = {name: list(kind["names"]) for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (AttributeError, KeyError, TypeError, ValueError):  # other programs write no such metadata
        names = {}
    candidates = [name for name in (*LABEL_COLUMNS, *names) if name in schema.names]
    if not candidates or (candidates[0] not in LABEL_COLUMNS and len(candidates) > 1):
        found = ", ".join(names or schema.names)
        raise DataError(
            f"{shard}: expected one column label with the class ids, but found {found}; rename one of them to label, with "
            "rename_column of the library datasets"
        )
    column = candidates[0]
    if not str(schema.field(column).type).startswith(("int", "uint")):
        raise DataError(
            f"{shard}: {column} has the type {schema.field(column).type} instead of class ids; convert it, with "
            "class_encode_column of the library datasets"
        )
    return column, names.get(column)


def _divide_row_groups(shard: Path, metadata: Any, path: str) -> tuple[array, array]:
    """Offset and size of an equal part of its row group's stored images for every image, see ``data.index.Index``.

    Args:
        path: path of the bytes of the images in the file.

    Raises:
        DataError: a row group is too large, or has rows without an image.
    """
    offsets, sizes, num_missing = array("q"), array("q"), 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        chunk = next(column for column in map(group.column, range(group.num_columns)) if column.path_in_schema == path)
        if (size := chunk.total_uncompressed_size) > MAX_ROW_GROUP:
            raise DataError(
                f"{shard} has a row group of {size / 2**30:.1f} GiB, all of which must be read for one image; write the file "
                "again with row_group_size=100, with write_table of pyarrow.parquet"
            )
        num_missing += (chunk.statistics.null_count or 0) if chunk.is_stats_set else 0
        start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
        bounds = start + chunk.total_compressed_size * np.arange(group.num_rows + 1, dtype=np.int64) // max(group.num_rows, 1)
        offsets.extend(bounds[:-1].tolist())
        sizes.extend(np.diff(bounds).tolist())
    if num_missing:
        remedy = _REMOVE_ROWS if num_missing < len(sizes) else f"store the content of the image files in {path}, not only paths"
        raise DataError(f"{shard}: {num_missing} rows have no image; {remedy}")
    return offsets, sizes


def _check_labels(labels: Sequence[int], classes: Sequence[str], source: Path) -> None:
    """Check that the class names are distinct, and that the class ids are theirs.

    Raises:
        DataError: a class id without a name, a class without images, or a duplicate name.
    """
    used = np.unique(np.array(labels, dtype=np.int64))
    if (duplicate := first_duplicate(classes)) is not None:
        raise DataError(f"{source}: duplicate class name {duplicate} in the metadata; give every class a unique name")
    if not len(used):
        raise DataError(f"{source} has no images; download the data again")
    if used[0] < 0:
        raise DataError(
            f"{source} has rows with the label {used[0]}: test splits on the hub often have no labels; use the split "
            "validation instead"
        )
    if used[-1] >= len(classes):
        raise DataError(f"{source} has the label {used[-1]}, but {len(classes)} class names; download the data again")
    if len(used) < len(classes):
        unused = next(label for label in range(len(classes)) if label not in set(used.tolist()))
        raise DataError(
            f"{source} has no image of class {unused}, {classes[unused]}; every class needs images in each split. To remove "
            "unused classes, convert class ids to names and these to class ids (int2str, class_encode_column of the library "
            "datasets)"
        )


def _wordnet_ids(classes: list[str]) -> list[str]:
    """Class names for the rest of the project: the WordNet ids, as in directories, if the names describe ImageNet's classes."""
    if len(classes) != NUM_IMAGENET_CLASSES:
        return classes
    from timm.data import ImageNetInfo  # imports torch, which other data do not need

    info = ImageNetInfo()
    num_equal = sum(info.index_to_description(label) == name for label, name in enumerate(classes))
    return info.label_names() if num_equal >= NUM_IMAGENET_CLASSES - MAX_OTHER_NAMES else classes
