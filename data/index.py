"""Index of a dataset split: image names, labels and offsets in archives.

Layouts: directories (``<split>/<class>/<image>``), zip archives as in the reference implementation (``<split>.zip``
and ``<split>_map.txt``), and tar shards in webdataset's format (``<split>-*.tar``, with ``<key>.jpg`` and its class id in
``<key>.cls``).
"""

import errno
import hashlib
import itertools
import json
import logging
import math
import os
import re
import stat
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

logger = logging.getLogger(__name__)

CLASS_NAMES_FILE = "classes.txt"  # next to archives: one class name per line
MAX_FILE_SIZE = 2**28  # bytes; larger image files are rejected
MAX_COMPRESSION_RATIO = 1000  # maximum ratio of decompressed to compressed size of an archive entry
MIN_CACHED_IMAGES = 10_000  # smaller splits are not cached, since scanning them is faster than reading a cache
SECONDS_BETWEEN_LOG_LINES = 30  # between progress lines in the log
CACHE_FORMAT = 2  # version of the file format of cached indices
_LOCAL_HEADER = 30  # bytes of a zip entry's local header, before its name and extra field


class DataError(ValueError):
    """Unusable data. The message includes the path and the remedy."""


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
        archive: (N,) position of each image's archive in ``archives``.
        offsets, sizes: (N,) start and length of each image's data in its archive, in bytes.
        deflated: (N,) whether the data are compressed.
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


def index_folder(root: str | Path, *, cache: Path | None = None) -> Index:
    """Index ``root/<class>/<image>``, with classes sorted by name.

    Args:
        cache: directory in which the index of a large split is cached; None disables caching.

    Raises:
        DataError: no such directory, no class directories, a class without images, or a directory that cannot be listed.
    """
    root = Path(root)
    classes = _list_classes(root)

    def scan() -> tuple[Index, list[Path]]:
        names = []
        labels = []
        scanned_folders = [root]
        ignored_files = []
        for label, name in enumerate(_with_progress(classes, root, names)):
            images = _list_images(root / name, scanned_folders, ignored_files)
            names += [f"{name}/{image}" for image in images]
            labels += [label] * len(images)
        if ignored_files:
            logger.info("%s: ignored %d files that are not images, such as %s", root, len(ignored_files), ignored_files[0])
        return _create_index(root, classes, names, labels), scanned_folders

    return _cached(scan, root, [], cache)


def index_zip(root: str | Path, split: str, *, cache: Path | None = None) -> Index:
    """Index ``root/<split>.zip`` with ``root/<split>_map.txt``, whose lines are: name in the archive, tab, class id.

    Raises:
        DataError: a missing file, a malformed line, class ids with gaps, an image missing from the archive, or an entry
            that is not a plain image file.
    """
    root, archive = Path(root), Path(root) / f"{split}.zip"

    def scan() -> tuple[Index, list[Path]]:
        listing = root / f"{split}_map.txt"
        names, labels = _read_map(listing)
        classes = _class_names(root, labels, listing)
        try:
            with zipfile.ZipFile(archive) as zip_file, open(archive, "rb") as file:
                entries = {name: entry for entry in zip_file.infolist() for name in _entry_names(entry)}
                if missing := next((name for name in names if name not in entries), None):
                    raise DataError(f"{archive}: {missing} is missing, but listed in {listing.name}; pack the archive again")
                image_entries = [entries[name] for name in names]
                for entry in image_entries:
                    _check_zip_entry(archive, entry)
                offsets = [_data_offset(file, entry.header_offset) for entry in image_entries]
                ends = [offset + entry.compress_size for offset, entry in zip(offsets, image_entries, strict=True)]
                if max(ends) > os.fstat(file.fileno()).st_size:
                    raise zipfile.BadZipFile("an entry extends beyond the end of the file")
        except DataError:
            raise
        except Exception as error:  # zipfile raises many exception types on damaged archives
            raise DataError(f"{archive} cannot be read ({error}); check --data-path, or leave out --zip") from None
        storage = {
            "offsets": offsets,
            "sizes": [entry.compress_size for entry in image_entries],
            "deflated": [entry.compress_type == zipfile.ZIP_DEFLATED for entry in image_entries],
            "checksums": [entry.CRC for entry in image_entries],
        }
        watched_files = [archive, listing, root / CLASS_NAMES_FILE]
        return _create_index(archive, classes, names, labels, archives=[archive], **storage), watched_files

    return _cached(scan, archive, [archive], cache)


def index_tar(root: str | Path, split: str, *, cache: Path | None = None) -> Index:
    """Index the uncompressed tar shards ``root/<split>-*.tar``, in webdataset's format (see the module's docstring).

    Class names are the lines of ``root/classes.txt`` if it exists, else numbers.

    Raises:
        DataError: a shard that cannot be read, an image without a class id, class ids with gaps, or an entry that is not a
            plain file.
    """
    root = Path(root)
    shards, source = list_shards(root, split), root / f"{split}-*.tar"

    def scan() -> tuple[Index, list[Path]]:
        names = []
        labels = []
        archive = []
        offsets = []
        sizes = []
        for number, shard in enumerate(_with_progress(shards, source, names)):
            for image, label, offset, size in _read_shard(shard):
                names.append(f"{shard.name}/{image}")
                labels.append(label)
                archive.append(number)
                offsets.append(offset)
                sizes.append(size)
        storage = {"archive": archive, "offsets": offsets, "sizes": sizes, "deflated": [False] * len(names)}
        classes = _class_names(root, labels, source)
        return _create_index(root, classes, names, labels, archives=shards, **storage), [*shards, root / CLASS_NAMES_FILE]

    return _cached(scan, source, shards, cache)


def list_shards(root: Path, split: str) -> list[Path]:
    """Tar shards of a split, sorted by name."""
    return sorted(root.glob(f"{split}-*.tar"))


def describe_index(index: Index) -> dict:
    """Fingerprint of a split, as plain data for a checkpoint: the number of images and a digest per class.

    The digest covers names, and in archives also sizes and checksums. See ``compare_descriptions``.
    """
    counts = np.bincount(index.labels, minlength=len(index.classes)).tolist()
    digests = [hashlib.sha256() for _ in index.classes]
    lengths = np.diff(index.ends, prepend=0)
    # Hash consecutive images of a class together: unless the images are shuffled, each class is hashed in one iteration.
    changes = np.flatnonzero(np.diff(index.labels)) + 1
    for start, end in zip(np.r_[0, changes], np.r_[changes, len(index)], strict=True):
        digest = digests[index.labels[start]]
        digest.update(index.text[index.ends[start] - lengths[start] : index.ends[end - 1]])
        for values in (lengths, index.sizes, index.checksums):
            digest.update(np.ascontiguousarray(values[start:end]))
    classes = [[name, counts[label], digests[label].hexdigest()[:16]] for label, name in enumerate(index.classes)]
    return {"num_images": len(index), "classes": classes}


def compare_descriptions(stored: dict, current: dict) -> str:
    """Describe the first difference between two results of ``describe_index``; "" if there is none."""
    before, after = ({name: (count, digest) for name, count, digest in split["classes"]} for split in (stored, current))
    if removed := [name for name in before if name not in after]:
        added = [name for name in after if name not in before]
        return f"class {removed[0]} is missing" + (f", class {added[0]} is new" if added else "")
    if added := [name for name in after if name not in before]:
        return f"class {added[0]} is new"
    for name, (count, digest) in after.items():
        if count != before[name][0]:
            return f"class {name} had {before[name][0]} images, now it has {count}"
        if digest != before[name][1]:
            return f"class {name} has the same number of images, but different ones"
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


def _cached(scan: Callable[[], tuple[Index, list[Path]]], source: Path, archives: list[Path], cache: Path | None) -> Index:
    """Return the cached index if the data are unchanged since it was written; else scan the data and cache the index.

    The data are unchanged if the list of archives, and the ``_stamps`` of the paths that ``scan`` returned, are the same.
    """
    cache_file = None if cache is None else cache / f"{hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:32]}.npz"
    try:
        if cache_file is not None and cache_file.is_file():
            return _read_cache(cache_file, source, archives)
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        logger.info("%s: the cached index is not used (%s); scanning again", source, error)
    started = time.time_ns()
    index, paths = scan()
    if cache_file is None or len(index) < MIN_CACHED_IMAGES:
        return index
    stamps = _stamps(paths)
    # Time stamps may have a resolution of 2 s: if data changed during the scan, or in the 2 s before it, a further change might
    # leave the time stamp the same. Such an index is not cached.
    if max(mtime for _, mtime, *_ in stamps.values()) >= started - 2 * 10**9:
        return index
    try:
        _write_cache(cache_file, index, stamps)
    except OSError as error:
        logger.info("%s: the index is not cached (%s)", source, error)
    return index


_ARRAYS = ("labels", "text", "ends", "archive", "offsets", "sizes", "deflated", "checksums")


def _write_cache(path: Path, index: Index, stamps: dict[str, list[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    archives = [str(Path(archive).absolute()) for archive in index.archives]
    header = json.dumps({"format": CACHE_FORMAT, "classes": index.classes, "archives": archives, "stamps": stamps})
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, header=np.array(header), **{name: getattr(index, name) for name in _ARRAYS})
        os.replace(temporary, path)  # atomic rename, since other processes may write the same file
    finally:
        temporary.unlink(missing_ok=True)


def _read_cache(path: Path, source: Path, archives: list[Path]) -> Index:
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as cached:
        header = json.loads(str(cached["header"]))
        if header.get("format") != CACHE_FORMAT:
            raise ValueError("its format version differs")
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
    logger.info("%s: %d images, from the index cached in %s", source, len(index), path)
    return index


def _stamps(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Size, mtime and ctime in nanoseconds, and inode of each path; zeros if it does not exist.

    The times of a directory change when entries are added or removed.
    """

    def stamp(path: Path) -> list[int]:
        if not path.exists():
            return [0, 0, 0, 0]
        status = path.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]

    return {str(path.absolute()): stamp(path) for path in paths}


def _list_classes(root: Path) -> list[str]:
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such directory; set --data-path to the parent of train/ and val/{_archive_hint(root)}")
    classes = sorted(entry.name for entry in _list_folder(root) if not entry.name.startswith(".") and _is_folder(entry))
    if not classes:
        raise DataError(
            f"{root}: no class directories; put every image into a directory named after its class, {root.name}/<class>/"
            f"{_archive_hint(root)}"
        )
    return classes


def _archive_hint(split: Path) -> str:
    """Suggest how to name or select the archives next to the split; "" if there are none."""
    archives = sorted(
        path for pattern in ("*.tar*", "*.tgz", "*.zip", f"{split.name}/*.tar*") for path in split.parent.glob(pattern)
    )
    if not archives:
        return ""
    return (
        f". Found {archives[0].name}: rename tar shards to {split.name}-*.tar (uncompressed), or rename a zip archive to "
        f"{split.name}.zip and add --zip"
    )


def _list_folder(folder: Path) -> list[os.DirEntry]:
    """List a directory.

    Raises:
        DataError: the directory cannot be listed completely.
    """
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise _listing_error(folder, error) from None


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a directory, or a link to one.

    Raises:
        DataError: the entry cannot be accessed.
    """
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a symbolic link that refers to itself
            return False
        raise _listing_error(entry.path, error) from None


def _identity(folder: Path) -> tuple[int, int]:
    """Device and inode number of a directory, which are the same for every link to it.

    Raises:
        DataError: the directory cannot be accessed.
    """
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _listing_error(folder, error) from None
    return status.st_dev, status.st_ino


def _listing_error(path: str | Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be listed ({error.strerror}); check its permissions and the disk")


def _list_images(folder: Path, scanned_folders: list[Path], ignored_files: list[str]) -> list[str]:
    """Names of the images below a class directory, relative to it; hidden files and directories are skipped.

    Symbolic links to an ancestor directory, up to the split's directory, are skipped too, since following them would never end.

    Args:
        scanned_folders: list to which every scanned directory is appended.
        ignored_files: list to which the paths of files that are not images are appended.
    """
    names = []

    def walk(parent: Path, prefix: str, ancestors: frozenset) -> None:
        identity = _identity(parent)
        if identity in ancestors:
            return
        scanned_folders.append(parent)
        for entry in _list_folder(parent):
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                walk(parent / entry.name, f"{prefix}{entry.name}/", ancestors | {identity})
            elif entry.name.lower().endswith(IMG_EXTENSIONS):
                names.append(prefix + entry.name)
            else:
                ignored_files.append(str(parent / entry.name))

    walk(folder, "", frozenset([_identity(folder.parent)]))
    if not names:
        raise DataError(f"{folder} has no images ({', '.join(IMG_EXTENSIONS)}); add some, or remove the directory")
    return sorted(names)


def _read_map(path: Path) -> tuple[list[str], list[int]]:
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


def read_class_names(listing: Path) -> list[str]:
    """Read the lines of ``classes.txt``; ``splitlines`` would also split at characters other than newlines."""
    return listing.read_text(encoding="utf-8-sig", errors="surrogateescape").removesuffix("\n").split("\n")


def _class_names(root: Path, labels: Sequence[int], source: Path) -> list[str]:
    """Class names by class id: the lines of ``classes.txt``, else numbers."""
    if not labels:
        raise DataError(f"{source} has no images; pack the data again")
    used_ids = set(labels)
    first_unused = next(class_id for class_id in itertools.count() if class_id not in used_ids)
    if first_unused < max(used_ids):  # checked first: the lists below grow with the largest class id
        raise DataError(f"{source} has no image of class {first_unused}; class ids must start at 0, without gaps")
    listing = root / CLASS_NAMES_FILE
    classes = [str(label) for label in range(max(labels) + 1)]
    if listing.is_file():
        classes = read_class_names(listing)
    if len(set(classes)) < len(classes):
        duplicate = next(name for name in classes if classes.count(name) > 1)
        raise DataError(f"{listing}: duplicate class name {duplicate}; give every class a unique name")
    if max(labels) >= len(classes):
        raise DataError(
            f"{source} has class id {max(labels)}, but {listing} has {len(classes)} class names; add the missing ones"
        )
    if missing := set(range(len(classes))) - set(labels):
        raise DataError(f"{source} has no image of class {min(missing)}; class ids must start at 0, without gaps")
    return classes


def _check_name(archive: Path, name: str) -> None:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
        raise DataError(f"{archive}: {name!r} points outside the archive; pack it again without such names")


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


def _data_offset(file, header_offset: int) -> int:
    """Offset of an entry's data, computed from its local header: the central directory may have a different extra field."""
    header = os.pread(file.fileno(), _LOCAL_HEADER, header_offset)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no entry at byte {header_offset}")
    return header_offset + _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _read_shard(shard: Path) -> Iterator[tuple[str, int, int, int]]:
    """Yield name, class id, offset and size of every image in a tar file.

    Raises:
        DataError: the file is damaged, truncated or compressed, an entry is not a plain file, or images and class ids do not
            match.
    """
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    end = 0
    try:
        with tarfile.open(shard, "r:") as archive:
            while (entry := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every entry in memory
                num_blocks = math.ceil(entry.size / tarfile.BLOCKSIZE) if entry.isreg() else 0
                end = entry.offset_data + num_blocks * tarfile.BLOCKSIZE
                folder, _, base = entry.name.rpartition("/")
                if entry.isdir() or base.startswith("._"):  # macOS stores metadata of each file in a ._ file
                    continue
                _check_name(shard, entry.name)
                if not entry.isreg():
                    raise DataError(f"{shard}: {entry.name} is a link or not a plain file; pack the image itself")
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}"
                if f".{extension.lower()}".endswith(IMG_EXTENSIONS):
                    if entry.size > MAX_FILE_SIZE:
                        raise DataError(f"{shard}: {entry.name} has {entry.size} bytes, too many for an image; remove it")
                    if key in images:
                        raise DataError(
                            f"{shard}: {entry.name} has the same key as {images[key][0]}; the name up to the first dot "
                            "must be unique per image"
                        )
                    images[key] = entry.name, entry.offset_data, entry.size
                elif extension == "cls":
                    text = archive.extractfile(entry).read(32).strip()
                    if not text.isdigit():  # bytes.isdigit accepts only 0 to 9
                        raise DataError(f"{shard}: {entry.name} contains {text!r}, not a class id")
                    labels[key] = int(text)
        _check_end(shard, end)
    except (OSError, tarfile.TarError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{shard} cannot be read ({error}) after byte {end}; shards must be plain tar files, not compressed"
        ) from None
    if not images:
        raise DataError(f"{shard} has no images ({', '.join(IMG_EXTENSIONS)}); remove it, or check --data-path")
    if unmatched_key := next((key for key in labels if key not in images), None):
        raise DataError(
            f"{shard}: {unmatched_key.lstrip('/')}.cls has no image ({', '.join(IMG_EXTENSIONS)}); pack the shard again with "
            "this image"
        )
    for key, (name, offset, size) in images.items():
        if key not in labels:
            raise DataError(f"{shard}: {name} has no class id; add {key.lstrip('/')}.cls")
        yield name, labels[key], offset, size


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
