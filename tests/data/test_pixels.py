"""Pixels of unusual images: declared bit depths, extreme shapes and sizes. Values and files are computed by hand."""

import io
import resource
import struct
import time
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import data.decoding
import jobs.predict
from data.build import build_datasets, build_eval_loader, build_train_loader
from data.datasets import FileDataset, ImageDataset
from data.decoding import decode_image, decode_pixels
from data.files import DataError
from data.transforms import create_eval_transform
from models.preprocessing import Preprocessing
from scripts import predict
from scripts.pack_dataset import pack
from tests.conftest import write_images
from tests.indices import index_folder
from tests.launch import run_script
from utils.config.loading import load_config

RAMP = list(range(0, 4096, 273))  # 16 values of 12 bits: 0, 273, ..., 4095


def tiff(
    samples: bytes,
    *,
    bits: int,
    width: int,
    height: int,
    channels: int = 1,
    photometric: int = 1,
    sample_format: int = 1,
    tags: dict[int, tuple[int, list[int]]] | None = None,
):
    """A little-endian TIFF file without compression, by default of one strip.

    Args:
        tags: further tags: number -> type (3: 16 bits, 4: 32 bits) and values.
    """
    values = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * channels),
        259: (3, [1]),
        262: (3, [photometric]),
        273: (4, [8]),  # the samples follow the file header
        277: (3, [channels]),
        278: (4, [height]),
        279: (4, [len(samples)]),
        339: (3, [sample_format] * channels),
    }
    lists = entries = b""
    position = 8 + len(samples) + len(samples) % 2
    for tag, (kind, numbers) in sorted((values | (tags or {})).items()):
        content = struct.pack(f"<{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(content) > 4:
            content, lists = struct.pack("<I", position + len(lists)), lists + content
        entries += struct.pack("<HHI4s", tag, kind, len(numbers), content)
    directory = struct.pack("<H", len(entries) // 12) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", position + len(lists)) + samples + bytes(len(samples) % 2) + lists + directory


def packed_12_bits(values: list[int]) -> bytes:
    """Two values of 12 bits in three bytes, most significant bits first."""
    pairs = zip(values[::2], values[1::2], strict=True)
    return b"".join((one << 12 | other).to_bytes(3, "big") for one, other in pairs)


def png(rows: list[bytes], *, width: int, bits: int, colour_type: int, significant: bytes = b"") -> bytes:
    """A PNG file without filters, with an sBIT chunk if ``significant`` is not empty."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0))
    declared = chunk(b"sBIT", significant) if significant else b""
    content = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + declared + content + chunk(b"IEND", b"")


def words(values) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


GREY_12 = partial(tiff, packed_12_bits(RAMP), bits=12, width=16, height=1)
GREY_16 = [0, 255, 256, 4095, 4096, 32768, 65279, 65535]
TOP_BYTE = [0, 0, 1, 15, 16, 128, 254, 255]
FILES = {
    # name: (content, expected red channel)
    "TIFF of 12 bits": (GREY_12(), [value // 16 for value in RAMP]),
    "TIFF of 16 bits": (
        tiff(struct.pack("<8H", *GREY_16), bits=16, width=8, height=1),
        TOP_BYTE,
    ),
    "TIFF of 16 bits, white is 0": (
        tiff(struct.pack("<8H", *GREY_16), bits=16, width=8, height=1, photometric=0),
        [255 - value for value in TOP_BYTE],
    ),
    "TIFF of 8 bits, white is 0": (tiff(bytes([0, 1, 255, 7]), bits=8, width=4, height=1, photometric=0), [255, 254, 0, 248]),
    "TIFF of 3 x 16 bits": (
        tiff(
            struct.pack("<24H", *(v for v in GREY_16 for _ in range(3))), bits=16, width=8, height=1, channels=3, photometric=2
        ),
        TOP_BYTE,
    ),
    "grey PNG of 16 bits": (png([words(GREY_16)], width=8, bits=16, colour_type=0), TOP_BYTE),
    "grey PNG with alpha": (png([words([v for x in GREY_16 for v in (x, 9)])], width=8, bits=16, colour_type=4), TOP_BYTE),
    "RGB PNG of 16 bits": (png([words([v for v in GREY_16 for _ in range(3)])], width=8, bits=16, colour_type=2), TOP_BYTE),
    "RGBA PNG of 16 bits": (
        png([words([x for v in GREY_16 for x in (v, v, v, 700)])], width=8, bits=16, colour_type=6),
        TOP_BYTE,
    ),
    # Samples of 12 bits, stored in 16: scaled as the standard requires, or unscaled.
    "grey PNG, 12 bits scaled": (
        png([words([v << 4 | v >> 8 for v in RAMP])], width=16, bits=16, colour_type=0, significant=b"\x0c"),
        [value // 16 for value in RAMP],
    ),
    "dark grey PNG, 12 bits scaled": (
        png([words([v << 4 for v in range(0, 256, 16)])], width=16, bits=16, colour_type=0, significant=b"\x0c"),
        list(range(16)),
    ),
    "grey PNG, 12 bits unscaled": (
        png([words(RAMP)], width=16, bits=16, colour_type=0, significant=b"\x0c"),
        [value // 16 for value in RAMP],
    ),
    "RGB PNG, 12 bits unscaled": (
        png([words([v for v in RAMP for _ in range(3)])], width=16, bits=16, colour_type=2, significant=b"\x0c\x0c\x0c"),
        [value // 16 for value in RAMP],
    ),
    "grey PNG, 8 bits unscaled": (
        png([words(range(0, 256, 17))], width=16, bits=16, colour_type=0, significant=b"\x08"),
        list(range(0, 256, 17)),
    ),
    "grey PNG of 2 bits": (png([bytes([0b00011011])], width=4, bits=2, colour_type=0), [0, 85, 170, 255]),
    "PGM with a maximum of 1000": (b"P5 3 1 1000\n" + words([0, 400, 1000]), [0, 102, 255]),
}


@pytest.mark.parametrize("name", FILES)
def test_samples_of_any_declared_depth_are_scaled_to_8_bits(name):
    content, expected = FILES[name]
    for pixels in (np.asarray(decode_image(content)), decode_pixels(content).permute(1, 2, 0).numpy()):
        assert pixels.dtype == np.uint8
        assert pixels[0, :, 0].tolist() == expected
        assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_signed_samples_are_rejected(bits):
    with pytest.raises(ValueError, match="signed"):
        decode_image(tiff(bytes(4 * bits // 8), bits=bits, width=4, height=1, sample_format=2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            tiff(
                struct.pack("<8H", *GREY_16) * 3,
                bits=16,
                width=8,
                height=1,
                channels=3,
                photometric=2,
                tags={273: (4, [8, 24, 40]), 279: (4, [16] * 3), 284: (3, [2])},
            ),
            "channels of 16 bits are stored separately",
        ),
        (
            tiff(bytes(range(8)), bits=8, width=8, height=1, photometric=3, tags={320: (3, list(range(256)) * 3)}),
            "palette has values of 8",
        ),
    ],
    ids=["separate channels", "palette of 8 bits"],
)
def test_tiff_files_that_pillow_reads_with_other_values_are_rejected(content, message):
    for decode in (decode_image, decode_pixels):
        with pytest.raises(ValueError, match=message):
            decode(content)


@pytest.mark.parametrize("content", [words([100] * 64), words([4095] * 64)])
def test_a_dark_16_bit_image_without_declared_depth_is_named_in_one_warning(content, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(data.decoding, "_dark_images", [])
    (tmp_path / "train/a").mkdir(parents=True)
    for name in ("1.png", "2.png"):
        image = png([content[position : position + 16] for position in range(0, 128, 16)], width=8, bits=16, colour_type=0)
        (tmp_path / "train/a" / name).write_bytes(image)
    dataset = ImageDataset(index_folder(tmp_path / "train"), np.asarray, decoder=decode_pixels)
    for position in range(2):
        dataset.decode(position)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "a/1.png: a 16-bit image with values below 4096 only" in caplog.text
    decode_image(FILES["TIFF of 16 bits"][0])
    assert len(caplog.records) == 1


def test_packing_downscales_16_bit_images_to_the_same_pixels_as_training(tmp_path):
    (tmp_path / "val/a").mkdir(parents=True)
    (tmp_path / "val/a/0.tif").write_bytes(tiff(packed_12_bits([4095, 1600] * 2000), bits=12, width=100, height=40))
    packed = ImageDataset(pack(tmp_path, tmp_path / "packed", "val", archive="tar", short_side=20), None)
    expected = Image.new("RGB", (100, 40))
    expected.paste(Image.fromarray(np.tile(np.array([255, 100], np.uint8), (40, 50))).convert("RGB"))
    assert np.array_equal(packed.decode(0), expected.resize((50, 20), Image.Resampling.BICUBIC))


# --- Shapes and sizes


def preprocessing(size, crop_pct=0.875, interpolation="bicubic"):
    height, width = (size, size) if isinstance(size, int) else size
    options = {"crop_mode": "short", "crop_pct": crop_pct, "interpolation": interpolation}
    return Preprocessing(img_size=(height, width), mean=(0, 0, 0), std=(1, 1, 1), **options)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [64, (48, 64), (64, 40)])
def test_crop_of_an_elongated_image_equals_the_crop_of_the_resized_image(size, interpolation):
    """Computed without the resized image, the crop differs by at most two levels."""
    rng = np.random.default_rng(0)
    for crop_pct in (0.875, 1.0):
        transform = create_eval_transform(preprocessing(size, crop_pct, interpolation))
        for shape in ((1, 40), (40, 1), (2, 333), (400, 3), (80, 120), (35, 500)):
            image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
            expected = transform.transform(image).permute(1, 2, 0).numpy().astype(int)
            assert np.abs(np.asarray(transform.resize_and_crop(image)) - expected).max() <= 2


@pytest.mark.parametrize(("width", "height"), [(1, 30_000), (30_000, 1), (65_535, 2)])
def test_extremely_elongated_images_need_little_memory(width, height):
    transform, before = create_eval_transform(preprocessing(224)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image = transform(Image.new("RGB", (width, height), (9, 8, 7)))
    assert image.shape == (3, 224, 224)
    assert (image == torch.tensor([9, 8, 7]).view(3, 1, 1)).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_images_with_too_many_pixels_are_rejected_before_they_are_decoded():
    buffer = io.BytesIO()
    Image.new("1", (13_300, 13_300)).save(buffer, "PNG")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for decode in (decode_image, decode_pixels):
        with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="13300 x 13300 pixels"):
            decode(buffer.getvalue())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB


def test_a_jpeg_file_with_a_thousand_exif_segments_is_rejected_at_once():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    content, segment = buffer.getvalue(), b"\xff\xe1" + struct.pack(">H", 60_000) + b"Exif\0\0".ljust(59_998, b"\0")
    started = time.process_time()
    for decode in (decode_image, decode_pixels):
        with pytest.raises(ValueError, match="EXIF segments"):
            decode(content[:2] + 1000 * segment + content[2:])
        decode(content[:2] + 2 * segment + content[2:])
    assert time.process_time() - started < 5


def test_files_that_pillow_reads_slowly_are_rejected_at_once():
    """Pillow needs 48 s for a PNM file with a million comments, and minutes for fill bytes of 100 MB."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    content = buffer.getvalue()
    started = time.process_time()
    for decode in (decode_image, decode_pixels):
        with pytest.raises(ValueError, match="more than 1024 comments"):
            decode(b"P3\n2 1 255\n" + b"#\n" * 10**6 + b"1 2 3 4 5 6")
        assert np.asarray(decode(b"P3\n# a comment\n2 1 255\n" + b"#\n" * 9 + b"1 2 3 4 5 6")).ravel()[0] == 1
        with pytest.raises(ValueError, match="more than 1024 fill bytes"):
            decode(content[:2] + b"\xff" * 10**7 + content[2:])
        decode(content[:2] + b"\xff" * 100 + content[2:])
    assert time.process_time() - started < 5


class FailOnWhite:
    """Transform that fails on white images, for lack of memory, without a message."""

    def __call__(self, image):
        pixels = image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if pixels.min() == 255:
            raise MemoryError
        return pixels[:, :8, :8]


@pytest.fixture
def one_white_image(tmp_path):
    """Directory with a white image, ``class1/001.png``, in each split."""
    for split in ("train", "val"):
        write_images(tmp_path, split, classes=2, per_class=8)
        Image.new("RGB", (40, 40), "white").save(tmp_path / split / "class1/001.png")
    return tmp_path


def test_errors_of_transforms_name_the_image_and_follow_the_policy(one_white_image, toy_config):
    def build(policy, *, workers=0):
        options = {"DATA.DATA_PATH": str(one_white_image), "DATA.UNREADABLE": policy, "DATA.NUM_WORKERS": workers}
        options |= {"MODEL.NUM_CLASSES": 2, "DATA.BATCH_SIZE": 4}
        cfg = load_config(toy_config, [word for pair in options.items() for word in pair])
        datasets = build_datasets(cfg, training=True)
        datasets.train.transform = datasets.val.transform = FailOnWhite()
        return cfg, datasets

    placement = {"rank": 0, "world_size": 1, "device": torch.device("cpu")}
    cfg, datasets = build("error", workers=2)
    for loader in (build_train_loader(cfg, datasets.train, **placement), build_eval_loader(cfg, datasets.val, **placement)):
        with pytest.raises(Exception, match=r"class1/001\.png: not a readable image \(MemoryError\)"):
            list(loader)
    for policy in ("skip", "replace"):
        cfg, datasets = build(policy, workers=2)
        loader = build_train_loader(cfg, datasets.train, **placement)
        keys = [key for batch in loader for key in batch.keys.tolist()]
        assert loader.unreadable == {9}
        assert (len(keys), 9 in {index for _, index in keys}) == (15 if policy == "skip" else 16, False)


def test_a_programming_error_of_a_transform_is_not_counted_as_an_unreadable_image(one_white_image):
    index = index_folder(one_white_image / "train")
    with pytest.raises(AttributeError, match="no attribute 'misspelt'"):
        ImageDataset(index, lambda image: image.misspelt, seed=0, unreadable="skip")[0, 0]


def test_prediction_lists_an_image_whose_error_has_no_message(trained, one_white_image, tmp_path, monkeypatch):
    files = FileDataset([one_white_image / "val/class1/001.png"], FailOnWhite(), exif=False)
    assert files[0] == (0, None, "MemoryError")
    monkeypatch.setattr(jobs.predict, "create_eval_transform", lambda _: fail_or_resize)
    arguments = [one_white_image / "val/class1", "--resume", trained, "--output", tmp_path / "out", "--workers", 1]
    outcome = run_script(predict, arguments, tmp_path / "log")
    assert outcome.exit_codes == [1], outcome.output
    assert "7 of 8 images classified, 1 unreadable" in outcome.output
    assert "class1/001.png,,,,,,,MemoryError" in (tmp_path / "out/predictions.csv").read_text()


def fail_or_resize(image):
    FailOnWhite()(image)
    return torch.from_numpy(np.array(image.resize((40, 40)))).permute(2, 0, 1)


def test_packing_names_an_image_that_cannot_be_downscaled(one_white_image, monkeypatch):
    original = Image.Image.resize

    def resize(image, *arguments, **options):
        if image.getextrema()[0] == (255, 255):
            raise MemoryError
        return original(image, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", resize)
    with pytest.raises(DataError, match=r"class1/001\.png: not a readable image \(MemoryError\)"):
        pack(one_white_image, one_white_image / "packed", "val", archive="tar", short_side=20)
