"""Index of a dataset split: image names, labels and offsets in archives; its cache, and its fingerprint in checkpoints."""

import hashlib
import json
import logging
import os
import time
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from data.files import IMAGES_LEFT_OUT, Note, image_extensions, read_head
from utils.files import replacing

logger = logging.getLogger(__name__)

MIN_CACHED_IMAGES = 10_000  # smaller splits are not cached, since scanning them is faster than reading a cache
CACHE_FORMAT = 3  # version of the file format of cached indices
# Version of the results of ``describe_index``; without a number: version 1. Up to version 2, fewer kinds of files were images.
DESCRIPTION_FORMAT = 3
NUM_SAMPLES = 256  # images whose content is part of ``describe_index``, in addition to those of each class and archive
MAX_SAMPLED_GROUPS = 1024  # maximum number of classes, and of archives, from which one image each is sampled
SAMPLED_BYTES = 2**16  # bytes that are read from each sampled image
PARQUET = ".parquet"  # extension of archives whose images are found by row
UNKNOWN_SIZE = -1  # stands for a size that cannot be determined, such as that of a link to a missing file


@dataclass(frozen=True, eq=False)
class Index:
    """Names, labels and storage locations of the images of a split, by position.

    Names are stored in one buffer: with one string per name, updates of reference counts would make every forked worker copy
    the memory.

    Args:
        source: directory or archive that contains the images; names are relative to it.
        classes: class names by class id.
        labels: (N,) class ids.
        text: bytes of all names, concatenated.
        ends: (N,) end of each name in ``text``, in bytes.
        archives: archive files; empty for a directory.
        archive: (N,) position of each image's archive in ``archives``; empty for a directory.
        offsets: (N,) start of each image's data in its archive, in bytes; empty for a directory.
        sizes: (N,) length of each image's data in bytes, as stored. In parquet files, where the images of a row group are
            compressed together, each image stands for an equal part of their data: ``offsets`` and ``sizes`` are those of
            this part.
        deflated: (N,) whether the data are compressed; empty for a directory.
        checksums: (N,) CRC-32 of the decompressed data; empty if the archive has none.
    """

    source: Path
    classes: list[str]
    labels: np.ndarray
    text: np.ndarray
    ends: np.ndarray
    archives: list[str]
    archive: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    deflated: np.ndarray
    checksums: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, position: int) -> str:
        start = self.ends[position - 1] if position else 0
        return self.text[start : self.ends[position]].tobytes().decode(errors="surrogateescape")

    @property
    def has_rows(self) -> bool:
        """Whether the archives are parquet files, whose images are found by ``row``."""
        return bool(self.archives) and self.archives[0].endswith(PARQUET)

    def row(self, position: int) -> int:
        """Row of an image in its parquet file, which its name contains, see ``row_name``."""
        return int(self.name(position).split("/")[1])

    def path(self, position: int) -> str:
        """Path of an image, for messages; in an archive, it starts with the path of the archive."""
        return f"{self.source}/{self.name(position)}"


def row_name(archive: Path, row: int, name: str) -> str:
    """Name of an image in a parquet file.

    Args:
        name: base name of the image, which need not be unique; "" if it has none.
    """
    return f"{archive.name}/{row:05d}{f'/{name}' if name else ''}"


def create_index(
    source: Path,
    classes: Sequence[str],
    names: Sequence[str],
    labels: Sequence[int],
    *,
    archives: Sequence[Path] = (),
    archive: Sequence[int] | None = None,
    offsets: Sequence[int] = (),
    sizes: Sequence[int] = (),
    deflated: Sequence[bool] = (),
    checksums: Sequence[int] = (),
) -> Index:
    """Create an index from one value per image, see ``Index``. Without ``archive``, all images are in the first archive."""
    encoded = [name.encode(errors="surrogateescape") for name in names]
    return Index(
        source=source,
        classes=list(classes),
        labels=np.array(labels, dtype=np.int32),
        text=np.frombuffer(b"".join(encoded), dtype=np.uint8),
        ends=np.cumsum([len(name) for name in encoded], dtype=np.int64),
        archives=[str(path) for path in archives],
        archive=np.array(archive if archive is not None else [0] * len(offsets), dtype=np.int32),
        offsets=np.array(offsets, dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int64),
        deflated=np.array(deflated, dtype=bool),
        checksums=np.array(checksums, dtype=np.uint32),
    )


def select_images(index: Index, positions: np.ndarray) -> Index:
    """The index of some of the images, with the same classes and archives.

    Args:
        positions: (M,) ascending.
    """
    lengths = np.diff(index.ends, prepend=0)
    is_selected = np.zeros(len(index), dtype=bool)
    is_selected[positions] = True
    per_image = {name: getattr(index, name) for name in ("labels", "archive", "offsets", "sizes", "deflated", "checksums")}
    return replace(
        index,
        text=index.text[np.repeat(is_selected, lengths)],
        ends=np.cumsum(lengths[positions]),
        **{name: values[positions] if len(values) else values for name, values in per_image.items()},
    )


def describe_index(index: Index) -> dict:
    """Fingerprint of a split, as plain data for a checkpoint: number of images, and name, count and digests of each class.

    The first digest of a class covers the names of its images, and in archives also sizes and checksums. The second one covers
    the sizes of the image files in directories, and the first ``SAMPLED_BYTES`` of some images (see ``_sampled``). Time stamps
    are not covered, so that data may be copied. See ``compare_descriptions``.
    """
    counts = np.bincount(index.labels, minlength=len(index.classes)).tolist()
    digests = [hashlib.sha256() for _ in index.classes]
    lengths = np.diff(index.ends, prepend=0)
    sizes = index.sizes if index.archives else index.sizes[:0]
    # Hash consecutive images of a class together: unless the images are shuffled, each class is hashed in one iteration.
    changes = np.flatnonzero(np.diff(index.labels)) + 1
    for start, end in zip(np.r_[0, changes], np.r_[changes, len(index)], strict=True):
        digest = digests[index.labels[start]]
        digest.update(index.text[index.ends[start] - lengths[start] : index.ends[end - 1]])
        for values in (lengths, sizes, index.checksums):
            digest.update(np.ascontiguousarray(values[start:end]))
    contents = _hash_contents(index)
    classes = [
        [name, counts[label], digests[label].hexdigest()[:16], contents[label].hexdigest()[:16]]
        for label, name in enumerate(index.classes)
    ]
    return {"format": DESCRIPTION_FORMAT, "num_images": len(index), "classes": classes}


def _hash_contents(index: Index) -> list:
    """Hash the sizes of the image files in directories, and the beginning of sampled images, per class."""
    digests = [hashlib.sha256() for _ in index.classes]
    if not index.archives and len(index.sizes):
        order = np.argsort(index.labels, kind="stable")
        ends = np.cumsum(np.bincount(index.labels, minlength=len(index.classes)))
        for digest, sizes in zip(digests, np.split(index.sizes[order], ends[:-1]), strict=True):
            digest.update(sizes.tobytes())
    positions = [] if len(index.checksums) else _sampled(index)
    with ThreadPoolExecutor(8) as pool:  # network disks have a high latency
        for position, data in zip(
            positions, pool.map(lambda position: read_beginning(index, position), positions), strict=True
        ):
            digests[index.labels[position]].update(hashlib.sha256(data).digest())
    return digests


def _sampled(index: Index) -> list[int]:
    """Positions of ``NUM_SAMPLES`` images, and of one image of each class and of each archive, all evenly spaced."""
    positions = {int(position) for position in np.linspace(0, len(index) - 1, min(NUM_SAMPLES, len(index)))}
    for groups, count in ((index.labels, len(index.classes)), (index.archive, len(index.archives))):
        first = np.full(count, -1)
        first[groups[::-1]] = np.arange(len(groups) - 1, -1, -1)  # the first position of each group is assigned last
        first = first[first >= 0]  # an archive may have no images
        chosen = np.linspace(0, len(first) - 1, min(MAX_SAMPLED_GROUPS, len(first)))
        positions |= {int(first[int(group)]) for group in chosen}
    return sorted(positions)


def read_beginning(index: Index, position: int) -> bytes:
    """First ``SAMPLED_BYTES`` of an image, as stored; empty if it cannot be read."""
    path, offset, size = index.source / index.name(position), 0, SAMPLED_BYTES
    if index.archives:
        path, offset = Path(index.archives[index.archive[position]]), int(index.offsets[position])
        size = min(size, int(index.sizes[position]))
    return read_head(path, size, offset=offset)


def compare_descriptions(stored: dict, current: dict) -> str:
    """Describe the first difference between two results of ``describe_index``; "" if there is none.

    Args:
        stored: possibly from an earlier version of this project; only what both versions cover is compared.
    """
    try:
        before, after = ({name: (count, *digests) for name, count, *digests in split["classes"]} for split in (stored, current))
    except (KeyError, TypeError, ValueError):
        return "the description in the checkpoint is malformed"
    if removed := [name for name in before if name not in after]:
        added = [name for name in after if name not in before]
        return f"class {removed[0]} is missing" + (f", class {added[0]} is new" if added else "")
    if added := [name for name in after if name not in before]:
        return f"class {added[0]} is new"
    differences = ("different ones", "files of other sizes or contents")
    for name, (count, *digests) in after.items():
        stored_count, *stored_digests = before[name]
        if count != stored_count:
            more = count > stored_count and stored.get("format") != DESCRIPTION_FORMAT
            reason = "; files with more extensions are images since then, see docs/data.md" if more else ""
            return f"class {name} had {stored_count} images, now it has {count}{reason}"
        for difference, digest, stored_digest in zip(differences, digests, stored_digests, strict=False):
            if digest != stored_digest:
                return f"class {name} has the same number of images, but {difference}"
    return "" if list(before) == list(after) else "the order of the classes has changed"


class Scan(NamedTuple):
    """What a scan of the data returns: the index, the paths whose change invalidates it, and log lines about the data."""

    index: Index  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    watched: list[Path]
    notes: list[Note]


class Source(Protocol):
    """A split stored in some layout, see ``data.sources.layout.Layout``."""

    path: Path
    source: Path
    archives: list[Path]

    def scan(self) -> Scan: ...


def read_index(split: Source, *, cache: Path | None = None) -> Index:
    """Return the cached index if the data are unchanged since it was written; else scan the data and cache the index.

    The data are unchanged if the list of archives, the ``_stamps`` of the paths that ``scan`` returned, and the sizes of the
    ``_sampled`` files of a directory are the same. Log lines about the data are repeated.

    Args:
        cache: directory in which the indices of large splits are cached; None disables caching.

    Raises:
        DataError: the data are invalid.
    """
    cache_file = None if cache is None else cache / f"{hashlib.sha256(str(split.path.resolve()).encode()).hexdigest()[:32]}.npz"
    try:
        if cache_file is not None and cache_file.is_file():
            index, notes = _read_cache(cache_file, split)
            log_notes(notes)
            return index
    except Exception as error:  # a damaged cache raises many exception types
        logger.info("%s: the cached index is not used (%s); scanning again", split.path, error)
    started = time.time_ns()
    index, watched, notes = split.scan()
    log_notes(notes)
    if cache_file is None or len(index) < MIN_CACHED_IMAGES:
        return index
    stamps = _stamps(watched)
    # Time stamps may have a resolution of 2 s: if data changed during the scan, or in the 2 s before it, a further change might
    # leave the time stamp the same. Such an index is not cached.
    if max(mtime for _, mtime, *_ in stamps.values()) >= started - 2 * 10**9:
        return index
    try:
        _write_cache(cache_file, index, stamps, notes)
    except OSError as error:
        logger.info("%s: the index is not cached (%s)", split.path, error)
    return index


def log_notes(notes: Iterable[Note]) -> None:
    for level, text in notes:
        logger.log(level, "%s", text)


# Arrays of an index, with the type of their elements.
_ARRAYS = {
    "labels": np.int32,
    "text": np.uint8,
    "ends": np.int64,
    "archive": np.int32,
    "offsets": np.int64,
    "sizes": np.int64,
    "deflated": np.bool_,
    "checksums": np.uint32,
}


def _write_cache(path: Path, index: Index, stamps: dict[str, list[int]], notes: Sequence[Note] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    archives = [str(Path(archive).absolute()) for archive in index.archives]
    content = {"format": CACHE_FORMAT, "classes": index.classes, "archives": archives, "stamps": stamps, "notes": notes}
    content["extensions"] = list(image_extensions())
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    with replacing(path) as temporary, open(temporary, "wb") as file:  # other processes may write the same file
        np.savez(file, header=np.array(json.dumps(content)), **arrays)


def _read_cache(path: Path, split: Source) -> tuple[Index, list[Note]]:
    """Read a cached index and its log lines; any exception means that it is not one of the data as they are now."""
    with zipfile.ZipFile(path) as members:  # numpy would allocate as much memory as an array's header requests
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in members.infolist()):
            raise ValueError("it is compressed")
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as cached:
        header = json.loads(str(cached["header"]))
        if not isinstance(header, dict) or header.get("format") != CACHE_FORMAT:
            raise ValueError("its format version differs")
        # Earlier versions stored no extensions, but a warning if they left out files that are images now.
        left_out = any(IMAGES_LEFT_OUT in text for _, text in header["notes"])
        if header.get("extensions", [] if left_out else list(image_extensions())) != list(image_extensions()):
            raise ValueError("other files are images now")
        if not {str(path.absolute()) for path in split.archives or [split.path]} <= header["stamps"].keys():
            raise ValueError("it does not list the data that it was made from")
        if _stamps(map(Path, header["stamps"])) != header["stamps"]:
            raise ValueError("the data have changed")
        if [str(archive.absolute()) for archive in split.archives] != header["archives"]:
            raise ValueError("the list of archives has changed")
        index = Index(
            source=split.source,  # stored relative paths would be wrong in another working directory
            classes=header["classes"],
            archives=[str(archive) for archive in split.archives],
            **{name: cached[name] for name in _ARRAYS},
        )
    _check_arrays(index)
    if not split.archives:
        positions = _sampled(index)
        if [_file_size(split.source / index.name(position)) for position in positions] != index.sizes[positions].tolist():
            raise ValueError("image files have changed")
    notes = [(level, text) for level, text in header["notes"]]
    if not isinstance(header["notes"], list) or not all(
        level in (logging.INFO, logging.WARNING) and isinstance(text, str) for level, text in notes
    ):
        raise ValueError("invalid log lines")
    logger.info("%s: %d images, from the index cached in %s", split.path, len(index), path)
    return index, notes


def _check_arrays(index: Index) -> None:
    """Check that the parts of an index fit together; raise ValueError otherwise."""
    count = len(index.labels)
    lengths = {"labels": count, "text": len(index.text), "ends": count, "sizes": count}
    lengths |= dict.fromkeys(("archive", "offsets", "deflated"), count if index.archives else 0)
    for name, dtype in _ARRAYS.items():
        array = getattr(index, name)
        if array.dtype != dtype or array.shape not in ([(0,), (count,)] if name == "checksums" else [(lengths[name],)]):
            raise ValueError(f"{name} has an unexpected type or shape")
    classes = index.classes
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes) or len(set(classes)) < len(classes):
        raise ValueError("invalid class names")
    if (
        not count
        or not 0 <= index.labels.min() <= index.labels.max() < len(classes)
        or not np.bincount(index.labels, minlength=len(classes)).all()
    ):
        raise ValueError("labels and classes differ")
    if index.ends[0] < 1 or (np.diff(index.ends) < 1).any() or index.ends[-1] != len(index.text):
        raise ValueError("invalid names")
    if index.archives and (
        index.offsets.min() < 0
        or index.sizes.min() < 0
        or not 0 <= index.archive.min() <= index.archive.max() < len(index.archives)
    ):
        raise ValueError("invalid positions in archives")


def _file_size(path: Path) -> int:
    """Size of a file in bytes, as in a ``Listing``."""
    try:
        return os.stat(path).st_size
    except OSError:
        return UNKNOWN_SIZE


def _stamps(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Size, mtime and ctime in nanoseconds, and inode of each path; zeros if it does not exist or cannot be accessed."""

    def stamp(path: Path) -> list[int]:
        try:
            status = os.stat(path)
        except OSError:
            return [0, 0, 0, 0]
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]

    return {str(path.absolute()): stamp(path) for path in paths}
