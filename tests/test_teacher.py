"""Whole runs with TRAIN.TEACHER, and teachers that are refused."""

import json
import logging
import re
import shlex
import shutil

import pytest
import timm
import torch
from timm.models import save_for_hf

from engine.replay import replay_update
from jobs.teacher import build_teacher
from models.checkpoints.reader import read_checkpoint
from tests.launch import run_main
from tests.runs import assert_equal, newest_update, read_state, toy_arguments
from utils.config.arguments import check_teacher
from utils.config.loading import load_config
from utils.distributed import World
from utils.errors import ConfigError

WORLD = World(0, 0, 1, torch.device("cpu"))
CLASSES = ["class0", "class1", "class2"]


def read_metrics(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: record.get(key) for key in ("step", "kind", "loss", "base_loss", "distillation_loss")} for record in records]


def test_a_run_with_a_teacher_killed_in_mid_epoch_ends_bit_equal_and_has_no_weights_of_the_teacher(
    trained, toy_config, toy_data, tmp_path
):
    """The images are smaller than those of the teacher, and normalised in another way."""
    states, metrics = [], []
    options = {"TRAIN.TEACHER": trained, "TRAIN.DISTILLATION.KIND": "soft", "TRAIN.DISTILLATION.WEIGHT": 0.8}
    options |= {"DATA.IMG_SIZE": 32, "DATA.MEAN": "[0.4, 0.4, 0.4]", "SAVE_STEPS": 2, "TRAIN.EPOCHS": 1, "DATA.NUM_WORKERS": 2}
    for name in ("whole", "killed"):
        folder = tmp_path / name / "toy/default"
        arguments = toy_arguments(toy_config, toy_data, tmp_path / name, *(word for pair in options.items() for word in pair))

        def in_mid_epoch(folder=folder) -> bool:  # an epoch has 12 updates
            return newest_update(folder) in (4, 6, 8)

        if name == "killed":
            assert run_main(arguments, tmp_path / "log", kill_when=in_mid_epoch).exit_codes == [-9]
        outcome = run_main(arguments, tmp_path / "log")
        assert outcome.exit_codes == [0], outcome.output
        assert "teacher: ema weights of" in outcome.output
        states.append(read_state(folder))
        metrics.append(read_metrics(folder))
    assert "resumed after update" in outcome.output
    assert_equal(*states)
    assert metrics[0] == metrics[1]
    for record in (record for record in metrics[0] if record["kind"] == "train"):
        assert record["loss"] == pytest.approx(0.2 * record["base_loss"] + 0.8 * record["distillation_loss"], rel=1e-4)
    assert states[0].keys() == read_state(trained.parent).keys() | {"teacher_digest"}
    assert states[0]["model"].keys() == read_checkpoint(trained)["model"].keys()

    # The same path with other weights.
    copied = tmp_path / "teacher.pth"
    torch.save(read_checkpoint(trained), copied)
    cfg = load_config(toy_config, ["TRAIN.TEACHER", str(copied)])
    saved = {"config": {"TRAIN": {"TEACHER": str(copied)}}, "teacher_digest": build_teacher(cfg, WORLD, CLASSES)[1]}
    assert saved["teacher_digest"] == states[0]["teacher_digest"]
    build_teacher(cfg, WORLD, CLASSES, saved, "run.pth")
    torch.save({key: value for key, value in read_checkpoint(trained).items() if "ema" not in key}, copied)
    with pytest.raises(ConfigError, match=r"the weights have changed since run.pth was saved.*another path"):
        build_teacher(cfg, WORLD, CLASSES, saved, "run.pth")
    saved["config"]["TRAIN"]["TEACHER"] = "elsewhere"
    build_teacher(cfg, WORLD, CLASSES, saved, "run.pth")  # the remedy


def test_the_replay_of_an_update_asks_for_the_teacher_and_repeats_it(trained, toy_config, toy_data, tmp_path, caplog):
    options = ["TRAIN.WARMUP_EPOCHS", 0, "TRAIN.BASE_LR", 1e20, "TRAIN.CLIP_GRAD", 0, "DATA.BATCH_SIZE", 4]
    arguments = toy_arguments(toy_config, toy_data, tmp_path, *options, "TRAIN.TEACHER", trained)
    outcome = run_main(arguments, tmp_path / "log", processes=2)
    assert outcome.exit_codes == [1, 1], outcome.output
    output = " ".join(outcome.output.split())
    replay = tmp_path / "toy/default/replay_000000001.pth"
    assert f"--opts TRAIN.TEACHER {shlex.quote(str(trained))} repeats the update" in output
    opts = ["DATA.DATA_PATH", str(toy_data)]
    with pytest.raises(ConfigError, match=r"to read it, add --opts TRAIN\.TEACHER"):
        replay_update(str(replay), opts, WORLD, build_teacher=build_teacher)
    caplog.set_level(logging.INFO)
    replay_update(str(replay), [*opts, "TRAIN.TEACHER", str(trained)], WORLD, build_teacher=build_teacher)
    assert "the first non-finite values are computed by layers.0.blocks.0.attn itself" in caplog.text


@pytest.fixture
def small_model(tmp_path):
    """A directory with a small model of timm, and a function that writes it with other options."""

    def write(label_names=CLASSES, **options):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet.r160_in1k", num_classes=len(label_names or CLASSES), **options)
        save_for_hf(model, tmp_path / "model", model_config={"label_names": label_names} if label_names else None)
        return f"timm:local-dir:{tmp_path}/model"

    return write


def test_a_model_of_timm_in_a_directory_is_a_teacher_and_its_classes_are_matched_by_name(small_model, toy_config, caplog):
    images = torch.randn(2, 3, 40, 40)
    teacher, digest = build_teacher(load_config(toy_config, ["TRAIN.TEACHER", small_model()]), WORLD, CLASSES)
    assert teacher.size == (160, 160)
    assert len(digest) == 64
    reordered, _ = build_teacher(load_config(toy_config, ["TRAIN.TEACHER", small_model(CLASSES[::-1])]), WORLD, CLASSES)
    torch.testing.assert_close(reordered(images), teacher(images).flip(1))


def test_unusable_teachers_are_refused_before_anything_is_written(small_model, trained, toy_config, toy_data, tmp_path):
    state = read_checkpoint(trained)
    names = {"bare": {"model": state["model"]}, "nan": state | {"model": dict(state["model"])}}
    names["nan"] = {key: value for key, value in names["nan"].items() if "ema" not in key}
    names["nan"]["model"]["head.weight"] = torch.full_like(state["model"]["head.weight"], torch.nan)
    names["other"] = state | {"class_names": ["a", "b", "c"]}
    for name, content in names.items():
        torch.save(content, tmp_path / f"{name}.pth")
    (tmp_path / "damaged.pth").write_bytes(b"damaged")
    expected = {
        tmp_path / "missing.pth": "missing.pth: no such file",
        tmp_path / "damaged.pth": "damaged.pth",
        tmp_path / "bare.pth": "weights but no config; give a checkpoint that a run of this project has written",
        tmp_path / "nan.pth": "values of head.weight in the teacher's weights are not finite",
        tmp_path / "other.pth": "the teacher was trained with different classes: class 0 is 'class0' in the data, but 'a'",
        small_model(["a", "b", "c", "d"]): "3 classes in the data, but 4 in the teacher",
        "timm:local-dir:/nowhere": "timm cannot load these weights",
        "timm:regnety_161": r"Unknown model \(regnety_161\).*did you mean timm:regnety_16",
    }
    for reference, message in expected.items():
        cfg = load_config(toy_config, ["TRAIN.TEACHER", str(reference)])
        with pytest.raises(ValueError, match=message) as error:
            build_teacher(cfg, WORLD, CLASSES)
        assert str(error.value).startswith(f"TRAIN.TEACHER={reference}: ")
    arguments = toy_arguments(toy_config, toy_data, tmp_path / "out", "TRAIN.TEACHER", tmp_path / "other.pth")
    assert run_main(arguments, tmp_path / "log").exit_codes == [2]
    assert not (tmp_path / "out").exists()


def test_a_teacher_in_the_output_directory_of_the_run_is_refused(trained, toy_config, toy_data, tmp_path):
    """Its weights would change during training, so the run could not resume. The remedy is another path."""
    folder = tmp_path / "toy/default"
    shutil.copytree(trained.parent, folder)
    (tmp_path / "link").symlink_to(folder)
    shutil.copy(trained, tmp_path / "copy.pth")
    contents = sorted(folder.iterdir())
    for teacher in (folder, folder / "best.pth", tmp_path / "link/best.pth"):
        arguments = toy_arguments(toy_config, toy_data, tmp_path, "TRAIN.TEACHER", teacher, "TRAIN.EPOCHS", 3)
        outcome = run_main(arguments, tmp_path / "log")
        assert outcome.exit_codes == [2], outcome.output
        assert "is in the output directory of this run" in outcome.output
    assert sorted(folder.iterdir()) == contents
    check_teacher(str(tmp_path / "copy.pth"), folder, exists=True)
    check_teacher(str(folder), tmp_path / "toy/other_tag", exists=True)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TRAIN.DISTILLATION.KIND", "soft"], "KIND=soft has no effect without TRAIN.TEACHER; remove it"),
        (["TRAIN.TEACHER", "timm:x", "TRAIN.DISTILLATION.TEMPERATURE", "2"], "with TRAIN.DISTILLATION.KIND=hard; remove it"),
        (["TRAIN.TEACHER", "timm:x", "TRAIN.DISTILLATION.KIND", "sft"], "did you mean 'soft'"),
        (["TRAIN.TEACHER", "timm:x", "TRAIN.DISTILLATION.WEIGHT", "1.5"], "give a number from 1e-06 to 1"),
        (["TRAIN.TEACHER", "timm:"], "add the name of a model, such as timm:regnety_160"),
    ],
)
def test_options_of_distillation_without_effect_are_refused(opts, message, toy_config):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(toy_config, opts)
    if remedy := re.search("add --opts (.*)", str(error.value)):
        load_config(toy_config, [*opts, *remedy[1].split()])
