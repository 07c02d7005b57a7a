"""Training on few images: the incomplete last update, warnings with numbers, and remedies that the next command accepts."""

import re

import pytest
import torch

from data.build import build_datasets, build_train_loader
from data.files import DataError
from data.samplers import TrainBatches
from engine.schedule import accumulation_steps, build_schedule
from jobs.few_images import warn_about_few_images, warn_about_patience
from jobs.resume import resume
from tests.conftest import CONFIGS, write_images
from tests.launch import run_main
from utils.config.arguments import overrides, parse_arguments
from utils.config.loading import load_config, to_dict
from utils.errors import ConfigError


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize(("world_size", "batch_size", "accumulation"), [(1, 32, 1), (2, 8, 2)])
def test_without_drop_last_every_image_is_used_in_every_epoch_in_full_batches(world_size, batch_size, accumulation, repeats):
    """120 images at a global batch size of 32: 4 updates, of which the last one has 24 new images and 8 of the first update."""
    updates = [[] for _ in range(4)]
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "seed": 5, "repeats": repeats}
        batches = TrainBatches(120, batch_size, accumulation=accumulation, drop_last=False, **options)
        assert batches.updates_per_epoch == 4
        batches.set_position(2, 0)
        for number, batch in enumerate(batches):
            assert len(batch) == batch_size
            updates[number // accumulation] += [index for _, index in batch]
    used = [index for update in updates for index in update]
    assert len(used) == 128
    assert len(set(used)) == 120 // repeats
    assert len(set(updates[3]) & set(updates[0])) == 8 // repeats
    dropped = TrainBatches(120, batch_size, accumulation=accumulation, rank=0, world_size=world_size, seed=5)
    assert dropped.updates_per_epoch == 3


def test_complete_updates_are_the_same_with_and_without_drop_last():
    batches = [
        list(TrainBatches(60, 8, accumulation=1, drop_last=drop, rank=0, world_size=1, seed=5)) for drop in (True, False)
    ]
    assert batches[0] == batches[1][:7]
    assert len(batches[1]) == 8
    with_all = [TrainBatches(64, 8, accumulation=1, drop_last=drop, rank=0, world_size=1, seed=5) for drop in (True, False)]
    assert list(with_all[0]) == list(with_all[1])


def test_a_warning_names_the_share_of_the_images_that_every_epoch_leaves_out(caplog):
    cfg = load_config(CONFIGS / "small.yaml", ["TRAIN.EPOCHS", 400])
    warn_about_few_images(cfg, 120, 3, 1)
    (record,) = caplog.records
    assert "leaves out 24 of 120 images (20 %)" in record.message
    assert "update of 32 images" in record.message
    caplog.clear()
    warn_about_few_images(load_config(CONFIGS / "small.yaml", ["TRAIN.EPOCHS", 400, "DATA.DROP_LAST", False]), 120, 4, 1)
    warn_about_few_images(cfg, 1000, 31, 1)  # 0.8 %
    assert not caplog.records


@pytest.mark.parametrize(("patience", "evaluations", "warns"), [(0, 1, False), (1, 1, True), (2, 4, False), (3, 4, True)])
def test_a_warning_names_a_patience_that_cannot_end_the_run_early(patience, evaluations, warns, caplog):
    """With four evaluations and a patience of 3, the earliest end is at the fourth, which is the end of the run anyway."""
    options = ["TRAIN.PATIENCE", patience, "TRAIN.EPOCHS", 5 * evaluations - 1, "EVAL_FREQ", 5]
    warn_about_patience(load_config(CONFIGS / "small.yaml", options))
    assert ("cannot end this run early" in caplog.text) is warns
    if warns:
        assert f"it has {evaluations} in {5 * evaluations - 1} epochs (EVAL_FREQ=5)" in caplog.text


def test_a_shortened_run_of_the_recipe_for_few_images_is_not_advised_to_use_this_recipe(caplog):
    files = [CONFIGS / "flatten_swin_t.yaml", CONFIGS / "recipes/few_images.yaml"]
    warn_about_few_images(load_config(files, ["MODEL.PRETRAINED", "flatten_swin_t", "TRAIN.EPOCHS", 6]), 80, 5, 1)
    assert "30 updates in all" in caplog.text
    assert "few_images.yaml" not in caplog.text


@pytest.mark.parametrize(
    ("num_images", "world_size", "opts"),
    [
        (80, 1, []),
        (80, 1, ["DATA.GLOBAL_BATCH_SIZE", 0, "TRAIN.ACCUMULATION_STEPS", 2]),
        (700, 4, []),
        (9, 2, []),
    ],
)
def test_the_advice_for_few_updates_gives_enough_of_them_at_the_learning_rate_of_the_recipe(
    num_images, world_size, opts, caplog, monkeypatch
):
    files = [CONFIGS / "flatten_swin_t.yaml", CONFIGS / "recipes/finetune.yaml"]
    cfg = load_config(files, [*opts, "DATA.BATCH_SIZE", 4, "MODEL.PRETRAINED", "flatten_swin_t"])
    updates_per_epoch = num_images // (4 * world_size * accumulation_steps(cfg, world_size))
    warn_about_few_images(cfg, num_images, updates_per_epoch, world_size)
    message = caplog.records[-1].message
    assert f"{num_images} images, global batch size" in message
    assert f"{30 * updates_per_epoch} updates in all" in message
    assert ("few_images.yaml" in message) == (num_images <= 1000)
    words = re.search(r"try (--tag.*?),? or list", message)[1].rstrip(",").split()
    monkeypatch.setattr("sys.argv", ["main.py", *words])
    advised = load_config(files, [*opts, *overrides(parse_arguments(""))])
    assert advised.TAG == "finetune_more_updates"
    assert accumulation_steps(advised, world_size) == 1
    updates_per_epoch = num_images // (advised.DATA.BATCH_SIZE * world_size)
    schedule = build_schedule(advised, updates_per_epoch=updates_per_epoch, world_size=world_size)
    assert schedule.num_updates >= 500
    assert schedule.base_lr == pytest.approx(5e-4, rel=0.01)  # as in the header of finetune.yaml


@pytest.mark.parametrize(
    ("num_images", "world_size", "opts"),
    [
        (20, 1, ["DATA.BATCH_SIZE", 64]),
        (20, 2, ["DATA.BATCH_SIZE", 64, "DATA.GLOBAL_BATCH_SIZE", 128]),
        (20, 1, ["DATA.BATCH_SIZE", 8, "TRAIN.ACCUMULATION_STEPS", 4]),
    ],
)
def test_the_remedy_for_fewer_images_than_an_update_is_accepted(num_images, world_size, opts, toy_config, tmp_path):
    write_images(tmp_path, "train", classes=2, per_class=num_images // 2)
    write_images(tmp_path, "val", classes=2, per_class=1)
    opts = ["DATA.DATA_PATH", str(tmp_path), "MODEL.NUM_CLASSES", 2, *opts]

    def build(opts):
        cfg = load_config(toy_config, opts)
        steps = accumulation_steps(cfg, world_size)
        dataset = build_datasets(cfg, training=True).train
        return build_train_loader(cfg, dataset, accumulation=steps, rank=0, world_size=world_size, device=torch.device("cpu"))

    with pytest.raises(DataError, match="add --batch-size") as error:
        build(opts)
    batch_size, remedy = re.search(r"add --batch-size (\d+)(?: --opts (.*))?", str(error.value)).groups()
    assert build([*opts, "DATA.BATCH_SIZE", batch_size, *(remedy or "").split()]).updates_per_epoch >= 5


def test_the_command_with_the_advice_runs_and_uses_every_image(toy_config, tmp_path):
    write_images(tmp_path / "data", "train", classes=3, per_class=15)
    write_images(tmp_path / "data", "val", classes=3, per_class=2)
    command = ["--cfg", toy_config, "--data-path", tmp_path / "data", "--output", tmp_path, "--batch-size", 16]
    outcome = run_main([*command, "--check"], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert "every epoch leaves out 13 of 45 images (29 %)" in outcome.output
    advice = re.search(r"6 updates in all.* try (.*)", outcome.output)[1].split()
    outcome = run_main(
        [*command, *advice, "DATA.DROP_LAST", "False", "TRAIN.EPOCHS", "2", "DATA.NUM_WORKERS", "2"], tmp_path / "log2"
    )
    assert outcome.exit_codes == [0], outcome.output
    assert "updates per epoch: 6, images used per epoch: 45 of 45" in outcome.output
    assert (tmp_path / "toy/default_more_updates/best.pth").is_file()


def test_a_resume_with_another_drop_last_is_refused_with_the_option(toy_config):
    saved = {"updates_per_epoch": 3, "config": to_dict(load_config(toy_config))}
    with pytest.raises(ConfigError, match=r"since DATA\.DROP_LAST was True\. Add --opts DATA\.DROP_LAST True"):
        resume(None, saved, load_config(toy_config, ["DATA.DROP_LAST", False]), 4, "checkpoint")
