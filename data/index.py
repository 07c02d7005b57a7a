"""Index of a dataset split: image names, labels and offsets in archives.

Layouts: directories (``<split>/<class>/<image>``), zip archives as in the reference implementation (``<split>.zip``
and ``<split>_map.txt``), and tar shards in webdataset's format (``<split>-*.tar``, with ``<key>.jpg`` and its class id in
``<key>.cls``).
"""

import hashlib
import json
import logging
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.files import (
    DataError,
    LeftOut,
    Note,
    check_distinct_names,
    read_head,
    suggest_split,
)
from data.sources.folder import UNKNOWN_SIZE, Listing, class_notes, list_class, list_classes
from data.sources.zip import (
    CLASS_NAMES_FILE,
    check_extents,
    check_shards,
    class_names,
    data_offset,
    find_entries,
    list_shards,
    read_map,
    read_shard,
    unlisted_entries,
    unread_shards,
)

logger = logging.getLogger(__name__)

MIN_CACHED_IMAGES = 10_000  # smaller splits are not cached, since scanning them is faster than reading a cache
SECONDS_BETWEEN_LOG_LINES = 30  # between progress lines in the log
CACHE_FORMAT = 3  # version of the file format of cached indices
DESCRIPTION_FORMAT = 2  # version of the results of ``describe_index``; without a number: version 1
NUM_SAMPLES = 256  # images whose content is part of ``describe_index``, in addition to those of each class and archive
MAX_SAMPLED_GROUPS = 1024  # maximum number of classes, and of archives, from which one image each is sampled
SAMPLED_BYTES = 2**16  # bytes that are read from each sampled image
MAX_COMPARED_MEMBERS = 256  # members of equal name and size in different shards whose content is compared


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
        sizes: (N,) length of each image's data in bytes, as stored.
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

    def path(self, position: int) -> str:
        """Path of an image, for messages; in an archive, it starts with the path of the archive."""
        return f"{self.source}/{self.name(position)}"


Scan = tuple[Index, list[Path], list[Note]]  # index, paths whose change invalidates it, and log lines


def index_folder(root: str | Path, *, cache: Path | None = None) -> Index:
    """Index ``root/<class>/<image>``, with classes sorted by name.

    Args:
        cache: directory in which the index of a large split is cached; None disables caching.

    Raises:
        DataError: no such directory, no class directories, a class without images, a directory that cannot be listed, an image
            or a directory that would be counted twice, or two classes whose names look the same.
    """
    root = Path(root)
    listing = Listing(root)
    classes = list_classes(root, listing.left_out)

    def scan() -> Scan:
        labels: list[int] = []
        names = frozenset(classes)
        for label, name in enumerate(_with_progress(classes, root, listing.names)):
            labels += [label] * list_class(listing, name, names)
        listing.check_links()
        index = _create_index(root, classes, listing.names, labels, sizes=listing.sizes)
        return index, [root, *listing.directories.values()], class_notes(listing, classes)

    return _cached(scan, root, [], cache)


def index_zip(root: str | Path, split: str, *, cache: Path | None = None) -> Index:
    """Index ``root/<split>.zip`` with ``root/<split>_map.txt``, whose lines are: name in the archive, tab, class id.

    Raises:
        DataError: a missing file, a malformed line, class ids with gaps, an image missing from the archive or listed twice, or
            an entry that is not a plain image file.
    """
    root, archive = Path(root), Path(root) / f"{split}.zip"

    def scan() -> Scan:
        listing = root / f"{split}_map.txt"
        if not os.path.isfile(archive):
            hint = suggest_split(root / split)
            raise DataError(f"{archive}: no such file; check --data-path, or leave out --zip{hint}")
        names, labels = read_map(listing)
        classes = class_names(root, labels, listing)
        try:
            with zipfile.ZipFile(archive) as zip_file, open(archive, "rb") as file:
                entries = find_entries(zip_file, archive, names, listing)
                offsets = [data_offset(file, entry) for entry in entries]
                check_extents(archive, entries, offsets, os.fstat(file.fileno()).st_size)
                notes = [*check_distinct_names(classes, archive), *unlisted_entries(zip_file, archive, entries, listing)]
        except DataError:
            raise
        except Exception as error:  # zipfile raises many exception types on damaged archives
            raise DataError(f"{archive} cannot be read ({error}); check --data-path, or leave out --zip") from None
        storage = {
            "offsets": offsets,
            "sizes": [entry.compress_size for entry in entries],
            "deflated": [entry.compress_type == zipfile.ZIP_DEFLATED for entry in entries],
            "checksums": [entry.CRC for entry in entries],
        }
        watched_files = [archive, listing, root / CLASS_NAMES_FILE]
        return _create_index(archive, classes, names, labels, archives=[archive], **storage), watched_files, notes

    return _cached(scan, archive, [archive], cache)


def index_tar(root: str | Path, split: str, *, cache: Path | None = None) -> Index:
    """Index the uncompressed tar shards ``root/<split>-*.tar``, in webdataset's format (see the module's docstring).

    Class names are the lines of ``root/classes.txt`` if it exists, else numbers.

    Raises:
        DataError: a shard that cannot be read or is missing from a numbered sequence, an image without a class id, an image
            that occurs twice, class ids with gaps, or an entry that is not a plain file.
    """
    root = Path(root)
    shards, source = list_shards(root, split), root / f"{split}-*.tar"

    def scan() -> Scan:
        check_shards(shards, split)
        names, labels, archive, offsets, sizes = [], [], [], [], []  # type: ignore[var-annotated]
        left_out = LeftOut()
        for number, shard in enumerate(_with_progress(shards, source, names)):
            for image, label, offset, size in read_shard(shard, left_out):
                names.append(f"{shard.name}/{image}")
                labels.append(label)
                archive.append(number)
                offsets.append(offset)
                sizes.append(size)
        classes = class_names(root, labels, source)
        storage = {"archive": archive, "offsets": offsets, "sizes": sizes, "deflated": [False] * len(names)}
        index = _create_index(root, classes, names, labels, archives=shards, **storage)
        _check_repeated_members(index)
        notes = [*check_distinct_names(classes, source), *left_out.notes(source)]
        if unread := unread_shards(root, split, shards):
            more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
            text = f"{unread[0]} is not read{more}; shards must be uncompressed and named {split}-*.tar"
            notes.append((logging.WARNING, text))
        return index, [*shards, root / CLASS_NAMES_FILE], notes

    return _cached(scan, source, shards, cache)


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
            digest.update(np.ascontiguousarray(sizes))
    positions = [] if len(index.checksums) else _sampled(index)
    with ThreadPoolExecutor(8) as pool:  # network disks have a high latency
        for position, data in zip(
            positions, pool.map(lambda position: _read_beginning(index, position), positions), strict=True
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


def _read_beginning(index: Index, position: int) -> bytes:
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
            return f"class {name} had {stored_count} images, now it has {count}"
        for difference, digest, stored_digest in zip(differences, digests, stored_digests, strict=False):
            if digest != stored_digest:
                return f"class {name} has the same number of images, but {difference}"
    return "" if list(before) == list(after) else "the order of the classes has changed"


def _create_index(
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


def _with_progress(items: Sequence, source: Path, names: list) -> Iterator:
    """Yield the directories or archives of a scan, and periodically log the number of images found so far, ``len(names)``."""
    last_line = time.monotonic()
    for position, item in enumerate(items):
        yield item
        if time.monotonic() - last_line > SECONDS_BETWEEN_LOG_LINES:
            last_line = time.monotonic()
            logger.info(
                "%s: %d images found, %d of %d directories or archives read", source, len(names), position + 1, len(items)
            )


def _cached(scan: Callable[[], Scan], source: Path, archives: list[Path], cache: Path | None) -> Index:
    """Return the cached index if the data are unchanged since it was written; else scan the data and cache the index.

    The data are unchanged if the list of archives, the ``_stamps`` of the paths that ``scan`` returned, and the sizes of the
    ``_sampled`` files of a directory are the same. Log lines about the data are repeated.
    """
    cache_file = None if cache is None else cache / f"{hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:32]}.npz"
    try:
        if cache_file is not None and cache_file.is_file():
            index, notes = _read_cache(cache_file, source, archives)
            _log_notes(notes)
            return index
    except Exception as error:  # a damaged cache raises many exception types
        logger.info("%s: the cached index is not used (%s); scanning again", source, error)
    started = time.time_ns()
    index, paths, notes = scan()
    _log_notes(notes)
    if cache_file is None or len(index) < MIN_CACHED_IMAGES:
        return index
    stamps = _stamps(paths)
    # Time stamps may have a resolution of 2 s: if data changed during the scan, or in the 2 s before it, a further change might
    # leave the time stamp the same. Such an index is not cached.
    if max(mtime for _, mtime, *_ in stamps.values()) >= started - 2 * 10**9:
        return index
    try:
        _write_cache(cache_file, index, stamps, notes)
    except OSError as error:
        logger.info("%s: the index is not cached (%s)", source, error)
    return index


def _log_notes(notes: Iterable[Note]) -> None:
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
    header = json.dumps(content)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, header=np.array(header), **{name: getattr(index, name) for name in _ARRAYS})
        os.replace(temporary, path)  # atomic rename, since other processes may write the same file
    finally:
        temporary.unlink(missing_ok=True)


def _read_cache(path: Path, source: Path, archives: list[Path]) -> tuple[Index, list[Note]]:
    """Read a cached index and its log lines.

    Raises:
        Exception: the file is not a cached index of the data as they are now.
    """
    with zipfile.ZipFile(path) as members:  # numpy would allocate as much memory as an array's header requests
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in members.infolist()):
            raise ValueError("it is compressed")
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as cached:
        header = json.loads(str(cached["header"]))
        if not isinstance(header, dict) or header.get("format") != CACHE_FORMAT:
            raise ValueError("its format version differs")
        if not {str(path.absolute()) for path in archives or [source]} <= header["stamps"].keys():
            raise ValueError("it does not list the data that it was made from")
        if _stamps(map(Path, header["stamps"])) != header["stamps"]:
            raise ValueError("the data have changed")
        if [str(archive.absolute()) for archive in archives] != header["archives"]:
            raise ValueError("the list of archives has changed")
        index = Index(
            # Use the caller's paths: stored relative paths would be wrong in another working directory. The source of tar
            # shards is their directory, since image names start with the file name of the shard.
            source=source.parent if len(archives) and source not in archives else source,
            classes=header["classes"],
            archives=[str(archive) for archive in archives],
            **{name: cached[name] for name in _ARRAYS},
        )
    _check_arrays(index)
    if not archives and any(_file_size(source / index.name(position)) != index.sizes[position] for position in _sampled(index)):
        raise ValueError("image files have changed")
    notes = [(level, text) for level, text in header["notes"]]
    if not isinstance(header["notes"], list) or not all(
        level in (logging.INFO, logging.WARNING) and isinstance(text, str) for level, text in notes
    ):
        raise ValueError("invalid log lines")
    logger.info("%s: %d images, from the index cached in %s", source, len(index), path)
    return index, notes


def _check_arrays(index: Index) -> None:
    """Check that the parts of an index fit together.

    Raises:
        ValueError: they do not.
    """
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
    """Size, mtime and ctime in nanoseconds, and inode of each path; zeros if it does not exist or cannot be accessed.

    The times of a directory change when entries are added or removed.
    """

    def stamp(path: Path) -> list[int]:
        try:
            status = os.stat(path)
        except OSError:
            return [0, 0, 0, 0]
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]

    return {str(path.absolute()): stamp(path) for path in paths}


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
        if index.archive[one] != index.archive[other] and _read_beginning(index, one) == _read_beginning(index, other):
            raise DataError(f"{index.path(other)} and {index.name(one)} are the same image; remove one of the shards")
