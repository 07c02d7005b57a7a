"""Training with TRAIN.SIZE_SCHEDULE and AUG.MIXUP_OFF_EPOCH: whole runs, loaders, and the replay of an update."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import engine.trainer
from data.build import build_datasets, build_mixup, build_train_loader
from engine.dry_run import choose_epoch
from engine.replay import read_update
from tests.engine.test_trainer import create_trainer
from tests.launch import run_main
from tests.reliability.test_signals import call_before
from tests.runs import assert_equal, read_state, toy_arguments
from utils.config.loading import load_config

CPU = torch.device("cpu")
UPDATES_PER_EPOCH = 6
# Images up to 32 pixels are cropped by another transform than larger ones.
OPTIONS = {
    **{"TRAIN.SIZE_SCHEDULE": "[[0, 24], [1, 36, 28], [2, 40]]", "AUG.MIXUP_OFF_EPOCH": 2, "TRAIN.EPOCHS": 3},
    **{"DATA.BATCH_SIZE": 16, "DATA.NUM_WORKERS": 2, "SAVE_STEPS": 2},
}
OPTS = [entry for item in OPTIONS.items() for entry in item]


def is_hard(targets: torch.Tensor) -> bool:
    """Whether the targets are those of single images, with label smoothing of 0.1 over 3 classes."""
    return bool((targets.max(dim=1).values - (0.9 + 0.1 / 3)).abs().max() < 1e-6)


def record_batches(path: Path):
    """Return a ``prepare`` function: a run appends size, mean and kind of targets of each training batch to a file."""

    def prepare(_rank: int) -> None:
        mix = engine.trainer.mix_batches

        def recorded(*arguments, **options):
            for images, targets in mix(*arguments, **options):
                with open(path, "a") as file:
                    file.write(json.dumps([list(images.shape[2:]), images.double().mean().item(), is_hard(targets)]) + "\n")
                yield images, targets

        engine.trainer.mix_batches = recorded

    return prepare


def test_a_run_with_several_sizes_that_ends_mixup_is_resumed_exactly_within_an_epoch_of_another_size(
    toy_config, toy_data, tmp_path
):
    """The second run is killed in its second epoch, as soon as its checkpoint within that epoch is written."""
    first, second = tmp_path / "first", tmp_path / "second"

    def wait_and_kill() -> None:
        while not (second / "toy/default/checkpoint_000000008.pth").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    outcome = run_main(
        toy_arguments(toy_config, toy_data, first, *OPTS), tmp_path / "log", prepare=record_batches(tmp_path / "batches")
    )
    assert outcome.exit_codes == [0], outcome.output
    assert "epoch 2/3: training with images of 36 x 28 pixels" in outcome.output
    batches = [json.loads(line) for line in (tmp_path / "batches").read_text().splitlines()]
    for epoch, size in enumerate(([24, 24], [36, 28], [40, 40])):
        in_epoch = batches[epoch * UPDATES_PER_EPOCH : (epoch + 1) * UPDATES_PER_EPOCH]
        assert [shape for shape, _, _ in in_epoch] == [size] * UPDATES_PER_EPOCH
        assert all(hard for _, _, hard in in_epoch) == (epoch == 2)

    arguments = toy_arguments(toy_config, toy_data, second, *OPTS)
    killed = run_main(
        arguments, tmp_path / "log", prepare=lambda _: call_before(engine.trainer.Trainer, "update", 10, wait_and_kill)
    )
    assert killed.exit_codes == [-9]
    outcome = run_main(arguments, tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert "resumed after update 8" in outcome.output
    assert_equal(read_state(second / "toy/default"), read_state(first / "toy/default"))

    cfg = load_config(toy_config, ["DATA.DATA_PATH", str(toy_data), *OPTS])
    dataset = build_datasets(cfg, training=True).train
    for update in (10, 15):
        ((images, targets, _),) = read_update(cfg, dataset, update, rank=0, world_size=1, device=CPU)
        assert [list(images.shape[2:]), images.double().mean().item(), is_hard(targets)] == batches[update]


def test_all_copies_of_an_image_in_an_epoch_have_the_size_of_the_epoch(toy_config, toy_data, tmp_path):
    """Repeated augmentation and balanced sampling number the copies of an image in the epochs of their keys."""
    shutil.copytree(toy_data, tmp_path / "data")
    for path in sorted((tmp_path / "data/train/class0").iterdir())[8:]:  # 8, 34 and 34 images: up to 4 copies in an epoch
        path.unlink()
    options = ["AUG.REPEATS", 2, "DATA.SAMPLING", "balanced", "DATA.NUM_WORKERS", 0]
    cfg = load_config(toy_config, ["DATA.DATA_PATH", str(tmp_path / "data"), *OPTS, *options])
    loader = build_train_loader(cfg, build_datasets(cfg, training=True).train, rank=0, world_size=1, device=CPU)
    for epoch, size in enumerate(((24, 24), (36, 28), (40, 40))):
        loader.set_position(epoch)
        keys, sizes = zip(*((batch.keys, tuple(batch.images.shape[2:])) for batch in loader), strict=True)
        assert set(sizes) == {size}
        assert min(key for batch in keys for key, _ in batch) >= epoch * 8


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("batch_size", [4, 5])
def test_images_are_not_mixed_after_the_last_epoch_of_mixup_but_targets_are_smoothed(toy_config, mode, batch_size):
    cfg = load_config(toy_config, ["AUG.MIXUP_MODE", mode, "AUG.MIXUP_OFF_EPOCH", 2])
    mixup = build_mixup(cfg, passes_per_epoch=10)
    images, labels = torch.rand(batch_size, 3, 8, 8), torch.arange(batch_size) % 3
    for step in (20, 21, 19, 20):
        mixed, targets = mixup(images.clone(), labels, step)
        assert torch.equal(mixed, images) == (step >= 20)
        if step >= 20:
            torch.testing.assert_close(targets, 0.9 * torch.nn.functional.one_hot(labels, 3) + 0.1 / 3)


def test_a_size_that_is_too_small_for_the_model_is_refused_before_anything_is_written(toy_config, toy_data, tmp_path):
    config = tmp_path / "pvt.yaml"
    config.write_text(
        "MODEL: {TYPE: flatten_pvt_tiny, NAME: toy, NUM_CLASSES: 3}\nDATA: {IMG_SIZE: 64, BATCH_SIZE: 16, NUM_WORKERS: 0}\n"
    )
    arguments = toy_arguments(config, toy_data, tmp_path / "output", "TRAIN.SIZE_SCHEDULE", "[[0, 24], [1, 64]]")
    outcome = run_main(arguments, tmp_path / "log")
    assert outcome.exit_codes == [2]
    assert (
        "TRAIN.SIZE_SCHEDULE=[[0, 24], [1, 64]]: images of 24 x 24 pixels are too small for MODEL.TYPE=flatten_pvt_tiny; give "
        "sizes of at least 32 pixels"
    ) in outcome.output
    assert not (tmp_path / "output").exists()


def test_a_dry_run_measures_the_largest_remaining_size(tmp_path):
    """Epochs of 4 updates. In units of an update at 40 pixels, one at 20 pixels counts 1/4, and one at 30 pixels 9/16."""
    trainer = create_trainer(tmp_path, "TRAIN.EPOCHS", 6, "TRAIN.SIZE_SCHEDULE", "[[0, 20], [2, 40], [5, 30]]")
    assert choose_epoch(trainer) == (2, 8 / 4 + 12 + 4 * 9 / 16)
    trainer.state.num_updates = 9
    assert choose_epoch(trainer) == (2, 11 + 4 * 9 / 16)
    trainer.state.num_updates = 20
    assert choose_epoch(trainer) == (5, 4)
    assert create_trainer(tmp_path, "TRAIN.EPOCHS", 6).training_log.eta(7.0) == "0:00:24 + 6 evaluations"
    assert trainer.training_log.eta(7.0) == "0:00:02 + 2 evaluations"  # the newest update had 40 pixels
