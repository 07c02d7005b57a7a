"""Resuming: checkpoints of earlier and later versions, states that do not fit, changed data and changed configs."""

import copy
import logging
import shlex
import shutil

import pytest
import torch

from data.index import describe_index
from engine.compatibility import compare_groups
from engine.optim import build_optimizer
from engine.replay import check_images
from engine.run_contents import Contents
from engine.schedule import build_schedule
from jobs.initialization import Initialization
from jobs.locate_checkpoint import log_differences
from jobs.resume import (
    ARCHITECTURE_KEY_PREFIXES,
    GROUP_KEYS,
    advise_finetuning,
    check_group_keys,
    log_config_changes,
    resume,
    warn_about_environment,
    warn_about_learning_rate,
)
from jobs.train import build_initial_state
from models import build_model
from models.checkpoints.reader import CheckpointError, read_checkpoint
from tests.conftest import write_images
from tests.indices import index_folder
from tests.launch import run_main
from tests.runs import assert_equal, read_state, toy_arguments
from utils.config.keys import KEYS
from utils.config.loading import flatten, load_config
from utils.config.rules import mixes
from utils.distributed import World
from utils.errors import ConfigError
from utils.run_files import RECORD, list_checkpoints

WORLD = World(0, 0, 1, torch.device("cpu"))


# --- Versions


def test_a_checkpoint_of_a_version_without_run_ids_formats_and_parameter_names_resumes_bit_equal(
    uninterrupted, toy_config, toy_data, tmp_path
):
    folder = tmp_path / "toy/default"
    shutil.copytree(uninterrupted(1), folder)
    (folder / RECORD).unlink()
    newest, older = list_checkpoints(folder)
    newest.unlink()
    for path in (older, folder / "best.pth"):
        state = read_checkpoint(path)
        del state["format"], state["run_id"], state["config"]["DATA"]["ACCEPT_CHANGES"]
        del state["config"]["MODEL"]["SWIN"]["SOFTMAX_WINDOW"]
        assert state["config"]["MODEL"]["SWIN"]["WINDOW_SIZE"] == 56  # covers the token map, as 0 below
        for group in state["optimizer"]["param_groups"]:
            del group["param_names"]
        if path == older or state["num_updates"] <= 34:
            torch.save(state, path)
        else:
            path.unlink()
    options = ["SAVE_STEPS", 2, "DATA.BATCH_SIZE", 8, "DATA.NUM_WORKERS", 2, "MODEL.SWIN.WINDOW_SIZE", 0]
    outcome = run_main(toy_arguments(toy_config, toy_data, tmp_path, *options), tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert "resumed after update 34" in outcome.output
    assert "keys that are not stored in the checkpoint, and their values now: DATA.ACCEPT_CHANGES False" in outcome.output
    states = [read_state(path) for path in (folder, uninterrupted(1))]
    for state in states:
        del state["best"], state["best_since"]  # the best checkpoint may be the deleted one
    assert_equal(*states)
    assert len(read_checkpoint(list_checkpoints(folder)[0])["run_id"]) == 32


def test_another_environment_is_a_warning_that_names_what_changed(caplog):
    before = {"torch": "2.11", "commit": "abc", "threads": 1, "command": "main.py"}
    warn_about_environment({"environment": before}, before | {"command": "main.py --cfg x", "new entry": 3}, "file.pth")
    warn_about_environment({}, before, "file.pth")
    assert caplog.text == ""
    warn_about_environment({"environment": before}, before | {"torch": "2.12", "threads": 2}, "file.pth")
    assert "torch was '2.11' and is '2.12' now, threads was 1 and is 2 now" in caplog.text
    assert "commit" not in caplog.text


def test_changed_defaults_and_missing_keys_are_warnings_and_requested_changes_are_not(toy_config, caplog):
    caplog.set_level(logging.INFO)
    stored = copy.deepcopy(dict(load_config(toy_config, ["TF32", False, "SEED", 5])))
    del stored["CUDNN_BENCHMARK"]
    log_config_changes(stored, load_config(toy_config, ["SEED", 6, "PRINT_FREQ", 2]), "file.pth")
    levels = {record.getMessage(): record.levelname for record in caplog.records}
    assert levels == {
        "file.pth: SEED was 5 in the checkpoint, but is 6 now": "INFO",
        "file.pth: TF32 was False in the checkpoint, but is True now, the default": "WARNING",
        "file.pth: keys that are not stored in the checkpoint, and their values now: CUDNN_BENCHMARK True": "WARNING",
    }


def test_a_key_that_a_checkpoint_lacks_is_not_reported_as_if_it_had_a_value(caplog):
    caplog.set_level(logging.INFO)
    log_differences({"MODEL": {"NAME": "x"}, "GONE": 1}, {"MODEL": {"NAME": "x", "TYPE": "flatten_swin"}}, "file.pth")
    assert [record.getMessage() for record in caplog.records] == [
        "file.pth: MODEL.TYPE is not stored in the checkpoint, and is 'flatten_swin' now"
    ]


def test_a_missing_key_is_not_reported_with_a_former_value_when_the_parameter_groups_change(toy_config):
    cfg = load_config(toy_config, ["TRAIN.LAYER_DECAY", 0.8, "TRAIN.HEAD_LR_SCALE", 3])
    message = r"TRAIN\.LAYER_DECAY is not stored, as if 1\.0, and is 0\.8 now, TRAIN\.HEAD_LR_SCALE was 2\.0 and is 3\.0 now"
    with pytest.raises(ConfigError, match=message):
        check_group_keys({"config": {"TRAIN": {"HEAD_LR_SCALE": 2.0}}}, cfg, "file.pth")


# --- States that do not fit


def change_first(state: dict, entry: str, change) -> None:
    """Replace an entry of the state of the optimizer's first parameter."""
    state["optimizer"]["state"][0][entry] = change(state["optimizer"]["state"][0][entry])


def swap_names(state: dict) -> None:
    names = state["optimizer"]["param_groups"][0]["param_names"]
    names[0], names[1] = names[1], names[0]


# Case -> (function that changes a checkpoint, entry that the error names).
MISFITS = {
    "fewer values": (lambda s: change_first(s, "exp_avg", lambda v: v[:1].clone()), r"patch_embed.*\.exp_avg has shape"),
    "no dimension": (lambda s: change_first(s, "exp_avg_sq", lambda v: torch.zeros(())), r"\.exp_avg_sq has shape \[\]"),
    "transposed": (lambda s: change_first(s, "exp_avg", lambda v: v.transpose(0, 1).clone()), r"\.exp_avg has shape"),
    "other type": (lambda s: change_first(s, "exp_avg", lambda v: v.to(torch.int64)), r"\.exp_avg has .*int64"),
    "not a tensor": (lambda s: change_first(s, "exp_avg", lambda v: 0.5), r"\.exp_avg is not a tensor"),
    "missing": (lambda s: s["optimizer"]["state"][0].pop("exp_avg_sq"), r"\.exp_avg_sq is missing"),
    "step of several values": (lambda s: change_first(s, "step", lambda v: torch.ones(3)), r"\.step is not a single"),
    "unknown entry": (lambda s: s["optimizer"]["state"][0].update(momentum_buffer=torch.ones(1)), "is not a state of AdamW"),
    "unknown parameter": (lambda s: s["optimizer"]["state"].update({999: {}}), r"optimizer\.state is not a dictionary of"),
    "state is a list": (lambda s: s["optimizer"].update(state=[1]), r"optimizer\.state is not a dictionary of"),
    "groups are missing": (lambda s: s["optimizer"].pop("param_groups"), r"optimizer\.param_groups is not a list"),
    "reordered parameters": (swap_names, r"has the parameter .* in the checkpoint where it has"),
    "other indices": (lambda s: s["optimizer"]["param_groups"][0]["params"].reverse(), "does not have the parameters 0 to"),
    "EMA": (lambda s: s["state_dict_ema"].update({"norm.weight": torch.ones(1)}), r"state_dict_ema\.norm\.weight has shape"),
    "EMA without an entry": (lambda s: s["state_dict_ema"].pop("norm.weight"), r"state_dict_ema: norm\.weight is missing"),
    "EMA is a list": (lambda s: s.update(state_dict_ema=[1]), "state_dict_ema is not a dictionary"),
    "weights": (lambda s: s["model"].update({"norm.weight": torch.ones(1)}), r"model\.norm\.weight has shape"),
    "weights of another type": (
        lambda s: s["model"].update({"norm.weight": torch.ones(64).half()}),
        r"model\.norm\.weight has",
    ),
    "scaler": (lambda s: s.update(scaler={"scale": 1.0}), "scaler does not have the entries"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_state_that_does_not_fit_is_rejected_before_it_is_loaded_and_the_error_names_the_tensor(case, trained, toy_config):
    cfg = load_config(toy_config, ["AMP", True, "AMP_DTYPE", "fp16"] if case == "scaler" else [])
    saved = read_checkpoint(trained)
    change, message = MISFITS[case]
    change(saved)
    state = build_initial_state(cfg, WORLD, Initialization("scratch", "", Contents(trained.parent)), ["a", "b", "c"])
    before = copy.deepcopy(state.to_dict())
    with pytest.raises(CheckpointError, match=message):
        resume(state, saved, cfg, saved["updates_per_epoch"], "file.pth")
    assert_equal(state.to_dict(), before)


def test_a_run_with_an_optimizer_state_of_another_shape_ends_with_status_2(uninterrupted, toy_config, toy_data, tmp_path):
    folder = tmp_path / "toy/default"
    shutil.copytree(uninterrupted(1), folder)
    newest = list_checkpoints(folder)[0]
    state = read_checkpoint(newest)
    change_first(state, "exp_avg", lambda value: torch.zeros(1))
    torch.save(state, newest)
    outcome = run_main(toy_arguments(toy_config, toy_data, tmp_path, "TRAIN.EPOCHS", 4), tmp_path / "log")
    assert outcome.exit_codes == [2], outcome.output
    assert ".exp_avg has shape [1]" in outcome.output


def other_value(key) -> object:
    """A legal value that differs from the default; None if there is no simple one."""
    if isinstance(key.default, bool):
        return not key.default
    if key.choices:
        return next((choice for choice in key.choices if choice != key.default), None)
    if isinstance(key.default, (int, float)) and key.minimum is not None:
        return key.default / 2 if key.default else min(1, key.maximum)
    return None


def test_every_key_that_changes_the_parameter_groups_is_known(toy_config):
    """Keys of the architecture and of the optimizer's type are rejected by their own checks."""

    def groups(opts: list) -> list:
        cfg = load_config(toy_config, opts)
        with torch.device("meta"):
            model = build_model(cfg)
        if cfg.TRAIN.FREEZE_BACKBONE:
            model.freeze_features()
        return [group["param_names"] for group in build_optimizer(cfg, model).param_groups]

    expected, changing, tried = groups([]), [], 0
    for name, key in KEYS.items():
        value = other_value(key)
        if value is None or name.startswith(ARCHITECTURE_KEY_PREFIXES):
            continue
        value = int(value) if isinstance(key.default, int) and not isinstance(key.default, bool) else value
        try:
            current = groups([name, str(value)])
        except ConfigError:  # a value that conflicts with the toy config
            continue
        tried += 1
        if current != expected:
            changing.append(name)
    assert tried > 50
    assert set(changing) == set(GROUP_KEYS)


@pytest.mark.parametrize("opts", [["TRAIN.LAYER_DECAY", 0.8], ["TRAIN.HEAD_LR_SCALE", 10], ["TRAIN.FREEZE_BACKBONE", True]])
def test_changed_parameter_groups_are_rejected_with_the_key_and_a_remedy_that_works(opts, trained, toy_config):
    cfg, original = load_config(toy_config, opts), load_config(toy_config)
    saved = read_checkpoint(trained)
    init = Initialization("scratch", "", Contents(trained.parent))
    state = build_initial_state(cfg, WORLD, init, ["a", "b", "c"])
    key, default = opts[0], flatten(original)[opts[0]]
    with pytest.raises(ConfigError, match=rf"{key} was {default} and is .* now. Restore the value \(--opts {key} {default}\)"):
        resume(state, saved, cfg, saved["updates_per_epoch"], "file.pth")
    restored = load_config(toy_config, [*opts, key, str(default)])
    resume(build_initial_state(restored, WORLD, init, ["a", "b", "c"]), saved, restored, saved["updates_per_epoch"], "file.pth")


def test_a_changed_scale_within_the_same_groups_is_accepted(toy_config):
    stored = build_optimizer(load_config(toy_config, ["TRAIN.HEAD_LR_SCALE", 10]), build_model(load_config(toy_config)))
    current = build_optimizer(load_config(toy_config, ["TRAIN.HEAD_LR_SCALE", 5]), build_model(load_config(toy_config)))
    assert compare_groups(current, stored.state_dict()) == ""


# --- Learning rate


def test_more_epochs_after_the_end_cause_a_warning_with_both_learning_rates(trained, toy_config, caplog):
    """At the end of 2 epochs the cosine is close to TRAIN.MIN_LR; with 20 epochs, it is close to TRAIN.BASE_LR again."""
    saved = read_checkpoint(trained)
    saved["num_updates"] = 24
    for epochs, warned in ((20, True), (2, False)):
        caplog.clear()
        cfg = load_config(toy_config, ["TRAIN.EPOCHS", epochs])
        schedule = build_schedule(cfg, updates_per_epoch=12, world_size=1)
        warn_about_learning_rate(saved, cfg, schedule, 1, str(trained))
        assert ("the learning rate grows from" in caplog.text) == warned
    former = build_schedule(load_config(toy_config, ["TRAIN.EPOCHS", 2]), updates_per_epoch=12, world_size=1)
    schedule = build_schedule(load_config(toy_config, ["TRAIN.EPOCHS", 20]), updates_per_epoch=12, world_size=1)
    caplog.clear()
    warn_about_learning_rate(saved, load_config(toy_config, ["TRAIN.EPOCHS", 20]), schedule, 1, str(trained))
    assert f"from {former(23):.3g} at update 23 to {schedule(24):.3g} at update 24" in caplog.text
    assert f"--pretrained {trained.parent / 'best.pth'} --tag default_longer" in caplog.text


def test_the_learning_rate_is_compared_with_that_of_a_run_with_a_weight_per_class(trained, toy_config, caplog):
    saved = read_checkpoint(trained)
    saved["num_updates"] = 24
    saved["config"]["TRAIN"]["CLASS_WEIGHTS"] = [1.0, 2.0, 3.0]
    cfg = load_config(toy_config, ["TRAIN.EPOCHS", 20, "TRAIN.CLASS_WEIGHTS", "[1, 2, 3]"])
    schedule = build_schedule(cfg, updates_per_epoch=12, world_size=1)
    warn_about_learning_rate(saved, cfg, schedule, 1, str(trained))
    assert "the learning rate grows from" in caplog.text


def test_the_advice_on_fine_tuning_is_accepted_with_every_option_for_epochs_and_any_path(toy_config):
    opts = ["TRAIN.EPOCHS", 30, "TRAIN.WARMUP_EPOCHS", 5, "TAG", "a b", "AUG.MIXUP", 0.8, "AUG.MIXUP_OFF_EPOCH", 20]
    opts += ["TRAIN.SIZE_SCHEDULE", "[[0, 24], [20, 32, 40]]"]
    opts += ["TRAIN.LR_SCHEDULER.NAME", "multistep", "TRAIN.LR_SCHEDULER.MILESTONES", "[10, 20]"]
    advice = advise_finetuning("my runs/checkpoint.pth", load_config(toy_config, opts), num_epochs=1)
    words = shlex.split(advice.partition("the best weights: ")[2])
    assert words[:5] == ["--pretrained", "my runs/best.pth", "--tag", "a b_longer", "--opts"]
    cfg = load_config(toy_config, [*opts, *words[5:]])
    assert (cfg.TRAIN.EPOCHS, cfg.TRAIN.SIZE_SCHEDULE, cfg.TRAIN.LR_SCHEDULER.NAME) == (1, [[0, 32, 40]], "cosine")
    assert not mixes(cfg)


# --- Changed data


def test_accepted_data_changes_resume_with_a_warning_and_are_stored(toy_config, tmp_path):
    """The remedy of an unreadable validation image: remove it, then add the option that the message gives."""
    data, folder = tmp_path / "data", tmp_path / "toy/default"
    for split, per_class in (("train", 34), ("val", 11)):
        write_images(data, split, classes=3, per_class=per_class)
    arguments = toy_arguments(toy_config, data, tmp_path, "SAVE_STEPS", 2, "DATA.NUM_WORKERS", 2, "TRAIN.EPOCHS", 2)
    assert run_main(arguments, tmp_path / "log").exit_codes == [0]
    former_best = read_checkpoint(folder / "best.pth")
    more = [*arguments, "TRAIN.EPOCHS", 3]
    (data / "val/class1/004.png").unlink()
    (data / "train/class2/005.png").unlink()
    refused = run_main(more, tmp_path / "log")
    assert refused.exit_codes == [2], refused.output
    assert "add --opts DATA.ACCEPT_CHANGES True" in refused.output
    outcome = run_main([*more, "DATA.ACCEPT_CHANGES", "True"], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert "in train/, class class2 had 34 images, now it has 33" in outcome.output
    assert "the validation images changed after the best accuracy was measured; the best accuracy is reset" in outcome.output
    assert_equal(read_checkpoint(folder / f"best_{former_best['num_updates']:09d}.pth"), former_best)
    best = read_checkpoint(folder / "best.pth")
    assert best["num_updates"] == best["best"]["num_updates"] == 36
    assert best["data"]["val"]["num_images"] == 32
    # The change is not reported again. Another evaluation crop has the same effect as other validation images.
    again = run_main([*arguments, "TRAIN.EPOCHS", 4, "TEST.CROP_PCT", 0.5], tmp_path / "log")
    assert again.exit_codes == [0], again.output
    assert ": TEST.CROP_PCT changed after the best accuracy was measured; the best accuracy is reset" in again.output
    assert_equal(read_checkpoint(folder / "best_000000036.pth"), best)
    assert read_checkpoint(folder / "best.pth")["num_updates"] == 48


def test_changed_classes_or_updates_per_epoch_are_refused_although_changes_are_accepted(trained, toy_config, tmp_path):
    copy_of_run = tmp_path / "toy/default"
    shutil.copytree(trained.parent, copy_of_run)
    cases = {"a class less": (2, 34, "class class2 is missing"), "fewer updates": (3, 20, "updates per epoch, but there are")}
    for name, (classes, per_class, message) in cases.items():
        data = tmp_path / name
        write_images(data, "train", classes=classes, per_class=per_class)
        write_images(data, "val", classes=classes, per_class=11)
        options = ["DATA.ACCEPT_CHANGES", "True", "TRAIN.EPOCHS", 3, "MODEL.NUM_CLASSES", 3]
        if classes == 2:
            (data / "train/class9").mkdir()
            (data / "val/class9").mkdir()
            for split in ("train", "val"):
                shutil.copy(data / split / "class0/000.png", data / split / "class9/000.png")
        outcome = run_main(toy_arguments(toy_config, data, tmp_path, *options), tmp_path / "log")
        assert outcome.exit_codes == [2], outcome.output
        assert message in outcome.output
        outcome = run_main(toy_arguments(toy_config, data, tmp_path, *options[2:]), tmp_path / "log")
        assert outcome.exit_codes == [2], outcome.output
        assert "DATA.ACCEPT_CHANGES" not in outcome.output.split("ERROR")[1]  # it is no remedy here


def test_a_replay_with_changed_training_images_is_refused_or_logs_the_change(toy_data, tmp_path, caplog):
    state = {"data": {"train": describe_index(index_folder(toy_data / "train"))}}
    shutil.copytree(toy_data / "train", tmp_path / "train")
    check_images(state, index_folder(tmp_path / "train"), "replay.pth", accept_changes=False)
    (tmp_path / "train/class1/003.png").unlink()
    changed = index_folder(tmp_path / "train")
    with pytest.raises(ConfigError, match=r"class class1 had 34 images, now it has 33.*--opts DATA.ACCEPT_CHANGES True"):
        check_images(state, changed, "replay.pth", accept_changes=False)
    check_images(state, changed, "replay.pth", accept_changes=True)
    assert "the training images are not those of the update: class class1 had 34 images, now it has 33" in caplog.text
    check_images({}, changed, "replay.pth", accept_changes=False)  # written by a version without descriptions
