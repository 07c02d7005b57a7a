"""Positions decide: the same images, drawn the same, for any number of workers and processes."""

import gzip
import hashlib
import io
import os
import pickle
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
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from data.build import build_datasets, build_eval_loader, build_mixup, build_train_loader, collate
from data.classes import check_classes, read_class_map, read_real_labels
from data.datasets import ImageDataset, decode_image, decode_pixels
from data.index import DataError, Index, index_folder, index_tar, index_zip
from data.samplers import EvalBatches, TrainBatches, epoch_order
from data.transforms import Normalize, Preprocessing, RandomResizedCrop, as_pair, create_train_transform
from scripts.pack_dataset import pack
from tests.conftest import reference, write_images
from utils.config import load_config

CPU = torch.device("cpu")
PHOTOGRAPHS = os.environ.get("IMAGENET_SAMPLES")


def config(toy_config, toy_data, *opts):
    return load_config(toy_config, ["DATA.DATA_PATH", str(toy_data), *opts])


def read_epoch(cfg, epoch, *, rank=0, world_size=1, first_update=0):
    """{index: image} of one process's share, and the order of its indices."""
    dataset = build_datasets(cfg, training=True).train
    loader = build_train_loader(cfg, dataset, rank=rank, world_size=world_size, device=CPU)
    loader.set_position(epoch, first_update)
    images, order = {}, []
    for batch in loader:
        order += batch.indices
        images |= dict(zip(batch.indices, batch.images, strict=True))
    return images, order


def test_augmented_images_depend_on_seed_epoch_and_index_alone(toy_config, toy_data):
    cfg = config(toy_config, toy_data, "AUG.REPROB", 1.0)
    expected, order = read_epoch(cfg, epoch=1)
    for workers in (1, 2, 4):
        images, same_order = read_epoch(config(toy_config, toy_data, "AUG.REPROB", 1.0, "DATA.NUM_WORKERS", workers), epoch=1)
        assert same_order == order
        assert all(torch.equal(images[index], expected[index]) for index in expected)
    half = config(toy_config, toy_data, "AUG.REPROB", 1.0, "DATA.BATCH_SIZE", 4)
    shares = [read_epoch(half, epoch=1, rank=rank, world_size=2)[0] for rank in (0, 1)]
    assert not shares[0].keys() & shares[1].keys()
    together = shares[0] | shares[1]
    assert together.keys() == expected.keys()
    assert all(torch.equal(together[index], expected[index]) for index in expected)
    other, other_order = read_epoch(cfg, epoch=2)
    assert other_order != order
    assert not any(torch.equal(other[index], expected[index]) for index in other.keys() & expected.keys())


def test_an_epoch_entered_in_the_middle_goes_on_with_the_same_images(toy_config, toy_data):
    cfg = config(toy_config, toy_data)
    _, whole = read_epoch(cfg, epoch=3)
    _, rest = read_epoch(cfg, epoch=3, first_update=5)
    assert rest == whole[5 * 8 :]


@pytest.mark.parametrize(("world_size", "batch_size", "accumulation"), [(1, 24, 1), (2, 12, 1), (4, 3, 2), (1, 4, 6)])
def test_an_update_takes_the_same_images_however_they_are_divided(world_size, batch_size, accumulation):
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
        read = list(batches)
        assert len(read) == len(batches)
        seen += [index for batch in read for _, index in batch]
    assert sorted(seen) == list(range(num_samples))


@pytest.mark.skipif(not PHOTOGRAPHS, reason="IMAGENET_SAMPLES names no folder with the photographs of the figures")
@pytest.mark.parametrize(
    "figures", reference("eval_transform"), ids=lambda f: f"{f['file'][:9]}-{f['img_size']}-{f['test_crop']}"
)
def test_evaluation_sees_photographs_as_the_reference_does(figures):
    transform = preprocessing(figures["img_size"], crop_mode="squash" if figures["test_crop"] else "none").create_transform()
    with Image.open(Path(PHOTOGRAPHS) / figures["file"]) as file:
        image = transform(file.convert("RGB"))
    image = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], CPU)(image.unsqueeze(0))[0]
    side = figures["img_size"]
    assert list(image.shape) == figures["shape"]
    expected = [figures[key] for key in ("mean", "std", "row0_first8", "center")]
    measured = [image.mean((1, 2)), image.std((1, 2)), image[0, 0, :8], image[:, side // 2, side // 2]]
    for mine, theirs in zip(measured, expected, strict=True):
        torch.testing.assert_close(mine, torch.tensor(theirs), atol=1e-5, rtol=0)


def preprocessing(size, **options):
    defaults = {"crop_mode": "squash", "crop_pct": 0.875, "interpolation": "bicubic"}
    mean_and_std = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return Preprocessing(**{"img_size": as_pair(size)} | defaults | mean_and_std | options)


def test_evaluation_squashes_to_a_square_and_takes_the_centre():
    """A white picture with a black left half keeps its edge in the middle, whatever its shape was."""
    pixels = np.full((100, 400, 3), 255, np.uint8)
    pixels[:, :200] = 0
    image = preprocessing(224, interpolation="bilinear").create_transform()(Image.fromarray(pixels))
    assert image.shape == (3, 224, 224)
    assert image.dtype == torch.uint8
    assert image[0, 100, 100] == 0
    assert image[0, 100, 124] == 255


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize(
    ("size", "crop_mode", "crop_pct", "resized", "box"),
    [
        # Sizes as Pillow takes them, (width, height), and the box (left, top, right, bottom) of the centre crop.
        (56, "squash", 0.875, (64, 64), (4, 4, 60, 60)),
        (56, "none", 0.875, (56, 56), (0, 0, 56, 56)),
        (56, "squash", 1.0, (56, 56), (0, 0, 56, 56)),
        (48, "short", 0.8, (100, 60), (26, 6, 74, 54)),  # 90 x 150 becomes 60 x 100
        ((56, 84), "squash", 0.875, (96, 64), (6, 4, 90, 60)),
        ((60, 80), "none", 0.875, (80, 60), (0, 0, 80, 60)),
        (32, "squash", 0.875, (32, 32), (0, 0, 32, 32)),  # small images are not cropped
    ],
)
def test_evaluation_pixels_are_pillow_s(size, crop_mode, crop_pct, resized, box, mode):
    transform = preprocessing(size, crop_mode=crop_mode, crop_pct=crop_pct, interpolation=mode).create_transform()
    filter_ = Image.Resampling.BICUBIC if mode == "bicubic" else Image.Resampling.BILINEAR
    expected = NOISE.resize(resized, filter_).crop(box)
    assert np.array_equal(transform(NOISE).permute(1, 2, 0).numpy(), np.asarray(expected))


def test_a_short_crop_of_another_shape_covers_it_without_distortion():
    """A circle stays a circle: 90 x 150 into 30 x 90 scales by 0.6, the larger of 30 / 90 and 90 / 150."""
    image = preprocessing((30, 90), crop_mode="short", crop_pct=1.0).create_transform()(NOISE)
    expected = NOISE.resize((90, 54), Image.Resampling.BICUBIC).crop((0, 12, 90, 42))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("size", [33, 160, 224, 384, 448, 1000])
def test_the_default_crop_is_that_of_the_reference(size):
    assert preprocessing(size).resized_to == (int(256 / 224 * size),) * 2


def test_a_protocol_is_described_by_its_numbers():
    described = preprocessing((160, 320), interpolation="random").to_dict()
    assert described == {
        "img_size": [160, 320],
        "resized_to": [182, 365],
        "crop_mode": "squash",
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert "182 x 365" in str(preprocessing((160, 320)))
    assert str(preprocessing(64, crop_mode="none")) == "resized to 64 x 64 pixels (bicubic), no crop"


def test_the_recipe_draws_ten_thousand_times_without_a_fault_and_rarely_the_same():
    transform = create_train_transform(
        32,
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
    for _ in range(10_000):
        pixels = torch.as_tensor(transform(image))
        assert (pixels.shape, pixels.dtype) == ((3, 32, 32), torch.uint8)
        seen.add(pixels.numpy().tobytes())
    assert len(seen) > 5_000


def test_erasing_replaces_a_rectangle_by_normal_noise(toy_config, toy_data):
    plain, _ = read_epoch(config(toy_config, toy_data, "AUG.REPROB", 0.0), epoch=0)
    erased, _ = read_epoch(config(toy_config, toy_data, "AUG.REPROB", 1.0), epoch=0)
    noise = []
    for index, image in plain.items():
        changed = (image != erased[index]).any(dim=0)
        if not changed.any():  # ten tries, none fitted
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
def test_mixed_targets_are_probabilities_that_fit_the_images(toy_config, toy_data, mixup, cutmix, minmax, smoothing):
    """Images of one constant per class: the mean of a mixed image tells its true mixture."""
    opts = ["AUG.MIXUP", mixup, "AUG.CUTMIX", cutmix, "AUG.CUTMIX_MINMAX", minmax, "MODEL.LABEL_SMOOTHING", smoothing]
    mix = build_mixup(config(toy_config, toy_data, *opts))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2, 1])
    for step in range(20):
        images = labels.float().view(-1, 1, 1, 1).expand(-1, 3, 40, 40).clone()
        mixed, targets = mix(images, labels, step)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
        mean_label = (targets - smoothing / 3) / (1 - smoothing) @ torch.arange(3.0)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), mean_label, atol=1e-4, rtol=1e-4)


def test_mixing_depends_on_the_step_alone(toy_config, toy_data):
    mix = build_mixup(config(toy_config, toy_data))
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8) % 3
    one, _ = mix(images.clone(), labels, 7)
    torch.rand(3)
    again, _ = mix(images.clone(), labels, 7)
    other, _ = mix(images.clone(), labels, 8)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_no_mixing_leaves_class_ids(toy_config, toy_data):
    assert build_mixup(config(toy_config, toy_data, "AUG.MIXUP", 0, "AUG.CUTMIX", 0)) is None


@pytest.mark.parametrize(
    ("train", "val", "num_classes", "message"),
    [
        (["a", "b"], ["a"], 2, "val/ lacks b"),
        (["a"], ["a", "b"], 1, "val/ also has b"),
        (["a", "b"], ["a", "b"], 3, "add --opts MODEL.NUM_CLASSES 2"),
    ],
)
def test_classes_that_do_not_fit_are_refused_with_the_remedy(train, val, num_classes, message):
    with pytest.raises(DataError, match=message):
        check_classes(train, val, num_classes, "root")


def test_layouts_that_are_none_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        index_folder(tmp_path / "val")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    with pytest.raises(DataError, match="put every image into a directory named after its class"):
        index_folder(tmp_path / "val")
    (tmp_path / "val" / "empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        index_folder(tmp_path / "val")


def read_folder(folder, **options):
    return ImageDataset(index_folder(folder), preprocessing(32).create_transform(), **options)


def test_an_unreadable_image_is_named(tmp_path):
    write_images(tmp_path, "val", classes=1, per_class=1)
    (tmp_path / "val/class0/000.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"class0/000.png: not a readable image"):
        read_folder(tmp_path / "val")[(0, 0)]


def test_names_of_any_alphabet_are_read(tmp_path):
    write_images(tmp_path, "val", classes=2, per_class=3)
    os.rename(tmp_path / "val/class1/002.png", tmp_path / "val/class1/zürich 東京.png")
    dataset = read_folder(tmp_path / "val")
    assert len(dataset) == 6
    assert dataset.index.name(5) == "class1/zürich 東京.png"
    assert dataset[(0, 5)].label == 1
    assert dataset[(0, 5)].key == (0, 5)


def test_the_eval_loader_keeps_the_order(toy_config, toy_data):
    cfg = config(toy_config, toy_data)
    val = build_datasets(cfg, training=False).val
    batches = list(build_eval_loader(cfg, val, rank=0, world_size=1, device=CPU))
    assert [index for batch in batches for index in batch.indices] == list(range(33))
    assert torch.cat([batch.targets for batch in batches]).tolist() == val.index.labels.tolist()


@pytest.fixture(scope="module")
def packed(toy_data, tmp_path_factory):
    """Layout -> the toy data in it, and the options that read it."""
    roots = {name: tmp_path_factory.mktemp(name) for name in ("zip", "tar")}
    for name, root in roots.items():
        for split in ("train", "val"):
            pack(toy_data, root, split, archive=name, shard_size=40)
    deflated = tmp_path_factory.mktemp("deflated")  # as the zip command packs
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


@pytest.mark.parametrize("layout", ["tar", "zip", "zip, part in memory", "zip, in memory", "deflated zip"])
def test_archives_give_the_tensors_of_folders(toy_config, toy_data, packed, layout):
    root, opts = packed[layout]
    for epoch in (0, 1):
        expected, order = read_epoch(config(toy_config, toy_data), epoch=epoch)
        images, same_order = read_epoch(config(toy_config, root, *opts, "DATA.NUM_WORKERS", 2), epoch=epoch)
        assert same_order == order
        assert all(torch.equal(images[index], expected[index]) for index in expected)


class Bytes(torch.utils.data.Dataset):
    """What workers read from an archive, by its digest."""

    def __init__(self, dataset, reads):
        self.dataset = dataset
        self.reads = reads

    def __len__(self):
        return self.reads

    def __getitem__(self, key):
        return hashlib.sha256(self.dataset.read(key % len(self.dataset))).hexdigest()


@pytest.mark.parametrize("layout", ["zip", "tar", "deflated zip"])
def test_four_workers_read_an_archive_at_once(toy_data, packed, layout):
    root = packed[layout][0]
    dataset = ImageDataset(index_tar(root, "train") if layout == "tar" else index_zip(root, "train"), None)
    folder = ImageDataset(index_folder(toy_data / "train"), None)
    expected = [hashlib.sha256(folder.read(index)).hexdigest() for index in range(len(folder))]
    loader = torch.utils.data.DataLoader(Bytes(dataset, 4000), batch_size=50, num_workers=4)
    read = [digest for batch in loader for digest in batch]
    assert read == [expected[index % len(folder)] for index in range(4000)]


def test_an_archive_travels_to_workers_that_are_spawned(packed):
    dataset = ImageDataset(index_zip(packed["zip"][0], "train"), None)
    read = dataset.read(3)
    assert pickle.loads(pickle.dumps(dataset)).read(3) == read


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.png\n", "is not a name, a tab"),
        ("a.png\t0\n../b.png\t2\n", "no image of class 1"),
        ("x.png\t0\n", "x.png is missing"),
    ],
)
def test_archives_that_do_not_fit_their_map_are_refused(tmp_path, lines, message):
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        archive.writestr("a.png", b"")
    (tmp_path / "val_map.txt").write_text(lines)
    with pytest.raises(DataError, match=message):
        index_zip(tmp_path, "val")


def zip_of(entries, root):
    """An archive of (entry, data) with its map, all of class 0."""
    with zipfile.ZipFile(root / "val.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in entries:
            archive.writestr(entry, data)
    names = [entry if isinstance(entry, str) else entry.filename for entry, _ in entries]
    (root / "val_map.txt").write_text("".join(f"{name}\t0\n" for name in names))


def link(name):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o120777 << 16
    return entry


@pytest.mark.parametrize(
    ("entry", "data", "message"),
    [
        ("../a.png", b"x", "points outside the archive"),
        ("/etc/passwd.png", b"x", "points outside the archive"),
        (link("a.png"), b"/etc/passwd", "is a link"),
        ("a.png", bytes(2**22), "too many for an image"),
    ],
    ids=["parent", "absolute", "link", "bomb"],
)
def test_zip_entries_that_are_no_plain_image_are_refused(tmp_path, entry, data, message):
    zip_of([(entry, data)], tmp_path)
    with pytest.raises(DataError, match=message):
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
def test_tar_entries_that_are_no_plain_image_are_refused(tmp_path, name, kind, message):
    with tarfile.open(tmp_path / "val-000000.tar", "w") as archive:
        entry = tarfile.TarInfo(name)
        entry.type = kind
        entry.linkname = "/etc/passwd"
        archive.addfile(entry)
    with pytest.raises(DataError, match=message):
        index_tar(tmp_path, "val")


def test_a_compressed_shard_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "val-000000.tar").write_bytes(gzip.compress(bytes(10240)))
    with pytest.raises(DataError, match="plain tar files, not compressed"):
        index_tar(tmp_path, "val")


@pytest.mark.parametrize("layout", ["zip", "tar"])
def test_a_damaged_archive_names_the_image(packed, tmp_path, layout):
    root = shutil.copytree(packed[layout][0], tmp_path / "copy")
    index = (index_zip if layout == "zip" else index_tar)(root, "val")
    path = Path(index.archives[0])
    data = bytearray(path.read_bytes())
    data[index.offsets[3] : index.offsets[3] + 8] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"003\.png: not a readable image"):
        ImageDataset(index, lambda image: image)[(0, 3)]


def test_packing_makes_large_images_smaller_and_leaves_the_others(tmp_path):
    folder = tmp_path / "folder" / "val" / "a"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in {"large.JPEG": (60, 90), "small.jpg": (20, 30), "large.png": (64, 40), "a.b.png": (9, 9)}.items():
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    for layout in ("zip", "tar"):
        index = pack(tmp_path / "folder", tmp_path / layout, "val", archive=layout, short_side=32, workers=2)
        dataset = ImageDataset(index, None)
        sizes = [dataset.decode(position).size for position in range(4)]
        assert sizes == [(9, 9), (48, 32), (32, 51), (30, 20)]  # in the order of names; width first
        assert dataset.read(3) == (folder / "small.jpg").read_bytes()
        assert index.classes == ["a"]
        with pytest.raises(DataError, match="already exists"):
            pack(tmp_path / "folder", tmp_path / layout, "val", archive=layout)
    assert sorted(path.name for path in (tmp_path / "tar").iterdir()) == ["classes.txt", "val-000000.tar"]


def test_packing_that_fails_leaves_nothing_behind(tmp_path):
    write_images(tmp_path, "val", classes=2, per_class=3)
    (tmp_path / "val/class1/001.png").write_bytes(b"no image")
    for layout in ("zip", "tar"):
        with pytest.raises(DataError, match=r"class1/001\.png: not a readable image"):
            pack(tmp_path, tmp_path / layout, "val", archive=layout, short_side=16)
        assert list((tmp_path / layout).iterdir()) == []


def unreadable_images(folder):
    """Every kind of D1 that no decoder reads."""
    folder.mkdir(parents=True)
    good = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(good, "JPEG")
    (folder / "cut_header.jpg").write_bytes(good.getvalue()[:10])
    (folder / "cut_body.jpg").write_bytes(good.getvalue()[: len(good.getvalue()) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"not an image")
    (folder / "dangling.jpg").symlink_to(folder / "nowhere")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """20 readable images of class b, and in class a the unreadable ones beside 2 readable ones."""
    root = tmp_path_factory.mktemp("spoilt")
    write_images(root, "train", classes=1, per_class=20)
    (root / "train/class0").rename(root / "train/b")
    bad = unreadable_images(root / "train/a")
    for name in ("good1.png", "good2.png"):
        shutil.copy(root / "train/b/000.png", root / "train/a" / name)
    return root, bad


def test_no_unreadable_image_passes_where_errors_are_the_policy(spoilt):
    root, bad = spoilt
    dataset = read_folder(root / "train")
    for position in range(len(dataset)):
        name = Path(dataset.index.name(position)).name
        if name in bad:
            with pytest.raises(DataError, match=name):
                dataset[(0, position)]
        else:
            assert dataset[(0, position)].decode_errors == []


def test_skipped_images_are_counted_and_the_others_stay_as_they_are(spoilt):
    root, bad = spoilt
    dataset, strict = read_folder(root / "train", unreadable="skip"), read_folder(root / "train")
    samples = [dataset[(1, position)] for position in range(len(dataset))]
    images, targets, keys, decode_errors = collate(samples)
    assert sorted(Path(dataset.index.name(index)).name for index, _ in decode_errors) == bad
    assert [index for _, index in keys] == [sample.key[1] for sample in samples if sample.image is not None]
    for image, target, key in zip(images, targets, keys, strict=True):
        assert target == strict.index.labels[key[1]]
        assert torch.equal(image, strict[key].image)
    with pytest.raises(DataError, match="no image of its batch can be read"):
        collate([sample for sample in samples if sample.image is None])


def test_replacements_are_other_images_with_their_own_labels_drawn_from_the_position(spoilt):
    root, bad = spoilt
    one, again = (read_folder(root / "train", unreadable="replace", seed=seed) for seed in (3, 3))
    taken = set()
    for position in range(len(one)):
        sample, same = one[(2, position)], again[(2, position)]
        assert torch.equal(sample.image, same.image)
        assert sample.key == same.key
        assert sample.label == one.index.labels[sample.key[1]]
        assert bool(sample.decode_errors) == (Path(one.index.name(position)).name in bad)
        if sample.decode_errors:
            taken.add(sample.key[1])
    assert len(taken) > 1


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "P", "RGBA", "LA"])
def test_odd_but_readable_images_are_read(tmp_path, mode):
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    if mode == "I;16":
        Image.fromarray(np.full((20, 20), 128 << 8, np.uint16)).save(folder / "x.png")
    else:
        image = Image.new("RGBA", (20, 20), (128, 128, 128, 100)) if mode != "CMYK" else Image.new("RGB", (20, 20), 3 * (128,))
        image.convert(mode).save(folder / "x.png", "JPEG" if mode == "CMYK" else "PNG")
    decoded = np.asarray(read_folder(tmp_path / "val").decode(0))
    assert decoded.shape == (20, 20, 3)
    assert abs(decoded.astype(int) - 128).max() <= 2


def test_too_many_unreadable_images_end_the_run(toy_config, spoilt):
    root, _ = spoilt
    shutil.copytree(root / "train/b", root / "val/b", dirs_exist_ok=True)
    shutil.copytree(root / "train/b", root / "val/a", dirs_exist_ok=True)
    opts = ["MODEL.NUM_CLASSES", 2, "DATA.UNREADABLE", "replace", "DATA.BATCH_SIZE", 4]
    read_epoch(config(toy_config, root, *opts), epoch=0)
    with pytest.raises(DataError, match=r"more than DATA\.MAX_UNREADABLE=2"):
        read_epoch(config(toy_config, root, *opts, "DATA.MAX_UNREADABLE", 2), epoch=0)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 12), (2, 6), (4, 3)])
def test_repeated_augmentation_shows_an_update_the_same_images_three_times(world_size, batch_size):
    order = epoch_order(100, seed=5, epoch=2).tolist()
    updates = [[] for _ in range(8)]
    for rank in range(world_size):
        batches = TrainBatches(100, batch_size, accumulation=1, repeats=3, rank=rank, world_size=world_size, seed=5)
        batches.set_position(2, 0)
        for number, batch in enumerate(batches):
            updates[number] += batch
    for number, keys in enumerate(updates):
        unique = order[4 * number : 4 * number + 4]
        assert sorted(keys) == sorted((3 * 2 + again, index) for index in unique for again in range(3))
    if world_size == 1:  # as timm pairs them, first with last: never an image with itself
        assert all(a[1] != b[1] for keys in updates for a, b in zip(keys, keys[::-1], strict=True))


def test_copies_of_an_image_are_drawn_apart_and_as_an_epoch_of_their_own(toy_config, toy_data):
    dataset = build_datasets(config(toy_config, toy_data), training=True).train
    one, two, three = (dataset[(again, 7)].image for again in range(3))
    assert not torch.equal(one, two)
    assert not torch.equal(two, three)


def test_a_large_scan_is_kept_and_read_while_nothing_has_changed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("data.index.SMALLEST_CACHED", 5)
    write_images(tmp_path, "train", classes=3, per_class=4)
    caplog.set_level("INFO")
    read = partial(index_folder, tmp_path / "train", cache=tmp_path / "cache")
    age = time.time() - 60
    for folder in (tmp_path / "train", *(tmp_path / "train").iterdir()):
        os.utime(folder, (age, age))
    first = read()
    assert "from the index cached" not in caplog.text
    second = read()
    assert "from the index cached" in caplog.text
    assert [second.name(position) for position in range(12)] == [first.name(position) for position in range(12)]
    assert second.classes == first.classes
    assert second.labels.tolist() == first.labels.tolist()
    (tmp_path / "train/class1/000.png").rename(tmp_path / "train/class1/new.png")
    assert "class1/new.png" in [read().name(position) for position in range(12)]
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert len(read()) == 12


def test_a_kept_index_is_read_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("data.index.SMALLEST_CACHED", 5)
    write_images(tmp_path / "d", "train", classes=3, per_class=4)
    pack(tmp_path / "d", tmp_path / "tar", "train", archive="tar")
    pack(tmp_path / "d", tmp_path / "zip", "train", archive="zip")
    age(tmp_path)
    cache = tmp_path / "cache"
    for relative, read in (
        ("d/train", lambda root: index_folder(root, cache=cache)),
        ("tar", lambda root: index_tar(root, "train", cache=cache)),
        ("zip", lambda root: index_zip(root, "train", cache=cache)),
    ):
        monkeypatch.chdir(tmp_path)
        first = read(Path(relative))
        monkeypatch.chdir("/")
        again = read(tmp_path / relative)
        assert len(list(cache.iterdir())) > 0
        assert [ImageDataset(again, None).read(position) for position in range(12)] == [
            (tmp_path / "d/train" / f"class{position // 4}/{position % 4:03d}.png").read_bytes() for position in range(12)
        ]
        assert again.source.absolute() == (tmp_path / first.source).absolute()
    assert len(list(cache.iterdir())) == 3


def age(root):
    """As if nothing below had changed for a minute: what has just changed is not kept."""
    then = time.time() - 60
    for path in (root, *root.rglob("*")):
        os.utime(path, (then, then))


def test_new_shards_and_class_names_end_a_kept_index(tmp_path, monkeypatch):
    monkeypatch.setattr("data.index.SMALLEST_CACHED", 5)
    write_images(tmp_path / "d", "train", classes=3, per_class=4)
    pack(tmp_path / "d", tmp_path / "tar", "train", archive="tar", shard_size=6)
    (tmp_path / "tar/train-000001.tar").rename(tmp_path / "later.tar")
    (tmp_path / "tar/classes.txt").unlink()
    age(tmp_path)
    read = partial(index_tar, tmp_path / "tar", "train", cache=tmp_path / "cache")
    assert (len(read()), read().classes) == (6, ["0", "1"])
    (tmp_path / "later.tar").rename(tmp_path / "tar/train-000001.tar")
    age(tmp_path / "tar")
    assert (len(read()), read().classes) == (12, ["0", "1", "2"])
    (tmp_path / "tar/classes.txt").write_text("x\ny\nz\n")
    assert read().classes == ["x", "y", "z"]


def test_an_entry_that_lies_about_its_size_is_not_unpacked(tmp_path):
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


def test_two_images_of_a_key_and_two_classes_of_a_name_are_refused(tmp_path):
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


def test_processes_share_one_scan(toy_config, toy_data):
    calls = []

    def share(scan):
        calls.append(scan)
        return found.pop(0)

    found = [index_folder(toy_data / split) for split in ("train", "val")]
    datasets = build_datasets(config(toy_config, toy_data), training=True, run_once=share)
    assert len(calls) == 2
    assert (len(datasets.train), len(datasets.val)) == (102, 33)


def test_class_maps_name_the_models_classes(tmp_path):
    assert read_class_map("imagenet", ["n01443537", "n01440764"], 1000) == [1, 0]
    assert read_class_map("imagenet", ["0", "1", "10", "2"], 1000) == [0, 1, 10, 2]
    (tmp_path / "map.txt").write_text("cat 3\nsmall dog\t1\n\n")
    assert read_class_map(str(tmp_path / "map.txt"), ["cat", "small dog"], 4) == [3, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat 3", "no class id for directory dog"),
        ("cat 3\ndog 4", "class id 4, but MODEL.NUM_CLASSES=4"),
        ("cat 3\ndog 3", "cat and another directory have the same class id"),
        ("cat\ndog 1", "is not a directory name"),
    ],
)
def test_class_maps_that_do_not_fit_are_refused(tmp_path, text, message):
    (tmp_path / "map.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_class_map(str(tmp_path / "map.txt"), ["cat", "dog"], 4)


def test_numbers_that_a_shard_made_up_name_no_imagenet_class():
    with pytest.raises(DataError, match="are numbered from 0"):
        read_class_map("imagenet", ["0", "1", "2"], 1000)


def test_real_labels_are_looked_up_by_the_images_number(tmp_path):
    (tmp_path / "real.json").write_text("[[3], [], [1, 2]]")
    names = ["n1/ILSVRC2012_val_00000003.JPEG", "n0/ILSVRC2012_val_00000002.JPEG"]
    assert read_real_labels(tmp_path / "real.json", names) == [[1, 2], []]
    with pytest.raises(DataError, match=r"no labels for cat\.jpg"):
        read_real_labels(tmp_path / "real.json", ["cat.jpg"])


def test_waiting_time_is_that_of_the_loader_alone(toy_config, toy_data, monkeypatch):
    """Not that of work on the device, which would be the consumer's."""
    loader = build_eval_loader(
        config(toy_config, toy_data),
        build_datasets(config(toy_config, toy_data), training=False).val,
        rank=0,
        world_size=1,
        device=CPU,
    )
    read, normalize = type(loader.loader.dataset).__getitem__, loader.normalize

    def slow_read(dataset, key):
        time.sleep(0.02)
        return read(dataset, key)

    def slow_normalize(images):
        time.sleep(0.2)
        return normalize(images)

    monkeypatch.setattr(type(loader.loader.dataset), "__getitem__", slow_read)
    loader.normalize = slow_normalize
    started = time.monotonic()
    num_batches = sum(1 for _ in loader)
    elapsed = time.monotonic() - started
    assert 33 * 0.02 <= loader.seconds_waited < elapsed - 0.2 * num_batches + 0.05


def smooth_image(size=(90, 70), mode="RGB") -> Image.Image:
    """Colour gradients with some texture, as photographs have."""
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
def test_pixels_for_training_are_those_of_pillow(data):
    expected = torch.from_numpy(np.array(decode_image(data))).permute(2, 0, 1)
    assert torch.equal(decode_pixels(data), expected)


def test_damaged_files_have_the_errors_of_pillow(capfd):
    data = encoded(smooth_image(), "JPEG")
    for damaged in (data[: len(data) // 2], data[:-40], data[:100], b"", b"text"):
        errors = []
        for decode in (decode_image, decode_pixels):
            with pytest.raises(Exception, match=r"\w") as caught:
                decode(damaged)
            errors.append((type(caught.value), str(caught.value).split("0x")[0]))
        assert errors[0] == errors[1]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("size", [224, (48, 64)])
def test_random_crops_are_those_of_timm_up_to_two_levels(size, interpolation):
    """The same draws, enlarged and reduced; the mean over all pixels stays within a hundredth of a level."""
    options = {"scale": (0.08, 1.0), "ratio": (0.75, 4 / 3), "interpolation": interpolation}
    ours, theirs = RandomResizedCrop(size, **options), RandomResizedCropAndInterpolation(size, **options)
    differences = []
    for seed in range(40):
        image = smooth_image((120 + 7 * seed, 100 + 5 * seed))
        random.seed(seed)
        expected = np.asarray(theirs(image)).astype(int)
        random.seed(seed)
        crop = np.asarray(ours(image)).astype(int)
        after = random.random()
        random.seed(seed)
        theirs(image)
        assert random.random() == after  # later draws are the same too
        random.seed(seed)
        assert (np.asarray(ours(decode_pixels(encoded(image, "PNG")))) == crop).all()
        differences.append(crop - expected)
    flat = np.concatenate([difference.ravel() for difference in differences])
    assert np.abs(flat).max() <= 2
    assert abs(flat.mean()) < 0.01
    assert np.abs(flat).mean() < 0.05


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 9)])
def test_crops_of_the_smallest_images_have_a_pixel(size):
    crop = RandomResizedCrop((8, 6), scale=(0.08, 1.0), ratio=(0.75, 4 / 3), interpolation="bicubic")
    for seed in range(200):
        random.seed(seed)
        assert crop(Image.new("RGB", size, (9, 8, 7))).getcolors() == [(48, (9, 8, 7))]
