"""Images read by position: what comes back depends on (seed, epoch, index) alone."""

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

from data.index import LARGEST_FILE, LARGEST_RATIO, DataError, Index

# Pillow chooses a decoder by content: those of the accepted extensions, and GIF, which is often named like one of them.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
MOST_OPEN_ARCHIVES = 128
MOST_REPLACEMENTS = 100  # tries to find a readable image in another's place
SEED_OF_REPLACEMENT = 4  # apart from the seeds of the image's own draws

Key = tuple[int, int]  # (epoch, index): with repeated augmentation, each of an epoch's rounds counts as one


class Sample(NamedTuple):
    """An image as it travels. image: (3, H, W) uint8, None where it was skipped; faults: (index, reason) of unreadable ones."""

    image: Tensor | None
    label: int
    key: Key
    faults: list[tuple[int, str]]


class ImageDataset(Dataset):
    """Images of an index, in folders or archives.

    A key is (epoch, index), so that a worker needs to know nothing of the run: the transform's draws are seeded from
    (seed, epoch, index), whichever of ``random``, ``numpy`` and ``torch`` they come from.

    Args:
        transform: an image as ``decoder`` returns it to (3, H, W) uint8.
        decoder: bytes of a file to an RGB image: ``decode_image`` or ``decode_pixels``.
        seed: of the run; None for a transform without draws.
        unreadable: what becomes of an image that cannot be read: ``error``, ``skip``, or ``replace`` by another one, drawn
            from (seed, epoch, index).
        in_memory: indices of an archive's images whose bytes to keep.
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
        # One array: workers share its memory, since nothing counts references to its parts.
        sizes = index.sizes[in_memory.start : in_memory.stop : in_memory.step] if len(in_memory) else np.zeros(0, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._memory = np.zeros(self._starts[-1], dtype=np.uint8)
        for slot, position in enumerate(in_memory):
            try:
                data = self._read_archive(position)  # may be short, as the archive may be
            except OSError:
                data = b""  # like a short one, it fails its checksum when it is used
            self._memory[self._starts[slot] : self._starts[slot] + len(data)] = np.frombuffer(data, dtype=np.uint8)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_archives": {}}  # open files do not travel to workers that are spawned

    def __len__(self) -> int:
        return len(self.index)

    def read(self, position: int) -> bytes:
        """The bytes of an image file.

        Raises:
            OSError, ValueError, zlib.error: they cannot be read, or are damaged.
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
            raise ValueError("the archive ends before it")
        if index.deflated[position]:
            unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
            data = unpacker.decompress(data, min(LARGEST_FILE, LARGEST_RATIO * max(size, 1)))
            if not unpacker.eof:
                raise ValueError("it unpacks to more than any image, or its end is missing")
        if len(index.checksums) and zlib.crc32(data) != index.checksums[position]:
            raise ValueError("it fails its checksum in the archive")
        return data

    def _read_archive(self, position: int) -> bytes:
        """The bytes as they are stored. Reads at an offset, which move no file position that workers share."""
        archive, size, offset = (int(values[position]) for values in (self.index.archive, self.index.sizes, self.index.offsets))
        return os.pread(self._open(archive), size, offset)

    def _open(self, archive: int) -> int:
        """File descriptor of an archive; the one opened first is closed when there are too many."""
        if archive not in self._archives:
            if len(self._archives) >= MOST_OPEN_ARCHIVES:
                os.close(self._archives.pop(next(iter(self._archives))))
            self._archives[archive] = os.open(self.index.archives[archive], os.O_RDONLY)
        return self._archives[archive]

    def decode(self, position: int) -> Image.Image | Tensor:
        """The image as the decoder returns it.

        Raises:
            DataError: it cannot be read.
        """
        try:
            return self.decoder(self.read(position))
        except Exception as error:  # Pillow's decoders raise many kinds on damaged files
            raise self.unreadable_error(position, error) from error

    def unreadable_error(self, position: int, error: Exception) -> DataError:
        """The error to report for an image that cannot be read or decoded."""
        place = f"{self.index.source}/{self.index.name(position)}"
        return DataError(f"{place}: is no readable image ({_reason(error)}); repair or remove it")

    def __getitem__(self, key: Key) -> Sample:
        epoch, position = key
        faults = []
        while True:
            try:
                image = self.decode(position)
                break
            except DataError as error:
                faults.append((position, str(error)))
                if self.unreadable == "skip":
                    return Sample(None, -1, key, faults)
                if self.unreadable == "error" or len(faults) > MOST_REPLACEMENTS:
                    raise
                position = draw_seed(self.seed or 0, *key, SEED_OF_REPLACEMENT, len(faults)) % len(self)
        return Sample(self._augment(image, key), int(self.index.labels[position]), (epoch, position), faults)

    def _augment(self, image: Image.Image | Tensor, key: Key) -> Tensor:
        if self.seed is None:
            return self.transform(image)
        # In a worker nothing else draws, so that there is no state to restore.
        with kept_generators() if get_worker_info() is None else nullcontext():
            seed_generators(draw_seed(self.seed, *key))
            return self.transform(image)


def read_file(path: Path) -> bytes:
    """The bytes of a regular file of at most ``LARGEST_FILE`` bytes.

    Raises:
        OSError, ValueError: it cannot be read, or is another kind of file, which may block or never end.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > LARGEST_FILE:
            raise ValueError(f"{status.st_size} bytes, more than an image has")
        return file.read()


def decode_image(data: bytes) -> Image.Image:
    """The image in a file's bytes, as RGB.

    Raises:
        Exception: of any kind that Pillow raises; it is damaged or no image.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        if file.mode == "F":
            raise ValueError("its pixels are floating-point numbers; convert it to 8 bits")
        if file.mode == "I" and file.format == "TIFF":
            raise ValueError("its pixels have 32 bits; convert it to 8 bits")
        if file.mode == "I" or file.mode.startswith("I;16"):  # 16 bits: Pillow would clip values above 255
            pixels = np.asarray(file)
            return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
        if "transparency" in file.info:  # a palette's, which Pillow wants to see named
            return file.convert("RGBA").convert("RGB")
        if file.mode != "RGB":
            return file.convert("RGB")
        file.load()
        return file  # converting would copy it


def decode_pixels(data: bytes) -> Tensor:
    """The same pixels as ``decode_image``, (3, H, W) uint8 with channels last in memory.

    JPEG files are decoded by torchvision, which saves Pillow's conversions; other formats by Pillow.

    Raises:
        Exception: of any kind that Pillow raises; it is damaged or no image.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        is_plain_jpeg = file.format == "JPEG" and file.mode == "RGB"
    if is_plain_jpeg:
        try:
            # torchvision's result has its channels last in memory.
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:  # damaged: Pillow tells why
            pass
    return torch.from_numpy(np.array(decode_image(data))).permute(2, 0, 1)


def _reason(error: Exception) -> str:
    """Why an image cannot be read; Pillow's own message would name a buffer in memory."""
    return "not an image of a known format" if isinstance(error, UnidentifiedImageError) else str(error)


class FileDataset(Dataset):
    """Image files without labels. An item is (position, (3, H, W) uint8, ""), or (position, None, why it is unreadable).

    Args:
        transform: PIL image to (3, H, W) uint8.
    """

    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image], Tensor]):
        self.paths, self.transform = list(paths), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> tuple[int, Tensor | None, str]:
        try:
            return position, self.transform(decode_image(read_file(self.paths[position]))), ""
        except Exception as error:  # Pillow's decoders raise many kinds on damaged files
            return position, None, _reason(error)


def draw_seed(*position: int) -> int:
    """A seed for one position of a run: (seed, epoch, index), (seed, step), ... well mixed, 32 bits."""
    return int(np.random.SeedSequence(position).generate_state(1)[0])


def seed_generators(seed: int, device: torch.device | None = None) -> None:
    """Seed all three generators that augmentation draws from, and torch's own of a GPU where one is named."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every backend, 300 times as long
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Let the host's generators go on afterwards as if nothing had been drawn meanwhile."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
