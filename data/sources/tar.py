"""Uncompressed tar shards in webdataset's format: ``<split>-*.tar`` with ``<key>.jpg`` and its class id in ``<key>.cls``."""

import glob
import io
import math
import os
import posixpath
import re
import shlex
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data.files import (
    HEAD,
    MAX_FILE_SIZE,
    SYSTEM,
    DataError,
    FileKind,
    LeftOut,
    check_member_name,
    classify,
    has_image_extension,
    image_extension,
    image_extensions,
    is_system_path,
)
from data.index import Index, Scan, create_index, read_beginning
from data.sources.class_list import check_distinct_names, class_names
from data.sources.shards import Shards
from utils.progress import progress

MAX_LABEL_SIZE = 32  # bytes of a file with a class id
MAX_COMPARED_MEMBERS = 256  # members of equal name and size in different shards whose content is compared
_SPARSE_RECORDS = ("GNU.sparse", "SCHILY.realsize")  # prefixes of pax records that only sparse members have


class TarShards(Shards):
    """Tar shards. Class names are the lines of ``classes.txt`` if it exists, else numbers."""

    title = "tar shards"
    extension = ".tar"
    other_extensions = r"\.(tar\b.*|tgz)"

    @staticmethod
    def hint(root: Path, name: str, option: str) -> str:
        match = re.fullmatch(r"(.*?)[0-9]*(\.tar)(\..+)?|(.*?)[0-9]*\.tgz", name, re.IGNORECASE | re.DOTALL)
        if match is None or os.path.isdir(root / name):
            return ""
        pattern = f"{glob.escape(match[1] or match[4] or '')}*{match[2] or '.tar'}"
        decompress = "decompress it and others like it, and " if match[3] or match[4] else ""
        return f"{decompress}add {option} {shlex.quote(pattern)}"

    def scan(self) -> Scan:
        """List the images.

        Raises:
            DataError: a shard that cannot be read or is missing from a numbered sequence, an image without a class id, an image
                that occurs twice, class ids with gaps, or an entry that is not a plain file.
        """
        self.check_shards()
        names: list[str] = []
        labels: list[int] = []
        archive, offsets, sizes = array("i"), array("q"), array("q")
        left_out = LeftOut()
        for number, shard in enumerate(progress(self.archives, len(self.archives), f"{self.path}: shards listed")):
            for name, label, offset, size in _Members(shard, left_out).read():
                names.append(f"{shard.name}/{name}")
                labels.append(label)
                archive.append(number)
                offsets.append(offset)
                sizes.append(size)
        classes = class_names(self.class_lists, labels, self.path)
        storage: dict[str, Any] = {"archive": archive, "offsets": offsets, "sizes": sizes, "deflated": [False] * len(names)}
        index = create_index(self.source, classes, names, labels, archives=self.archives, **storage)
        _check_repeated_members(index)
        notes = [*check_distinct_names(classes, self.path), *left_out.notes(self.path), *self.unread_files()]
        return Scan(index, [*self.archives, *self.class_lists], notes)

    def write(self, index: Index, images: Iterable[bytes], shard_size: int) -> None:
        keys, files = set(), iter(images)
        for number, start in enumerate(range(0, len(index), shard_size)):
            with tarfile.open(self.source / f"{self.split}-{number:06d}.tar", "w") as shard:
                for position in range(start, min(start + shard_size, len(index))):
                    path = PurePosixPath(index.name(position))
                    key = str(path.with_name(path.stem.replace(".", "_")))  # webdataset keys must not contain dots
                    while key in keys:  # a.jpg and a.png. Held-out images depend on the file name, so a directory is added
                        key = str(PurePosixPath(key).parent / str(position) / PurePosixPath(key).name)
                    keys.add(key)
                    data = next(files)
                    extension = path.suffix if has_image_extension(path.name) else image_extension(data)
                    _add(shard, f"{key}{extension}", data)
                    _add(shard, f"{key}.cls", str(index.labels[position]).encode())
        self.archives = sorted(self.source.glob(self.path.name))


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    shard.addfile(entry, io.BytesIO(data))


class _Members:
    """Images and class ids of a shard, by key: the path up to the first dot of the file name."""

    def __init__(self, shard: Path, left_out: LeftOut):
        self.shard = shard
        self.left_out = left_out
        self.images: dict[str, tuple[str, int, int]] = {}
        self.by_content: list[tuple[str, tuple[str, int, int]]] = []  # images without a known extension, with their keys
        self.labels: dict[str, int] = {}

    def read(self) -> Iterator[tuple[str, int, int, int]]:
        """Yield name, class id, offset and size of every image of a shard that is neither damaged nor compressed."""
        end = 0
        try:
            with tarfile.open(self.shard, "r:") as archive:
                while (entry := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every entry in memory
                    self._check_records(entry, dict(archive.pax_headers))
                    num_blocks = math.ceil(entry.size / tarfile.BLOCKSIZE) if entry.isreg() else 0
                    end = entry.offset_data + num_blocks * tarfile.BLOCKSIZE
                    if not entry.isdir():
                        self._add(archive, entry)
            _check_end(self.shard, end)
        except DataError:
            raise
        except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
            raise DataError(
                f"{self.shard} cannot be read ({error}) after byte {end}; shards must be plain tar files, not compressed"
            ) from None
        yield from self._match()

    def _check_records(self, entry: tarfile.TarInfo, global_records: dict[str, str]) -> None:
        """Reject entries whose data are not stored as one block of ``size`` bytes."""
        if entry.issparse() or any(key.startswith(_SPARSE_RECORDS) for key in entry.pax_headers):
            raise DataError(f"{self.shard}: {entry.name} is stored as a sparse file; pack it again without --sparse (-S)")
        if entry.size < 0:
            raise DataError(f"{self.shard}: {entry.name} has the invalid size {entry.size}; pack it again")
        if changed := {"size", "path", "linkpath", *_SPARSE_RECORDS} & global_records.keys():
            raise DataError(
                f"{self.shard}: a global header sets the {min(changed)} of all entries; pack it again without this header"
            )

    def _add(self, archive: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        """Add an entry, which must be a plain file whose key is unique."""
        if is_system_path(entry.name):
            self.left_out.add_reason(SYSTEM, f"{self.shard.name}/{entry.name}")
            return
        check_member_name(self.shard, entry.name)
        if not entry.isreg():
            raise DataError(f"{self.shard}: {entry.name} is a link or not a plain file; pack the image itself")
        folder, _, base = posixpath.normpath(entry.name).rpartition("/")  # "./a.jpg" and "a.jpg" are the same name
        stem, _, extension = base.partition(".")
        key = f"{folder}/{stem}"
        image = entry.name, entry.offset_data, entry.size
        if has_image_extension(f".{extension}"):
            self._add_image(key, image)
        elif extension == "cls":
            text = _read_start(archive, entry, MAX_LABEL_SIZE).strip()
            if entry.size > MAX_LABEL_SIZE or not text.isdigit():  # bytes.isdigit accepts only 0 to 9
                raise DataError(f"{self.shard}: {entry.name} contains {text!r}, not a class id; write a number from 0")
            if self.labels.setdefault(key, int(text)) != int(text):
                raise DataError(f"{self.shard}: {entry.name} occurs twice, with different class ids; pack it again")
        elif (kind := classify(base, lambda: _read_start(archive, entry, HEAD))) is FileKind.IMAGE:
            self.by_content.append((key, image))
        else:
            self.left_out.add(f"{self.shard.name}/{entry.name}", kind)

    def _add_image(self, key: str, image: tuple[str, int, int]) -> None:
        """Add an image, whose key must be unique."""
        name, _, size = image
        if size > MAX_FILE_SIZE:
            raise DataError(f"{self.shard}: {name} has {size} bytes, too many for an image; remove it")
        if (other := self.images.setdefault(key, image)) is not image:
            raise DataError(
                f"{self.shard}: {name} has the same key as {other[0]}; the name up to the first dot must be unique per image"
            )

    def _add_images_by_content(self) -> None:
        """Add the images without a known extension; leave out those beside another image, such as depth maps."""
        others = frozenset(self.images)
        for key, image in self.by_content:
            if key in self.labels and key not in others:
                self._add_image(key, image)
            else:
                self.left_out.add(f"{self.shard.name}/{image[0]}", FileKind.OTHER_IMAGE)

    def _match(self) -> Iterator[tuple[str, int, int, int]]:
        """Yield name, class id, offset and size of every image, all of which must have a class id, and vice versa."""
        self._add_images_by_content()
        shard, extensions = self.shard, ", ".join(image_extensions())
        if unmatched_key := next((key for key in self.labels if key not in self.images), None):
            raise DataError(
                f"{shard}: {unmatched_key.lstrip('/')}.cls has no image ({extensions}); pack the shard again with this image"
            )
        if not self.images:
            raise DataError(f"{shard} has no images ({extensions}); remove it, or check --data-path")
        for key, (name, offset, size) in sorted(self.images.items(), key=lambda item: item[1][1]):
            if key not in self.labels:
                raise DataError(f"{shard}: {name} has no class id; add {key.lstrip('/')}.cls")
            yield name, self.labels[key], offset, size


def _check_end(shard: Path, end: int) -> None:
    """Check that at least two blocks, all zero, follow the last entry of a tar file; ``tarfile`` does not check this."""
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


def _check_repeated_members(index: Index) -> None:
    """Check that no image is in two shards under the same name, as after copying a shard.

    Keys may start again in every shard. Members of equal name and size are therefore compared, but no more than
    ``MAX_COMPARED_MEMBERS`` pairs.

    Raises:
        DataError: an image occurs twice.
    """
    starts = index.ends - np.diff(index.ends, prepend=0)
    lengths = [len(Path(archive).name.encode(errors="surrogateescape")) + 1 for archive in index.archives]
    starts += np.array(lengths, dtype=np.int64)[index.archive]  # names start with the name of the shard and a slash
    text = index.text.tobytes()
    hashes = np.fromiter(
        (hash((text[start:end], size)) for start, end, size in zip(starts, index.ends, index.sizes, strict=True)), np.int64
    )
    order = np.argsort(hashes, kind="stable")
    equal = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    for position in equal[:MAX_COMPARED_MEMBERS]:
        one, other = (int(order[position + step]) for step in (0, 1))
        if index.archive[one] != index.archive[other] and read_beginning(index, one) == read_beginning(index, other):
            raise DataError(f"{index.path(other)} and {index.name(one)} are the same image; remove one of the shards")


def _read_start(archive: tarfile.TarFile, entry: tarfile.TarInfo, size: int) -> bytes:
    """The first bytes of a file in an archive."""
    file = archive.extractfile(entry)
    assert file is not None  # a plain file
    return file.read(size)
