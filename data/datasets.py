"""Image datasets, indexed by position. Each sample depends only on (seed, epoch, index)."""

import io
import os
import random
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision.io import ImageReadMode, decode_jpeg

from data.index import MAX_COMPRESSION_RATIO, MAX_FILE_SIZE, DataError, Index

# Formats that Pillow may decode, detected from the content of a file. GIF is included, since some GIF files are named .jpg.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
MAX_OPEN_ARCHIVES = 128
MAX_REPLACEMENTS = 100  # maximum number of other images to try in place of an unreadable one
RNG_STREAM_OF_REPLACEMENT = 4  # hashed into the seed, so that these random draws differ from those of augmentation

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
        transform: converts an image as returned by ``decoder`` to (3, H, W) uint8.
        decoder: decodes a file's bytes to an RGB image: ``decode_image`` or ``decode_pixels``.
        seed: the run's seed; None for a deterministic transform.
        unreadable: policy for unreadable images: ``error``, ``skip``, or ``replace``, which uses another image, chosen by
            a hash of (seed, epoch, index).
        in_memory: positions of the archive's images whose bytes are kept in memory.
    """

    def __init__(
        self,
        index: Index,
        transform: Callable[[Image.Image | Tensor], Tensor],
        *,
        decoder: Callable[[bytes], Image.Image | Tensor] | None = None,
        seed: int | None = None,
        unreadable: str = "error",
        in_memory: range = range(0),
    ):
        self.index = index
        self.transform = transform
        self.decoder = decoder or decode_image
        self.seed = seed
        self.unreadable = unreadable
        self._archives: dict[int, int] = {}
        self._in_memory = in_memory
        # Use one array: with one object per image, updates of reference counts would make every forked worker copy the memory.
        sizes = index.sizes[in_memory.start : in_memory.stop : in_memory.step] if len(in_memory) else np.zeros(0, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._memory = np.zeros(self._starts[-1], dtype=np.uint8)
        for slot, position in enumerate(in_memory):
            try:
                data = self._read_archive(position)  # short if the archive is truncated
            except OSError:
                data = b""  # the image's bytes remain 0; ``read`` rejects them, since their checksum is wrong
            self._memory[self._starts[slot] : self._starts[slot] + len(data)] = np.frombuffer(data, dtype=np.uint8)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_archives": {}}  # spawned workers do not inherit open files

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
        """Read an image's bytes as stored in the archive. ``pread`` is used, since forked workers share the file position."""
        archive, size, offset = (int(values[position]) for values in (self.index.archive, self.index.sizes, self.index.offsets))
        return os.pread(self._open(archive), size, offset)

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
        try:
            return self.decoder(self.read(position))
        except Exception as error:  # Pillow's decoders raise many exception types on damaged files
            raise self.unreadable_error(position, error) from error

    def unreadable_error(self, position: int, error: Exception) -> DataError:
        """Error for an image that cannot be read or decoded."""
        place = f"{self.index.source}/{self.index.name(position)}"
        return DataError(f"{place}: not a readable image ({_reason(error)}); repair or remove it")

    def __getitem__(self, key: Key) -> Sample:
        epoch, position = key
        decode_errors = []
        while True:
            try:
                image = self.decode(position)
                break
            except DataError as error:
                decode_errors.append((position, str(error)))
                if self.unreadable == "skip":
                    return Sample(None, -1, key, decode_errors)
                if self.unreadable == "error" or len(decode_errors) > MAX_REPLACEMENTS:
                    raise
                position = draw_seed(self.seed or 0, *key, RNG_STREAM_OF_REPLACEMENT, len(decode_errors)) % len(self)
        return Sample(self._augment(image, key), int(self.index.labels[position]), (epoch, position), decode_errors)

    def _augment(self, image: Image.Image | Tensor, key: Key) -> Tensor:
        if self.seed is None:
            return self.transform(image)
        # Loader workers draw no other random numbers, so their generators need not be restored.
        with restore_generators() if get_worker_info() is None else nullcontext():
            seed_generators(draw_seed(self.seed, *key))
            return self.transform(image)


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


def decode_image(data: bytes) -> Image.Image:
    """Decode a file's bytes to an RGB image.

    Raises:
        ValueError: the pixels are floating-point or 32-bit numbers.
        Exception: any exception that Pillow raises for a damaged file, or for a file that is not an image.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        if file.mode == "F":
            raise ValueError("its pixels are floating-point numbers; convert it to 8 bits")
        if file.mode == "I" and file.format == "TIFF":
            raise ValueError("its pixels have 32 bits; convert it to 8 bits")
        if file.mode == "I" or file.mode.startswith("I;16"):  # 16 bits: Pillow would clip values above 255
            pixels = np.asarray(file)
            return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
        if "transparency" in file.info:  # Pillow warns if a palette with transparency is converted directly to RGB
            return file.convert("RGBA").convert("RGB")
        if file.mode != "RGB":
            return file.convert("RGB")
        file.load()
        return file  # ``convert`` would copy it


def decode_pixels(data: bytes) -> Tensor:
    """Decode a file's bytes to a (3, H, W) uint8 tensor with channels last in memory.

    torchvision decodes RGB JPEG files directly to tensors; ``decode_image`` decodes all other files.

    Raises:
        Exception: any exception that ``decode_image`` raises.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        is_rgb_jpeg = file.format == "JPEG" and file.mode == "RGB"
    if is_rgb_jpeg:
        try:
            # The result of decode_jpeg already has channels last in memory.
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:  # damaged: decode it with Pillow below, whose error message states the reason
            pass
    return torch.from_numpy(np.array(decode_image(data))).permute(2, 0, 1)


def _reason(error: Exception) -> str:
    """Reason why an image cannot be read. Replaces Pillow's message for unknown formats, which has only a memory address."""
    return "not an image of a known format" if isinstance(error, UnidentifiedImageError) else str(error)


class FileDataset(Dataset):
    """Image files without labels. Items: (position, (3, H, W) uint8, ""), or (position, None, reason) if unreadable.

    Args:
        transform: converts a PIL image to (3, H, W) uint8.
    """

    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image], Tensor]):
        self.paths = list(paths)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> tuple[int, Tensor | None, str]:
        try:
            return position, self.transform(decode_image(read_file(self.paths[position]))), ""
        except Exception as error:  # Pillow's decoders raise many exception types on damaged files
            return position, None, _reason(error)


def draw_seed(*identifiers: int) -> int:
    """Hash the numbers that identify a random draw, such as (seed, epoch, index) or (seed, step, rank), to a 32-bit seed."""
    return int(np.random.SeedSequence(identifiers).generate_state(1)[0])


def seed_generators(seed: int, device: torch.device | None = None) -> None:
    """Seed the CPU generators of ``random``, ``numpy`` and ``torch``, and torch's CUDA generator if ``device`` is a GPU."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also seeds the GPU backends, which takes 300 times as long
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


@contextmanager
def restore_generators() -> Iterator[None]:
    """Restore the states of the CPU generators of ``random``, ``numpy`` and ``torch`` on exit."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
