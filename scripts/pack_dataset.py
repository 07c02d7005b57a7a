"""Pack the images of directories, parquet or tar shards into archives that main.py reads: tar shards, or zip files (--zip).

Tar shards follow webdataset's naming. Image files are copied byte for byte, unless --short-side downscales them. Archives are
read back and verified before they are moved to the target directory.
"""

import hashlib
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import active_children, get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import ExifTags, Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.datasets import ImageDataset, unreadable_error
from data.decoding import JPEG_FORMATS, UPRIGHT, open_image, read_orientation
from data.files import DataError
from data.index import Index
from data.sources import LAYOUTS, index_split, list_layouts, read_split
from data.sources.class_list import CLASS_NAMES_FILE, read_class_names, write_class_names
from data.sources.layout import DEFAULT_NAMES, Layout, split_of
from data.splits import find_split
from data.workers import end_with_parent
from scripts.command_line import create_parser, reporting_errors
from utils.log import setup_logging
from utils.progress import progress

ROUND = 1024  # images submitted to the workers at a time


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
    """Pack one split of ``source``, in any layout that needs no flag, into ``target``.

    Args:
        split: name, path or pattern of the split, see ``Layout``; the archives get its ``packed_name``.
        archive: zip or tar.
        short_side: maximum length of the shorter side in pixels; larger images are downscaled; 0: no downscaling.
        quality: JPEG quality of downscaled JPEG and HEIC files; downscaled files of other formats are written as PNG.
        shard_size: images per tar file.
        workers: number of processes for downscaling; 0: downscale in the calling process.

    Returns:
        The index of the archives. Every image has been read back and verified.

    Raises:
        DataError: there are no images; the target already contains this split, or its class list differs from that of the
            source; a name or an image is invalid; an archive cannot be written, or its contents differ when read back.
    """
    layout = next(iter(list_layouts(source, split)), LAYOUTS["folder"](source, split))
    index, split = read_split(layout, source, split, option="--splits"), packed_name(split)
    target.mkdir(parents=True, exist_ok=True)
    check_target(target, split, index)
    dataset = ImageDataset(index, None)
    # Write and read back in a temporary directory, so that an incomplete archive never gets its final name.
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix=".packing-", dir=target)))
        if workers:
            # Send the dataset to each worker once; per image, only its position and its bytes are transferred.
            pool = stack.enter_context(
                ProcessPoolExecutor(workers, get_context("fork"), _set_worker_arguments, (dataset, short_side, quality))
            )
            stack.push(_kill_workers_after_error)  # the executor would wait for them
            files = _in_rounds(pool, len(index))
        else:
            files = (_read(dataset, short_side, quality, position) for position in range(len(index)))
        digests: list[bytes] = []
        images = _with_digests(progress(files, len(index), f"pack {split}"), digests)
        try:
            write_class_names(folder / CLASS_NAMES_FILE, index.classes)
            LAYOUTS[archive](folder, split).write(index, images, shard_size)
        except BrokenProcessPool:
            raise DataError(
                f"{index.source}: a downscaling process was killed; lower --workers if the machine runs out of memory"
            ) from None
        except OSError as error:
            raise DataError(f"{target} cannot be written ({error.strerror}); the archives need {_size(index)}") from None
        _compare(index_split(archive, folder, split), index, digests, f"check {split}")
        for path in sorted(folder.iterdir()):
            os.replace(path, target / path.name)
    return index_split(archive, target, split)


def packed_name(split: str) -> str:
    """Name of a split in the target: its last directory; for archives, the split or the first word of their name."""
    name = Path(split).name
    if "." in name:
        name = split_of(split) or re.match(r"[\w-]*", name)[0].rstrip("-_0123456789")
    return name or "train"


def check_target(target: Path, split: str, index: Index) -> None:
    """Check that archives of a split can be added to a directory.

    Raises:
        DataError: the directory already contains this split, or its class list differs from that of the source.
    """
    if present := [path.name for layout in LAYOUTS.values() for path in layout(target, split).files()]:
        raise DataError(f"{target}: {', '.join(present[:3])} already exists; choose another directory")
    class_list = target / CLASS_NAMES_FILE
    if class_list.is_file() and read_class_names(class_list) != index.classes:
        raise DataError(f"{class_list} lists different classes than {index.source}; choose another directory")


def _size(index: Index) -> str:
    """Total size of the images, formatted in MiB."""
    return f"{index.sizes.clip(min=0).sum() / 2**20:.1f} MiB"


_worker_arguments: tuple = ()  # in each worker: dataset, short_side, quality


def _kill_workers_after_error(kind: type[BaseException] | None, *_: object) -> None:
    if kind is not None:
        for child in active_children():
            child.kill()


def _set_worker_arguments(*arguments) -> None:
    global _worker_arguments
    _worker_arguments = arguments
    end_with_parent()


def _read_in_worker(position: int) -> bytes:
    return _read(*_worker_arguments, position)


def _in_rounds(pool, count: int) -> Iterator[bytes]:
    """Yield the bytes of every image in order. Workers read at most one round of images ahead."""
    for start in range(0, count, ROUND):
        yield from pool.map(_read_in_worker, range(start, min(start + ROUND, count)), chunksize=16)


def _read(dataset: ImageDataset, short_side: int, quality: int, position: int) -> bytes:
    """Bytes of an image file, downscaled if the shorter side exceeds ``short_side`` pixels."""
    try:
        data = dataset.read(position)
    except Exception as error:  # a MemoryError too must name the file
        raise unreadable_error(dataset.index.path(position), error) from error
    if not short_side:
        return data
    image = dataset.decode(position)
    if min(image.size) <= short_side:
        return data
    scale = short_side / min(image.size)
    try:
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        options: dict[str, Any] = {}
        with open_image(data) as original:
            if original.format == "PNG":
                original.load()  # EXIF data may follow the pixels
            options["format"] = "JPEG" if original.format in (*JPEG_FORMATS, "HEIF") else "PNG"
            if (orientation := read_orientation(original)) != UPRIGHT:
                options["exif"] = Image.Exif()
                options["exif"][ExifTags.Base.Orientation] = orientation  # the pixels are not turned, so that DATA.EXIF decides
        buffer = io.BytesIO()
        image.save(buffer, **options, quality=quality)  # the format PNG ignores the quality
    except Exception as error:  # Pillow raises many exception types, for example if memory is insufficient
        raise unreadable_error(dataset.index.path(position), error) from error
    return buffer.getvalue()


def _with_digests(files: Iterable[bytes], digests: list[bytes]) -> Iterator[bytes]:
    """Yield the files, and append the sha256 of each to ``digests``."""
    for data in files:
        digests.append(hashlib.sha256(data).digest())
        yield data


def _compare(packed: Index, index: Index, digests: list[bytes], title: str) -> None:
    """Check that archives have the labels and classes of the source index, and that their images have the given sha256."""
    dataset = ImageDataset(packed, None)
    if packed.labels.tolist() != index.labels.tolist() or packed.classes != index.classes:
        raise DataError(f"{packed.source}: labels or classes differ from those of the source; the disk may be faulty")
    for position, digest in enumerate(progress(digests, len(digests), title)):
        if hashlib.sha256(dataset.read(position)).digest() != digest:
            raise DataError(f"{packed.source}: {packed.name(position)} differs when read back; the disk may be faulty")


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("source", type=Path, help="data set: directories <split>/<class>/<image>, parquet or tar shards")
    parser.add_argument("target", type=Path, help="output directory")
    formats = [name for name, layout in LAYOUTS.items() if layout.write is not Layout.write]
    parser.add_argument("--format", choices=formats, default="tar")
    parser.add_argument(
        "--splits",
        nargs="+",
        metavar="SPLIT",
        help="directories, names or patterns of shards below source, as for DATA.TRAIN_SPLIT (default: train, and the first "
        "of val, valid, validation and test that exists)",
    )
    parser.add_argument(
        "--short-side",
        type=int,
        default=0,
        metavar="PIXELS",
        help="maximum length of the shorter side; larger images are downscaled (default: no downscaling)",
    )
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality of downscaled JPEG and HEIC files, 1 to 95")
    parser.add_argument("--shard-size", type=int, default=10_000, metavar="IMAGES", help="images per tar file")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes for downscaling")
    args = parser.parse_args()
    if args.short_side < 0 or not 1 <= args.quality <= 95 or args.shard_size < 1 or args.workers < 0:
        parser.error("--short-side and --workers must be at least 0, --quality 1 to 95, and --shard-size at least 1")
    setup_logging(rank=0)
    for number in (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])):
        if signal.getsignal(number) != signal.SIG_IGN:  # SIGHUP is ignored under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # SystemExit removes the temporary directory
    options = {"archive": args.format, "short_side": args.short_side, "quality": args.quality, "shard_size": args.shard_size}
    with reporting_errors(parser):
        splits = args.splits or find_splits(args.source)
        for split in splits:
            packed = pack(args.source, args.target, split, workers=args.workers if args.short_side else 0, **options)
            size = f"{packed.sizes.sum() / 2**20:.1f} MiB"
            print(f"{split}: {len(packed)} images of {len(packed.classes)} classes, {size}, verified")
    arguments = ["--data-path", str(args.target), *(["--zip"] if args.format == "zip" else [])]
    names = [packed_name(split) for split in splits]
    if keys := [word for name in names for word in split_option(name)]:
        arguments += ["--opts", *keys]
    print(f"options for main.py: {shlex.join(arguments)}")
    for name in names:
        if split_of(name) is None:
            print(f"to read {name}: --opts DATA.TRAIN_SPLIT {shlex.quote(name)}, or --opts DATA.VAL_SPLIT {shlex.quote(name)}")


def find_splits(source: Path) -> list[str]:
    """Names of the training and of the validation split.

    Raises:
        DataError: one of them is missing.
    """
    train, _ = find_split(source, "train", option="--splits")
    val, _ = find_split(source, "val", option=f"--splits {train}")
    return [train, val]


def split_option(name: str) -> list[str]:
    """Key and value with which main.py finds a packed split of this name; [] if it finds it without."""
    split = split_of(name)
    return [f"DATA.{split.upper()}_SPLIT", name] if split and name not in DEFAULT_NAMES[split] else []


if __name__ == "__main__":
    main()
