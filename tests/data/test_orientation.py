"""The EXIF orientation of photographs (DATA.EXIF). ``PIL.ImageOps.exif_transpose`` gives the expected pixels."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data.build import build_datasets
from data.datasets import ImageDataset
from data.decoding import decode_image, decode_pixels
from data.index import SAMPLED_BYTES
from data.orientation import NUM_SAMPLES, warn_if_turned
from scripts import export, predict
from scripts.pack_dataset import pack
from tests.conftest import write_images
from tests.launch import run_main, run_script
from utils.config.loading import load_config

ORIENTATIONS = range(1, 9)
# How to turn an upright image into the pixels that a file with each orientation stores.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def orientation_tag(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def picture(height: int = 48, width: int = 64) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def encode(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    if image_format == "MPO":
        options |= {"save_all": True, "append_images": [image]}
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def check_pixels(content: bytes) -> None:
    """Check both decoders, with and without the orientation, against Pillow."""
    with Image.open(io.BytesIO(content)) as file:
        upright = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    with Image.open(io.BytesIO(content)) as file:
        stored = np.asarray(file.convert("RGB"))
    for exif, expected in ((True, upright), (False, stored)):
        assert np.array_equal(decode_image(content, exif=exif), expected)
        pixels = decode_pixels(content, exif=exif)
        assert np.array_equal(pixels.permute(1, 2, 0), expected)
        assert pixels[None].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF", "HEIF"])
def test_every_orientation_equals_that_of_pillow(image_format):
    if image_format == "AVIF":
        pytest.importorskip("PIL._avif")
    if image_format == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    for orientation in (0, *ORIENTATIONS, 9):  # 0 and 9 are illegal
        check_pixels(encode(picture(), image_format, exif=orientation_tag(orientation)))


def test_orientations_in_grey_16_bit_and_palette_images_are_applied():
    grey_16 = Image.fromarray(np.arange(0, 65280, 340, dtype=np.uint16).reshape(12, 16))
    for orientation in ORIENTATIONS:
        for image in (picture().convert("L"), picture().convert("P"), picture().convert("LA")):
            check_pixels(encode(image, "PNG", exif=orientation_tag(orientation)))
        content = encode(grey_16, "PNG", exif=orientation_tag(orientation))
        with Image.open(io.BytesIO(content)) as file:
            expected = np.asarray(ImageOps.exif_transpose(file)) >> 8
        assert np.array_equal(np.asarray(decode_image(content, exif=True))[..., 0], expected)


def exif_after_pixels() -> bytes:
    content, exif = encode(picture(), "PNG"), orientation_tag(6).tobytes()[6:]
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    return content[:-12] + chunk + content[-12:]


def in_xmp() -> bytes:
    return encode(picture(), "JPEG", xmp=b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>')


def as_long() -> bytes:
    return encode(picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 0x112, 4, 1, 6, 0))


@pytest.mark.parametrize("create", [exif_after_pixels, in_xmp, as_long])
def test_orientations_in_unusual_places_equal_those_of_pillow(create):
    with Image.open(io.BytesIO(create())) as file:
        assert ImageOps.exif_transpose(file).size == (48, 64)  # turned
    check_pixels(create())


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0II",
        b"Exif\0\0XX*\0\x08\0\0\0\x01\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff\x01\0",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03",
        b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIIII", 1, 0x112, 2, 9, 9999, 0, 0),
        bytes(range(256)),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # from Pillow, which reads the resolution of JPEG files
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_data_leave_the_image_as_it_is_stored(exif, image_format):
    content = encode(picture(), image_format, exif=exif)
    assert np.array_equal(decode_image(content, exif=True), decode_image(content))
    assert torch.equal(decode_pixels(content, exif=True), decode_pixels(content))


def test_exif_data_with_many_large_entries_are_read_at_once():
    """Pillow would copy 65,535 overlapping values of 4 MiB each."""
    entries = b"".join(struct.pack("<HHII", tag, 7, 1 << 22, 8) for tag in range(1, 65_000))
    content = encode(picture(), "PNG")
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", 64_999) + entries + bytes(1 << 22)
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    content = content[:-12] + chunk + content[-12:]
    assert np.array_equal(decode_image(content, exif=True), np.asarray(picture()))


# --- Data sets


def write_turned(source: Path, target: Path) -> None:
    """Copy PNG images; each copy stores its pixels in another orientation, and declares it."""
    for number, path in enumerate(sorted(source.rglob("*.png"))):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        orientation = 1 + number % 8
        with Image.open(path) as image:
            stored = image.transpose(STORED[orientation]) if orientation in STORED else image
            stored.save(copy, exif=orientation_tag(orientation))
        with Image.open(copy) as file, Image.open(path) as image:
            assert np.array_equal(ImageOps.exif_transpose(file), image)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Directory with the same images in ``upright`` and in ``turned``; they are wider than high."""
    root = tmp_path_factory.mktemp("photographs")
    write_images(root / "upright", "train", classes=3, per_class=8)
    write_images(root / "upright", "val", classes=3, per_class=16)
    for path in (root / "upright").rglob("*.png"):
        with Image.open(path) as image:
            image.resize((60, 40)).save(path)
    write_turned(root / "upright", root / "turned")
    return root


def test_a_run_its_evaluation_and_its_predictions_apply_the_orientation_of_every_photograph(photographs, toy_config, tmp_path):
    """The checkpoint stores DATA.EXIF. The evaluation reads the same images stored upright, without EXIF data."""
    options = ["DATA.EXIF", "True", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "EMA.ENABLED", "False"]
    arguments = ["--cfg", toy_config, "--data-path", photographs / "turned", "--output", tmp_path, "--opts", *options]
    outcome = run_main([*map(str, arguments), "DATA.NUM_WORKERS", "1"], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert "EXIF orientation" not in outcome.output
    run = tmp_path / "toy/default"
    *_, expected = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    arguments = ["--eval", "--resume", run / "best.pth", "--data-path", photographs / "upright"]
    outcome = run_main([*map(str, arguments)], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    record = json.loads((run / "eval.json").read_text())
    assert record["preprocessing"]["exif"] is True
    result = record["results"]["raw"]
    assert (result["correct1"], result["loss"]) == (expected["correct1"], pytest.approx(expected["loss"], rel=1e-6))
    arguments = [photographs / "turned/val", "--resume", run / "best.pth", "--output", tmp_path / "predictions"]
    outcome = run_script(predict, [*arguments, "--workers", 1], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    predicted = json.loads((tmp_path / "predictions/predictions.json").read_text())["images"]
    correct = [entry["predictions"][0]["class"] == Path(entry["image"]).parent.name for entry in predicted]
    assert (sum(correct), len(correct)) == (expected["correct1"], expected["num_images"])


@pytest.mark.parametrize("size", [32, 40])  # the first is trained from Pillow images, the second from tensors
def test_datasets_of_a_run_read_turned_photographs_as_upright_ones(size, photographs, toy_config, caplog):
    def read(name: str, exif: bool) -> list[np.ndarray]:
        options = ["DATA.DATA_PATH", str(photographs / name), "DATA.EXIF", exif, "DATA.IMG_SIZE", size]
        datasets = build_datasets(load_config(toy_config, options), training=True)
        images = [dataset.decode(position) for dataset in (datasets.train, datasets.val) for position in range(8)]
        return [np.asarray(image.permute(1, 2, 0) if isinstance(image, torch.Tensor) else image) for image in images]

    upright = read("upright", False)
    assert all(map(np.array_equal, read("turned", True), upright))
    assert "EXIF" not in caplog.text
    assert sum(map(np.array_equal, read("turned", False), upright)) == 2  # two of sixteen images are stored upright
    assert caplog.text.count("turned/train: 21 of the 24 looked at are stored sideways") == 1
    assert caplog.text.count("turned/val: 42 of the 48 looked at are stored sideways") == 1


def test_the_warning_reads_a_sample_and_the_beginning_of_its_files(caplog):
    content = encode(picture(), "JPEG", exif=orientation_tag(6)) + bytes(2 * SAMPLED_BYTES)
    read: list[int] = []

    def read_start(position: int) -> bytes:
        read.append(position)
        return content[:SAMPLED_BYTES]

    entire = {"read": lambda _: pytest.fail("the entire file was read")}
    warn_if_turned("a large data set", 1_281_167, read_beginning=read_start, **entire)
    assert sorted(read) == np.linspace(0, 1_281_166, NUM_SAMPLES).astype(int).tolist()
    assert f"a large data set: {NUM_SAMPLES} of the {NUM_SAMPLES} looked at" in caplog.text
    assert "--opts DATA.EXIF True" in caplog.text


def test_the_warning_skips_unreadable_images_and_reads_the_entire_file_if_necessary(caplog):
    contents = [encode(picture(), kind, exif=orientation_tag(3)) for kind in ("WEBP", "JPEG")] + [b"", encode(picture(), "PNG")]
    start, read = (lambda position: contents[position][:100]), contents.__getitem__
    warn_if_turned("photographs", 4, read_beginning=start, read=read)
    assert "photographs: 2 of the 3 looked at" in caplog.text


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
def test_packed_photographs_keep_their_orientation(image_format, tmp_path):
    """Copied files are equal byte for byte; downscaled ones have the same orientation, and a small file if they are JPEG."""
    folder, images = tmp_path / "val/a", {}
    folder.mkdir(parents=True)
    for orientation in ORIENTATIONS:
        name = f"{orientation}.{image_format.lower()}"
        images[name] = encode(picture(96, 128), image_format, exif=orientation_tag(orientation))
        (folder / name).write_bytes(images[name])
    for short_side in (0, 48):
        packed = pack(tmp_path, tmp_path / f"packed{short_side}", "val", archive="tar", short_side=short_side)
        dataset = ImageDataset(packed, None)
        for position, (name, content) in enumerate(images.items()):
            stored, upright = (decode_image(content, exif=exif) for exif in (False, True))
            data = dataset.read(position)
            assert name in packed.name(position)
            if not short_side:
                assert data == content
                continue
            with Image.open(io.BytesIO(data)) as file:
                assert file.format == ("JPEG" if image_format in ("JPEG", "MPO") else "PNG")
            for expected, exif in ((stored, False), (upright, True)):
                decoded = decode_image(data, exif=exif)
                assert decoded.size == tuple(side // 2 for side in expected.size)
                resized = expected.resize(decoded.size, Image.Resampling.BICUBIC)
                difference = np.abs(np.asarray(decoded, dtype=int) - np.asarray(resized))
                assert difference.mean() < 12


def test_an_exported_model_documents_that_it_expects_upright_images(toy_config, trained, tmp_path):
    options = ["--formats", "safetensors", "--opts", "DATA.EXIF=True"]
    outcome = run_script(export, [trained, tmp_path / "out", *options], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    card = (tmp_path / "out/README.md").read_text()
    assert "Input: RGB, turned upright by the EXIF orientation, resized to" in card
    assert "PIL.ImageOps.exif_transpose" in card
