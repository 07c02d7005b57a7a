"""Entries of zip archives and tar shards: which of them are images, their class ids, and where their data start."""

import itertools
import math
import os
import posixpath
import re
import stat
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from data.files import (
    HEAD,
    IMAGE_EXTENSIONS,
    DataError,
    LeftOut,
    Note,
    first_duplicate,
    has_image_extension,
    is_system_path,
)

CLASS_NAMES_FILE = "classes.txt"  # next to archives: one class name per line
MAX_FILE_SIZE = 2**28  # bytes; larger image files are rejected
MAX_LABEL_SIZE = 32  # bytes of a file with a class id
MAX_COMPRESSION_RATIO = 1000  # maximum ratio of decompressed to compressed size of an archive entry
_LOCAL_HEADER = 30  # bytes of a zip entry's local header, before its name and extra field
_SPARSE_RECORDS = ("GNU.sparse", "SCHILY.realsize")  # prefixes of pax records that only sparse members have


def list_shards(root: Path, split: str) -> list[Path]:
    """Tar shards of a split, sorted by name."""
    return sorted(root.glob(f"{split}-*.tar")) if os.path.isdir(root) else []


def unread_shards(root: Path, split: str, shards: Sequence[Path]) -> list[Path]:
    """Files that could be further shards of a split, such as ``val-001.tar.gz``, ``val_001.tar`` or ``val-001.TAR``."""
    pattern = re.compile(re.escape(split) + r"([^a-z].*)?\.(tar\b.*|tgz)", re.IGNORECASE | re.DOTALL)
    known = {path.name for path in shards}
    return sorted(path for path in root.iterdir() if path.name not in known and pattern.fullmatch(path.name))


def check_shards(shards: Sequence[Path], split: str) -> None:
    """Check that numbered shards, ``<split>-<number>.tar``, form a sequence that starts at 0 or 1, and that no shard is a link
    to another one. If the names state the total, ``<split>-<number>-of-<total>.tar``, all shards must exist.

    Raises:
        DataError: a shard is missing, or occurs twice.
    """
    seen: dict[tuple[int, int], Path] = {}
    numbered: dict[int, Path] = {}
    total = 0
    for shard in shards:
        status = os.stat(shard) if os.path.exists(shard) else None
        if status and (other := seen.setdefault((status.st_dev, status.st_ino), shard)) != shard:
            raise DataError(f"{shard} and {other} are links to the same file, which would be counted twice; remove one of them")
        if match := re.fullmatch(re.escape(split) + r"-([0-9]+)(?:-of-([0-9]+))?\.tar", shard.name):
            if (other := numbered.setdefault(int(match[1]), shard)) != shard:
                raise DataError(f"{shard} and {other.name} have the same number; remove or rename one of them")
            total = max(total, int(match[2] or 0))
    if not numbered:
        return
    first = min(numbered) if min(numbered) <= 1 else 0
    end = max(max(numbered) + 1, first + total)
    missing = [number for number in itertools.islice(itertools.count(first), len(numbered) + 1) if number not in numbered]
    if missing and missing[0] < end:
        example = shards[0].parent / f"{split}-{missing[0]}.tar"
        raise DataError(
            f"{example}: shard {missing[0]} of {split} is missing, but there are shards {min(numbered)} to {max(numbered)}"
            f"{f' of {total}' if total else ''}; download or pack it again. To use only the others, renumber them without "
            "gaps, from 0"
        )


def read_map(path: Path) -> tuple[list[str], list[int]]:
    """Read names and class ids of the images of a zip archive."""
    try:
        # ``splitlines`` would also split at characters other than newlines, which names may contain.
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").rstrip("\n").split("\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); it must list the archive's images") from None
    names, labels = [], []
    for number, line in enumerate(lines, start=1):
        name, *columns = line.rstrip().split("\t")  # further columns are ignored, as in the reference implementation
        label = columns[0].strip() if columns else ""
        if not is_class_id(label):
            raise DataError(f"{path}:{number}: expected a name, a tab and a class id, found {line!r}")
        names.append(name)
        labels.append(int(label))
    return names, labels


def is_class_id(text: str) -> bool:
    """Whether a text is a decimal number of at most 18 digits."""
    return re.fullmatch(r"[0-9]{1,18}", text) is not None


def numbered(count: int) -> list[str]:
    """Class names "0", "1", ..., as used for archives without ``classes.txt``."""
    return [str(number) for number in range(count)]


def read_class_names(listing: Path) -> list[str]:
    """Read the lines of ``classes.txt``; ``splitlines`` would also split at characters other than newlines.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return listing.read_text(encoding="utf-8-sig", errors="surrogateescape").removesuffix("\n").split("\n")
    except OSError as error:
        raise DataError(f"{listing} cannot be read ({error.strerror}); it must list the class names") from None


def class_names(root: Path, labels: Sequence[int], source: Path) -> list[str]:
    """Class names by class id: the lines of ``classes.txt``, else numbers."""
    if not labels:
        raise DataError(f"{source} has no images; pack the data again")
    used_ids = set(labels)
    first_unused = next(class_id for class_id in itertools.count() if class_id not in used_ids)
    if first_unused < max(used_ids):  # checked first: the lists below grow with the largest class id
        raise DataError(f"{source} has no image of class {first_unused}; class ids must start at 0, without gaps")
    listing = root / CLASS_NAMES_FILE
    classes = read_class_names(listing) if os.path.isfile(listing) else numbered(max(labels) + 1)
    if (duplicate := first_duplicate(classes)) is not None:
        raise DataError(f"{listing}: duplicate class name {duplicate}; give every class a unique name")
    if max(labels) >= len(classes):
        raise DataError(
            f"{source} has class id {max(labels)}, but {listing} has {len(classes)} class names; add the missing ones"
        )
    if missing := set(range(len(classes))) - used_ids:
        raise DataError(f"{source} has no image of class {min(missing)}; class ids must start at 0, without gaps")
    return classes


def _check_name(archive: Path, name: str) -> None:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
        raise DataError(f"{archive}: {name!r} points outside the archive; pack it again without such names")


def find_entries(zip_file: zipfile.ZipFile, archive: Path, names: Sequence[str], listing: Path) -> list[zipfile.ZipInfo]:
    """Find the archive's entry of each name in the map file, and check it.

    Raises:
        DataError: an entry is missing, ambiguous, listed twice, or not a plain image file.
    """
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
            raise DataError(f"{archive}: {name} is missing, but listed in {listing.name}; pack the archive again")
        if name in ambiguous:
            raise DataError(f"{archive} has several entries named {name}; pack the archive again, with one of them")
        entry = entries[name]
        if (first := lines.setdefault(id(entry), line)) != line:
            raise DataError(f"{listing}:{line}: {name} is already listed in line {first}; each image must be listed once")
        _check_zip_entry(archive, entry)
        found.append(entry)
    return found


def check_extents(archive: Path, entries: Sequence[zipfile.ZipInfo], offsets: Sequence[int], size: int) -> None:
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
        raise DataError(f"{archive}: the data of {one} and {other} overlap; pack the archive again")


def unlisted_entries(zip_file: zipfile.ZipFile, archive: Path, entries: Sequence[zipfile.ZipInfo], listing: Path) -> list[Note]:
    """Log lines about the entries that the map file does not list."""
    left_out, listed = LeftOut(), {id(entry) for entry in entries}
    for entry in zip_file.infolist():
        if entry.is_dir() or id(entry) in listed:
            continue
        if is_system_path(entry.filename):
            left_out.add_kind("system", entry.filename)
        elif has_image_extension(entry.filename):
            left_out.add_kind(f"are not listed in {listing.name}", entry.filename)
        else:
            left_out.add(entry.filename, lambda entry=entry: _read_entry_head(zip_file, entry))
    return left_out.notes(archive)


def _read_entry_head(zip_file: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    try:
        with zip_file.open(entry) as file:
            return file.read(HEAD)
    except Exception:  # zipfile raises many exception types on damaged or encrypted entries
        return b""


def _entry_names(entry: zipfile.ZipInfo) -> list[str]:
    """Names that ``<split>_map.txt`` may use for an entry: some programs write UTF-8 names without the UTF-8 flag."""
    if entry.flag_bits & 0x800:
        return [entry.filename]
    try:
        return [entry.filename, entry.filename.encode("cp437").decode("utf-8")]
    except UnicodeError:
        return [entry.filename]


def _check_zip_entry(archive: Path, entry: zipfile.ZipInfo) -> None:
    _check_name(archive, entry.filename)
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


def data_offset(file, entry: zipfile.ZipInfo) -> int:
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


def read_shard(shard: Path, left_out: LeftOut) -> Iterator[tuple[str, int, int, int]]:
    """Yield name, class id, offset and size of every image in a tar file.

    Args:
        left_out: receives the entries that are neither images nor class ids.

    Raises:
        DataError: the file is damaged, truncated or compressed, an entry is not a plain file, or images and class ids do not
            match.
    """
    members = _Members(shard, left_out)
    end = 0
    try:
        with tarfile.open(shard, "r:") as archive:
            while (entry := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every entry in memory
                _check_records(shard, entry, archive.pax_headers)
                num_blocks = math.ceil(entry.size / tarfile.BLOCKSIZE) if entry.isreg() else 0
                end = entry.offset_data + num_blocks * tarfile.BLOCKSIZE
                if not entry.isdir():
                    members.add(archive, entry)
        _check_end(shard, end)
    except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{shard} cannot be read ({error}) after byte {end}; shards must be plain tar files, not compressed"
        ) from None
    yield from members.match()


def _check_records(shard: Path, entry: tarfile.TarInfo, global_records: dict[str, str]) -> None:
    """Reject entries whose data are not stored as one block of ``size`` bytes.

    Raises:
        DataError: a sparse file (``tar --sparse``), an invalid size, or records that change the names or sizes of all entries.
    """
    if entry.issparse() or any(key.startswith(_SPARSE_RECORDS) for key in entry.pax_headers):
        raise DataError(f"{shard}: {entry.name} is stored as a sparse file; pack it again without --sparse (-S)")
    if entry.size < 0:
        raise DataError(f"{shard}: {entry.name} has the invalid size {entry.size}; pack it again")
    if changed := {"size", "path", "linkpath", *_SPARSE_RECORDS} & global_records.keys():
        raise DataError(f"{shard}: a global header sets the {min(changed)} of all entries; pack it again without this header")


class _Members:
    """Images and class ids of a shard, by key: the path up to the first dot of the file name."""

    def __init__(self, shard: Path, left_out: LeftOut):
        self.shard = shard
        self.left_out = left_out
        self.images: dict[str, tuple[str, int, int]] = {}
        self.labels: dict[str, int] = {}

    def add(self, archive: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        """Add an entry.

        Raises:
            DataError: it is not a plain file, its name points outside the archive, or its key is not unique.
        """
        if is_system_path(entry.name):
            self.left_out.add_kind("system", f"{self.shard.name}/{entry.name}")
            return
        _check_name(self.shard, entry.name)
        if not entry.isreg():
            raise DataError(f"{self.shard}: {entry.name} is a link or not a plain file; pack the image itself")
        folder, _, base = posixpath.normpath(entry.name).rpartition("/")  # "./a.jpg" and "a.jpg" are the same name
        stem, _, extension = base.partition(".")
        key = f"{folder}/{stem}"
        if has_image_extension(f".{extension}"):
            if entry.size > MAX_FILE_SIZE:
                raise DataError(f"{self.shard}: {entry.name} has {entry.size} bytes, too many for an image; remove it")
            if key in self.images:
                raise DataError(
                    f"{self.shard}: {entry.name} has the same key as {self.images[key][0]}; the name up to the first dot must "
                    "be unique per image"
                )
            self.images[key] = entry.name, entry.offset_data, entry.size
        elif extension == "cls":
            text = archive.extractfile(entry).read(MAX_LABEL_SIZE).strip()
            if entry.size > MAX_LABEL_SIZE or not text.isdigit():  # bytes.isdigit accepts only 0 to 9
                raise DataError(f"{self.shard}: {entry.name} contains {text!r}, not a class id")
            if self.labels.setdefault(key, int(text)) != int(text):
                raise DataError(f"{self.shard}: {entry.name} occurs twice, with different class ids; pack it again")
        else:
            self.left_out.add(f"{self.shard.name}/{entry.name}", lambda: archive.extractfile(entry).read(HEAD))

    def match(self) -> Iterator[tuple[str, int, int, int]]:
        """Yield name, class id, offset and size of every image.

        Raises:
            DataError: there are no images, an image has no class id, or a class id no image.
        """
        shard, extensions = self.shard, ", ".join(IMAGE_EXTENSIONS)
        if unmatched_key := next((key for key in self.labels if key not in self.images), None):
            raise DataError(
                f"{shard}: {unmatched_key.lstrip('/')}.cls has no image ({extensions}); pack the shard again with this image"
            )
        if not self.images:
            raise DataError(f"{shard} has no images ({extensions}); remove it, or check --data-path")
        for key, (name, offset, size) in self.images.items():
            if key not in self.labels:
                raise DataError(f"{shard}: {name} has no class id; add {key.lstrip('/')}.cls")
            yield name, self.labels[key], offset, size


def _check_end(shard: Path, end: int) -> None:
    """Check that at least two blocks, all zero, follow the last entry of a tar file; ``tarfile`` does not check this.

    Raises:
        DataError: the file is truncated, or has data after its end.
    """
    size = shard.stat().st_size
    if size < end + 2 * tarfile.BLOCKSIZE:
        raise DataError(
            f"{shard} is truncated at byte {size} (the two blocks of zeros that end a tar file are missing); pack or download "
            "it again"
        )
    with open(shard, "rb") as file:
        file.seek(end)
        while block := file.read(1 << 20):
            if block.count(0) < len(block):
                first = end + next(position for position, value in enumerate(block) if value)
                raise DataError(
                    f"{shard} has data at byte {first}, after the end of the archive; the file is damaged, or consists of "
                    "several concatenated archives. Pack or download it again"
                )
            end += len(block)
