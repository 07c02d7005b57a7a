"""Datasets, samplers, loaders and transforms. Samples depend on (seed, epoch, index), not on workers or processes."""

import gzip
import hashlib
import importlib.util
import inspect
import io
import json
import os
import random
import shutil
import tarfile
import time
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.io
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.transforms import RandomResizedCropAndInterpolation

import data.sources
from data.build import build_datasets, build_eval_loader, build_mixup, build_train_loader
from data.classes import check_classes, read_class_map, read_real_labels
from data.datasets import ImageDataset
from data.decoding import decode_image, decode_pixels
from data.files import DataError
from data.index import Index
from data.loader import collate
from data.samplers import EvalBatches, TrainBatches, epoch_order
from data.sources.class_list import class_names
from data.sources.folder import Folder
from data.splits import build_index
from data.transforms import Normalize, RandomResizedCrop, create_eval_transform, create_train_transform
from models.preprocessing import Preprocessing
from scripts.pack_dataset import pack
from tests.conftest import reference, write_images
from tests.indices import index_folder, index_tar, index_zip
from tests.parquet import write_parquet_copy
from utils.config.loading import load_config

CPU = torch.device("cpu")
PHOTOGRAPHS = os.environ.get("IMAGENET_SAMPLES")


def config(toy_config, toy_data, *opts):
    return load_config(toy_config, ["DATA.DATA_PATH", str(toy_data), *opts])


def read_epoch(cfg, epoch, *, rank=0, world_size=1, first_update=0):
    """Read the part of an epoch that one process trains on. Return {index: image} and the indices in reading order."""
    dataset = build_datasets(cfg, training=True).train
    loader = build_train_loader(cfg, dataset, rank=rank, world_size=world_size, device=CPU)
    loader.set_position(epoch, first_update)
    images, order = {}, []
    for batch in loader:
        order += batch.indices
        images |= dict(zip(batch.indices, batch.images, strict=True))
    return images, order


def test_augmented_images_depend_only_on_seed_epoch_and_index(toy_config, toy_data):
    cfg = config(toy_config, toy_data, "AUG.REPROB", 1.0)
    expected, order = read_epoch(cfg, epoch=1)
    for workers in (1, 4):
        images, order_with_workers = read_epoch(
            config(toy_config, toy_data, "AUG.REPROB", 1.0, "DATA.NUM_WORKERS", workers), epoch=1
        )
        assert order_with_workers == order
        assert all(torch.equal(images[index], expected[index]) for index in expected)
    half_batch_cfg = config(toy_config, toy_data, "AUG.REPROB", 1.0, "DATA.BATCH_SIZE", 4)
    parts = [read_epoch(half_batch_cfg, epoch=1, rank=rank, world_size=2)[0] for rank in (0, 1)]
    assert not parts[0].keys() & parts[1].keys()
    merged = parts[0] | parts[1]
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[index], expected[index]) for index in expected)
    next_images, next_order = read_epoch(cfg, epoch=2)
    assert next_order != order
    assert not any(torch.equal(next_images[index], expected[index]) for index in next_images.keys() & expected.keys())


def test_epoch_resumed_in_the_middle_reads_the_remaining_images_in_the_same_order(toy_config, toy_data):
    cfg = config(toy_config, toy_data)
    _, full_order = read_epoch(cfg, epoch=3)
    _, remaining_order = read_epoch(cfg, epoch=3, first_update=5)
    assert remaining_order == full_order[5 * 8 :]


@pytest.mark.parametrize(("world_size", "batch_size", "accumulation"), [(1, 24, 1), (2, 12, 1), (4, 3, 2), (1, 4, 6)])
def test_update_uses_the_same_images_for_any_number_of_processes_and_accumulated_batches(world_size, batch_size, accumulation):
    order = epoch_order(100, seed=5, epoch=2).tolist()
    updates = [set() for _ in range(4)]
    for rank in range(world_size):
        batches = TrainBatches(100, batch_size, accumulation=accumulation, rank=rank, world_size=world_size, seed=5)
        batches.set_position(2, 0)
        assert batches.updates_per_epoch == 4
        for number, batch in enumerate(batches):
            updates[number // accumulation] |= {index for _, index in batch}
    assert updates == [set(order[start : start + 24]) for start in range(0, 96, 24)]


@pytest.mark.parametrize("num_samples", [1, 2, 5, 127, 128, 129])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_reads_every_image_once(num_samples, world_size):
    seen = []
    for rank in range(world_size):
        batches = EvalBatches(num_samples, 7, rank=rank, world_size=world_size)
        own_batches = list(batches)
        assert len(own_batches) == len(batches)
        seen += [index for batch in own_batches for _, index in batch]
    assert sorted(seen) == list(range(num_samples))


@pytest.mark.skipif(not PHOTOGRAPHS, reason="set IMAGENET_SAMPLES to a directory with the images of eval_transform.json")
@pytest.mark.parametrize(
    "recorded", reference("eval_transform"), ids=lambda f: f"{f['file'][:9]}-{f['img_size']}-{f['test_crop']}"
)
def test_evaluation_transform_of_photographs_matches_the_reference(recorded):
    crop_mode = "squash" if recorded["test_crop"] else "none"
    transform = create_eval_transform(preprocessing(recorded["img_size"], crop_mode=crop_mode))
    with Image.open(Path(PHOTOGRAPHS) / recorded["file"]) as file:
        image = transform(file.convert("RGB"))
    image = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], CPU)(image.unsqueeze(0))[0]
    side = recorded["img_size"]
    assert list(image.shape) == recorded["shape"]
    expected = [recorded[key] for key in ("mean", "std", "row0_first8", "center")]
    measured = [image.mean((1, 2)), image.std((1, 2)), image[0, 0, :8], image[:, side // 2, side // 2]]
    for measured_value, expected_value in zip(measured, expected, strict=True):
        torch.testing.assert_close(measured_value, torch.tensor(expected_value), atol=1e-5, rtol=0)


def preprocessing(size, **options):
    defaults = {"crop_mode": "squash", "crop_pct": 0.875, "interpolation": "bicubic"}
    mean_and_std = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    img_size = (size, size) if isinstance(size, int) else size
    return Preprocessing(**{"img_size": img_size} | defaults | mean_and_std | options)


def test_squash_mode_resizes_to_a_square_and_crops_the_centre():
    """The left half of the image is black. After the resize to a square, the edge of the black half is still in the middle."""
    pixels = np.full((100, 400, 3), 255, np.uint8)
    pixels[:, :200] = 0
    image = create_eval_transform(preprocessing(224, interpolation="bilinear"))(Image.fromarray(pixels))
    assert image.shape == (3, 224, 224)
    assert image.dtype == torch.uint8
    assert image[0, 100, 100] == 0
    assert image[0, 100, 124] == 255


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize(
    ("size", "crop_mode", "crop_pct", "resized", "box"),
    [
        # resized: (width, height) as in Pillow; box: (left, top, right, bottom) of the centre crop.
        (56, "squash", 0.875, (64, 64), (4, 4, 60, 60)),
        (56, "none", 0.875, (56, 56), (0, 0, 56, 56)),
        (56, "squash", 1.0, (56, 56), (0, 0, 56, 56)),
        (48, "short", 0.8, (100, 60), (26, 6, 74, 54)),  # 90 x 150 pixels (height x width) are resized to 60 x 100
        ((56, 84), "squash", 0.875, (96, 64), (6, 4, 90, 60)),
        ((60, 80), "none", 0.875, (80, 60), (0, 0, 80, 60)),
        (32, "squash", 0.875, (32, 32), (0, 0, 32, 32)),  # with inputs of at most 32 pixels, nothing is cropped
    ],
)
def test_evaluation_pixels_equal_those_of_pillow(size, crop_mode, crop_pct, resized, box, mode):
    transform = create_eval_transform(preprocessing(size, crop_mode=crop_mode, crop_pct=crop_pct, interpolation=mode))
    filter_ = Image.Resampling.BICUBIC if mode == "bicubic" else Image.Resampling.BILINEAR
    expected = NOISE.resize(resized, filter_).crop(box)
    assert np.array_equal(transform(NOISE).permute(1, 2, 0).numpy(), np.asarray(expected))


def test_short_mode_fills_another_aspect_ratio_without_distortion():
    """Sizes are height x width. To fill 30 x 90 pixels, the image of 90 x 150 is scaled by max(30 / 90, 90 / 150) = 0.6."""
    image = create_eval_transform(preprocessing((30, 90), crop_mode="short", crop_pct=1.0))(NOISE)
    expected = NOISE.resize((90, 54), Image.Resampling.BICUBIC).crop((0, 12, 90, 42))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("size", [33, 160, 224, 384, 448, 1000])
def test_default_resize_before_the_centre_crop_equals_the_reference(size):
    assert preprocessing(size).resized_to == (int(256 / 224 * size),) * 2


def test_preprocessing_description_contains_all_settings():
    described = preprocessing((160, 320), interpolation="random").to_dict()
    assert described == {
        "img_size": [160, 320],
        "resized_to": [182, 365],
        "crop_mode": "squash",
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "exif": False,
    }
    assert "182 x 365" in str(preprocessing((160, 320)))
    assert str(preprocessing(64, crop_mode="none")) == "resized to 64 x 64 pixels (bicubic), no crop"


def test_two_thousand_training_augmentations_succeed_and_most_of_them_differ():
    transform = create_train_transform(
        (32, 32),
        interpolation="bicubic",
        mean=[0.485, 0.456, 0.406],
        scale=(0.08, 1.0),
        ratio=(0.75, 4 / 3),
        hflip=0.5,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    seen = set()
    for _ in range(2_000):
        pixels = torch.as_tensor(transform(image))
        assert (pixels.shape, pixels.dtype) == ((3, 32, 32), torch.uint8)
        seen.add(pixels.numpy().tobytes())
    assert len(seen) > 1_000


def test_erasing_replaces_a_rectangle_by_normal_noise(toy_config, toy_data):
    plain, _ = read_epoch(config(toy_config, toy_data, "AUG.REPROB", 0.0), epoch=0)
    erased, _ = read_epoch(config(toy_config, toy_data, "AUG.REPROB", 1.0), epoch=0)
    noise = []
    for index, image in plain.items():
        changed = (image != erased[index]).any(dim=0)
        if not changed.any():  # no rectangle fitted into the image in ten attempts
            continue
        rows, columns = changed.nonzero().unbind(1)
        box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
        assert changed[box].all()
        noise.append(erased[index][(slice(None), *box)].flatten())
    noise = torch.cat(noise)
    assert abs(noise.mean()) < 0.05
    assert noise.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("mixup", "cutmix", "minmax"), [(0.8, 1.0, None), (0.8, 0.0, None), (0.0, 1.0, None), (0.0, 0.0, [0.2, 0.8])]
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_targets_are_probabilities_that_match_the_mixed_images(toy_config, toy_data, mixup, cutmix, minmax, smoothing):
    """Every pixel of an image equals its class id, so the mean of a mixed image is the mean class id weighted by its target."""
    opts = ["AUG.MIXUP", mixup, "AUG.CUTMIX", cutmix, "AUG.CUTMIX_MINMAX", minmax, "MODEL.LABEL_SMOOTHING", smoothing]
    mix = build_mixup(config(toy_config, toy_data, *opts))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2, 1])
    for step in range(20):
        images = labels.float().view(-1, 1, 1, 1).expand(-1, 3, 40, 40).clone()
        mixed, targets = mix(images, labels, step)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
        mean_label = (targets - smoothing / 3) / (1 - smoothing) @ torch.arange(3.0)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), mean_label, atol=1e-4, rtol=1e-4)


def test_mixing_depends_on_the_step_and_not_on_earlier_draws(toy_config, toy_data):
    mix = build_mixup(config(toy_config, toy_data))
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8) % 3
    first, _ = mix(images.clone(), labels, 7)
    torch.rand(3)
    repeated, _ = mix(images.clone(), labels, 7)
    next_step, _ = mix(images.clone(), labels, 8)
    assert torch.equal(first, repeated)
    assert not torch.equal(first, next_step)


def test_no_mixup_is_built_if_mixup_and_cutmix_are_disabled(toy_config, toy_data):
    assert build_mixup(config(toy_config, toy_data, "AUG.MIXUP", 0, "AUG.CUTMIX", 0)) is None


def test_a_data_set_of_one_class_is_refused_without_the_remedy_of_a_model_for_one_class():
    """MODEL.NUM_CLASSES 1 and class maps of one class are refused too."""
    for train in (["cat"], None):
        with pytest.raises(DataError, match=r"only one class, 'cat'.*at least two classes") as caught:
            check_classes(train, ["cat"], 3, "data")
        assert "NUM_CLASSES" not in str(caught.value)


def test_the_error_for_tar_shards_read_with_zip_says_to_leave_out_zip(tmp_path):
    (tmp_path / "val-000000.tar").write_bytes(b"x")
    with pytest.raises(DataError, match=r"Found val-000000\.tar: leave out --zip"):
        index_zip(tmp_path, "val")


@pytest.mark.parametrize(
    ("train", "val", "num_classes", "message"),
    [
        (["a", "b"], ["a"], 2, "the validation split lacks b"),
        (["a"], ["a", "b"], 1, "the validation split also has b"),
        (["b", "a"], ["a", "b"], 2, "in another order: class 0 is 'a' instead of 'b'"),
        (["a", "b"], ["a", "b"], 3, "add --opts MODEL.NUM_CLASSES 2"),
    ],
)
def test_mismatched_classes_are_rejected_with_a_remedy(train, val, num_classes, message):
    with pytest.raises(DataError, match=message):
        check_classes(train, val, num_classes, "root")


def test_invalid_directory_layouts_are_rejected(tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        index_folder(tmp_path / "val")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    with pytest.raises(DataError, match="put every image into a directory named after its class"):
        index_folder(tmp_path / "val")
    (tmp_path / "val" / "empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        index_folder(tmp_path / "val")


def create_folder_dataset(folder, **options):
    return ImageDataset(index_folder(folder), create_eval_transform(preprocessing(32)), **options)


def test_the_error_for_an_unreadable_image_contains_its_path(tmp_path):
    write_images(tmp_path, "val", classes=1, per_class=1)
    (tmp_path / "val/class0/000.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"class0/000.png: not a readable image"):
        create_folder_dataset(tmp_path / "val")[(0, 0)]


def test_images_with_non_ascii_file_names_are_read(tmp_path):
    write_images(tmp_path, "val", classes=2, per_class=3)
    os.rename(tmp_path / "val/class1/002.png", tmp_path / "val/class1/zürich 東京.png")
    dataset = create_folder_dataset(tmp_path / "val")
    assert len(dataset) == 6
    assert dataset.index.name(5) == "class1/zürich 東京.png"
    assert dataset[(0, 5)].label == 1
    assert dataset[(0, 5)].key == (0, 5)


def test_eval_loader_keeps_the_order_of_the_dataset(toy_config, toy_data):
    cfg = config(toy_config, toy_data)
    val = build_datasets(cfg, training=False).val
    batches = list(build_eval_loader(cfg, val, rank=0, world_size=1, device=CPU))
    assert [index for batch in batches for index in batch.indices] == list(range(33))
    assert torch.cat([batch.targets for batch in batches]).tolist() == val.index.labels.tolist()


@pytest.fixture(scope="module")
def packed(toy_data, tmp_path_factory):
    """Return {layout: (directory, options)}: the toy data in each archive layout, and the config options for reading it."""
    roots = {name: tmp_path_factory.mktemp(name) for name in ("zip", "tar")}
    for name, root in roots.items():
        for split in ("train", "val"):
            pack(toy_data, root, split, archive=name, shard_size=40)
    deflated = tmp_path_factory.mktemp("deflated")  # compressed with deflate, as by the zip command
    for split in ("train", "val"):
        shutil.copy(roots["zip"] / f"{split}_map.txt", deflated)
        with (
            zipfile.ZipFile(roots["zip"] / f"{split}.zip") as stored,
            zipfile.ZipFile(deflated / f"{split}.zip", "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for name in stored.namelist():
                archive.writestr(name, stored.read(name))
    return {
        "tar": (roots["tar"], []),
        "zip": (roots["zip"], ["DATA.ZIP_MODE", True, "DATA.CACHE_MODE", "no"]),
        "zip, part in memory": (roots["zip"], ["DATA.ZIP_MODE", True, "DATA.CACHE_MODE", "part"]),
        "zip, in memory": (roots["zip"], ["DATA.ZIP_MODE", True, "DATA.CACHE_MODE", "full"]),
        "deflated zip": (deflated, ["DATA.ZIP_MODE", True, "DATA.CACHE_MODE", "no"]),
    }


@pytest.fixture(scope="module")
def epoch_of_directories(toy_config, toy_data):
    return read_epoch(config(toy_config, toy_data), epoch=1)


@pytest.mark.parametrize("layout", ["tar", "parquet", "zip", "zip, part in memory", "zip, in memory", "deflated zip"])
def test_archives_give_the_same_tensors_as_directories(toy_config, toy_data, epoch_of_directories, packed, layout, tmp_path):
    root, opts = packed[layout] if layout != "parquet" else (write_parquet_copy(toy_data, tmp_path), [])
    expected, order = epoch_of_directories
    images, archive_order = read_epoch(config(toy_config, root, *opts, "DATA.NUM_WORKERS", 2), epoch=1)
    assert archive_order == order
    assert all(torch.equal(images[index], expected[index]) for index in expected)


class NestedFolder(Folder):
    """A layout for the test below: the classes are in ``<split>/images``."""

    title = "nested directories"

    def __init__(self, root, split):
        super().__init__(root / split, "images")


def test_a_layout_that_is_added_to_the_table_is_found_by_training(toy_config, toy_data, tmp_path, monkeypatch, caplog):
    for split in ("train", "val"):
        shutil.copytree(toy_data / split, tmp_path / split / "images")
    monkeypatch.setattr(data.sources, "LAYOUTS", {"nested": NestedFolder, **data.sources.LAYOUTS})
    index = build_index(config(toy_config, tmp_path), "train")
    assert (index.source, len(index), len(index.classes)) == (tmp_path / "train/images", 102, 3)
    assert f"is read, but not the directories beside it, such as {tmp_path / 'train'}" in caplog.text


class DigestDataset(torch.utils.data.Dataset):
    """SHA-256 digests of the image files of an archive. The dataset has ``reads`` items and cycles through the images."""

    def __init__(self, dataset, reads):
        self.dataset = dataset
        self.reads = reads

    def __len__(self):
        return self.reads

    def __getitem__(self, key):
        return hashlib.sha256(self.dataset.read(key % len(self.dataset))).hexdigest()


@pytest.mark.parametrize("layout", ["zip", "tar", "deflated zip"])
def test_four_workers_read_an_archive_concurrently(toy_data, packed, layout):
    root = packed[layout][0]
    dataset = ImageDataset(index_tar(root, "train") if layout == "tar" else index_zip(root, "train"), None)
    directory_dataset = ImageDataset(index_folder(toy_data / "train"), None)
    expected = [hashlib.sha256(directory_dataset.read(index)).hexdigest() for index in range(len(directory_dataset))]
    loader = torch.utils.data.DataLoader(DigestDataset(dataset, 4000), batch_size=50, num_workers=4)
    digests = [digest for batch in loader for digest in batch]
    assert digests == [expected[index % len(directory_dataset)] for index in range(4000)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.png\n", "expected a name, a tab"),
        ("a.png\t0\n../b.png\t2\n", "no image of class 1"),
        ("x.png\t0\n", "x.png is missing"),
        ("a.png\t5\n", "no image of class 0"),
    ],
)
def test_zip_archives_that_do_not_match_their_map_file_are_rejected(tmp_path, lines, message):
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        archive.writestr("a.png", b"")
    (tmp_path / "val_map.txt").write_text(lines)
    with pytest.raises(DataError, match=message):
        index_zip(tmp_path, "val")


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        ("cat\ncat\n", "duplicate class name cat"),
        ("cat\n", "has class id 1, but .* has 1 class names"),
        ("a\nb\nc\n", "no image of class 2"),
    ],
)
def test_class_names_that_do_not_match_the_class_ids_of_an_archive_are_rejected(tmp_path, class_names, message):
    write_zip([("a.png", b""), ("b.png", b"")], tmp_path)
    (tmp_path / "val_map.txt").write_text("a.png\t0\nb.png\t1\n")
    (tmp_path / "classes.txt").write_text(class_names)
    with pytest.raises(DataError, match=message):
        index_zip(tmp_path, "val")


def write_zip(entries, root):
    """Write the (entry, data) pairs to ``val.zip``, and a map file that assigns class 0 to every entry."""
    with zipfile.ZipFile(root / "val.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in entries:
            archive.writestr(entry, data)
    names = [entry if isinstance(entry, str) else entry.filename for entry, _ in entries]
    (root / "val_map.txt").write_text("".join(f"{name}\t0\n" for name in names))


def symlink_entry(name):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o120777 << 16
    return entry


@pytest.mark.parametrize(
    ("entry", "data", "message"),
    [
        ("../a.png", b"x", "points outside the archive"),
        ("/etc/passwd.png", b"x", "points outside the archive"),
        (symlink_entry("a.png"), b"/etc/passwd", "is a link"),
        ("a.png", bytes(2**22), "too many for an image"),
    ],
    ids=["parent directory", "absolute path", "symbolic link", "zip bomb"],
)
def test_unsafe_zip_entries_are_rejected(tmp_path, entry, data, message):
    write_zip([(entry, data)], tmp_path)
    with pytest.raises(DataError, match=message):
        index_zip(tmp_path, "val")


def test_a_duplicate_among_a_hundred_thousand_class_names_is_found_at_once(tmp_path):
    (tmp_path / "classes.txt").write_text("".join(f"{number}\n" for number in [*range(100_000), 99_999]))
    started = time.process_time()
    with pytest.raises(DataError, match="duplicate class name 99999"):
        class_names([tmp_path / "classes.txt"], [0, 1], tmp_path)
    assert time.process_time() - started < 5


def test_images_that_do_not_fit_into_memory_are_an_error_with_a_remedy(tmp_path):
    write_zip([("a.png", b"x")], tmp_path)
    index = index_zip(tmp_path, "val")
    index.sizes[:] = 2**50
    with pytest.raises(DataError, match=r"1048576\.0 GiB of memory per process.*--cache-mode no"):
        ImageDataset(index, None, in_memory=range(1))


def test_zip_entries_with_another_name_in_their_local_header_are_rejected(tmp_path):
    """Otherwise, two images would exchange their class ids, with correct checksums."""
    write_zip([("a.png", b"x"), ("b.png", b"y")], tmp_path)
    content = (tmp_path / "val.zip").read_bytes()
    start = content.index(b"PK\1\2")  # of the central directory
    directory = content[start:].replace(b"a.png", b"c.png").replace(b"b.png", b"a.png").replace(b"c.png", b"b.png")
    (tmp_path / "val.zip").write_bytes(content[:start] + directory)
    with pytest.raises(DataError, match=r"the entry at byte \d+ is not a\.png"):
        index_zip(tmp_path, "val")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("../a.png", tarfile.REGTYPE, "points outside the archive"),
        ("/a.png", tarfile.REGTYPE, "points outside the archive"),
        ("a.png", tarfile.SYMTYPE, "is a link"),
        ("a.png", tarfile.LNKTYPE, "is a link"),
        ("a.png", tarfile.REGTYPE, "has no class id"),
        ("a.txt", tarfile.REGTYPE, "has no images"),
    ],
)
def test_invalid_tar_entries_are_rejected(tmp_path, name, kind, message):
    with tarfile.open(tmp_path / "val-000000.tar", "w") as archive:
        entry = tarfile.TarInfo(name)
        entry.type = kind
        entry.linkname = "/etc/passwd"
        archive.addfile(entry)
    with pytest.raises(DataError, match=message):
        index_tar(tmp_path, "val")


def test_compressed_shard_is_rejected_with_a_remedy(tmp_path):
    (tmp_path / "val-000000.tar").write_bytes(gzip.compress(bytes(10240)))
    with pytest.raises(DataError, match="plain tar files, not compressed"):
        index_tar(tmp_path, "val")


@pytest.mark.parametrize("layout", ["zip", "tar"])
def test_the_error_for_a_damaged_image_in_an_archive_contains_its_name(packed, tmp_path, layout):
    root = shutil.copytree(packed[layout][0], tmp_path / "copy")
    index = (index_zip if layout == "zip" else index_tar)(root, "val")
    path = Path(index.archives[0])
    data = bytearray(path.read_bytes())
    data[index.offsets[3] : index.offsets[3] + 8] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"003\.png: not a readable image"):
        ImageDataset(index, lambda image: image)[(0, 3)]


def test_packing_downscales_large_images_and_copies_small_ones_unchanged(tmp_path):
    folder = tmp_path / "folder" / "val" / "a"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in {"large.JPEG": (60, 90), "small.jpg": (20, 30), "large.png": (64, 40), "a.b.png": (9, 9)}.items():
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    for layout in ("zip", "tar"):
        index = pack(tmp_path / "folder", tmp_path / layout, "val", archive=layout, short_side=32, workers=2)
        dataset = ImageDataset(index, None)
        sizes = [dataset.decode(position).size for position in range(4)]
        assert sizes == [(9, 9), (48, 32), (32, 51), (30, 20)]  # (width, height), sorted by name
        assert dataset.read(3) == (folder / "small.jpg").read_bytes()
        assert index.classes == ["a"]
        with pytest.raises(DataError, match="already exists"):
            pack(tmp_path / "folder", tmp_path / layout, "val", archive=layout)
    assert sorted(path.name for path in (tmp_path / "tar").iterdir()) == ["classes.txt", "val-000000.tar"]


def test_failed_packing_leaves_no_files(tmp_path):
    write_images(tmp_path, "val", classes=2, per_class=3)
    (tmp_path / "val/class1/001.png").write_bytes(b"no image")
    for layout in ("zip", "tar"):
        with pytest.raises(DataError, match=r"class1/001\.png: not a readable image"):
            pack(tmp_path, tmp_path / layout, "val", archive=layout, short_side=16)
        assert list((tmp_path / layout).iterdir()) == []


def write_unreadable_images(folder):
    """Write unreadable image files of several kinds (row D1 of docs/reliability.md). Return their names in sorted order."""
    folder.mkdir(parents=True)
    readable = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(readable, "JPEG")
    (folder / "cut_header.jpg").write_bytes(readable.getvalue()[:10])
    (folder / "cut_body.jpg").write_bytes(readable.getvalue()[: len(readable.getvalue()) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"not an image")
    (folder / "dangling.jpg").symlink_to(folder / "nowhere")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def partly_unreadable(tmp_path_factory):
    """Directory with ``train/``, and the names of its unreadable images.

    Class a has 2 readable images and all unreadable ones; class b has 20 readable images.
    """
    root = tmp_path_factory.mktemp("unreadable")
    write_images(root, "train", classes=1, per_class=20)
    (root / "train/class0").rename(root / "train/b")
    unreadable_names = write_unreadable_images(root / "train/a")
    for name in ("good1.png", "good2.png"):
        shutil.copy(root / "train/b/000.png", root / "train/a" / name)
    return root, unreadable_names


def test_every_unreadable_image_raises_an_error_by_default(partly_unreadable):
    root, unreadable_names = partly_unreadable
    dataset = create_folder_dataset(root / "train")
    for position in range(len(dataset)):
        name = Path(dataset.index.name(position)).name
        if name in unreadable_names:
            with pytest.raises(DataError, match=name):
                dataset[(0, position)]
        else:
            assert dataset[(0, position)].decode_errors == []


def test_skipped_images_are_counted_and_the_others_are_unchanged(partly_unreadable):
    root, unreadable_names = partly_unreadable
    dataset, default_dataset = create_folder_dataset(root / "train", unreadable="skip"), create_folder_dataset(root / "train")
    samples = [dataset[(1, position)] for position in range(len(dataset))]
    images, targets, keys, decode_errors = collate(samples)
    assert sorted(Path(dataset.index.name(index)).name for index, _ in decode_errors) == unreadable_names
    assert [index for _, index in keys] == [sample.key[1] for sample in samples if sample.image is not None]
    for image, target, key in zip(images, targets, keys, strict=True):
        assert target == default_dataset.index.labels[key[1]]
        assert torch.equal(image, default_dataset[key].image)
    with pytest.raises(DataError, match="All images of this batch are unreadable"):
        collate([sample for sample in samples if sample.image is None])


def test_replacement_images_have_matching_labels_and_depend_only_on_seed_epoch_and_index(partly_unreadable):
    root, unreadable_names = partly_unreadable
    dataset, same_seed, other_seed = (
        create_folder_dataset(root / "train", unreadable="replace", seed=seed) for seed in (3, 3, 4)
    )
    replacements, other_replacements = [], []
    for position in range(len(dataset)):
        sample, same_sample = dataset[(2, position)], same_seed[(2, position)]
        assert torch.equal(sample.image, same_sample.image)
        assert sample.key == same_sample.key
        assert sample.label == dataset.index.labels[sample.key[1]]
        assert bool(sample.decode_errors) == (Path(dataset.index.name(position)).name in unreadable_names)
        if sample.decode_errors:
            replacements.append(sample.key[1])
            other_replacements.append(other_seed[(2, position)].key[1])
    assert len(set(replacements)) > 1
    assert replacements != other_replacements


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "P", "RGBA", "LA"])
def test_images_of_unusual_pixel_modes_are_converted_to_rgb(tmp_path, mode):
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    if mode == "I;16":
        Image.fromarray(np.full((20, 20), 128 << 8, np.uint16)).save(folder / "x.png")
    else:
        image = Image.new("RGBA", (20, 20), (128, 128, 128, 100)) if mode != "CMYK" else Image.new("RGB", (20, 20), 3 * (128,))
        image.convert(mode).save(folder / "x.png", "JPEG" if mode == "CMYK" else "PNG")
    decoded = np.asarray(create_folder_dataset(tmp_path / "val").decode(0))
    assert decoded.shape == (20, 20, 3)
    assert abs(decoded.astype(int) - 128).max() <= 2


def test_more_unreadable_images_than_the_maximum_raise_an_error(toy_config, partly_unreadable):
    root, _ = partly_unreadable
    shutil.copytree(root / "train/b", root / "val/b", dirs_exist_ok=True)
    shutil.copytree(root / "train/b", root / "val/a", dirs_exist_ok=True)
    opts = ["MODEL.NUM_CLASSES", 2, "DATA.UNREADABLE", "replace", "DATA.BATCH_SIZE", 4]
    read_epoch(config(toy_config, root, *opts), epoch=0)
    with pytest.raises(DataError, match=r"more than DATA\.MAX_UNREADABLE=2"):
        read_epoch(config(toy_config, root, *opts, "DATA.MAX_UNREADABLE", 2), epoch=0)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 12), (2, 6), (4, 3)])
def test_repeated_augmentation_puts_three_copies_of_each_image_into_an_update(world_size, batch_size):
    order = epoch_order(100, seed=5, epoch=2).tolist()
    updates = [[] for _ in range(8)]
    for rank in range(world_size):
        batches = TrainBatches(100, batch_size, accumulation=1, repeats=3, rank=rank, world_size=world_size, seed=5)
        batches.set_position(2, 0)
        for number, batch in enumerate(batches):
            updates[number] += batch
    for number, keys in enumerate(updates):
        unique = order[4 * number : 4 * number + 4]
        # A key is (repeats * epoch + copy, index).
        assert sorted(keys) == sorted((3 * 2 + copy, index) for index in unique for copy in range(3))
    if world_size == 1:  # timm mixes each image with the one at the same position in the reversed batch
        assert all(a[1] != b[1] for keys in updates for a, b in zip(keys, keys[::-1], strict=True))


def test_repeated_copies_of_an_image_are_augmented_differently(toy_config, toy_data):
    dataset = build_datasets(config(toy_config, toy_data), training=True).train
    one, two, three = (dataset[(copy, 7)].image for copy in range(3))
    assert not torch.equal(one, two)
    assert not torch.equal(two, three)


def test_index_of_a_large_directory_is_cached_until_the_data_change(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("data.index.MIN_CACHED_IMAGES", 5)
    write_images(tmp_path, "train", classes=3, per_class=4)
    caplog.set_level("INFO")
    read = partial(index_folder, tmp_path / "train", cache=tmp_path / "cache")
    past = time.time() - 60
    for folder in (tmp_path / "train", *(tmp_path / "train").iterdir()):
        os.utime(folder, (past, past))
    first = read()
    assert "from the index cached" not in caplog.text
    second = read()
    assert "from the index cached" in caplog.text
    assert [second.name(position) for position in range(12)] == [first.name(position) for position in range(12)]
    assert second.classes == first.classes
    assert second.labels.tolist() == first.labels.tolist()
    (tmp_path / "train/class1/000.png").rename(tmp_path / "train/class1/new.png")
    assert "class1/new.png" in [read().name(position) for position in range(12)]
    (cache_file,) = (tmp_path / "cache").iterdir()
    cache_file.write_bytes(cache_file.read_bytes()[:100])
    assert len(read()) == 12


def test_cached_index_is_read_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("data.index.MIN_CACHED_IMAGES", 5)
    write_images(tmp_path / "d", "train", classes=3, per_class=4)
    pack(tmp_path / "d", tmp_path / "tar", "train", archive="tar")
    pack(tmp_path / "d", tmp_path / "zip", "train", archive="zip")
    set_old_times(tmp_path)
    cache = tmp_path / "cache"
    for relative, read in (
        ("d/train", lambda root: index_folder(root, cache=cache)),
        ("tar", lambda root: index_tar(root, "train", cache=cache)),
        ("zip", lambda root: index_zip(root, "train", cache=cache)),
    ):
        monkeypatch.chdir(tmp_path)
        first = read(Path(relative))
        monkeypatch.chdir("/")
        second = read(tmp_path / relative)
        assert len(list(cache.iterdir())) > 0
        assert [ImageDataset(second, None).read(position) for position in range(12)] == [
            (tmp_path / "d/train" / f"class{position // 4}/{position % 4:03d}.png").read_bytes() for position in range(12)
        ]
        assert second.source.absolute() == (tmp_path / first.source).absolute()
    assert len(list(cache.iterdir())) == 3


def set_old_times(root):
    """Set all modification times to one minute ago, because the index of recently changed data is not cached."""
    past = time.time() - 60
    for path in (root, *root.rglob("*")):
        os.utime(path, (past, past))


def test_new_shards_and_class_names_invalidate_the_cached_index(tmp_path, monkeypatch):
    monkeypatch.setattr("data.index.MIN_CACHED_IMAGES", 5)
    write_images(tmp_path / "d", "train", classes=3, per_class=4)
    pack(tmp_path / "d", tmp_path / "tar", "train", archive="tar", shard_size=6)
    (tmp_path / "tar/train-000001.tar").rename(tmp_path / "later.tar")
    (tmp_path / "tar/classes.txt").unlink()
    set_old_times(tmp_path)
    read = partial(index_tar, tmp_path / "tar", "train", cache=tmp_path / "cache")
    assert (len(read()), read().classes) == (6, ["0", "1"])
    (tmp_path / "later.tar").rename(tmp_path / "tar/train-000001.tar")
    set_old_times(tmp_path / "tar")
    assert (len(read()), read().classes) == (12, ["0", "1", "2"])
    (tmp_path / "tar/classes.txt").write_text("x\ny\nz\n")
    assert read().classes == ["x", "y", "z"]


def test_zip_entry_that_exceeds_the_maximum_decompressed_size_is_rejected(tmp_path):
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    data = compressor.compress(bytes(2**24)) + compressor.flush()
    (tmp_path / "val.zip").write_bytes(data)
    (tmp_path / "val_map.txt").write_text("a.png\t0\n")
    index = Index(
        source=tmp_path / "val.zip",
        classes=["0"],
        labels=np.zeros(1, np.int32),
        text=np.frombuffer(b"a.png", np.uint8),
        ends=np.array([5]),
        archives=[str(tmp_path / "val.zip")],
        archive=np.zeros(1, np.int32),
        offsets=np.zeros(1, np.int64),
        sizes=np.array([len(data)]),
        deflated=np.ones(1, bool),
        checksums=np.array([zlib.crc32(bytes(2**24))], np.uint32),
    )
    with pytest.raises(DataError, match="it exceeds the maximum decompressed size"):
        ImageDataset(index, None).decode(0)


def test_duplicate_image_keys_and_duplicate_class_names_are_rejected(tmp_path):
    write_images(tmp_path, "train", classes=2, per_class=2)
    with tarfile.open(tmp_path / "x-0.tar", "w") as archive:
        for name in ("a.png", "a.seg.png"):
            archive.add(tmp_path / "train/class0/000.png", name)
    with pytest.raises(DataError, match=r"a\.seg\.png has the same key as a\.png"):
        index_tar(tmp_path, "x")
    pack(tmp_path, tmp_path / "tar", "train", archive="tar")
    (tmp_path / "tar/classes.txt").write_text("crane\ncrane\n")
    with pytest.raises(DataError, match="duplicate class name crane"):
        index_tar(tmp_path / "tar", "train")


def test_processes_share_one_scan_of_each_split(toy_config, toy_data, monkeypatch):
    def run_once(task):
        return indices.pop(0) if indices else task()

    indices = [{split: index_folder(toy_data / split) for split in ("train", "val")}]
    monkeypatch.setattr("data.build.build_indices", None)  # the datasets have the indices that ``run_once`` returned
    datasets = build_datasets(config(toy_config, toy_data), training=True, run_once=run_once)
    assert indices == []
    assert (len(datasets.train), len(datasets.val)) == (102, 33)


def test_class_maps_translate_directory_names_to_class_ids_of_the_model(tmp_path):
    assert read_class_map("imagenet", ["n01443537", "n01440764"], 1000) == [1, 0]
    assert read_class_map("imagenet", ["0", "1", "10", "2"], 1000) == [0, 1, 10, 2]
    (tmp_path / "map.txt").write_text("cat 3\nsmall dog\t1\n\n")
    assert read_class_map(str(tmp_path / "map.txt"), ["cat", "small dog"], 4) == [3, 1]
    composed, decomposed = "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"
    (tmp_path / "map.txt").write_text(f" a\tb\t 2\n{decomposed} 1\n")
    assert read_class_map(str(tmp_path / "map.txt"), ["a\tb ", composed], 3) == [2, 1]
    (tmp_path / "map.txt").write_text(f"tea 0\n{decomposed} 1\n{composed} 2\n")
    with pytest.raises(DataError, match="another class id in an earlier line"):
        read_class_map(str(tmp_path / "map.txt"), ["tea", composed], 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat 3", "directories without a class id: dog"),
        ("cat 3\ndog 4", "class id 4, but MODEL.NUM_CLASSES=4"),
        ("cat 3\ndog 3", "cat and another directory have the same class id"),
        ("cat\ndog 1", "expected a directory name"),
    ],
)
def test_invalid_class_maps_are_rejected(tmp_path, text, message):
    (tmp_path / "map.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_class_map(str(tmp_path / "map.txt"), ["cat", "dog"], 4)


def test_class_maps_accept_a_checkpoint_with_fewer_or_repeated_class_names(tmp_path, caplog):
    (tmp_path / "map.txt").write_text("cat 5\ndog 1\n")
    assert read_class_map(str(tmp_path / "map.txt"), ["cat", "dog"], 10, ["cat", "dog"]) == [5, 1]
    assert "class cat is mapped to class id 5, but in the checkpoint, this class id is unused" in caplog.text
    names = ImageNetInfo().label_names()
    assert read_class_map("imagenet", names[:2], 1000, [*names, names[0]]) == [0, 1]


@pytest.mark.parametrize("first", [0, 1])
def test_imagenet_class_map_rejects_fewer_classes_than_the_model_if_they_are_numbered_consecutively(first):
    with pytest.raises(DataError, match=f"are numbered from {first}"):
        read_class_map("imagenet", [str(first + number) for number in range(12)], 1000)


def test_imagenet_real_labels_are_looked_up_by_the_number_in_the_file_name(tmp_path):
    (tmp_path / "real.json").write_text("[[3], [], [1, 2]]")
    names = ["n1/ILSVRC2012_val_00000003.JPEG", "n0/ILSVRC2012_val_00000002.JPEG"]
    assert read_real_labels(tmp_path / "real.json", names) == [[1, 2], []]
    with pytest.raises(DataError, match=r"no labels for cat\.jpg"):
        read_real_labels(tmp_path / "real.json", ["cat.jpg"])


@pytest.mark.parametrize(
    "text", ['[["0"], [1]]', "[[0.0], [1]]", "[[true], [1]]", "[[-1], [1]]", "[[[0]], [1]]", "[" * 100_000]
)
def test_real_labels_that_are_not_class_ids_are_rejected(text, tmp_path):
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(DataError, match=r"use real\.json"):
        read_real_labels(tmp_path / "real.json", ["ILSVRC2012_val_00000002.JPEG"])


def test_real_labels_are_rejected_if_the_class_ids_are_not_those_of_imagenet(toy_config, tmp_path):
    """Images of ImageNet's classes 0, 1 and 2, in directories whose order is that of ImageNet, or the reverse."""
    (tmp_path / "real.json").write_text(json.dumps([[number // 4, 7] for number in range(12)]))
    for kind, names in (("same", "abc"), ("other", "cba")):
        for number in range(12):
            path = tmp_path / kind / "val" / names[number // 4] / f"ILSVRC2012_val_{number + 1:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    opts = ["MODEL.NUM_CLASSES", 3, "TEST.REAL_LABELS", str(tmp_path / "real.json")]
    real_labels = build_datasets(config(toy_config, tmp_path / "same", *opts), training=False).real_labels
    assert [labels[0] for labels in real_labels] == [0] * 4 + [1] * 4 + [2] * 4
    with pytest.raises(DataError, match="only 4 of 12 images have their own class id among their labels"):
        build_datasets(config(toy_config, tmp_path / "other", *opts), training=False)
    (tmp_path / "map.txt").write_text("a 2\nb 1\nc 0\n")
    mapped = config(toy_config, tmp_path / "other", *opts, "TEST.CLASS_MAP", str(tmp_path / "map.txt"))
    assert build_datasets(mapped, training=False).class_ids == [2, 1, 0]


def test_seconds_waited_includes_only_the_loader(toy_config, toy_data, monkeypatch):
    """Work on the device, here a slow ``normalize``, is excluded."""
    loader = build_eval_loader(
        config(toy_config, toy_data),
        build_datasets(config(toy_config, toy_data), training=False).val,
        rank=0,
        world_size=1,
        device=CPU,
    )
    read, normalize = type(loader.loader.dataset).__getitem__, loader.normalize

    def slow_read(dataset, key):
        time.sleep(0.01)
        return read(dataset, key)

    def slow_normalize(images):
        time.sleep(0.1)
        return normalize(images)

    monkeypatch.setattr(type(loader.loader.dataset), "__getitem__", slow_read)
    loader.normalize = slow_normalize
    started = time.monotonic()
    num_batches = sum(1 for _ in loader)
    elapsed = time.monotonic() - started
    assert 33 * 0.01 <= loader.seconds_waited < elapsed - 0.1 * num_batches + 0.05


def smooth_image(size=(90, 70), mode="RGB") -> Image.Image:
    """Colour gradients with some noise, similar to a photograph."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(small).astype(int) + rng.integers(-12, 12, (size[1], size[0], 3)), 0, 255)
    return Image.fromarray(noisy.astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        encoded(smooth_image(), "JPEG"),
        encoded(smooth_image(), "JPEG", quality=30, subsampling=0),
        encoded(smooth_image(), "JPEG", progressive=True),
        encoded(smooth_image(mode="L"), "JPEG"),
        encoded(smooth_image(mode="CMYK"), "JPEG"),
        encoded(smooth_image(), "PNG"),
        encoded(smooth_image(mode="P"), "PNG"),
        encoded(smooth_image(), "WEBP"),
    ],
    ids=["jpeg", "jpeg 4:4:4", "progressive", "grey", "cmyk", "png", "palette", "webp"],
)
def test_training_decoder_returns_the_same_pixels_as_pillow(data):
    expected = torch.from_numpy(np.array(decode_image(data))).permute(2, 0, 1)
    assert torch.equal(decode_pixels(data), expected)


def test_images_are_decoded_by_a_torchvision_without_decoders(monkeypatch):
    """torchvision has deprecated its decoders. The module is loaded again without them."""
    for name in ("decode_jpeg", "decode_png"):
        monkeypatch.delattr(torchvision.io, name)
    spec = importlib.util.spec_from_file_location("without_decoders", inspect.getfile(decode_pixels))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    for file_format in ("JPEG", "PNG"):
        content = encoded(image, file_format)
        expected = torch.from_numpy(np.array(Image.open(io.BytesIO(content)))).permute(2, 0, 1)
        assert torch.equal(module.decode_pixels(content), expected)


def test_damaged_files_raise_the_same_errors_as_pillow(capfd):
    data = encoded(smooth_image(), "JPEG")
    for damaged in (data[: len(data) // 2], data[:-40], data[:100], b"", b"text"):
        errors = []
        for decode in (decode_image, decode_pixels):
            with pytest.raises(Exception, match=r"\w") as caught:
                decode(damaged)
            errors.append((type(caught.value), str(caught.value).split("0x")[0]))  # without the memory address
        assert errors[0] == errors[1]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("size", [224, (48, 64)])
def test_random_crops_match_timm_within_two_intensity_levels(size, interpolation):
    """Both transforms draw the same random numbers. Some of the crops are upsampled, others are downsampled."""
    options = {"scale": (0.08, 1.0), "ratio": (0.75, 4 / 3), "interpolation": interpolation}
    ours, theirs = RandomResizedCrop(size, **options), RandomResizedCropAndInterpolation(size, **options)
    differences = []
    for seed in range(15):
        image = smooth_image((120 + 18 * seed, 100 + 13 * seed))
        random.seed(seed)
        expected = np.asarray(theirs(image)).astype(int)
        random.seed(seed)
        crop = np.asarray(ours(image)).astype(int)
        next_draw = random.random()
        random.seed(seed)
        theirs(image)
        assert random.random() == next_draw  # both draw the same number of random numbers
        random.seed(seed)
        assert (np.asarray(ours(decode_pixels(encoded(image, "PNG")))) == crop).all()
        differences.append(crop - expected)
    all_differences = np.concatenate([difference.ravel() for difference in differences])
    assert np.abs(all_differences).max() <= 2
    assert abs(all_differences.mean()) < 0.01  # no bias
    assert np.abs(all_differences).mean() < 0.05


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 9)])
def test_random_crops_of_tiny_images_contain_at_least_one_pixel(size):
    crop = RandomResizedCrop((8, 6), scale=(0.08, 1.0), ratio=(0.75, 4 / 3), interpolation="bicubic")
    for seed in range(200):
        random.seed(seed)
        assert crop(Image.new("RGB", size, (9, 8, 7))).getcolors() == [(48, (9, 8, 7))]
