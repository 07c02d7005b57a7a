"""Image datasets, indexed by position. Each sample depends only on (seed, epoch, index)."""

import io
import logging
import os
import stat
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from data.files import DataError
from data.index import Index
from data.sources.zip import MAX_COMPRESSION_RATIO, MAX_FILE_SIZE
from utils.random import Stream, draw_seed, restore_generators, seed_generators

try:
    from torchvision.io import ImageReadMode, decode_jpeg, decode_png
except ImportError:  # deprecated: a later torchvision removes them. Pillow then decodes JPEG files, more slowly
    decode_jpeg = decode_png = None

logger = logging.getLogger(__name__)

# Formats that Pillow may decode, detected from the content of a file. GIF is included, since some GIF files are named .jpg.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
MAX_PIXELS = 2**27  # maximum number of pixels of an image; decoding one of this size needs 400 MiB
MAX_EXIF_SEGMENTS = 32  # in a JPEG file; cameras write one
MAX_FILL_BYTES = 1024  # between the segments of a JPEG file
MAX_COMMENTS = 1024  # in a PNM file of decimal numbers
MAX_OPEN_ARCHIVES = 128
MAX_REPLACEMENTS = 100  # maximum number of other images to try in place of an unreadable one

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
        decoder: decodes a file's bytes to an RGB image, given the bytes and the name of the file: ``decode_image`` or
            ``decode_pixels``.
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
        decoder: Callable[[bytes, str], Image.Image | Tensor] | None = None,
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
        self._stamps = [_archive_stamp(os.stat(path)) if os.path.exists(path) else None for path in index.archives]
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
        """Read an image's bytes as stored in the archive. ``pread`` is used, since forked workers share the file position.

        Raises:
            ValueError: the archive was changed or replaced, so that other images may be at the indexed offsets.
        """
        archive, size, offset = (int(values[position]) for values in (self.index.archive, self.index.sizes, self.index.offsets))
        descriptor = self._open(archive)
        data = os.pread(descriptor, size, offset)
        if not len(self.index.checksums) and _archive_stamp(os.fstat(descriptor)) != self._stamps[archive]:
            raise ValueError(
                f"{self.index.archives[archive]} was changed after its images were listed; start the command again"
            )
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
        try:
            return self.decoder(self.read(position), self.index.path(position))
        except Exception as error:  # Pillow's decoders raise many exception types on damaged files
            raise self.unreadable_error(position, error) from error

    def unreadable_error(self, position: int, error: Exception) -> DataError:
        """Error for an image that cannot be read, decoded or transformed."""
        return DataError(f"{self.index.path(position)}: not a readable image ({describe_error(error)}); repair or remove it")

    def __getitem__(self, key: Key) -> Sample:
        epoch, position = key
        decode_errors = []
        while True:
            try:
                image = self._load(position, key)
                break
            except DataError as error:
                decode_errors.append((position, str(error)))
                if self.unreadable == "skip":
                    return Sample(None, -1, key, decode_errors)
                if self.unreadable == "error" or len(decode_errors) > MAX_REPLACEMENTS:
                    raise
                position = draw_seed(self.seed or 0, *key, Stream.REPLACEMENT, len(decode_errors)) % len(self)
        return Sample(image, int(self.index.labels[position]), (epoch, position), decode_errors)

    def _load(self, position: int, key: Key) -> Tensor:
        """Read, decode and transform an image. Transforms may fail on images of unusual shape, for lack of memory for example.

        Raises:
            DataError: the image cannot be read, decoded or transformed.
        """
        image = self.decode(position)
        try:
            return self._augment(image, key)
        except Exception as error:  # transforms raise many exception types
            raise self.unreadable_error(position, error) from error

    def _augment(self, image: Image.Image | Tensor, key: Key) -> Tensor:
        if self.seed is None:
            return self.transform(image)
        # Loader workers draw no other random numbers, so their generators need not be restored.
        with restore_generators() if get_worker_info() is None else nullcontext():
            seed_generators(draw_seed(self.seed, *key))
            return self.transform(image)


def _archive_stamp(status: os.stat_result) -> tuple[int, int]:
    """Size and mtime of an archive. Unlike its ctime, they do not change if an open archive is deleted or renamed."""
    return status.st_size, status.st_mtime_ns


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


def decode_image(data: bytes, name: str = "") -> Image.Image:
    """Decode a file's bytes to an RGB image.

    Samples of more than 8 bits are scaled by the depth that the file declares: their most significant 8 bits are used.

    Args:
        name: path of the image, for the warning about dark images, see ``_warn_if_dark``.

    Raises:
        ValueError: too many pixels, or pixels that are floating-point, signed or 32-bit numbers.
        Exception: any exception that Pillow raises for a damaged file, or for a file that is not an image.
    """
    with open_image(data) as file:
        _check_samples(file)
        depth = _sample_depth(file, data)
        if file.mode == "I" or file.mode.startswith("I;16"):  # Pillow would clip values above 255
            return _warn_if_dark(Image.fromarray(_most_significant_byte(file, data)).convert("RGB"), name)
        if file.format == "PNG" and data[24] == 16 and depth < 16:  # Pillow reads only the upper 8 of 16 bits
            if decode_png is None:
                raise ValueError(f"its samples of {depth} bits are stored in 16 bits; convert it to 8 bits")
            pixels = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0).numpy()
            colours = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., [0, 0, 0]]
            return _warn_if_dark(Image.fromarray((colours >> _shift(colours, depth)).astype(np.uint8)), name)
        if "transparency" in file.info:  # Pillow warns if a palette with transparency is converted directly to RGB
            image = file.convert("RGBA").convert("RGB")
        elif file.mode != "RGB":
            image = file.convert("RGB")
        else:
            file.load()
            image = file  # ``convert`` would copy it
        return _warn_if_dark(image, name) if depth > 8 else image


def open_image(data: bytes) -> Image.Image:
    """Open an image of a supported format without decoding its pixels.

    Raises:
        ValueError: decoding it would need too much memory or time.
        Exception: any exception that Pillow raises for a damaged file, or for a file that is not an image.
    """
    _check_segments(data)
    file = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = file.size
    if width * height > MAX_PIXELS:
        file.close()
        raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS}; downscale it")
    return file


def _check_segments(data: bytes) -> None:
    """Reject files whose structure takes Pillow long to read.

    It joins EXIF segments in a time that is quadratic in their number, likewise comments in PNM files of decimal numbers, and
    reads fill bytes of JPEG files one by one.

    Raises:
        ValueError: more than ``MAX_EXIF_SEGMENTS``, ``MAX_COMMENTS`` or ``MAX_FILL_BYTES``.
    """
    if data.startswith((b"P1", b"P2", b"P3")) and data.count(b"#") > MAX_COMMENTS:
        raise ValueError(f"more than {MAX_COMMENTS} comments; remove them")
    position, count, fill = 2, 0, 0
    while data.startswith(b"\xff\xd8") and data[position : position + 1] == b"\xff" and count <= MAX_EXIF_SEGMENTS:
        marker, length = data[position + 1 : position + 2], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in (b"\xda", b""):  # the pixels follow
            return
        count += marker == b"\xe1" and data.startswith(b"Exif", position + 4)
        position += 1 if marker == b"\xff" else 2 + length
        fill += marker == b"\xff"
        if fill > MAX_FILL_BYTES:
            raise ValueError(f"more than {MAX_FILL_BYTES} fill bytes between its segments; remove them")
    if count > MAX_EXIF_SEGMENTS:
        raise ValueError(f"more than {MAX_EXIF_SEGMENTS} EXIF segments; remove them")


def _check_samples(file: Image.Image) -> None:
    """Reject pixels that have no defined brightness as 8-bit values.

    Raises:
        ValueError: floating-point, signed or 32-bit numbers, or TIFF files whose pixels Pillow reads incorrectly.
    """
    if file.mode == "F":
        raise ValueError("its pixels are floating-point numbers; convert it to 8 bits")
    if file.format != "TIFF":
        return
    if set(_tiff_values(file, _SAMPLE_FORMAT)) & {2, 5, 6}:
        raise ValueError("its pixels are signed or complex numbers; convert it to 8 bits")
    if file.mode == "I":
        raise ValueError("its pixels have 32 bits; convert it to 8 bits")
    is_deep = max(_tiff_values(file, _BITS_PER_SAMPLE), default=1) > 8
    if (
        is_deep
        and _tiff_values(file, _PLANAR) == (2,)
        and _tiff_values(file, _COMPRESSION) in ((), (1,))
        and file.mode != "I;16"
    ):
        raise ValueError("its channels of 16 bits are stored separately (PlanarConfiguration 2); convert it to 8 bits")
    if file.mode == "P" and max(_tiff_values(file, _COLOUR_MAP), default=0) in range(1, 256):  # Pillow uses the upper 8 bits
        raise ValueError("its palette has values of 8 instead of 16 bits; convert it to RGB")


# Tags of TIFF files.
_BITS_PER_SAMPLE, _COMPRESSION, _PHOTOMETRIC, _PLANAR, _COLOUR_MAP, _SAMPLE_FORMAT = 258, 259, 262, 284, 320, 339


def _tiff_values(file: Image.Image, tag: int) -> tuple[int, ...]:
    """Values of a tag of a TIFF file; () if it is missing."""
    values = getattr(file, "tag_v2", {}).get(tag, ())
    return values if isinstance(values, tuple) else (values,)


def _sample_depth(file: Image.Image, data: bytes) -> int:
    """Bits per sample that a TIFF or PNG file declares; 16 for other formats that Pillow reads as 16 bits."""
    if file.format == "TIFF":
        return max(_tiff_values(file, _BITS_PER_SAMPLE), default=1)
    if file.format == "PNG":
        return _png_depth(data)
    return 16 if file.mode.startswith("I") else 8


def _png_depth(data: bytes) -> int:
    """Bit depth of a PNG file: its significant bits (sBIT chunk) if the depth is 16 and they are declared."""
    depth, position = data[24], 8
    while depth == 16 and data[position + 4 : position + 8] not in (b"IDAT", b""):
        length = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == b"sBIT" and length:
            return max(8, min(16, data[position + 8]))
        position += length + 12
    return depth


def _shift(pixels: np.ndarray, depth: int) -> int:
    """Number of low bits to drop from 16-bit samples with ``depth`` significant bits.

    PNG encoders must scale samples to 16 bits, but some store them unscaled. Scaled samples are nearly multiples of
    2 ** (16 - depth), and exceed the largest unscaled sample unless the image is very dark.
    """
    unscaled = pixels.max(initial=0) < 1 << depth and (pixels & ((1 << 16 - depth) - 1)).max(initial=0) > 1
    return depth - 8 if unscaled else 8


def _most_significant_byte(file: Image.Image, data: bytes) -> np.ndarray:
    """Most significant 8 bits of a grey image of 9 to 16 bits per sample. (H, W) uint8."""
    pixels, depth = np.asarray(file), _sample_depth(file, data)
    shift = _shift(pixels, depth) if file.format == "PNG" else depth - 8
    grey = (pixels >> shift).astype(np.uint8)
    is_inverted = file.format == "TIFF" and _tiff_values(file, _PHOTOMETRIC) == (0,)  # white is 0
    return 255 - grey if is_inverted else grey


_dark_images: list[str] = []  # the first dark image of this process


def _warn_if_dark(image: Image.Image, name: str) -> Image.Image:
    """Warn, once per process, if an image of 16 bits per sample uses only values below 4096. Returns the image."""
    if not _dark_images and max(maximum for _, maximum in image.getextrema()) < 16:
        _dark_images.append(name)
        logger.warning(
            "%s: a 16-bit image with values below 4096 only, which is nearly black; if its samples have fewer bits, scale them "
            "to 16 bits, or declare their depth (TIFF: BitsPerSample, PNG: sBIT). Other such images are not reported",
            name,
        )
    return image


def decode_pixels(data: bytes, name: str = "") -> Tensor:
    """Decode a file's bytes to a (3, H, W) uint8 tensor with channels last in memory.

    torchvision decodes RGB JPEG files directly to tensors; ``decode_image`` decodes all other files.

    Args:
        name: path of the image, for warnings.

    Raises:
        Exception: any exception that ``decode_image`` raises.
    """
    with open_image(data) as file:
        is_rgb_jpeg = file.format == "JPEG" and file.mode == "RGB"
    if is_rgb_jpeg and decode_jpeg is not None:
        try:
            # The result of decode_jpeg already has channels last in memory.
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:  # damaged: decode it with Pillow below, whose error message states the reason
            pass
    return torch.from_numpy(np.array(decode_image(data, name))).permute(2, 0, 1)


def describe_error(error: Exception) -> str:
    """Reason why an image cannot be read, never empty.

    Replaces Pillow's message for unknown formats, which has only a memory address.
    """
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return str(error).strip() or type(error).__name__


class FileDataset(Dataset):
    """Image files without labels. Items: (position, (3, H, W) uint8, None), or (position, None, reason) if unreadable.

    Args:
        transform: converts a PIL image to (3, H, W) uint8.
    """

    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image], Tensor]):
        self.paths = list(paths)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> tuple[int, Tensor | None, str | None]:
        path = self.paths[position]
        try:
            return position, self.transform(decode_image(read_file(path), str(path))), None
        except Exception as error:  # decoders and transforms raise many exception types on damaged or unusual files
            return position, None, describe_error(error)
