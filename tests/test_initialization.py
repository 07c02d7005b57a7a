"""Initialization of runs: rejected checkpoints and output directories, numerical settings, resuming, and metrics files."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

import engine.metrics_writer
import jobs.evaluate
import jobs.train
from engine.checkpoint_writer import save_checkpoint
from engine.metrics_writer import MetricsWriter
from engine.remaining_work import work_after
from engine.run_contents import Contents, find_unusable_entries
from engine.run_directory import RunLock, check_available
from engine.state import check_trained
from jobs.initialization import Initialization
from jobs.locate_checkpoint import open_checkpoint
from jobs.resume import check_data, resume
from jobs.train import build_data, build_trainer
from models.checkpoints.reader import CheckpointError, preferred_weights, read_checkpoint
from tests.launch import run_main
from tests.runs import toy_arguments
from utils.config.loading import load_config
from utils.distributed import World
from utils.environment import apply_numerical_settings
from utils.errors import ConfigError, TrainingError
from utils.run_files import list_checkpoints

# Test case -> invalid entry of a checkpoint.
INVALID_ENTRIES = {
    "config is None": {"config": None},
    "num_updates is negative": {"num_updates": -5},
    "updates_per_epoch is zero": {"updates_per_epoch": 0},
    "best is empty": {"best": {}},
    "best contains text": {"best": {"acc1": "x", "weights": "raw", "epoch": 0, "num_updates": "y"}},
    "num_skipped is text": {"num_skipped": "x"},
    "data is a number": {"data": 7},
    "data lacks the split val": {"data": {"train": {}}},
    "evaluations is a dictionary": {"evaluations": {}},
    "an evaluation has no step": {"evaluations": [{"kind": "eval_raw"}]},
}


@pytest.mark.parametrize("case", INVALID_ENTRIES)
def test_the_error_for_a_checkpoint_with_an_invalid_entry_mentions_the_entry(case, trained, toy_config, toy_data, tmp_path):
    state = read_checkpoint(trained)
    assert find_unusable_entries(state) == []
    (name,) = INVALID_ENTRIES[case]
    assert find_unusable_entries(state | INVALID_ENTRIES[case]) == [name]
    if case == "best contains text":
        save_checkpoint(state | INVALID_ENTRIES[case], tmp_path / "file.pth")
        outcome = run_main(
            [*toy_arguments(toy_config, toy_data, tmp_path), "--resume", tmp_path / "file.pth"], tmp_path / "log"
        )
        assert outcome.exit_codes == [2]
        assert "file.pth is not a valid checkpoint: best.num_updates is of type str" in outcome.output


@pytest.mark.parametrize("content", [{1: torch.zeros(2)}, {"model": {}, "num_updates": 3}])
def test_files_that_are_not_checkpoints_are_rejected(content, toy_config, toy_data, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    for flag in ("--resume", "--pretrained"):
        outcome = run_main([*toy_arguments(toy_config, toy_data, tmp_path), flag, tmp_path / "file.pth"], tmp_path / "log")
        assert outcome.exit_codes == [2], outcome.output
        assert "Traceback" not in outcome.output


# --- Output directory


def test_a_rejected_run_creates_no_output_directory(toy_config, toy_data, tmp_path):
    output = tmp_path / "a/b"
    outcome = run_main(toy_arguments(toy_config, toy_data, output, "MODEL.NUM_CLASSES", 2), tmp_path / "log")
    assert outcome.exit_codes == [2], outcome.output
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("level", ["output", "output/toy", "output/toy/default"])
def test_a_file_at_the_output_path_is_rejected_by_training_and_by_check(level, toy_config, toy_data, tmp_path):
    (tmp_path / level).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / level).write_text("text")
    for flags in ([], ["--check"]):
        outcome = run_main([*toy_arguments(toy_config, toy_data, tmp_path / "output"), *flags], tmp_path / "log")
        assert outcome.exit_codes == [2], outcome.output
        assert "choose another --output" in outcome.output
    assert (tmp_path / level).read_text() == "text"


def test_check_detects_the_same_problems_as_training(uninterrupted, toy_config, toy_data, tmp_path):
    """--check rejects a locked directory and a new run in the directory of another one, and skips damaged checkpoints."""
    folder = tmp_path / "toy/default"
    shutil.copytree(uninterrupted(1), folder)
    command = [*toy_arguments(toy_config, toy_data, tmp_path, "TRAIN.EPOCHS", 4, "TRAIN.AUTO_RESUME", False), "--check"]
    outcome = run_main(command, tmp_path / "log")
    assert outcome.exit_codes == [2]
    assert "so the directory would then contain files of two runs" in outcome.output
    newest, older = list_checkpoints(folder)
    newest.write_bytes(newest.read_bytes()[:1000])
    if read_checkpoint(folder / "best.pth")["num_updates"] > int(older.stem[11:]):
        (folder / "best.pth").unlink()  # otherwise, the run would resume from it
    before = {path.name: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    command = [*toy_arguments(toy_config, toy_data, tmp_path), "--check"]
    outcome = run_main(command, tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert f"resumed after update {int(older.stem[11:])}" in outcome.output
    assert "the run will rename this file" in outcome.output
    assert {path.name: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())} == before
    lock = RunLock(folder)
    lock.acquire()
    outcome = run_main(command, tmp_path / "log")
    lock.release()
    assert outcome.exit_codes == [2]
    assert "another run is writing to this directory" in outcome.output
    check_available(folder)


def test_a_resumed_run_ignores_pretrained_weights_and_logs_a_warning(uninterrupted, toy_config, toy_data, tmp_path):
    shutil.copytree(uninterrupted(1), tmp_path / "toy/default")
    arguments = toy_arguments(toy_config, toy_data, tmp_path)
    outcome = run_main([*arguments, "--pretrained", tmp_path / "other.pth"], tmp_path / "log")
    assert outcome.exit_codes == [0]
    assert "other.pth: not read, since the run resumes from" in outcome.output


def test_incomplete_files_of_killed_runs_are_deleted_once_they_are_old(toy_config, toy_data, tmp_path):
    folder = tmp_path / "toy/default"
    folder.mkdir(parents=True)
    old, new = folder / ".metrics.0123abcd.incomplete.jsonl", folder / ".eval.0123abcd.incomplete.json"
    for path in (old, new):
        path.write_text("")
    os.utime(old, (time.time() - 7200,) * 2)
    outcome = run_main(toy_arguments(toy_config, toy_data, tmp_path, "TRAIN.EPOCHS", 1), tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert not old.exists()
    assert new.exists()


def test_an_output_directory_without_access_permission_is_rejected(toy_config, toy_data, tmp_path, monkeypatch):
    def prepare(rank: int) -> None:
        """Simulate missing permissions, because root may access every directory."""
        original_glob, original_mkdir = Path.glob, Path.mkdir

        def check_access(path: Path) -> None:
            if "closed" in path.parts:
                raise PermissionError(13, "Permission denied", str(path))

        Path.glob = lambda path, pattern: check_access(path) or original_glob(path, pattern)
        Path.mkdir = lambda path, *arguments, **options: check_access(path) or original_mkdir(path, *arguments, **options)

    outcome = run_main(toy_arguments(toy_config, toy_data, tmp_path / "closed"), tmp_path / "log", prepare=prepare)
    assert outcome.exit_codes == [2], outcome.output
    assert "cannot be written to (Permission denied); choose another --output" in outcome.output


def test_a_checkpoint_without_a_data_description_is_rejected_if_classes_were_renamed():
    saved, data = {"class_names": ["a", "b"]}, {"train": {"classes": [["a", 1, ""], ["c", 1, ""]]}, "val": {}}
    with pytest.raises(ConfigError, match=r"was saved with the classes \['a', 'b'\]"):
        check_data(saved, data, "file.pth")
    check_data({"class_names": ["a", "c"]}, data, "file.pth")


def test_a_finished_run_that_skipped_every_update_fails():
    check_trained(num_updates=0, num_skipped=0)
    check_trained(num_updates=5, num_skipped=4)
    with pytest.raises(TrainingError, match="fp16 skipped every update"):
        check_trained(num_updates=5, num_skipped=5)


# --- Recorded environment, and numerical settings


def test_log_and_checkpoint_record_environment_and_config(trained):
    environment = read_checkpoint(trained)["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["processes"] == 1
    assert "--cfg" in environment["command"]
    log = (trained.parent / "log_rank0.txt").read_text()
    assert f"torch: {torch.__version__}" in log
    assert "ATTN_TYPE: LLS" in log


def test_deterministic_algorithms_and_tf32_follow_the_config(toy_config, monkeypatch):
    # Unset the variable, and let monkeypatch restore it after the test, because ``apply_numerical_settings`` sets it.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        for value, enabled, only_warns in (("error", True, False), ("warn", True, True)):
            apply_numerical_settings(load_config(toy_config, ["DETERMINISTIC", value, "TF32", False]))
            assert torch.are_deterministic_algorithms_enabled() == enabled
            assert torch.is_deterministic_algorithms_warn_only_enabled() == only_warns
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.backends.cudnn.benchmark
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        apply_numerical_settings(load_config(toy_config))
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("supported", [True, False])
def test_fp16_is_recommended_for_amp_on_a_gpu_without_bf16(supported, toy_config, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    apply_numerical_settings(load_config(toy_config, ["AMP", True]))
    assert ("use fp16 (--opts AMP_DTYPE fp16)" in caplog.text) == (not supported)


def test_a_type_of_mixed_precision_without_mixed_precision_is_a_warning(toy_config, caplog):
    apply_numerical_settings(load_config(toy_config, ["AMP_DTYPE", "fp16", "AMP", True]))
    assert "has no effect" not in caplog.text
    apply_numerical_settings(load_config(toy_config, ["AMP_DTYPE", "fp16"]))
    assert "AMP_DTYPE=fp16 has no effect without --amp; add --amp" in caplog.text


def test_training_and_check_apply_the_numerical_settings_of_the_config(toy_config, toy_data, tmp_path):
    def prepare(rank: int) -> None:
        original = jobs.train.build_trainer

        def build(*arguments, **options):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.backends.cuda.matmul.allow_tf32
            return original(*arguments, **options)

        jobs.train.build_trainer = build

    arguments = toy_arguments(toy_config, toy_data, tmp_path, "DETERMINISTIC", "warn", "TF32", False, "TRAIN.EPOCHS", 1)
    for flags in ([], ["--check"]):
        outcome = run_main([*arguments, *flags], tmp_path / "log", prepare=prepare)
        assert outcome.exit_codes == [0], outcome.output


def test_evaluation_applies_the_numerical_settings_of_the_config(trained, toy_config, toy_data, tmp_path):
    def prepare(rank: int) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        original = jobs.evaluate.evaluate

        def evaluate(*arguments, **options):
            assert torch.backends.cuda.matmul.allow_tf32  # the config enables TF32 by default
            return original(*arguments, **options)

        jobs.evaluate.evaluate = evaluate

    arguments = [*toy_arguments(toy_config, toy_data, tmp_path), "--eval", "--resume", trained]
    outcome = run_main(arguments, tmp_path / "log", prepare=prepare)
    assert outcome.exit_codes == [0], outcome.output


# --- Resuming, and metrics files


@pytest.mark.parametrize(
    ("num_updates", "last_evaluation", "expected"),
    [(40, 40, False), (49, 49, False), (50, 40, False), (50, 50, True), (60, 60, True)],
)
def test_a_run_is_finished_after_its_cooldown_and_last_evaluation(num_updates, last_evaluation, expected, toy_config):
    """The run has 4 epochs and 1 cooldown epoch, of 10 updates each."""
    cfg = load_config(toy_config, ["TRAIN.EPOCHS", 4, "TRAIN.COOLDOWN_EPOCHS", 1])
    saved = {"num_updates": num_updates, "updates_per_epoch": 10, "last_evaluation": last_evaluation}
    assert work_after(saved, cfg).is_finished is expected


def test_a_different_number_of_updates_per_epoch_prevents_resuming(toy_config):
    with pytest.raises(ConfigError, match=r"with 10 updates per epoch, but there are 11 now, so the data have changed"):
        resume(None, {"updates_per_epoch": 10, "config": {}}, load_config(toy_config), 11, "file.pth")


def test_resuming_discards_metrics_after_the_checkpoint_and_keeps_earlier_ones(tmp_path):
    """Resume at step 2: once after the evaluation of this step was completed, and once before."""
    for evaluated, expected in ((True, [(1, "train"), (2, "train"), (2, "eval_raw")]), (False, [(1, "train"), (2, "train")])):
        output = tmp_path / str(evaluated)
        output.mkdir()
        writer = MetricsWriter(output, 0)
        for step in (1, 2, 3):
            writer.scalars(step, "train", {"loss": 1.0 / step})
            if step > 1:
                writer.scalars(step, "eval_raw", {"acc1": step})
        writer.close()
        MetricsWriter(output, 2, evaluated=evaluated).close()
        points = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert [(point["step"], point["kind"]) for point in points] == expected
        assert points[1]["loss"] == 0.5


def test_tensorboard_contains_scalars_text_and_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = MetricsWriter(tmp_path, 0)
    metrics.scalars(3, "train", {"loss": 0.5, "lr": 1e-3, "epoch": 0, "grad_norm": 2.0})
    metrics.scalars(3, "eval_ema", {"acc1": 40.0, "acc5": 90.0, "correct1": 4}, file_only=("acc5",))
    metrics.text("config", "SEED: 0", 0)
    metrics.image("first_batch", torch.ones(3, 4, 5), 0)
    metrics.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(point.step, point.value) for point in events.Scalars("Overview/training_loss")] == [(3, 0.5)]
    assert sorted(events.Tags()["scalars"]) == [  # in the order in which TensorBoard shows them
        "Overview/accuracy_ema",
        "Overview/learning_rate",
        "Overview/training_loss",
        "eval_ema/correct1",
        "train/epoch",
        "train/grad_norm",
    ]
    assert [point.value for point in events.Scalars("train/epoch")] == [1]  # counted from 1
    assert b"SEED: 0" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    (image,) = events.Images("first_batch")
    assert (image.height, image.width) == (4, 5)


@pytest.mark.parametrize("clock", [0, -86_400, 86_400], ids=["same clock", "clock set back", "clock set forward"])
def test_tensorboard_drops_the_events_after_the_checkpoint_on_resume(clock, tmp_path, monkeypatch):
    """The run is resumed at step 2 twice; before the first of them, the clock is set."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    now = time.time
    for number, (resumed_at, steps) in enumerate(((0, (1, 2, 3)), (2, (3, 4)), (2, (3,)))):
        monkeypatch.setattr(time, "time", lambda shift=clock * (number > 0): now() + shift)
        metrics = MetricsWriter(tmp_path, resumed_at)
        for step in steps:
            metrics.scalars(step, "train", {"loss": float(10 * number + step)})
        metrics.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(point.step, point.value) for point in events.Scalars("Overview/training_loss")] == [(1, 1.0), (2, 2.0), (3, 23.0)]


def test_the_overview_of_tensorboard_continues_the_curves_of_an_earlier_version(tmp_path, monkeypatch):
    """The run was written without an overview until step 3, and resumes at step 2 twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(start: int, *steps: int) -> None:
        metrics = MetricsWriter(tmp_path, start)
        for step in steps:
            metrics.scalars(step, "train", {"loss": float(step), "grad_norm": float("inf")})
            metrics.scalars(step, "eval_raw", {"acc1": 10.0 * step})
        metrics.close()

    with monkeypatch.context() as earlier_version:
        earlier_version.setattr(engine.metrics_writer, "OVERVIEW", {})
        write(0, 1, 2, 3)
    write(2, 3)
    write(2, 3, 4)
    events = EventAccumulator(str(tmp_path)).Reload()
    steps = [1, 2, 3, 4]
    assert [(point.step, point.value) for point in events.Scalars("Overview/training_loss")] == [(step, step) for step in steps]
    assert [(point.step, point.value) for point in events.Scalars("Overview/accuracy_raw")] == [(s, 10 * s) for s in steps]
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2]
    assert [point.step for point in events.Scalars("train/grad_norm")] == steps


def test_tensorboard_drops_an_incomplete_evaluation_but_keeps_the_training_point_of_its_step(tmp_path):
    """The run is killed after the evaluation at step 2, before it is saved, and resumes at step 2."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in ((0, (1, 2)), (2, (3,))):
        metrics = MetricsWriter(tmp_path, start, evaluated=start == 0)
        for step in steps:
            metrics.scalars(step, "train", {"loss": float(step), "grad_norm": float("inf")})
        metrics.scalars(2, "eval_raw", {"acc1": 50.0 + start})
        metrics.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(point.step, point.value) for point in events.Scalars("Overview/training_loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [(point.step, point.value) for point in events.Scalars("Overview/accuracy_raw")] == [(2, 52.0)]


def test_evaluations_that_the_metrics_file_lacks_are_restored_from_the_checkpoint_in_order(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3, 4):
        writer.scalars(step, "train", {"loss": float(step)})
    writer.scalars(4, "eval_raw", {"acc1": 40.0})
    writer.close()
    evaluations = [{"step": step, "kind": "eval_raw", "acc1": 10.0 * step, "loss": float("nan")} for step in (2, 4)]
    MetricsWriter(tmp_path, 4, evaluations=evaluations).close()
    points = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(point["step"], point["kind"]) for point in points] == [
        (1, "train"),
        (2, "train"),
        (2, "eval_raw"),
        (3, "train"),
        (4, "train"),
        (4, "eval_raw"),
    ]
    assert points[2] == {"step": 2, "kind": "eval_raw", "acc1": 20.0, "loss": None}
    (tmp_path / "metrics.jsonl").unlink()
    MetricsWriter(tmp_path, 4, evaluations=evaluations).close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_blocked_disk_delays_the_first_flush_of_metrics_for_a_limited_time_and_later_ones_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.metrics_writer, "SECONDS_AT_EXIT", 0.5)
    writer, release = MetricsWriter(tmp_path, 0), threading.Event()
    writer._write_line(release.wait, 60)
    writer.scalars(1, "train", {"loss": 1.0})
    durations = []
    for _ in range(3):
        started = time.monotonic()
        writer.flush()
        durations.append(time.monotonic() - started)
    assert durations[0] >= 0.5
    assert sum(durations[1:]) < 0.5
    release.set()
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.0


def test_metrics_of_a_run_whose_directory_is_moved_cause_a_warning_and_no_traceback_of_tensorboard(
    tmp_path, monkeypatch, caplog
):
    errors = []
    monkeypatch.setattr(threading, "excepthook", errors.append)  # errors of TensorBoard's own thread
    (tmp_path / "run").mkdir()
    writer = MetricsWriter(tmp_path / "run", 0)
    writer.scalars(1, "train", {"loss": 1.0})
    writer.flush()
    (tmp_path / "run").rename(tmp_path / "moved")
    writer.scalars(2, "train", {"loss": 1.0})
    writer.close()
    assert errors == []
    assert f"{tmp_path / 'run'} was moved or removed" in caplog.text
    assert not (tmp_path / "run").exists()


# --- Loading of weights, and gradient checkpointing


def test_incomplete_weights_are_rejected_for_evaluation(trained, toy_config, toy_data, tmp_path):
    """Missing entries, such as the head, would have random values in the evaluation."""
    state = read_checkpoint(trained)
    for name, dropped in (("no_head", ("head.weight", "head.bias")), ("no_norm", ("norm.weight",))):
        weights = {key: value for key, value in state["model"].items() if key not in dropped}
        torch.save({"model": weights}, tmp_path / f"{name}.pth")
        arguments = [*toy_arguments(toy_config, toy_data, tmp_path), "--eval", "--resume", tmp_path / f"{name}.pth"]
        outcome = run_main(arguments, tmp_path / "log")
        assert outcome.exit_codes == [2], outcome.output
        assert dropped[0] in outcome.output
        assert not list(tmp_path.rglob("eval.json"))


def test_a_checkpoint_replaced_while_it_is_read_is_rejected(trained, monkeypatch):
    digests = iter(["first", "second"])
    monkeypatch.setattr("jobs.locate_checkpoint.sha256", lambda _: next(digests))
    with pytest.raises(CheckpointError, match="was replaced while it was being read"):
        open_checkpoint(trained)


def test_use_checkpoint_enables_gradient_checkpointing_of_the_trained_model(toy_config, toy_data, tmp_path):
    for enabled in (True, False):
        cfg = load_config(toy_config, ["DATA.DATA_PATH", str(toy_data), "TRAIN.USE_CHECKPOINT", enabled])
        world = World(0, 0, 1, torch.device("cpu"))
        init = Initialization("scratch", "", Contents(tmp_path))
        data = build_data(cfg, world, init, None)
        trainer = build_trainer(cfg, world, init, None, data, output=tmp_path, find_unused_parameters=False)
        assert trainer.state.model.grad_checkpointing is enabled


@pytest.mark.parametrize(
    ("names", "warning"),
    [
        (["class0", "class1", "class2"], ""),
        (
            ["class0", "cat", "class2"],
            "trained with other classes: class 1 is 'class1' in the data, but 'cat' in the checkpoint",
        ),
        (["0", "1", "2"], ""),  # class numbers are not compared
        (None, ""),
    ],
    ids=["equal", "different", "numbers", "missing"],
)
def test_a_pretrained_head_for_other_classes_is_loaded_with_a_warning(
    trained, toy_config, toy_data, tmp_path, caplog, names, warning
):
    state = read_checkpoint(trained) | {"class_names": names}
    torch.save(state, tmp_path / "pretrained.pth")
    cfg = load_config(toy_config, ["DATA.DATA_PATH", str(toy_data)])
    init = Initialization("pretrained", str(tmp_path / "pretrained.pth"), Contents(tmp_path))
    world = World(0, 0, 1, torch.device("cpu"))
    data = build_data(cfg, world, init, None)
    trainer = build_trainer(cfg, world, init, None, data, output=tmp_path, find_unused_parameters=False)
    label = preferred_weights(state)
    head = state["model" if label == "raw" else "state_dict_ema"]["head.weight"]
    assert torch.equal(trainer.state.model.head.weight, head)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert ("trained with other classes" in " ".join(warnings)) == bool(warning)
    assert warning in " ".join(warnings)
