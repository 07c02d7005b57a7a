"""Image datasets, indexed by position. Each sample depends only on (seed, epoch, index)."""

import os
import stat
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from data.decoding import decode_image, describe_error
from data.files import MAX_COMPRESSION_RATIO, MAX_FILE_SIZE, DataError, check_unchanged, file_stamp
from data.index import Index
from data.rows import RowReader
from data.transforms import TransformSchedule
from utils.random import Stream, draw_seed, restore_generators, seed_generators

MAX_OPEN_ARCHIVES = 128
MAX_REPLACEMENTS = 100  # maximum number of other images to try in place of an unreadable one
READ_ERRORS = (MemoryError, OSError, ValueError, zlib.error)  # errors of ``read`` that are due to the file
# Errors of transforms that are due to an image of unusual shape, such as a lack of memory. Others are programming errors.
TRANSFORM_ERRORS = (ArithmeticError, MemoryError, OSError, RuntimeError, ValueError)

Key = tuple[int, int]  # (epoch, index); with repeated augmentation, (epoch * repeats + copy number, index)


class Sample(NamedTuple):
    """A loaded image. image: (3, H, W) uint8, None if skipped; decode_errors: (index, reason) of unreadable images."""

    image: Tensor | None
    label: int
    key: Key
    decode_errors: list[tuple[int, str]]


class ImageDataset(Dataset):
    """Dataset of the images in an ``Index``, read from directories or archives.

    Keys are (epoch, index), so that workers need no other state of the run: before each transform, ``random``, ``numpy``
    and ``torch`` are seeded from (seed, epoch, index).

    Args:
        transform: converts an image as returned by ``decoder`` to (3, H, W) uint8; or such a function for each epoch.
        decoder: decodes a file's bytes to an RGB image, given the bytes and the name of the file: ``decode_image`` or
            ``decode_pixels``, with their option ``exif``.
        seed: the run's seed; None for a deterministic transform.
        unreadable: policy for unreadable images: ``error``, ``skip``, or ``replace``, which uses another image, chosen by
            a hash of (seed, epoch, index).
        in_memory: positions of the archive's images whose bytes are kept in memory.
    """

    def __init__(
        self,
        index: Index,
        transform: Callable[[Image.Image | Tensor], Tensor] | TransformSchedule,
        *,
        decoder: Callable[[bytes, str], Image.Image | Tensor] = decode_image,
        seed: int | None = None,
        unreadable: str = "error",
        in_memory: range = range(0),
    ):
        self.index = index
        self.transform = transform
        self.decoder = decoder
        self.seed = seed
        self.unreadable = unreadable
        self._archives: dict[int, int] = {}
        self._stamps = [file_stamp(os.stat(path)) if os.path.exists(path) else None for path in index.archives]
        self._rows = RowReader(index.archives, self._stamps) if index.has_rows else None
        self._in_memory = in_memory
        # Use one array: with one object per image, updates of reference counts would make every forked worker copy the memory.
        sizes = index.sizes[in_memory.start : in_memory.stop : in_memory.step] if len(in_memory) else np.zeros(0, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        try:
            self._memory = np.zeros(self._starts[-1], dtype=np.uint8)
        except MemoryError:
            raise DataError(
                f"{index.source}: its images need {self._starts[-1] / 2**30:.1f} GiB of memory per process, which is not "
                "available; use --cache-mode no, or part with several processes"
            ) from None
        for slot, position in enumerate(in_memory):
            try:
                data = self._read_archive(position)  # short if the archive is truncated
            except OSError:
                data = b""  # the image's bytes remain 0; ``read`` rejects them, since their checksum is wrong
            self._memory[self._starts[slot] : self._starts[slot] + len(data)] = np.frombuffer(data, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, position: int) -> bytes:
        """Read the bytes of an image file.

        Raises:
            OSError, ValueError, zlib.error: the file cannot be read, or is damaged.
        """
        index = self.index
        if not index.archives:
            return read_file(index.source / index.name(position))
        if self._rows is not None:
            return self._rows.read(int(index.archive[position]), index.row(position))
        size = int(index.sizes[position])
        if position in self._in_memory:
            start = self._starts[self._in_memory.index(position)]
            data = self._memory[start : start + size].tobytes()
        else:
            data = self._read_archive(position)
        if len(data) < size:
            raise ValueError("the archive is truncated")
        if index.deflated[position]:
            decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
            data = decompressor.decompress(data, min(MAX_FILE_SIZE, MAX_COMPRESSION_RATIO * max(size, 1)))
            if not decompressor.eof:
                raise ValueError("it exceeds the maximum decompressed size, or is truncated")
        if len(index.checksums) and zlib.crc32(data) != index.checksums[position]:
            raise ValueError("it fails its checksum in the archive")
        return data

    def _read_archive(self, position: int) -> bytes:
        """Read an image's bytes as stored in the archive. ``pread`` is used, since forked workers share the file position.

        Raises:
            ValueError: the archive was changed or replaced, so that other images may be at the indexed offsets.
        """
        archive, size, offset = (int(values[position]) for values in (self.index.archive, self.index.sizes, self.index.offsets))
        descriptor = self._open(archive)
        data = os.pread(descriptor, size, offset)
        if not len(self.index.checksums):
            check_unchanged(self.index.archives[archive], os.fstat(descriptor), self._stamps[archive])
        return data

    def _open(self, archive: int) -> int:
        """Open an archive and return its file descriptor; above ``MAX_OPEN_ARCHIVES``, close the one that was opened first."""
        if archive not in self._archives:
            if len(self._archives) >= MAX_OPEN_ARCHIVES:
                os.close(self._archives.pop(next(iter(self._archives))))
            self._archives[archive] = os.open(self.index.archives[archive], os.O_RDONLY)
        return self._archives[archive]

    def decode(self, position: int) -> Image.Image | Tensor:
        """Read and decode an image.

        Raises:
            DataError: the image cannot be read or decoded.
        """
        return load(lambda: self.read(position), self.decoder, self.index.path(position))

    def __getitem__(self, key: Key) -> Sample:
        epoch, position = key
        decode_errors = []
        while True:
            try:
                image = self._augment(self.decode(position), self.index.path(position), key)
                break
            except DataError as error:
                decode_errors.append((position, str(error)))
                if self.unreadable == "skip":
                    return Sample(None, -1, key, decode_errors)
                if self.unreadable == "error" or len(decode_errors) > MAX_REPLACEMENTS:
                    raise
                position = draw_seed(self.seed or 0, *key, Stream.REPLACEMENT, len(decode_errors)) % len(self)
        return Sample(image, int(self.index.labels[position]), (epoch, position), decode_errors)

    def _augment(self, image: Image.Image | Tensor, path: str, key: Key) -> Tensor:
        """Transform an image.

        Raises:
            DataError: the transform cannot process the image.
        """
        transform = self.transform.at(key[0]) if isinstance(self.transform, TransformSchedule) else self.transform
        if self.seed is None:
            return apply(transform, image, path)
        # Loader workers draw no other random numbers, so their generators need not be restored.
        with restore_generators() if get_worker_info() is None else nullcontext():
            seed_generators(draw_seed(self.seed, *key))
            return apply(transform, image, path)


class FileDataset(Dataset):
    """Image files without labels. Items: (position, (3, H, W) uint8, None), or (position, None, reason) if unreadable.

    Args:
        transform: converts a PIL image to (3, H, W) uint8.
    """

    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image | Tensor], Tensor], *, exif: bool):
        self.paths = list(paths)
        self.transform = transform
        self.decoder = partial(decode_image, exif=exif)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> tuple[int, Tensor | None, str | None]:
        path = self.paths[position]
        try:
            return position, apply(self.transform, load(lambda: read_file(path), self.decoder, str(path)), str(path)), None
        except DataError as error:
            return position, None, describe_error(error.__cause__ or error)


def load(read: Callable[[], bytes], decode: Callable[[bytes, str], Image.Image | Tensor], path: str) -> Image.Image | Tensor:
    """Read and decode an image.

    Raises:
        DataError: the image cannot be read or decoded; its ``__cause__`` is the error.
    """
    try:
        data = read()
    except READ_ERRORS as error:
        raise unreadable_error(path, error) from error
    try:
        return decode(data, path)
    except Exception as error:  # Pillow's decoders raise many exception types on damaged files
        raise unreadable_error(path, error) from error


def apply(transform: Callable[[Image.Image | Tensor], Tensor], image: Image.Image | Tensor, path: str) -> Tensor:
    """Transform an image.

    Raises:
        DataError: the transform cannot process the image, see ``TRANSFORM_ERRORS``; its ``__cause__`` is the error.
    """
    try:
        return transform(image)
    except TRANSFORM_ERRORS as error:
        raise unreadable_error(path, error) from error


def unreadable_error(path: str, error: BaseException) -> DataError:
    """Error for an image that cannot be read, decoded or transformed."""
    return DataError(f"{path}: not a readable image ({describe_error(error)}); repair or remove it")


def read_file(path: Path) -> bytes:
    """Read a regular file of at most ``MAX_FILE_SIZE`` bytes.

    Raises:
        OSError, ValueError: the file cannot be read, is too large, or is a pipe or device, whose reads may block or never end.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > MAX_FILE_SIZE:
            raise ValueError(f"{status.st_size} bytes, too large for an image")
        return file.read()
