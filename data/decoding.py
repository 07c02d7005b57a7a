"""Image files to RGB pixels of 8 bits: accepted formats and sizes, samples of more bits, and the EXIF orientation."""

import functools
import io
import logging
import re
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from data.files import AVIF_CONTENT, AVIF_REMEDY, HEIC_CONTENT, HEIC_REMEDY, reads_avif, reads_heic
from utils.errors import one_line

try:
    from torchvision.io import ImageReadMode, decode_jpeg, decode_png
except ImportError:  # deprecated: a later torchvision removes them. Pillow then decodes JPEG files, more slowly
    decode_jpeg = decode_png = None

logger = logging.getLogger(__name__)

# Formats that Pillow may decode, detected from the content of a file; see ``_formats`` for those that it may lack.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
JPEG_FORMATS = ("JPEG", "MPO")  # an MPO file is a JPEG file, followed by further ones
MAX_PIXELS = 2**27  # maximum number of pixels of an image; decoding one of this size needs 400 MiB
MAX_EXIF_SEGMENTS = 32  # in a JPEG file; cameras write one
MAX_FILL_BYTES = 1024  # between the segments of a JPEG file
MAX_COMMENTS = 1024  # in a PNM file of decimal numbers


def decode_image(data: bytes, name: str = "", *, exif: bool = False) -> Image.Image:
    """Decode a file's bytes to an RGB image; of several images, the first one.

    Samples of more than 8 bits are scaled by the depth that the file declares: their most significant 8 bits are used.

    Args:
        name: path of the image, for the warning about dark images, see ``_warn_if_dark``.
        exif: apply the EXIF orientation, like ``PIL.ImageOps.exif_transpose``. That of TIFF and HEIC files is always
            applied, by Pillow.

    Raises:
        ValueError: too many pixels, or pixels that are floating-point, signed or 32-bit numbers.
        Exception: any exception that Pillow raises for a damaged file, or for a file that is not an image.
    """
    with open_image(data) as file:
        _check_samples(file)
        image = _to_rgb(file, data, name)
        # Read after the pixels: in PNG files, EXIF data may follow them.
        transposition = _TRANSPOSITIONS.get(read_orientation(file)) if exif else None
        return image if transposition is None else image.transpose(transposition)


def _to_rgb(file: Image.Image, data: bytes, name: str) -> Image.Image:
    """Decode an opened file to RGB; its bytes are ``data``."""
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
    if HEIC_CONTENT.match(data) and not reads_heic():
        raise ValueError(f"a HEIC image, which Pillow cannot read; {HEIC_REMEDY}")
    if AVIF_CONTENT.match(data) and not reads_avif():
        raise ValueError(f"an AVIF image, which this version of Pillow cannot read; {AVIF_REMEDY}")
    try:
        file = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:
        if data.startswith((b"II*\0", b"MM\0*")):
            raise ValueError("a kind of TIFF file that Pillow cannot read; convert it to 8 bits") from None
        raise
    width, height = file.size
    if width * height > MAX_PIXELS:
        file.close()
        raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS}; downscale it")
    return file


@functools.cache
def _formats() -> tuple[str, ...]:
    """Formats that this installation of Pillow decodes."""
    if reads_heic():
        import pillow_heif

        pillow_heif.register_heif_opener()
    return FORMATS + ("AVIF",) * reads_avif() + ("HEIF",) * reads_heic()


# Orientation -> how to turn the stored pixels upright.
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
UPRIGHT = 1  # the orientation of an image that is displayed as it is stored
_EXIF_PREFIX = re.compile(rb"\A(?:Exif\0\0)+")
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def read_orientation(file: Image.Image) -> int:
    """Orientation of an opened image, from its EXIF data or else its XMP data; ``UPRIGHT`` if it has none, or if it is damaged.

    ``Image.getexif`` has the same result, but needs much time and memory for some damaged files, and warns or raises an error.
    """
    if file.format in ("TIFF", "HEIF"):  # Pillow has transposed the pixels
        return UPRIGHT
    exif, profile = file.info.get("exif"), file.info.get("Raw profile type exif")
    try:
        if exif is None and profile is not None:  # hexadecimal numbers after three lines, as ImageMagick writes them
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
        orientation = _exif_orientation(exif or b"")
        if orientation is None:
            xmp = file.info.get("XML:com.adobe.xmp") or file.info.get("xmp") or b""
            match = _XMP_ORIENTATION.search(xmp.encode(errors="replace") if isinstance(xmp, str) else xmp)
            orientation = int(match[1]) if match else UPRIGHT
    except (AttributeError, TypeError, ValueError):
        return UPRIGHT
    return orientation if orientation in _TRANSPOSITIONS else UPRIGHT


def _exif_orientation(exif: bytes) -> int | None:
    """Value of the orientation tag in the first directory of EXIF data; None if it is missing."""
    exif = _EXIF_PREFIX.sub(b"", exif)
    order: Literal["little", "big"] = "little" if exif.startswith(b"II") else "big"
    start = int.from_bytes(exif[4:8], order)
    num_entries = int.from_bytes(exif[start : start + 2], order)
    for position in range(start + 2, min(start + 2 + 12 * num_entries, len(exif) - 11), 12):
        if int.from_bytes(exif[position : position + 2], order) == ExifTags.Base.Orientation:
            length = {1: 1, 3: 2, 4: 4}.get(int.from_bytes(exif[position + 2 : position + 4], order), 0)  # byte, short, long
            return int.from_bytes(exif[position + 8 : position + 8 + length], order)
    return None


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
    if not _dark_images and max(maximum for _, maximum in image.getextrema()) < 16:  # type: ignore[misc]  # RGB has a pair per channel
        _dark_images.append(name)
        logger.warning(
            "%s: a 16-bit image with values below 4096 only, which is nearly black; if its samples have fewer bits, scale them "
            "to 16 bits, or declare their depth (TIFF: BitsPerSample, PNG: sBIT). Other such images are not reported",
            name,
        )
    return image


def decode_pixels(data: bytes, name: str = "", *, exif: bool = False) -> Tensor:
    """Decode a file's bytes to a (3, H, W) uint8 tensor with channels last in memory.

    torchvision decodes RGB JPEG files directly to tensors, unless they have to be turned; ``decode_image`` decodes all others.

    Args:
        name, exif: see ``decode_image``.

    Raises:
        Exception: any exception that ``decode_image`` raises.
    """
    with open_image(data) as file:
        is_plain_jpeg = file.format in JPEG_FORMATS and file.mode == "RGB"
        if exif and read_orientation(file) != UPRIGHT:
            is_plain_jpeg = False
    if is_plain_jpeg and decode_jpeg is not None:
        try:
            # The result of decode_jpeg already has channels last in memory.
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:  # damaged: decode it with Pillow below, whose error message states the reason
            pass
    return torch.from_numpy(np.array(decode_image(data, name, exif=exif))).permute(2, 0, 1)


def describe_error(error: BaseException) -> str:
    """Reason why an image cannot be read, never empty.

    Replaces Pillow's message for unknown formats, which has only a memory address.
    """
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return one_line(error)
