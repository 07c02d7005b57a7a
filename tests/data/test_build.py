"""Effect of config keys on datasets, loaders and mixup, compared with Pillow and with hand-computed values."""

import io
import multiprocessing
import os
import random
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from data.build import (
    build_datasets,
    build_eval_loader,
    build_mixup,
    build_preprocessing,
    build_train_loader,
    build_train_transform,
)
from data.datasets import ImageDataset
from data.files import DataError
from data.samplers import TrainBatches, separate_copies
from data.transforms import create_eval_transform
from data.workers import create_loader
from tests.indices import index_folder, index_tar, index_zip
from utils.config.loading import load_config
from utils.random import seed_generators

CPU = torch.device("cpu")


def config(toy_config, toy_data, *opts):
    return load_config(toy_config, ["DATA.DATA_PATH", str(toy_data), *opts])


@pytest.fixture(scope="module")
def white_images(tmp_path_factory):
    """Dataset of white images in two classes."""
    root = tmp_path_factory.mktemp("white")
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (48, 48), "white").save(root / split / name / f"{number}.png")
    return root


def test_training_and_evaluation_images_are_normalised_with_the_configured_mean_and_std(toy_config, white_images):
    """A white pixel (1.0) becomes (1 - mean) / std in every channel."""
    opts = ["DATA.MEAN", [0.5, 0.4, 0.3], "DATA.STD", [0.1, 0.2, 0.25], "MODEL.NUM_CLASSES", 2, "AUG.REPROB", 0.0]
    cfg = config(toy_config, white_images, *opts, "AUG.AUTO_AUGMENT", "none", "AUG.COLOR_JITTER", 0.0, "DATA.BATCH_SIZE", 4)
    datasets = build_datasets(cfg, training=True)
    expected = torch.tensor([(1 - 0.5) / 0.1, (1 - 0.4) / 0.2, (1 - 0.3) / 0.25]).view(1, 3, 1, 1).expand(4, 3, 40, 40)
    for loader in (
        build_train_loader(cfg, datasets.train, rank=0, world_size=1, device=CPU),
        build_eval_loader(cfg, datasets.val, rank=0, world_size=1, device=CPU),
    ):
        torch.testing.assert_close(next(iter(loader)).images, expected)
    assert build_preprocessing(cfg).mean == (0.5, 0.4, 0.3)
    assert build_preprocessing(cfg).std == (0.1, 0.2, 0.25)


@pytest.mark.parametrize(
    ("opts", "mode"),
    [
        (["DATA.INTERPOLATION", "bicubic"], Image.Resampling.BICUBIC),
        (["DATA.INTERPOLATION", "bilinear"], Image.Resampling.BILINEAR),
        (["DATA.INTERPOLATION", "random"], Image.Resampling.BILINEAR),
        (["DATA.INTERPOLATION", "bicubic", "TEST.INTERPOLATION", "bilinear"], Image.Resampling.BILINEAR),
        (["DATA.INTERPOLATION", "bilinear", "TEST.INTERPOLATION", "bicubic"], Image.Resampling.BICUBIC),
    ],
)
def test_evaluation_interpolates_as_configured(opts, mode, toy_config, toy_data):
    """The pixels equal Pillow's: the image is resized to 45 x 45 (40 / 0.875, rounded down), then cropped to 40 x 40."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=np.uint8))
    transform = create_eval_transform(build_preprocessing(config(toy_config, toy_data, *opts, "TEST.CROP", True)))
    resized = image.resize((45, 45), mode).crop((2, 2, 42, 42))
    assert torch.equal(transform(image), torch.from_numpy(np.array(resized)).permute(2, 0, 1))


def test_random_crop_area_and_aspect_ratio_follow_their_config_keys(toy_config, toy_data):
    """A crop with a quarter of the area of a 200 x 200 image and an aspect ratio of 4 is 200 pixels wide and 50 pixels high."""
    cfg = config(toy_config, toy_data, "AUG.SCALE", [0.25, 0.25], "AUG.RATIO", [4.0, 4.0])
    crop = build_train_transform(cfg).transforms[0]
    seed_generators(0)
    for _ in range(5):
        _, _, height, width = crop.get_params(Image.new("RGB", (200, 200)), crop.scale, crop.ratio)
        assert (width, height) == (200, 50)


@pytest.mark.parametrize(("mixup", "cutmix", "expected"), [(50.0, 0.01, range(20, 41)), (0.01, 50.0, range(3))])
def test_mixup_and_cutmix_use_separate_alphas(mixup, cutmix, expected, toy_config, toy_data):
    """Count the batches with grey pixels after a black and a white image are mixed.

    Each batch uses mixup or CutMix, with a probability of one half each. A mixing ratio drawn from Beta(50, 50) is near 0.5, so
    mixup makes every pixel grey. A ratio drawn from Beta(0.01, 0.01) is near 0 or 1, so mixup rarely makes pixels grey. CutMix
    leaves every pixel black or white.
    """
    mix = build_mixup(config(toy_config, toy_data, "AUG.MIXUP", mixup, "AUG.CUTMIX", cutmix))
    num_grey_batches = 0
    for step in range(60):
        images = torch.cat([torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)])
        mixed, _ = mix(images, torch.tensor([0, 1]), step)
        num_grey_batches += bool(((mixed > 0.2) & (mixed < 0.8)).any())
    assert num_grey_batches in expected


def test_middle_image_of_a_batch_of_odd_size_is_mixed_with_the_first_image(toy_config, toy_data):
    """Every pixel of an image equals its class id, so the mean of a mixed image is the mean class id weighted by its target."""
    mix = build_mixup(
        config(toy_config, toy_data, "AUG.CUTMIX", 0.0, "MODEL.NUM_CLASSES", 7, "MODEL.LABEL_SMOOTHING", 0.0, "AUG.MIXUP", 50.0)
    )
    labels, partners = torch.arange(7), [6, 5, 4, 0, 2, 1, 0]
    for step in range(10):
        images = labels.float().view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()
        mixed, targets = mix(images, labels, step)
        assert mixed.shape == (7, 3, 4, 4)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ labels.float())
        torch.testing.assert_close(targets.diagonal(), targets[0, 0].expand(7))  # the same ratio at every position
        for position, partner in enumerate(partners):
            assert set(targets[position].nonzero().flatten().tolist()) == {position, partner}, position


def test_different_seeds_give_different_orders_augmentations_and_mixing(toy_config, toy_data):
    def read_first_epoch(seed: int):
        """Return the index order, {index: image after random erasing}, image 5 before erasing, and targets of a mixed batch."""
        cfg = config(toy_config, toy_data, "SEED", seed, "AUG.REPROB", 1.0)
        dataset = build_datasets(cfg, training=True).train
        loader = build_train_loader(cfg, dataset, rank=0, world_size=1, device=CPU)
        order, images = [], {}
        for batch in loader:
            order += batch.indices
            images |= dict(zip(batch.indices, batch.images, strict=True))
        return order, images, dataset[(0, 5)].image, build_mixup(cfg)(torch.rand(2, 3, 4, 4), torch.tensor([0, 1]), 0)[1]

    one, other = read_first_epoch(0), read_first_epoch(1)
    assert one[0] != other[0]
    assert not torch.equal(one[2], other[2])
    assert not torch.equal(one[3], other[3])
    assert not any(torch.equal(one[1][index], other[1][index]) for index in one[1].keys() & other[1].keys())


@pytest.mark.parametrize(
    ("training", "model_classes", "warning"), [(True, (), "have the same images"), (False, ("0", "1"), "matched by class id")]
)
def test_a_warning_about_the_data_is_logged_by_one_process(training, model_classes, warning, toy_config, white_images, caplog):
    cfg = config(toy_config, white_images, "MODEL.NUM_CLASSES", 2)
    build_datasets(cfg, training=training, model_classes=model_classes)
    assert warning in caplog.text
    caplog.clear()
    # Another process receives the indices and class ids instead of scanning the data and comparing the classes.
    received = iter([{split: index_folder(white_images / split) for split in ("train", "val")}, (None, ""), None, None])
    options = {"rank": 1, "world_size": 2, "run_once": lambda task: next(received)}
    build_datasets(cfg, training=training, model_classes=model_classes, **options)
    assert warning not in caplog.text


def test_sampler_position_counts_updates_instead_of_forward_passes():
    """With 3 forward passes per update, update 5 starts at batch 15 of the epoch."""
    options = {"accumulation": 3, "world_size": 2, "seed": 0, "rank": 1}
    batches = TrainBatches(100, 2, **options)
    assert batches.updates_per_epoch == 8
    full_epoch = list(batches)
    assert len(full_epoch) == len(TrainBatches(100, 2, **options)) == 24
    batches.set_position(0, 5)
    assert list(batches) == full_epoch[5 * 3 :]
    assert len(batches) == 9


def test_changed_pixel_in_a_zip_archive_fails_the_checksum(tmp_path):
    """A BMP file decodes with any pixel values, so that only the checksum in the archive detects the change."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, "BMP")
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        archive.writestr("a/0.bmp", buffer.getvalue())
    (tmp_path / "val_map.txt").write_text("a/0.bmp\t0\n")
    index = index_zip(tmp_path, "val")
    dataset = ImageDataset(index, lambda image: image)
    assert dataset[(0, 0)].image.getpixel((0, 0)) == (1, 2, 3)
    data = bytearray((tmp_path / "val.zip").read_bytes())
    data[int(index.offsets[0]) + len(buffer.getvalue()) - 1] ^= 1
    (tmp_path / "val.zip").write_bytes(data)
    with pytest.raises(DataError, match="fails its checksum"):
        ImageDataset(index, lambda image: image)[(0, 0)]


def write_shard(path, contents):
    with tarfile.open(path, "w") as archive:
        for label, content in enumerate(contents):
            for extension, part in (("bmp", content), ("cls", b"%d" % label)):
                entry = tarfile.TarInfo(f"{label}.{extension}")
                entry.size = len(part)
                archive.addfile(entry, io.BytesIO(part))


@pytest.mark.parametrize("opened", [False, True], ids=["before it is opened", "after it was opened"])
def test_a_tar_shard_that_changes_during_a_run_is_an_error(opened, tmp_path):
    """Tar files have no checksums: images at the former offsets would get the class ids of others."""
    images = []
    for brightness in (10, 20):
        buffer = io.BytesIO()
        Image.new("L", (8, 8), brightness).save(buffer, "BMP")
        images.append(buffer.getvalue())
    write_shard(tmp_path / "val-0.tar", images)
    os.utime(tmp_path / "val-0.tar", (1e9, 1e9))
    dataset = ImageDataset(index_tar(tmp_path, "val"), lambda image: image)
    if opened:
        assert [dataset[(0, position)].image.getpixel((0, 0))[0] for position in range(2)] == [10, 20]
    write_shard(tmp_path / "other.tar", images[::-1])
    (tmp_path / "val-0.tar").write_bytes((tmp_path / "other.tar").read_bytes())
    with pytest.raises(DataError, match=r"val-0\.tar was changed after its images were listed"):
        dataset[(0, 0)]


def test_reading_an_image_does_not_change_the_random_generators_of_the_process(toy_config, toy_data):
    dataset = build_datasets(config(toy_config, toy_data), training=True).train
    for generator in (random.random, np.random.rand, lambda: torch.rand(1).item()):
        seed_generators(3)
        expected = generator()
        seed_generators(3)
        dataset[(0, 1)]
        assert generator() == expected


@pytest.mark.parametrize("batch_size", range(5, 12))
def test_images_that_occur_at_most_twice_in_a_batch_are_never_mixed_with_their_copy(batch_size):
    """In a batch of size B, position i is mixed with B - 1 - i; if B is odd, the middle position is mixed with position 0."""
    rng = random.Random(batch_size)
    for _ in range(200):
        indices = list(range(batch_size))
        for position in rng.sample(range(2, batch_size), rng.randrange(1, 3)):
            indices[position] = position % 2  # a copy of image 0 or 1
        rng.shuffle(indices)
        order = separate_copies(indices)
        assert sorted(order) == list(range(batch_size))
        ordered = [indices[position] for position in order]
        partners = ordered[::-1]
        if batch_size % 2:
            partners[batch_size // 2] = ordered[0]
        if max(map(indices.count, indices)) == 2:
            assert all(one != other for one, other in zip(ordered, partners, strict=True)), indices


def test_loader_workers_run_also_where_python_would_not_fork_them():
    """Python 3.14 starts processes from a server, which is then their parent; a worker ends when its parent changes."""
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        loader = create_loader([10, 20, 30], num_workers=1, batch_size=2, collate_fn=list)
        assert list(loader) == [[10, 20], [30]]
    finally:
        multiprocessing.set_start_method(method, force=True)
