"""Pack image folders into archives that main.py reads: zip (--zip), or tar shards in webdataset's naming.

Images keep their bytes, unless --short-side makes the large ones smaller. What was written is read back and compared before
it takes its place.
"""

import argparse
import hashlib
import io
import os
import re
import signal
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.datasets import ImageDataset
from data.index import CLASS_NAMES, DataError, Index, index_folder, index_tar, index_zip, list_shards, read_class_names
from utils.log import progress, setup_logging

ROUND = 1024  # images that workers are given at once


def pack(
    source: Path,
    target: Path,
    split: str,
    *,
    archive: str,
    short_side: int = 0,
    quality: int = 90,
    shard_size: int = 10_000,
    workers: int = 0,
) -> Index:
    """Pack one split, folders ``source/<split>/<class>/<image>``, into ``target``.

    Args:
        archive: zip or tar.
        short_side: pixels; images of a longer one are made smaller, JPEG with ``quality``, others without loss. 0: none is.
        shard_size: images of a tar file.
        workers: processes that resize; 0 for this one.

    Returns:
        The index of what was written, every image of which was read back.

    Raises:
        DataError: nothing to pack, something in the way, an image that cannot be read, or a disk that is full.
    """
    index = index_folder(source / split)
    check_names(index, archive)
    target.mkdir(parents=True, exist_ok=True)
    if present := [*target.glob(f"{split}.zip"), *target.glob(f"{split}_map.txt"), *list_shards(target, split)]:
        raise DataError(f"{present[0]}: is there already; remove it, or choose another folder")
    if (target / split).is_dir():
        raise DataError(f"{target / split}: is a folder of the same split; choose another folder for the archives")
    listing = target / CLASS_NAMES
    if listing.is_file() and read_class_names(listing) != index.classes:
        raise DataError(f"{listing}: names other classes than {source / split}; choose another folder")
    dataset = ImageDataset(index, None)
    # Written and read back in a folder of their own, so that nothing incomplete ever has a name that is read.
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix=".packing-", dir=target)))
        if workers:
            # The dataset goes to the workers once; what crosses at each image is its position, and its bytes.
            pool = stack.enter_context(
                ProcessPoolExecutor(workers, get_context("fork"), _receive, (dataset, short_side, quality))
            )
            files = _in_rounds(pool, len(index))
        else:
            files = (_read(dataset, short_side, quality, position) for position in range(len(index)))
        try:
            digests = _write(archive, folder, split, index, files, shard_size)
            (folder / CLASS_NAMES).write_text(
                "".join(f"{name}\n" for name in index.classes), encoding="utf-8", errors="surrogateescape"
            )
        except BrokenProcessPool:
            raise DataError(
                f"{source / split}: a process that makes images smaller was killed; lower --workers if memory is short"
            ) from None
        except OSError as error:
            raise DataError(f"{target}: not written ({error.strerror}); the archives need {_size(index)}") from None
        _compare((index_zip if archive == "zip" else index_tar)(folder, split), index, digests, f"check {split}")
        for path in sorted(folder.iterdir()):
            os.replace(path, target / path.name)
    return (index_zip if archive == "zip" else index_tar)(target, split)


def check_names(index: Index, archive: str) -> None:
    """Refuse names that an archive or its map cannot have.

    Raises:
        DataError: the first of them.
    """
    if wrong := next((name for name in index.classes if re.search(r"[\n\r]", name)), None):
        raise DataError(f"{index.source}/{wrong!r}: {CLASS_NAMES} cannot have a class with a line break; rename it")
    for position in range(len(index)):
        name = index.name(position)
        if archive == "zip" and re.search(r"[\n\r\t]", name):
            raise DataError(f"{index.source}/{name!r}: a map cannot have a name with a tab or a line break; rename it")
        if archive == "zip" and not _is_unicode(name):
            raise DataError(
                f"{index.source}/{name!r}: a zip archive cannot have a name that is not UTF-8; rename it, or pack tar"
            )


def _is_unicode(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _size(index: Index) -> str:
    """Of all images of a folder."""
    return f"{sum((index.source / index.name(position)).stat().st_size for position in range(len(index))) / 2**20:.1f} MiB"


_received: tuple = ()  # in a worker: dataset, short_side, quality


def _receive(*arguments) -> None:
    global _received
    _received = arguments


def _read_received(position: int) -> bytes:
    return _read(*_received, position)


def _in_rounds(pool, count: int) -> Iterator[bytes]:
    """Every image in order, never more than a round ahead of the writing."""
    for start in range(0, count, ROUND):
        yield from pool.map(_read_received, range(start, min(start + ROUND, count)), chunksize=16)


def _read(dataset: ImageDataset, short_side: int, quality: int, position: int) -> bytes:
    try:
        data = dataset.read(position)
    except (OSError, ValueError) as error:
        raise dataset.unreadable_error(position, error) from error
    if not short_side:
        return data
    image = dataset.decode(position)
    if min(image.size) <= short_side:
        return data
    scale = short_side / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as original:
        kind = original.format
    image.save(buffer, "JPEG", quality=quality) if kind == "JPEG" else image.save(buffer, "PNG")
    return buffer.getvalue()


def _write(archive: str, folder: Path, split: str, index: Index, files: Iterable[bytes], shard_size: int) -> list[bytes]:
    """Write the archives of a split. Returns the sha256 of every image."""
    digests = []

    def counted() -> Iterator[bytes]:
        for data in progress(files, len(index), f"pack {split}"):
            digests.append(hashlib.sha256(data).digest())
            yield data

    if archive == "zip":
        with zipfile.ZipFile(folder / f"{split}.zip", "w", zipfile.ZIP_STORED) as opened:
            for position, data in enumerate(counted()):
                opened.writestr(zipfile.ZipInfo(index.name(position)), data)  # dated 1980: the same bytes every time
        lines = (f"{index.name(position)}\t{index.labels[position]}\n" for position in range(len(index)))
        (folder / f"{split}_map.txt").write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
        return digests
    keys, images = set(), counted()
    for shard, start in enumerate(range(0, len(index), shard_size)):
        with tarfile.open(folder / f"{split}-{shard:06d}.tar", "w") as opened:
            for position in range(start, min(start + shard_size, len(index))):
                path = PurePosixPath(index.name(position))
                key = str(path.with_name(path.stem.replace(".", "_")))  # webdataset's key ends at the first dot
                while key in keys:
                    key = f"{key}-{position}"
                keys.add(key)
                _add(opened, f"{key}{path.suffix}", next(images))
                _add(opened, f"{key}.cls", str(index.labels[position]).encode())
    return digests


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def _compare(packed: Index, index: Index, digests: list[bytes], title: str) -> None:
    dataset = ImageDataset(packed, None)
    if packed.labels.tolist() != index.labels.tolist() or packed.classes != index.classes:
        raise DataError(f"{packed.source}: does not list what was packed; the disk may be faulty")
    for position, digest in enumerate(progress(digests, len(digests), title)):
        if hashlib.sha256(dataset.read(position)).digest() != digest:
            raise DataError(f"{packed.source}: {packed.name(position)} reads differently; the disk may be faulty")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="holds <split>/<class>/<image>")
    parser.add_argument("target", type=Path, help="to hold the archives")
    parser.add_argument("--format", choices=("zip", "tar"), default="tar")
    parser.add_argument("--splits", nargs="+", default=["train", "val"])
    parser.add_argument("--short-side", type=int, default=0, metavar="PIXELS", help="make images smaller that are larger")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG files that are made smaller, 1 to 95")
    parser.add_argument("--shard-size", type=int, default=10_000, metavar="IMAGES", help="of a tar file")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that make images smaller")
    args = parser.parse_args()
    if args.short_side < 0 or not 1 <= args.quality <= 95 or args.shard_size < 1 or args.workers < 0:
        parser.error("--short-side and --workers: 0 or more; --quality: 1 to 95; --shard-size: 1 or more")
    setup_logging(rank=0)
    for number in (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # temporary folders are removed then
    options = {"archive": args.format, "short_side": args.short_side, "quality": args.quality, "shard_size": args.shard_size}
    for split in args.splits:
        try:
            packed = pack(args.source, args.target, split, workers=args.workers if args.short_side else 0, **options)
        except (DataError, OSError) as error:
            print(f"pack_dataset.py: error: {error}", file=sys.stderr)
            sys.exit(2)
        size = f"{packed.sizes.sum() / 2**20:.1f} MiB"
        print(f"{split}: {len(packed)} images of {len(packed.classes)} classes, {size}, all read back")
    print(f"now: --data-path {args.target}{' --zip' if args.format == 'zip' else ''}")


if __name__ == "__main__":
    main()
