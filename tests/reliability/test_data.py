"""Damaged, malicious, unusual and changed data (rows D1, D5, D9 to D11 and R17 of docs/reliability.md)."""

import errno
import gc
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data.index
import data.sources.tar
import data.sources.zip
import jobs.train
import scripts.pack_dataset
from data.build import build_datasets, build_mixup, build_train_transform
from data.classes import read_class_map
from data.datasets import FileDataset, ImageDataset, Sample
from data.decoding import FORMATS, decode_image
from data.files import DataError
from data.index import UNKNOWN_SIZE, Index, compare_descriptions, describe_index
from data.loader import collate
from data.mixup import StepMixup
from data.samplers import TrainBatches
from data.sources.class_list import class_names
from data.splits import build_index
from scripts.pack_dataset import pack
from tests.conftest import CONFIGS, write_images
from tests.indices import index_folder, index_tar, index_zip
from tests.launch import run_main, run_script
from tests.runs import toy_arguments
from utils.config.loading import load_config

pytestmark = pytest.mark.reliability
ROOT = Path(__file__).parent.parent.parent


def png(value: int = 0, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, entries: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def tar_entries(count: int) -> dict[str, bytes]:
    """Entries of a tar shard: images of three classes, with their class ids."""
    return {
        name: content
        for number in range(count)
        for name, content in ((f"{number}.png", png(number)), (f"{number}.cls", str(number % 3).encode()))
    }


# --- Tar shards


def test_d9_tar_shard_damaged_at_any_of_100_positions_is_rejected(tmp_path):
    """The shard is truncated at a random byte, or one bit of a header is flipped."""
    shard = write_tar(tmp_path / "train-0.tar", tar_entries(30))
    intact, rng = shard.read_bytes(), random.Random(0)
    with tarfile.open(shard) as archive:
        headers = [entry.offset for entry in archive]
        end = archive.getmembers()[-1].offset_data + tarfile.BLOCKSIZE
    for trial in range(100):
        if trial % 2:
            damaged = intact[: rng.randrange(1, end + tarfile.BLOCKSIZE)]
        else:
            # Flip a bit of the first 154 bytes of a header: name, mode, owner, size, time, and the digits of the checksum.
            position = rng.choice(headers) + rng.randrange(154)
            damaged = intact[:position] + bytes([intact[position] ^ 1 << rng.randrange(7)]) + intact[position + 1 :]
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-0\.tar .*byte \d+"):
            index_tar(tmp_path, "train")
    for position in headers[1:]:  # truncated between two members, where tarfile reports no error
        shard.write_bytes(intact[:position])
        with pytest.raises(DataError, match=r"train-0\.tar .*byte \d+"):
            index_tar(tmp_path, "train")
    shard.write_bytes(intact)
    assert len(index_tar(tmp_path, "train")) == 30


def test_d9_data_after_the_end_of_a_shard_are_rejected(tmp_path):
    first, second = (write_tar(tmp_path / name, tar_entries(3)).read_bytes() for name in ("a.tar", "b.tar"))
    (tmp_path / "train-0.tar").write_bytes(first + second)
    with pytest.raises(DataError, match=f"data at byte {len(first)}, after the end of the archive"):
        index_tar(tmp_path, "train")


def test_tar_shard_with_an_unsupported_image_extension_is_rejected(tmp_path):
    write_tar(tmp_path / "train-0.tar", tar_entries(3) | {"9.jxl": b"", "9.cls": b"0"})
    with pytest.raises(DataError, match=r"9\.cls has no image"):
        index_tar(tmp_path, "train")


def test_files_that_macos_adds_to_an_archive_are_ignored(tmp_path):
    write_tar(tmp_path / "train-0.tar", tar_entries(3) | {"._0.png": b"x"})
    assert len(index_tar(tmp_path, "train")) == 3


@pytest.mark.parametrize("class_id", [15_075_141, 999_999_999_999])
def test_huge_class_id_is_rejected_before_memory_is_allocated(class_id, tmp_path):
    write_tar(tmp_path / "train-0.tar", tar_entries(3) | {"9.png": png(), "9.cls": str(class_id).encode()})
    with pytest.raises(DataError, match="has no image of class 3"):
        index_tar(tmp_path, "train")


def test_class_id_with_thousands_of_digits_is_rejected(tmp_path):
    write_zip(tmp_path, [png()])
    (tmp_path / "train_map.txt").write_text("0.png\t" + "9" * 5000)
    with pytest.raises(DataError, match="expected a name, a tab and a class id"):
        index_zip(tmp_path, "train")
    (tmp_path / "classes").write_text("cats " + "9" * 5000)
    with pytest.raises(DataError, match="expected a directory name, white space and a class id"):
        read_class_map(str(tmp_path / "classes"), ["cats"], 10)


# --- Zip archives


def write_zip(root: Path, contents: list[bytes]) -> None:
    with zipfile.ZipFile(root / "train.zip", "w") as archive:
        for number, content in enumerate(contents):
            archive.writestr(f"{number}.png", content)
    (root / "train_map.txt").write_text("".join(f"{n}.png\t{n % 2}\n" for n in range(len(contents))))


@pytest.mark.parametrize("in_memory", [range(0), range(4)], ids=["from disk", "in memory"])
def test_the_policy_for_unreadable_images_applies_to_archives(in_memory, tmp_path, monkeypatch):
    write_zip(tmp_path, [png(n) for n in range(4)])
    content = (tmp_path / "train.zip").read_bytes()
    position = content.index(png(2)) + 30
    (tmp_path / "train.zip").write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    index = index_zip(tmp_path, "train")
    options = {"in_memory": in_memory, "seed": 0}
    with pytest.raises(DataError, match=r"2\.png: not a readable image"):
        ImageDataset(index, np.asarray, **options)[0, 2]
    skipped = ImageDataset(index, np.asarray, unreadable="skip", **options)[0, 2]
    assert skipped.image is None
    replaced = ImageDataset(index, np.asarray, unreadable="replace", **options)[0, 2]
    assert replaced.key[1] != 2
    for number in (0, 1, 3):
        assert (ImageDataset(index, np.asarray, **options)[0, number].image == number).all()

    original = os.pread

    def fail_for_image_1(descriptor: int, size: int, offset: int) -> bytes:
        if offset == index.offsets[1]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", fail_for_image_1)
    dataset = ImageDataset(index, np.asarray, unreadable="skip", **options)
    # Image 1 cannot be read from the disk, and image 2 is damaged.
    assert [dataset[0, number].image is None for number in range(4)] == [False, True, True, False]


def test_map_files_with_additional_columns_and_zip_names_without_the_utf8_flag_are_read(tmp_path):
    name = "Stra\N{LATIN SMALL LETTER SHARP S}e.png"
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("0.png", png())
        archive.writestr("xxxxxxx.png", png())
    content = (tmp_path / "train.zip").read_bytes()
    # Store a UTF-8 name without the UTF-8 flag, as Info-ZIP does.
    (tmp_path / "train.zip").write_bytes(content.replace(b"xxxxxxx.png", name.encode("utf-8")))
    (tmp_path / "train_map.txt").write_text(f"0.png\t0\t \n{name}\t1 \textra\n", encoding="utf-8")
    index = index_zip(tmp_path, "train")
    assert [index.name(position) for position in range(2)] == ["0.png", name]


@pytest.mark.parametrize("change", ["size", "content", "cache format"])
def test_cached_index_is_not_used_after_a_change_with_the_same_modification_time(change, tmp_path, monkeypatch):
    monkeypatch.setattr(data.index, "MIN_CACHED_IMAGES", 1)
    past = 1_600_000_000 * 10**9

    def write(contents: list[bytes]) -> None:
        write_zip(tmp_path, contents)
        for path in (tmp_path / "train.zip", tmp_path / "train_map.txt"):
            os.utime(path, ns=(past, past))

    write([png(n) for n in range(4)])
    # Use a time in the future: the index of data that changed in the last 2 s is not cached.
    monkeypatch.setattr(data.index.time, "time_ns", lambda: 2**62)
    index_zip(tmp_path, "train", cache=tmp_path / "cache")
    scans, original = [], data.sources.zip._read_map
    monkeypatch.setattr(data.sources.zip, "_read_map", lambda path: scans.append(path) or original(path))
    index_zip(tmp_path, "train", cache=tmp_path / "cache")
    assert not scans
    if change == "cache format":
        monkeypatch.setattr(data.index, "CACHE_FORMAT", 99)
    else:
        write([png(n) for n in range(6)] if change == "size" else [png(n) for n in (3, 2, 1, 0)])
    index = index_zip(tmp_path, "train", cache=tmp_path / "cache")
    assert scans
    expected = index_zip(tmp_path, "train")
    assert len(index) == (6 if change == "size" else 4)
    for name in data.index._ARRAYS:
        assert np.array_equal(getattr(index, name), getattr(expected, name)), name


def test_an_index_cached_by_an_earlier_version_is_used(tmp_path, monkeypatch):
    """The file is written here as earlier versions wrote it. Its image has another name than the one in the directory."""
    write_images(tmp_path, "train", classes=1, per_class=1, size=8)
    source = tmp_path / "train"

    def stamp(path: Path) -> list[int]:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]

    header = {"format": 3, "classes": ["class0"], "archives": [], "notes": [[30, "a warning"]]}
    header["stamps"] = {str(path): stamp(path) for path in (source, source / "class0")}
    (image,) = (source / "class0").iterdir()
    name = f"./class0/{image.name}".encode()
    np.savez(
        tmp_path / "cache",
        header=np.array(json.dumps(header)),
        labels=np.zeros(1, np.int32),
        text=np.frombuffer(name, np.uint8),
        ends=np.array([len(name)], np.int64),
        sizes=np.array([image.stat().st_size], np.int64),
        **{key: np.empty(0, dtype) for key, dtype in (("archive", np.int32), ("offsets", np.int64), ("deflated", bool))},
        checksums=np.empty(0, np.uint32),
    )
    key = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:32]
    (tmp_path / "cache.npz").rename(tmp_path / f"{key}.npz")
    assert index_folder(source, cache=tmp_path).name(0) == name.decode()
    assert index_folder(source).name(0) == name.decode()[2:]


def test_damaged_index_cache_never_gives_a_wrong_number_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr(data.index, "MIN_CACHED_IMAGES", 1)
    write_zip(tmp_path, [png(n) for n in range(4)])
    # Use a time in the future: the index of data that changed in the last 2 s is not cached.
    monkeypatch.setattr(data.index.time, "time_ns", lambda: 2**62)
    index_zip(tmp_path, "train", cache=tmp_path / "cache")
    (cache_file,) = (tmp_path / "cache").iterdir()
    content, rng = cache_file.read_bytes(), random.Random(0)
    for _ in range(100):
        cache_file.write_bytes(damage(content, rng))
        assert len(index_zip(tmp_path, "train", cache=tmp_path / "cache")) == 4


# --- Directories


def test_d11_directory_that_cannot_be_listed_raises_an_error(tmp_path, monkeypatch):
    write_images(tmp_path, "train", classes=2, per_class=3, size=8)
    (tmp_path / "train/class1/nested").mkdir()
    (tmp_path / "train/class1/nested/x.png").write_bytes(png())
    original = os.scandir
    for unlistable in ("train", "class1", "nested"):

        def scandir(path, unlistable=unlistable):
            if Path(path).name == unlistable:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return original(path)

        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(DataError, match=f"{unlistable} cannot be listed"):
            index_folder(tmp_path / "train")
    monkeypatch.setattr(os, "scandir", original)
    original_stat = os.stat

    def stat(path, *arguments, **options):
        if str(path).endswith("class1"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original_stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(DataError, match=r"class1 cannot be listed .Permission denied"):
        index_folder(tmp_path / "train")
    monkeypatch.setattr(os, "stat", original_stat)
    assert len(index_folder(tmp_path / "train")) == 7


@pytest.mark.parametrize("zip_mode", [False, True])
def test_a_data_path_without_permissions_is_a_data_error(toy_data, toy_config, monkeypatch, zip_mode):
    cfg = load_config(toy_config, ["DATA.DATA_PATH", str(toy_data), "DATA.ZIP_MODE", zip_mode])

    def denied(original):
        def call(path=".", *arguments, **options):
            if str(path).startswith(str(toy_data)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return original(path, *arguments, **options)

        return call

    for name in ("stat", "scandir", "listdir"):
        monkeypatch.setattr(os, name, denied(getattr(os, name)))
    with pytest.raises(DataError, match=r"cannot be listed .Permission denied"):
        build_index(cfg, "train")


def test_directories_that_are_nested_too_deeply_are_a_data_error(tmp_path):
    """Without a limit, a thousand levels would exceed Python's recursion limit."""
    write_images(tmp_path, "train", classes=2, per_class=2, size=8)
    (tmp_path / "train/class0" / "/".join("a" * 90)).mkdir(parents=True)
    assert len(index_folder(tmp_path / "train")) == 4
    (tmp_path / "train/class0" / "/".join("a" * 150)).mkdir(parents=True)
    with pytest.raises(DataError, match="nested more than 100 levels deep"):
        index_folder(tmp_path / "train")


def test_a_list_of_class_names_that_cannot_be_read_is_a_data_error(tmp_path, monkeypatch):
    (tmp_path / "classes.txt").write_text("class0\n")
    original = Path.read_text

    def read_text(path, *arguments, **options):
        if path.name == "classes.txt":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(DataError, match=r"classes\.txt cannot be read .Permission denied"):
        class_names([tmp_path / "classes.txt"], [0], tmp_path)


def test_hidden_directories_and_links_to_parents_are_ignored(tmp_path, caplog):
    caplog.set_level("INFO")
    write_images(tmp_path, "train", classes=2, per_class=3, size=8)
    hidden = tmp_path / "train/class0/.ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "000.png").write_bytes(png())
    (tmp_path / "train/class0/loop").symlink_to(tmp_path / "train/class0")
    (tmp_path / "train/class0/split").symlink_to(tmp_path / "train")
    (tmp_path / "train/class0/itself").symlink_to("itself")
    (tmp_path / "train/itself").symlink_to("itself")
    (tmp_path / "train/class1/notes.txt").write_text("")
    assert len(index_folder(tmp_path / "train")) == 6
    assert "files that are not images" in caplog.text


# --- Images


def encode(kind: str, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def damage(content: bytes, rng: random.Random) -> bytes:
    """Change 1 to 7 bytes, and truncate the result with a probability of 0.3."""
    content = bytearray(content)
    for _ in range(rng.randrange(1, 8)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content[: rng.randrange(1, len(content) + 1)] if rng.random() < 0.3 else content)


def count_unreadable(trials: int, tmp_path) -> int:
    """Decode damaged files of every format, and count those that raise DataError. Other exceptions propagate."""
    write_images(tmp_path, "train", classes=1, per_class=1, size=8)
    dataset, rng, unreadable = ImageDataset(index_folder(tmp_path / "train"), np.asarray), random.Random(0), 0
    contents = [encode(kind) for kind in FORMATS] + [encode("JPEG", "CMYK"), encode("PNG", "P")]
    contents += [encode("TIFF", compression=name) for name in ("tiff_lzw", "tiff_deflate", "jpeg")]
    for trial in range(trials):
        content = damage(contents[trial % len(contents)], rng)
        dataset.read = lambda position, content=content: content
        try:
            dataset.decode(0)
        except DataError:
            unreadable += 1
    return unreadable


@pytest.mark.filterwarnings("ignore")  # Pillow warns about damaged files
@pytest.mark.parametrize("trials", [3_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_d10_damaged_images_raise_no_error_other_than_data_error(trials, tmp_path):
    assert count_unreadable(trials, tmp_path) > 0.15 * trials


def test_d1_unsupported_image_formats_are_rejected():
    """Formats outside ``FORMATS`` are rejected, even if Pillow has a decoder for them.

    By default, Pillow chooses the decoder by content. Its PostScript decoder starts an interpreter, and some others raise
    unexpected errors.
    """
    Image.init()
    for kind in ("EPS", "ICNS", "TGA", "DDS", "QOI"):
        if kind in Image.SAVE:
            with pytest.raises(Image.UnidentifiedImageError):
                decode_image(encode(kind))


def test_d1_supported_image_formats_are_read():
    """Some cameras write MPO files, which contain several images, with the extension ``.jpg``: the first image is read."""
    for kind in ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF"):
        assert decode_image(encode(kind)).size == (24, 24)
    buffer, image = io.BytesIO(), Image.new("RGB", (24, 24), "red")
    image.save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (24, 24), "blue")])
    assert np.asarray(decode_image(buffer.getvalue()))[0, 0, 0] > 250


def test_d1_16_bit_images_are_scaled_to_8_bits_and_32_bit_images_are_rejected(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    expected = (values >> 8).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, kind)
        assert (np.asarray(decode_image(buffer.getvalue()))[..., 0] == expected).all()
    header = b"P5 8 8 65535\n"  # PGM: 8 x 8 pixels of 16 bits
    assert (np.asarray(decode_image(header + values.astype(">u2").tobytes()))[..., 0] == expected).all()
    small_values = np.full((8, 8), 200, np.int32)
    for pixels in (values.astype(np.int32) * 1000, small_values, -small_values, values.astype(np.float32)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "TIFF")
        with pytest.raises(ValueError, match="convert it to 8 bits"):
            decode_image(buffer.getvalue())


def test_d1_named_pipes_and_huge_files_are_treated_as_unreadable_images(tmp_path):
    write_images(tmp_path, "train", classes=1, per_class=1, size=8)
    os.mkfifo(tmp_path / "train/class0/pipe.jpg")
    with open(tmp_path / "train/class0/sparse.jpg", "wb") as file:
        file.truncate(20 * 2**30)
    dataset = ImageDataset(index_folder(tmp_path / "train"), np.asarray)
    with pytest.raises(DataError, match=r"pipe\.jpg: not a readable image .not a regular file"):
        dataset[0, 1]
    with pytest.raises(DataError, match=r"sparse\.jpg: not a readable image .21474836480 bytes"):
        dataset[0, 2]
    file_dataset = FileDataset([tmp_path / "train/class0/pipe.jpg"], np.asarray, exif=False)
    assert file_dataset[0][2] == "not a regular file"


# --- Augmentation


@pytest.mark.parametrize("num_skipped", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [64, 127, 128])
@pytest.mark.parametrize("repeats", [1, 2, 3, 4])
def test_copies_of_an_image_are_never_mixed_with_each_other(batch_size, repeats, num_skipped):
    """Every image has its own class: a target with one class would mean that an image was mixed with a copy of itself."""
    batches = TrainBatches(1000, batch_size, accumulation=1, repeats=repeats, rank=0, world_size=1, seed=0)
    mixup = StepMixup(seed=0, num_classes=1000, mixup_alpha=0.8, label_smoothing=0.0)
    seen = []
    for step, batch in enumerate(itertools.islice(batches, 7)):
        samples = [Sample(torch.zeros(3, 8, 8, dtype=torch.uint8), index, (epoch, index), []) for epoch, index in batch]
        samples[:num_skipped] = [sample._replace(image=None) for sample in samples[:num_skipped]]
        images, targets, keys, _ = collate(samples)
        assert len(keys) == batch_size - num_skipped
        _, mixed = mixup(images.float(), targets, step)
        own_probabilities = mixed[torch.arange(len(keys)), targets]
        assert ((mixed > 0).sum(dim=1) == 2).all()
        assert (own_probabilities > 0).all()
        seen += batch
    assert len(set(seen)) == len(seen)


def test_every_process_of_a_run_builds_mixup_with_its_rank(toy_config, toy_data, tmp_path):
    def prepare(rank: int) -> None:
        original = jobs.train.build_mixup

        def build(cfg, *, rank: int, **options):
            (tmp_path / f"mixup{os.environ['RANK']}").write_text(str(rank))
            return original(cfg, rank=rank, **options)

        jobs.train.build_mixup = build

    arguments = toy_arguments(toy_config, toy_data, tmp_path, "TRAIN.EPOCHS", 1)
    assert run_main(arguments, tmp_path / "log", processes=2, prepare=prepare).exit_codes == [0, 0]
    assert [(tmp_path / f"mixup{rank}").read_text() for rank in range(2)] == ["0", "1"]


def test_mixup_depends_on_the_rank():
    cfg = load_config(CONFIGS / "flatten_swin_t.yaml")
    images, targets = torch.rand(8, 3, 32, 32), torch.arange(8)
    draws = [build_mixup(cfg, rank=rank)(images.clone(), targets, 5) for rank in (0, 0, 1)]
    assert torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][1], draws[2][1])


def test_invalid_augmentation_policy_is_rejected_when_the_transform_is_built():
    for policy in ("rand-m9-foo1", "rand-m9-mstd0.5-inc1x", "rand-m9-tfoo", "augmix-z3", "augmix-a0", "foo"):
        with pytest.raises(DataError, match="not a timm policy"):
            build_train_transform(load_config(CONFIGS / "flatten_swin_t.yaml", ["AUG.AUTO_AUGMENT", policy]))


@pytest.mark.slow  # -O makes Python recompile all packages
def test_invalid_augmentation_policy_is_rejected_with_assertions_disabled():
    code = (
        "from data.build import build_train_transform as build; from utils.config.loading import load_config as load\n"
        "import sys\n"
        "try: build(load('configs/flatten_swin_t.yaml', ['AUG.AUTO_AUGMENT', 'rand-m9-foo1']))\n"
        "except ValueError as error: sys.exit(0 if 'not a timm policy' in str(error) else 1)\n"
        "sys.exit(1)"
    )
    assert subprocess.run([sys.executable, "-O", "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m9-n3-mstd0.5-tweights", "augmix-m5-w4-d2", "original-mstd0.5", "3a"]
)
def test_valid_augmentation_policies_are_accepted(policy):
    build_train_transform(load_config(CONFIGS / "flatten_swin_t.yaml", ["AUG.AUTO_AUGMENT", policy]))


# --- Class maps and index caches


def test_class_map_may_have_a_byte_order_mark_but_no_conflicting_lines(tmp_path):
    path = tmp_path / "map.txt"
    path.write_bytes(b"\xef\xbb\xbfcats 3\ndogs 5\n")
    assert read_class_map(str(path), ["cats", "dogs"], 10) == [3, 5]
    path.write_text("cats 3\ndogs 5\ncats 4\n")
    with pytest.raises(DataError, match=r"map\.txt:3: cats has another class id"):
        read_class_map(str(path), ["cats", "dogs"], 10)


def test_index_is_not_cached_without_a_home_directory(toy_config, toy_data, monkeypatch):
    monkeypatch.setattr(data.index, "MIN_CACHED_IMAGES", 1)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    # Use a time in the future: the index of data that changed in the last 2 s is not cached.
    monkeypatch.setattr(data.index.time, "time_ns", lambda: 2**62)
    build_datasets(load_config(toy_config, ["DATA.DATA_PATH", str(toy_data)]), training=True)
    assert not Path("~").exists()


def test_unreadable_index_cache_is_ignored(tmp_path, monkeypatch):
    write_images(tmp_path, "train", classes=2, per_class=3, size=8)
    original = Path.is_file

    def is_file(path: Path) -> bool:
        if path.suffix == ".npz":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    assert len(index_folder(tmp_path / "train", cache=tmp_path / "closed")) == 6


# --- Packing


def test_killed_worker_ends_packing_with_an_error_and_leaves_no_files(tmp_path, monkeypatch):
    write_images(tmp_path, "val", classes=2, per_class=3)
    monkeypatch.setattr(scripts.pack_dataset, "_read", lambda *_: os.kill(os.getpid(), 9))
    with pytest.raises(DataError, match="was killed; lower --workers"):
        pack(tmp_path, tmp_path / "zip", "val", archive="zip", short_side=16, workers=2)
    assert list((tmp_path / "zip").iterdir()) == []


def test_packing_does_not_overwrite_an_existing_map_file(tmp_path):
    write_images(tmp_path, "val", classes=2, per_class=3)
    (tmp_path / "val_map.txt").write_text("mine")
    with pytest.raises(DataError, match=r"val_map\.txt already exists"):
        pack(tmp_path, tmp_path, "val", archive="zip")
    assert (tmp_path / "val_map.txt").read_text() == "mine"


def test_full_disk_ends_packing_and_the_error_gives_the_required_size(tmp_path, monkeypatch):
    write_images(tmp_path, "val", classes=2, per_class=3)

    def raise_no_space(*_arguments, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(zipfile.ZipFile, "writestr", raise_no_space)
    with pytest.raises(DataError, match=r"No space left on device.*the archives need 0"):
        pack(tmp_path, tmp_path / "zip", "val", archive="zip")
    assert list((tmp_path / "zip").iterdir()) == []


def test_packed_archive_is_verified_before_it_is_renamed(tmp_path, monkeypatch):
    write_images(tmp_path, "val", classes=2, per_class=3)
    original = data.sources.tar._add

    def corrupt(archive, name: str, content: bytes) -> None:
        original(archive, name, content if name.endswith(".cls") else content[:-1] + b"x")

    monkeypatch.setattr(data.sources.tar, "_add", corrupt)
    with pytest.raises(DataError, match="differs when read back; the disk may be faulty"):
        pack(tmp_path, tmp_path / "tar", "val", archive="tar")
    assert list((tmp_path / "tar").iterdir()) == []


def test_unreadable_image_ends_packing_and_the_error_names_it(tmp_path):
    write_images(tmp_path, "val", classes=2, per_class=3)
    os.mkfifo(tmp_path / "val/class0/pipe.png")
    for short_side in (0, 16):
        with pytest.raises(DataError, match=r"class0/pipe\.png: not a readable image .not a regular file"):
            pack(tmp_path, tmp_path / "tar", "val", archive="tar", short_side=short_side)
    assert list((tmp_path / "tar").iterdir()) == []


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_packing_and_leaves_no_files(signal_number, tmp_path):
    write_images(tmp_path, "val", classes=2, per_class=3)

    def send_signal(*_arguments) -> None:
        os.kill(os.getpid(), signal_number)

    def main_with_signal() -> None:
        signal.signal(signal_number, signal.SIG_DFL)  # if the tests run under nohup, SIGHUP is ignored
        scripts.pack_dataset._compare = send_signal
        scripts.pack_dataset.main()

    script = SimpleNamespace(__file__=scripts.pack_dataset.__file__, main=main_with_signal)
    outcome = run_script(script, [tmp_path, tmp_path / "tar", "--splits", "val"], tmp_path / "log")
    assert outcome.exit_codes == [128 + signal_number]
    assert list((tmp_path / "tar").iterdir()) == []


@pytest.mark.parametrize("archive", ["zip", "tar"])
def test_unusual_class_names_are_packed_and_read_back(archive, tmp_path):
    names = [" a", "b\x85c", "d\N{LINE SEPARATOR}e", "f\x1cg"]
    for number, name in enumerate(sorted(names)):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "0.png").write_bytes(png(number))
    packed = pack(tmp_path, tmp_path / "packed", "val", archive=archive)
    assert packed.classes == sorted(names)
    (tmp_path / "val/h\ni").mkdir()
    (tmp_path / "val/h\ni/0.png").write_bytes(png())
    with pytest.raises(DataError, match="cannot contain a class with a line break; rename it"):
        pack(tmp_path, tmp_path / "again", "val", archive=archive)


def test_file_names_that_are_not_utf8_are_packed_only_as_tar(tmp_path):
    (tmp_path / "val/a").mkdir(parents=True)
    (tmp_path / "val/a" / os.fsdecode(b"\xff.png")).write_bytes(png(7))
    packed = ImageDataset(pack(tmp_path, tmp_path / "tar", "val", archive="tar"), np.asarray)
    assert np.asarray(packed.decode(0))[0, 0, 0] == 7
    with pytest.raises(DataError, match="cannot contain a name that is not UTF-8; rename it, or pack as tar"):
        pack(tmp_path, tmp_path / "zip", "val", archive="zip")


def test_images_with_equal_stems_have_distinct_tar_keys(tmp_path):
    (tmp_path / "val/a").mkdir(parents=True)
    for number, name in enumerate(["a-2.jpg", "a.jpg", "a.png"]):
        (tmp_path / "val/a" / name).write_bytes(png(number))
    packed = ImageDataset(pack(tmp_path, tmp_path / "tar", "val", archive="tar"), np.asarray)
    assert sorted(int(np.asarray(packed.decode(position))[0, 0, 0]) for position in range(3)) == [0, 1, 2]


@pytest.mark.parametrize("archive", ["zip", "tar"])
def test_unusual_file_names_are_packed_and_read_back(archive, tmp_path):
    folder = tmp_path / "val/a"
    folder.mkdir(parents=True)
    names = ["a.jpg", "a.png", "a-2.png", "a-1.jpg", "x\x85y.png", "\N{LINE SEPARATOR}.png", "s p.png"]
    for number, name in enumerate(names):
        (folder / name).write_bytes(png(number))
    packed = ImageDataset(pack(tmp_path, tmp_path / "packed", "val", archive=archive), np.asarray)
    values = sorted(int(np.asarray(packed.decode(position))[0, 0, 0]) for position in range(len(packed)))
    assert values == list(range(len(names)))
    (folder / "tab\t.png").write_bytes(png())
    if archive == "zip":
        with pytest.raises(DataError, match="a tab or a line break; rename it"):
            pack(tmp_path, tmp_path / "again", "val", archive=archive)


# --- Changed data


def test_r17_comparison_of_index_descriptions_reports_the_change(tmp_path):
    write_images(tmp_path, "train", classes=3, per_class=3, size=8)
    folder = tmp_path / "train"
    original_description = describe_index(index_folder(folder))
    assert compare_descriptions(original_description, describe_index(index_folder(folder))) == ""
    assert original_description["num_images"] == 9

    def describe_change(change) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy)
        return compare_descriptions(original_description, describe_index(index_folder(copy)))

    assert describe_change(lambda root: (root / "class1/001.png").unlink()) == "class class1 had 3 images, now it has 2"
    assert describe_change(lambda root: (root / "class1/9.png").write_bytes(png())) == "class class1 had 3 images, now it has 4"
    renamed = describe_change(lambda root: (root / "class1/001.png").rename(root / "class1/9.png"))
    assert renamed == "class class1 has the same number of images, but different ones"
    assert (
        describe_change(lambda root: (root / "class1").rename(root / "other")) == "class class1 is missing, class other is new"
    )
    assert describe_change(lambda root: shutil.copytree(root / "class1", root / "more")) == "class more is new"
    write_zip(tmp_path, [png(n) for n in range(4)])
    archive = describe_index(index_zip(tmp_path, "train"))
    write_zip(tmp_path, [png(n + (n == 2)) for n in range(4)])  # changes image 2, which is of class 0
    assert "class 0 has the same number of images" in compare_descriptions(
        archive, describe_index(index_zip(tmp_path, "train"))
    )


# --- Large indices


def create_large_index(source: Path, num_images: int) -> Index:
    """Create an index similar to the one of ImageNet: 1,000 classes, and image names of 30 characters."""
    name = b"n01440764/n01440764_10026.JPEG"
    return Index(
        source=source,
        classes=[f"class{label}" for label in range(1000)],
        labels=(np.arange(num_images) % 1000).astype(np.int32),
        text=np.frombuffer(name * num_images, dtype=np.uint8),
        ends=np.arange(1, num_images + 1, dtype=np.int64) * len(name),
        archives=[],
        sizes=np.full(num_images, UNKNOWN_SIZE, dtype=np.int64),
        **{name: np.empty(0, dtype=data.index._ARRAYS[name]) for name in ("archive", "offsets", "deflated", "checksums")},
    )


def private_bytes() -> int:
    """Bytes of memory of this process that are not shared with other processes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def read_many_names(worker: int, index: Index, results) -> None:
    gc.freeze()  # otherwise, the garbage collector would write to shared pages, which copies them
    initial = private_bytes()
    for position in np.random.default_rng(worker).integers(0, len(index), 20_000):
        assert index.name(int(position)).endswith(".JPEG")
    results.put(private_bytes() - initial)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="private memory is measured only on Linux")
@pytest.mark.parametrize(
    ("num_images", "max_cpu_seconds"), [(1_280_000, 1), pytest.param(14_000_000, 2, marks=pytest.mark.slow)]
)
def test_d5_workers_share_the_memory_of_a_large_index_and_its_cache_loads_quickly(num_images, max_cpu_seconds, tmp_path):
    source = tmp_path / "data"
    data.index._write_cache(tmp_path / "index.npz", create_large_index(source, num_images), data.index._stamps([source]))
    started = time.process_time()
    index, _ = data.index._read_cache(tmp_path / "index.npz", data.sources.LAYOUTS["folder"](tmp_path, "data"))
    assert time.process_time() - started < max_cpu_seconds
    assert len(index) == num_images
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    workers = [context.Process(target=read_many_names, args=(number, index, results)) for number in range(4)]
    for worker in workers:
        worker.start()
    growth = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    assert max(growth) < 20 * 2**20
