"""Positions decide: the same images, drawn the same, for any number of workers and processes."""

import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.build import build_datasets, build_eval_loader, build_mixup, build_train_loader
from data.datasets import DataError, FolderDataset, ZipDataset, check_classes
from data.samplers import EvalBatches, TrainBatches, epoch_order
from data.transforms import Normalize, create_eval_transform, create_train_transform
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
    transform = create_eval_transform(figures["img_size"], interpolation="bicubic", crop=figures["test_crop"])
    with Image.open(Path(PHOTOGRAPHS) / figures["file"]) as file:
        image = transform(file.convert("RGB"))
    image = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], CPU)(image.unsqueeze(0))[0]
    side = figures["img_size"]
    assert list(image.shape) == figures["shape"]
    expected = [figures[key] for key in ("mean", "std", "row0_first8", "center")]
    measured = [image.mean((1, 2)), image.std((1, 2)), image[0, 0, :8], image[:, side // 2, side // 2]]
    for mine, theirs in zip(measured, expected, strict=True):
        torch.testing.assert_close(mine, torch.tensor(theirs), atol=1e-5, rtol=0)


def test_evaluation_squashes_to_a_square_and_takes_the_centre():
    """A white picture with a black left half keeps its edge in the middle, whatever its shape was."""
    pixels = np.full((100, 400, 3), 255, np.uint8)
    pixels[:, :200] = 0
    image = create_eval_transform(224, interpolation="bilinear", crop=True)(Image.fromarray(pixels))
    assert image.shape == (3, 224, 224)
    assert image.dtype == torch.uint8
    assert image[0, 100, 100] == 0
    assert image[0, 100, 124] == 255


def test_the_recipe_draws_ten_thousand_times_without_a_fault():
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
    for _ in range(10_000):
        assert transform(image).shape == (3, 32, 32)


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
        (["a"], ["a", "b"], 1, "val/ has b besides"),
        (["a", "b"], ["a", "b"], 3, "add --opts MODEL.NUM_CLASSES 2"),
    ],
)
def test_classes_that_do_not_fit_are_refused_with_the_remedy(train, val, num_classes, message):
    with pytest.raises(DataError, match=message):
        check_classes(train, val, num_classes, "root")


def test_layouts_that_are_none_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        FolderDataset(tmp_path / "val", None)
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    with pytest.raises(DataError, match="put every image into a folder named after its class"):
        FolderDataset(tmp_path / "val", None)
    (tmp_path / "val" / "empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        FolderDataset(tmp_path / "val", None)


def test_an_unreadable_image_is_named(tmp_path):
    write_images(tmp_path, "val", classes=1, per_class=1)
    (tmp_path / "val/class0/000.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"class0/000.png: is no readable image"):
        FolderDataset(tmp_path / "val", create_eval_transform(32, interpolation="bicubic", crop=True))[(0, 0)]


def test_names_of_any_alphabet_are_read(tmp_path):
    write_images(tmp_path, "val", classes=2, per_class=3)
    os.rename(tmp_path / "val/class1/002.png", tmp_path / "val/class1/zürich 東京.png")
    dataset = FolderDataset(tmp_path / "val", create_eval_transform(32, interpolation="bicubic", crop=True))
    assert len(dataset) == 6
    assert dataset.name(5) == "class1/zürich 東京.png"
    assert dataset[(0, 5)][1:] == (1, 5)


def test_the_eval_loader_keeps_the_order(toy_config, toy_data):
    cfg = config(toy_config, toy_data)
    val = build_datasets(cfg, training=False).val
    batches = list(build_eval_loader(cfg, val, rank=0, world_size=1, device=CPU))
    assert [index for batch in batches for index in batch.indices] == list(range(33))
    assert torch.cat([batch.targets for batch in batches]).tolist() == val.labels.tolist()


@pytest.fixture(scope="module")
def zipped(toy_data, tmp_path_factory):
    """The toy data in the reference's archives, in the folders' order."""
    root = tmp_path_factory.mktemp("zipped")
    for split in ("train", "val"):
        folder = FolderDataset(toy_data / split, None)
        with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
            for index in range(len(folder)):
                archive.write(folder.open(index), folder.name(index))
        lines = [f"{folder.name(index)}\t{folder.labels[index]}\n" for index in range(len(folder))]
        (root / f"{split}_map.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("cache_mode", ["no", "part", "full"])
def test_archives_give_the_tensors_of_folders(toy_config, toy_data, zipped, cache_mode):
    expected, order = read_epoch(config(toy_config, toy_data), epoch=1)
    opts = ["DATA.ZIP_MODE", True, "DATA.CACHE_MODE", cache_mode, "DATA.NUM_WORKERS", 2]
    images, same_order = read_epoch(config(toy_config, zipped, *opts), epoch=1)
    assert same_order == order
    assert all(torch.equal(images[index], expected[index]) for index in expected)


class Bytes(torch.utils.data.Dataset):
    """What workers read from an archive, by its digest."""

    def __init__(self, dataset, reads):
        self.dataset, self.reads = dataset, reads

    def __len__(self):
        return self.reads

    def __getitem__(self, key):
        return hashlib.sha256(self.dataset.open(key % len(self.dataset)).read()).hexdigest()


def test_four_workers_read_an_archive_at_once(toy_data, zipped):
    dataset, folder = ZipDataset(zipped, "train", None), FolderDataset(toy_data / "train", None)
    expected = [hashlib.sha256(folder.open(index).read_bytes()).hexdigest() for index in range(len(folder))]
    loader = torch.utils.data.DataLoader(Bytes(dataset, 4000), batch_size=50, num_workers=4)
    read = [digest for batch in loader for digest in batch]
    assert read == [expected[index % len(folder)] for index in range(4000)]


def test_an_archive_travels_to_workers_that_are_spawned(zipped):
    dataset = ZipDataset(zipped, "train", None)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.open(3).read() == dataset.open(3).read()


@pytest.mark.parametrize(
    ("lines", "message"),
    [("a.png\n", "is not a name, a tab"), ("a.png\t0\n../b.png\t2\n", "no image of class 1"), ("x.png\t0\n", "lacks x.png")],
)
def test_archives_that_do_not_fit_their_map_are_refused(tmp_path, lines, message):
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        archive.writestr("a.png", b"")
    (tmp_path / "val_map.txt").write_text(lines)
    with pytest.raises(DataError, match=message):
        ZipDataset(tmp_path, "val", None)
