"""Which files are images: one rule for training, evaluation, prediction and packing."""

import importlib.util
import io
import logging
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data.index
from data.datasets import ImageDataset
from data.decoding import decode_image, decode_pixels
from data.files import DataError, FileKind, classify, image_extensions, reads_avif, reads_heic
from data.index import compare_descriptions, describe_index
from data.sources import index_split
from jobs.predict import find_images
from scripts.pack_dataset import pack
from tests.indices import index_folder, index_tar, index_zip


def encode(image_format: str, level: int = 0, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (level, level, level)).save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.fixture
def installed(monkeypatch):
    """Function that pretends that packages are missing."""

    def hide(*names: str) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr("data.files.find_spec", lambda name: None if name in names else find(name))
        for function in (reads_avif, reads_heic, image_extensions):
            function.cache_clear()

    yield hide
    monkeypatch.undo()
    for function in (reads_avif, reads_heic, image_extensions):
        function.cache_clear()


IMAGES = {
    **dict.fromkeys(("a.JPG", "b.jpeg", "c.jpe", "d.jfif", "e.mpo", "without extension", "f.2024", "g.jif"), "JPEG"),
    **{"h.gif": "GIF", "i.png": "PNG", "j.data": "WEBP", "k.jpg": "GIF", "l.apng": "PNG", "m": "BMP", "n.pnm": "PPM"},
}
NO_IMAGES = {
    "a.txt": b"\xff\xd8\xff",
    "b.json": b"{}",
    "c.npy": b"\x93NUMPY",
    "README": b"P1 is text",
    "d.mp4": b"\0\0\0\x18ftypmp42",
}
LEFT_OUT = {
    "unread.jxl": b"\xff\x0a",
    "camera.NEF": encode("TIFF"),
    "download.crdownload": encode("JPEG"),
    "photo.jpg.part": encode("JPEG"),
    "photo.png.bak": encode("PNG"),
    "photo.jpg~": encode("JPEG"),
}


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def test_training_packing_and_prediction_read_the_same_files(tmp_path, caplog):
    images = {name: encode(kind, 10 * number) for number, (name, kind) in enumerate(IMAGES.items())}
    write(tmp_path / "val/a", images | NO_IMAGES | LEFT_OUT)
    index = index_folder(tmp_path / "val")
    assert [index.name(position) for position in range(len(index))] == [f"a/{name}" for name in sorted(images)]
    (warning,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    for part in ("1 .jxl", "1 .nef", "1 .crdownload", "1 .part", "1 .bak", "1 .jpg~"):
        assert part in warning
    assert find_images([tmp_path / "val/a"]) == [tmp_path / "val/a" / name for name in sorted(images)]
    packed = {kind: pack(tmp_path, tmp_path / kind, "val", archive=kind) for kind in ("tar", "zip")}
    for shown in (index, packed["tar"], packed["zip"]):
        dataset = ImageDataset(shown, None)
        levels = [np.asarray(dataset.decode(position))[0, 0, 0] for position in range(len(images))]
        assert np.abs(np.array(levels) - [10 * list(images).index(name) for name in sorted(images)]).max() <= 1


def test_a_file_without_known_extension_beside_an_image_of_its_key_is_left_out_of_tar_shards(tmp_path, caplog):
    members = {"1.jpg": encode("JPEG"), "1.depth": encode("PNG"), "1.cls": b"0", "2.img": encode("PNG"), "2.cls": b"1"}
    with tarfile.open(tmp_path / "val-0.tar", "w") as archive:
        for name, content in (members | {"3": encode("PNG")}).items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    index = index_tar(tmp_path, "val")
    assert [index.name(position) for position in range(2)] == ["val-0.tar/1.jpg", "val-0.tar/2.img"]
    assert index.labels.tolist() == [0, 1]
    assert "1 .depth, 1 without extension" in caplog.text


def test_images_by_content_that_a_zip_archive_does_not_list_are_named(tmp_path, caplog):
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        for name in ("a.jpg", "b.gif", "c"):
            archive.writestr(name, encode("GIF"))
    (tmp_path / "val_map.txt").write_text("a.jpg\t0\n")
    assert len(index_zip(tmp_path, "val")) == 1
    assert "are not listed in val_map.txt: 2, such as b.gif" in caplog.text


@pytest.mark.parametrize(
    ("image_format", "package", "extension", "remedy"),
    [("HEIF", "pillow_heif", ".heic", "pip install pillow-heif"), ("AVIF", "PIL._avif", ".avif", "--upgrade 'pillow>=11.3'")],
)
def test_an_optional_format_is_read_if_its_package_is_installed_and_else_named(
    image_format, package, extension, remedy, tmp_path, installed, caplog, monkeypatch
):
    pytest.importorskip(package)
    if image_format == "HEIF":
        importlib.import_module("pillow_heif").register_heif_opener()
    monkeypatch.setattr(data.index, "MIN_CACHED_IMAGES", 1)
    monkeypatch.setattr(data.index.time, "time_ns", lambda: 2**62)  # the files were written in the past
    content, jpeg = encode(image_format, 100), encode("JPEG")
    write(tmp_path / "val/a", {f"photo{extension}": content, "photo.jpg": jpeg})
    installed(package)
    cache = {"cache": tmp_path / "cache"}
    assert len(index_folder(tmp_path / "val", **cache)) == len(index_folder(tmp_path / "val", **cache)) == 1
    assert caplog.text.count(f"left out, but images by extension or content: 1 {extension}, such as a/photo{extension}; ") == 2
    assert remedy in caplog.text
    for decode in (decode_image, decode_pixels):
        with pytest.raises(ValueError, match=remedy.replace("+", r"\+")):
            decode(content)
    installed()
    index = index_folder(tmp_path / "val", **cache)  # not from the cache
    assert len(index) == 2
    decoded = np.asarray(ImageDataset(index, None).decode([index.name(0), index.name(1)].index(f"a/photo{extension}")))
    with Image.open(io.BytesIO(content)) as file:
        assert np.array_equal(decoded, np.asarray(file.convert("RGB")))


def test_the_content_of_files_with_a_known_extension_is_not_read():
    def read() -> bytes:
        pytest.fail("the file was read")

    assert classify("a.JPG", read) is FileKind.IMAGE
    assert classify("a.json", read) is FileKind.NO_IMAGE
    assert classify("a.dng", read) is FileKind.OTHER_IMAGE


def test_a_class_with_unread_images_only_is_refused_with_their_number(tmp_path):
    write(tmp_path / "val/a", {"1.jxl": b"\xff\x0a", "2.jxl": b"\xff\x0a"})
    with pytest.raises(DataError, match=r"a has no images .*Left out so far: 2 \.jxl"):
        index_split("folder", tmp_path, "val")


def test_a_checkpoint_of_a_version_that_read_fewer_files_is_refused_with_the_reason(tmp_path):
    write(tmp_path / "val/a", {"1.jpg": encode("JPEG")})
    stored = describe_index(index_folder(tmp_path / "val")) | {"format": 2}
    assert compare_descriptions(stored, describe_index(index_folder(tmp_path / "val"))) == ""
    write(tmp_path / "val/a", {"2.gif": encode("GIF")})
    change = compare_descriptions(stored, describe_index(index_folder(tmp_path / "val")))
    assert change == "class a had 1 images, now it has 2; files with more extensions are images since then, see docs/data.md"


# --- Colours


def test_transparency_is_ignored_and_the_stored_colours_are_used():
    """As by ``Image.convert("RGB")`` of Pillow: there is no background colour."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 4), dtype=np.uint8)
    pixels[..., 3] = [0, 0, 0, 0, 128, 128, 255, 255]
    image = Image.fromarray(pixels)
    for image_format in ("PNG", "TIFF"):
        buffer = io.BytesIO()
        image.save(buffer, image_format)
        for decoded in (decode_image(buffer.getvalue()), decode_pixels(buffer.getvalue()).permute(1, 2, 0)):
            assert np.array_equal(np.asarray(decoded), pixels[..., :3])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK"])
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "JPEG", "GIF", "BMP"])
def test_colours_of_other_modes_are_converted_as_by_pillow(mode, image_format):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    try:
        image.save(buffer, image_format)
    except (OSError, ValueError):
        pytest.skip("this format cannot store this mode")
    with Image.open(io.BytesIO(buffer.getvalue())) as file:
        expected = np.asarray(file.convert("RGB"))
    for decoded in (decode_image(buffer.getvalue()), decode_pixels(buffer.getvalue()).permute(1, 2, 0)):
        assert np.array_equal(np.asarray(decoded), expected)
