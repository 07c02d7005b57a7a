"""Zip archives as in the reference implementation: ``<split>.zip``, and ``<split>_map.txt`` with the class ids."""

import os
import re
import shlex
import stat
import zipfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data.files import (
    HEAD,
    MAX_COMPRESSION_RATIO,
    MAX_FILE_SIZE,
    SYSTEM,
    DataError,
    FileKind,
    LeftOut,
    check_member_name,
    classify,
    is_system_path,
)
from data.index import Index, Scan, create_index
from data.sources.class_list import check_distinct_names, class_lists, class_names, is_class_id, list_classes, read_listing
from data.sources.layout import Layout, MissingSplitError

_LOCAL_HEADER = 30  # bytes of a zip entry's local header, before its name and extra field


class ZipArchive(Layout):
    """``<split>.zip`` and ``<split>_map.txt``, whose lines are: name in the archive, tab, class id; see --zip."""

    title = "zip archives"
    needs_flag = True

    def __init__(self, root: Path, split: str):
        stem = split.removesuffix(".zip")
        self.path = self.source = root / f"{stem}.zip"
        self.map = root / f"{stem}_map.txt"
        self.class_lists = class_lists(self.path.parent, root)
        self.archives = [self.path]

    def files(self) -> list[Path]:
        return [path for path in (self.path, self.map) if os.path.isfile(path)]

    @staticmethod
    def hint(root: Path, name: str, option: str) -> str:
        if not name.endswith(".zip"):
            return ""
        needed = "" if os.path.isfile(root / f"{name.removesuffix('.zip')}_map.txt") else f", and write {name[:-4]}_map.txt"
        return f"add {option} {shlex.quote(name)}{needed}"

    def list_classes(self) -> list[str] | None:
        return list_classes(self.class_lists)

    def scan(self) -> Scan:
        """List the images.

        Raises:
            DataError: a missing file, a malformed line, class ids with gaps, an image missing from the archive or listed twice,
                or an entry that is not a plain image file.
        """
        if not os.path.isfile(self.path):
            raise MissingSplitError(f"{self.path}: no such file")
        names, labels = _read_map(self.map)
        classes = class_names(self.class_lists, labels, self.map)
        try:
            with zipfile.ZipFile(self.path) as zip_file, open(self.path, "rb") as file:
                entries = self._find_entries(zip_file, names)
                offsets = [_data_offset(file, entry) for entry in entries]
                self._check_extents(entries, offsets, os.fstat(file.fileno()).st_size)
                notes = [*check_distinct_names(classes, self.path), *self._left_out(zip_file, entries).notes(self.path)]
        except DataError:
            raise
        except Exception as error:  # zipfile raises many exception types on damaged archives
            raise DataError(f"{self.path} cannot be read ({error}); check --data-path, or leave out --zip") from None
        index = create_index(
            self.source,
            classes,
            names,
            labels,
            archives=self.archives,
            offsets=offsets,
            sizes=[entry.compress_size for entry in entries],
            deflated=[entry.compress_type == zipfile.ZIP_DEFLATED for entry in entries],
            checksums=[entry.CRC for entry in entries],
        )
        return Scan(index, [self.path, self.map, *self.class_lists], notes)

    def _find_entries(self, zip_file: zipfile.ZipFile, names: Sequence[str]) -> list[zipfile.ZipInfo]:
        """Find the archive's entry of each name in the map file, which must be a plain image file that is listed once."""
        entries: dict[str, zipfile.ZipInfo] = {}
        ambiguous = set()
        for entry in zip_file.infolist():
            for name in set(_entry_names(entry)):
                if entries.setdefault(name, entry) is not entry:
                    ambiguous.add(name)
        lines: dict[int, int] = {}  # line of the map file that lists an entry, by the entry's identity
        found = []
        for line, name in enumerate(names, start=1):
            if name not in entries:
                raise DataError(f"{self.path}: {name} is missing, but listed in {self.map.name}; pack the archive again")
            if name in ambiguous:
                raise DataError(f"{self.path} has several entries named {name}; pack the archive again, with one of them")
            entry = entries[name]
            if (first := lines.setdefault(id(entry), line)) != line:
                raise DataError(f"{self.map}:{line}: {name} is already listed in line {first}; each image must be listed once")
            _check_entry(self.path, entry)
            found.append(entry)
        return found

    def _check_extents(self, entries: Sequence[zipfile.ZipInfo], offsets: Sequence[int], size: int) -> None:
        """Check that the data of the entries are within the archive, and do not overlap.

        Raises:
            DataError: two entries use the same bytes, so that an image would be counted twice.
            zipfile.BadZipFile: the archive is truncated.
        """
        starts = np.array(offsets, dtype=np.int64)
        ends = starts + np.array([entry.compress_size for entry in entries], dtype=np.int64)
        if ends.max() > size:
            raise zipfile.BadZipFile("an entry extends beyond the end of the file")
        order = np.argsort(starts, kind="stable")
        overlaps = np.flatnonzero((starts[order][1:] < ends[order][:-1]) | (starts[order][1:] == starts[order][:-1]))
        if len(overlaps):
            one, other = (entries[order[overlaps[0] + step]].filename for step in (0, 1))
            raise DataError(f"{self.path}: the data of {one} and {other} overlap; pack the archive again")

    def _left_out(self, zip_file: zipfile.ZipFile, entries: Sequence[zipfile.ZipInfo]) -> LeftOut:
        """The entries that the map file does not list."""
        left_out, listed = LeftOut(), {id(entry) for entry in entries}
        for entry in zip_file.infolist():
            if entry.is_dir() or id(entry) in listed:
                continue
            if is_system_path(entry.filename):
                left_out.add_reason(SYSTEM, entry.filename)
            elif (kind := classify(entry.filename, partial(_read_head, zip_file, entry))) is FileKind.IMAGE:
                left_out.add_reason(f"are not listed in {self.map.name}", entry.filename)
            else:
                left_out.add(entry.filename, kind)
        return left_out

    def write(self, index: Index, images: Iterable[bytes], shard_size: int) -> None:
        names = [index.name(position) for position in range(len(index))]
        for name in names:
            path = f"{index.source}/{name!r}"
            if re.search(r"[\n\r\t]", name):
                raise DataError(f"{path}: a map file cannot contain a name with a tab or a line break; rename it")
            if name.encode("utf-8", errors="ignore").decode() != name:
                raise DataError(f"{path}: a zip archive cannot contain a name that is not UTF-8; rename it, or pack as tar")
        with zipfile.ZipFile(self.path, "w", zipfile.ZIP_STORED) as zip_file:
            for name, data in zip(names, images, strict=True):
                zip_file.writestr(zipfile.ZipInfo(name), data)  # fixed date (1980) for reproducible archives
        lines = (f"{name}\t{label}\n" for name, label in zip(names, index.labels, strict=True))
        self.map.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")


def _read_map(path: Path) -> tuple[list[str], list[int]]:
    """Read names and class ids of the images of a zip archive."""
    names, labels = [], []
    for number, line in enumerate(read_listing(path, "it must list the archive's images").rstrip("\n").split("\n"), start=1):
        name, *columns = line.rstrip().split("\t")  # further columns are ignored, as in the reference implementation
        label = columns[0].strip() if columns else ""
        if not is_class_id(label):
            raise DataError(f"{path}:{number}: expected a name, a tab and a class id, found {line!r}")
        names.append(name)
        labels.append(int(label))
    return names, labels


def _entry_names(entry: zipfile.ZipInfo) -> list[str]:
    """Names that ``<split>_map.txt`` may use for an entry: some programs write UTF-8 names without the UTF-8 flag."""
    if entry.flag_bits & 0x800:
        return [entry.filename]
    try:
        return [entry.filename, entry.filename.encode("cp437").decode("utf-8")]
    except UnicodeError:
        return [entry.filename]


def _read_head(zip_file: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    try:
        with zip_file.open(entry) as file:
            return file.read(HEAD)
    except Exception:  # zipfile raises many exception types on damaged or encrypted entries
        return b""


def _check_entry(archive: Path, entry: zipfile.ZipInfo) -> None:
    check_member_name(archive, entry.filename)
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise DataError(f"{archive}: {entry.filename} is a link; pack the image itself")
    if entry.flag_bits & 1:
        raise DataError(f"{archive}: {entry.filename} is encrypted; pack it without a password")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{archive}: {entry.filename} is compressed by a method other than deflate; pack it again without compression"
        )
    if entry.file_size > min(MAX_FILE_SIZE, MAX_COMPRESSION_RATIO * max(entry.compress_size, 1)):
        raise DataError(
            f"{archive}: {entry.filename} decompresses from {entry.compress_size} to {entry.file_size} bytes, too many "
            "for an image; remove it"
        )


def _data_offset(file, entry: zipfile.ZipInfo) -> int:
    """Offset of an entry's data, computed from its local header: the central directory may have a different extra field.

    Raises:
        zipfile.BadZipFile: there is no local header, or it has the name of another entry.
    """
    name = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
    header = os.pread(file.fileno(), _LOCAL_HEADER + len(name), entry.header_offset)
    name_length, extra_length = (int.from_bytes(header[start : start + 2], "little") for start in (26, 28))
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no entry at byte {entry.header_offset}")
    if name_length != len(name) or header[_LOCAL_HEADER:] != name:
        raise zipfile.BadZipFile(f"the entry at byte {entry.header_offset} is not {entry.filename}")
    return entry.header_offset + _LOCAL_HEADER + name_length + extra_length
