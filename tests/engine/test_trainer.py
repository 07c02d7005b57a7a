"""Tests of the trainer with a linear model and a loader of fixed batches."""

import logging
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import engine.evaluation
import engine.saver
import engine.trainer
import engine.training_log
from engine.evaluation import EvalResult
from engine.metrics_writer import MetricsWriter
from engine.optim import build_ema, build_optimizer, build_scaler
from engine.remaining_work import work_after
from engine.schedule import accumulation_steps
from engine.state import TrainState
from engine.step import Report
from engine.trainer import SLOW_UPDATE, Trainer
from models.checkpoints.reader import CheckpointError, read_checkpoint
from tests.conftest import CONFIGS
from tests.runs import LinearClassifier, assert_equal
from utils.config.loading import load_config
from utils.distributed import World, wrap
from utils.errors import Stopped, TrainingError
from utils.run_files import BEST, list_checkpoints, num_updates_of

DEVICE = torch.device("cpu")
UPDATES_PER_EPOCH = 4


@dataclass
class Batch:
    images: Tensor
    targets: Tensor


class Loader:
    """An endless sequence of different batches of 7 images."""

    updates_per_epoch = UPDATES_PER_EPOCH
    seconds_waited = 0.0

    def __init__(self) -> None:
        self.started: list[int] = []  # epochs whose loading was started ahead of time

    def set_position(self, epoch: int, first_update: int = 0) -> None:
        self.first = epoch * UPDATES_PER_EPOCH + first_update

    def start(self, epoch: int) -> None:
        self.started.append(epoch)

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(self.first)
            self.first += 1
            yield Batch(torch.randn(7, 6, generator=generator), torch.randint(0, 3, (7,), generator=generator))


SETTINGS = {
    "AMP": False,
    "EMA.ENABLED": True,
    "EMA.DECAY": 0.9,
    "TRAIN.OPTIMIZER.NAME": "sgd",
    "TRAIN.OPTIMIZER.MOMENTUM": 0.0,
    "TRAIN.EPOCHS": 2,
    "TRAIN.WARMUP_EPOCHS": 0,
    "TRAIN.CLIP_GRAD": 0.0,
    "PRINT_FREQ": 2,
    "SAVE_MINUTES": 0.0,
    "KEEP_CHECKPOINTS": 99,
}


def create_trainer(output, *opts, schedule=lambda num_updates: 1e-2 * (1 + num_updates)) -> Trainer:
    """A trainer with ``SETTINGS``. opts: KEY, VALUE, ... that override them."""
    settings = [entry for item in SETTINGS.items() for entry in item]
    cfg = load_config(CONFIGS / "flatten_swin_t.yaml", [*settings, *opts])
    torch.manual_seed(0)
    model = LinearClassifier(6, 3)
    world = World(0, 0, 1, DEVICE)
    return Trainer(
        cfg=cfg,
        world=world,
        state=TrainState(model, build_optimizer(cfg, model), build_scaler(cfg, DEVICE), build_ema(cfg, model)),
        model=wrap(model, world),
        criterion=nn.CrossEntropyLoss(),
        schedule=schedule,
        train_loader=Loader(),
        val_loader=None,
        mixup=None,
        output=output,
        metadata={"config": {}, "global_batch_size": 7 * accumulation_steps(cfg, 1)},
    )


@pytest.fixture
def correct_counts(monkeypatch) -> list[int]:
    """Numbers of correct predictions for 10 images, one per evaluation; further evaluations reuse the last number."""
    counts = [5]

    def evaluate(models, *_, **__):
        count = counts.pop(0) if len(counts) > 1 else counts[0]
        by_class = np.array([[10, 0, 0], [count, 10 - count, 0], [count, 0, 0]])
        return {label: EvalResult(label, count, count, 10, 1.0, 3, by_class, np.ones((3, 15))) for label in models}

    monkeypatch.setattr(engine.trainer, "evaluate", evaluate)
    return counts


# Background saving.


@pytest.mark.parametrize("request_every", [("SAVE_STEPS", 4), ("SAVE_MINUTES", 1e-9)])
def test_a_checkpoint_requested_at_the_end_of_an_epoch_is_saved_if_neither_evaluation_nor_save_is_due(
    request_every, tmp_path, correct_counts
):
    trainer = create_trainer(tmp_path, *request_every, "TRAIN.EPOCHS", 3, "EVAL_FREQ", 3, "SAVE_FREQ", 3)
    trainer.fit()
    saved = {num_updates_of(path) for path in list_checkpoints(tmp_path)}
    assert saved >= {4, 8, 12}  # the ends of the epochs


def test_a_checkpoint_written_in_the_background_is_not_changed_by_later_updates(tmp_path, correct_counts, monkeypatch):
    """The state after two updates is written only after the third update has changed the weights."""
    expected = create_trainer(tmp_path / "expected", "SAVE_STEPS", 2)
    (tmp_path / "expected").mkdir()
    expected.fit()

    trainer = create_trainer(tmp_path, "SAVE_STEPS", 2)
    save, third_update_done, writes = engine.saver.save_checkpoint, threading.Event(), []

    def save_delayed(state, path):
        assert third_update_done.wait(30)
        writes.append(None)
        save(state, path)

    def step_and_notify(*arguments, **options):
        report = step(*arguments, **options)
        if trainer.state.num_updates == 2:
            third_update_done.set()
        return report

    step = engine.trainer.train_step
    monkeypatch.setattr(engine.trainer, "train_step", step_and_notify)
    monkeypatch.setattr(engine.saver, "save_checkpoint", save_delayed)
    trainer.fit()
    assert len(writes) == 6  # after 2 and 6 updates, and before and after the evaluations of both epochs
    for path in list_checkpoints(tmp_path):
        assert_equal(read_checkpoint(path), read_checkpoint(tmp_path / "expected" / path.name))


def test_a_failed_write_ends_training_at_the_next_update(tmp_path, correct_counts, monkeypatch):
    trainer = create_trainer(tmp_path, "SAVE_STEPS", 1)

    def fail(state, path):
        raise CheckpointError("no space")

    def step_after_failure(*arguments, **options):
        while trainer.state.num_updates == 1 and not trainer.saver.background_write.failed:
            time.sleep(0.01)
        return step(*arguments, **options)

    step = engine.trainer.train_step
    monkeypatch.setattr(engine.trainer, "train_step", step_after_failure)
    monkeypatch.setattr(engine.saver, "save_checkpoint", fail)
    with pytest.raises(CheckpointError, match="no space"):
        trainer.fit()
    assert trainer.state.num_updates == 2


def test_nothing_is_saved_after_a_write_that_failed_for_an_unexpected_reason(tmp_path, correct_counts, monkeypatch):
    trainer = create_trainer(tmp_path, "SAVE_STEPS", 1)

    def fail(*arguments):
        raise OSError("injected")

    monkeypatch.setattr(engine.saver, "record_save", fail)
    with pytest.raises(OSError, match="injected"):
        trainer.fit()
    trainer.saver.background_write.close()
    assert [num_updates_of(path) for path in list_checkpoints(tmp_path)] == [1]


def test_a_failed_write_requests_a_save_in_which_all_processes_raise_its_error(tmp_path, correct_counts, monkeypatch):
    trainer = create_trainer(tmp_path)
    assert trainer.requests() == (False, False)  # requests to stop and to save

    def fail(state, path):
        raise CheckpointError("no space")

    monkeypatch.setattr(engine.saver, "save_checkpoint", fail)
    trainer.save()
    while not trainer.saver.background_write.failed:
        time.sleep(0.01)
    assert trainer.requests() == (False, True)  # every process then saves, which raises the error of the failed write


def test_a_save_before_a_slow_update_does_not_raise_the_error_of_a_previous_write_in_rank_0_alone(tmp_path):
    trainer, started = create_trainer(tmp_path), threading.Event()
    trainer.stop = lambda: True

    def fail() -> None:
        started.wait(10)
        raise CheckpointError("disk full")

    trainer.saver.background_write.start(fail)
    threading.Timer(0.2, started.set).start()
    trainer.save_before_slow_update(SLOW_UPDATE + 1)
    assert trainer.saver.background_write.failed
    assert trainer.requests() == (True, True)
    with pytest.raises(CheckpointError, match="disk full"):
        trainer.save()


def test_a_failure_of_the_last_write_fails_the_run(tmp_path, correct_counts, monkeypatch):
    def fail(state, path):
        raise CheckpointError("no space")

    monkeypatch.setattr(engine.saver, "save_checkpoint", fail)
    with pytest.raises(CheckpointError, match="no space"):
        create_trainer(tmp_path, "TRAIN.EPOCHS", 1).fit()


# Evaluations and checkpoints at the ends of epochs.


def test_the_best_checkpoint_is_the_later_one_on_ties(tmp_path, correct_counts):
    correct_counts[:] = [4, 6, 6, 5]
    trainer = create_trainer(tmp_path, "TRAIN.EPOCHS", 4)
    trainer.fit()
    assert trainer.state.best == {"acc1": 60.0, "weights": "ema", "epoch": 2, "num_updates": 3 * UPDATES_PER_EPOCH}
    best = read_checkpoint(tmp_path / BEST)
    assert best["num_updates"] == 3 * UPDATES_PER_EPOCH
    assert best["best"] == trainer.state.best  # saved after the evaluation, so it contains the new best accuracy


def test_a_run_ends_after_the_patience_without_a_better_evaluation_and_is_finished_on_resume(tmp_path, correct_counts, caplog):
    """A tie is not better, although the later checkpoint becomes the best one."""
    caplog.set_level(logging.INFO)
    correct_counts[:] = [4, 6, 5, 6, 3]
    trainer = create_trainer(tmp_path, "TRAIN.EPOCHS", 9, "TRAIN.PATIENCE", 2, "SAVE_FREQ", 9)
    trainer.fit()
    assert trainer.state.num_updates == 4 * UPDATES_PER_EPOCH
    assert trainer.state.best["epoch"] == 3
    assert "done after epoch 4 of 9, since the last evaluations gave no better acc1 (TRAIN.PATIENCE=2)" in caplog.text
    newest = read_checkpoint(list_checkpoints(tmp_path)[0]) | {"updates_per_epoch": UPDATES_PER_EPOCH}
    assert work_after(newest, trainer.cfg).is_finished
    more = load_config(CONFIGS / "flatten_swin_t.yaml", ["TRAIN.EPOCHS", 9, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.PATIENCE", 3])
    assert not work_after(newest, more).stop


def test_the_best_checkpoints_are_kept_although_newer_ones_replace_them(tmp_path, correct_counts):
    correct_counts[:] = [4, 9, 2, 6, 1]
    create_trainer(tmp_path, "TRAIN.EPOCHS", 5, "SAVE_FREQ", 9, "KEEP_CHECKPOINTS", 1, "KEEP_BEST", 2).fit()
    assert saved_epochs(tmp_path) == [5]
    kept = {path.name: read_checkpoint(path) for path in tmp_path.glob("top_*.pth")}
    assert sorted(kept) == ["top_000000008.pth", "top_000000016.pth"]  # after epochs 2 and 4
    assert all(name == f"top_{state['last_evaluation']:09d}.pth" for name, state in kept.items())
    assert read_checkpoint(tmp_path / BEST)["num_updates"] == 8


def test_the_best_evaluation_is_that_of_the_chosen_metric(tmp_path):
    state = create_trainer(tmp_path).state
    records = [{"epoch": 0, "acc1": 60.0, "loss": 1.5}, {"epoch": 0, "acc1": 70.0, "loss": 1.75}]
    assert [state.add_evaluation("raw", record, "loss") for record in records] == [True, False]
    assert state.best == {"acc1": 60.0, "weights": "raw", "epoch": 0, "num_updates": 0, "metric": "loss", "value": 1.5}
    state.reset_best()
    assert [state.add_evaluation("ema", record, "acc1") for record in records] == [True, True]


def saved_epochs(folder) -> list[int]:
    return sorted(read_checkpoint(path)["num_updates"] // UPDATES_PER_EPOCH for path in list_checkpoints(folder))


def test_checkpoints_are_saved_after_every_second_epoch_and_the_last(tmp_path, correct_counts):
    """SAVE_FREQ is 2 in a run of 5 epochs that is evaluated only at its end."""
    create_trainer(tmp_path, "TRAIN.EPOCHS", 5, "SAVE_FREQ", 2, "EVAL_FREQ", 5).fit()
    assert saved_epochs(tmp_path) == [2, 4, 5]


def test_the_state_is_saved_before_an_evaluation_and_replaced_only_if_a_save_is_due_or_the_accuracy_improved(
    tmp_path, correct_counts
):
    """SAVE_FREQ is 2, and the accuracy improves in the first evaluation only. Checkpoint 3 precedes its evaluation."""
    correct_counts[:] = [9, 1]
    create_trainer(tmp_path, "TRAIN.EPOCHS", 5, "SAVE_FREQ", 2).fit()
    assert saved_epochs(tmp_path) == [1, 2, 3, 4, 5]
    evaluated = [state["last_evaluation"] == state["num_updates"] for state in map(read_checkpoint, list_checkpoints(tmp_path))]
    assert evaluated == [True, True, False, True, True]  # newest first
    assert read_checkpoint(tmp_path / BEST)["num_updates"] == UPDATES_PER_EPOCH


def test_the_model_is_evaluated_after_every_second_epoch_and_the_last(tmp_path, monkeypatch, correct_counts):
    evaluated = []
    trainer = create_trainer(tmp_path, "TRAIN.EPOCHS", 5, "EVAL_FREQ", 2)
    evaluate = engine.trainer.evaluate

    def record(models, *arguments, **options):
        evaluated.append(trainer.state.num_updates // UPDATES_PER_EPOCH)
        return evaluate(models, *arguments, **options)

    monkeypatch.setattr(engine.trainer, "evaluate", record)
    trainer.fit()
    assert evaluated == [2, 4, 5]
    assert trainer.train_loader.started == [2, 4]  # the next epoch is loaded during the evaluation


# Saves after an error.


def train_and_fail(trainer: Trainer, error: type[BaseException], monkeypatch, *, during: str) -> None:
    """Raise ``error`` in the third update: while its batch is loaded, in the optimizer step, or in the update of the EMA."""

    def fail(*_arguments, **_options):
        if trainer.state.num_updates + (during != "EMA update") == 3:
            raise error("injected")

    if during == "loading":
        trainer.mixup = lambda images, targets, _: fail() or (images, targets)
    elif during == "optimizer step":
        trainer.state.optimizer.register_step_pre_hook(fail)
    else:
        monkeypatch.setattr(trainer.state.ema, "update", fail)
    with pytest.raises(error, match="injected"):
        trainer.fit()
    trainer.saver.background_write.close()


@pytest.mark.parametrize("error", [ValueError, MemoryError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_unexpected_error_between_two_updates_saves_the_last_complete_one(error, tmp_path, monkeypatch):
    expected = create_trainer(tmp_path / "expected", "SAVE_STEPS", 2)
    (tmp_path / "expected").mkdir()
    monkeypatch.setattr(expected, "evaluate", lambda epoch: False)
    expected.fit()
    trainer = create_trainer(tmp_path)
    train_and_fail(trainer, error, monkeypatch, during="loading")
    (path,) = list_checkpoints(tmp_path)
    saved = read_checkpoint(path)
    assert saved["num_updates"] == 2
    reference = read_checkpoint(tmp_path / "expected" / path.name)
    for name in ("model", "state_dict_ema", "scaler", "best"):
        assert_equal(saved[name], reference[name])


@pytest.mark.parametrize("during", ["optimizer step", "EMA update"])
def test_an_error_while_an_update_changes_the_state_saves_nothing(during, tmp_path, monkeypatch):
    train_and_fail(create_trainer(tmp_path), ValueError, monkeypatch, during=during)
    assert not list_checkpoints(tmp_path)


def test_an_error_is_raised_even_if_the_state_cannot_be_saved_after_it(tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr(engine.saver, "to_host", fail)
    train_and_fail(create_trainer(tmp_path), ValueError, monkeypatch, during="loading")
    assert "the state could not be saved (OSError: no space)" in caplog.text


def test_an_error_after_an_update_that_was_not_finite_saves_nothing(tmp_path, monkeypatch):
    """The loss of the second update is NaN, so it changed no weights. Its report is read only after the third update."""
    trainer = create_trainer(tmp_path, "PRINT_FREQ", 99)
    criterion, calls = trainer.criterion, []
    trainer.criterion = lambda *arguments: (
        criterion(*arguments) * (float("nan") if calls.append(None) or len(calls) == 2 else 1)
    )
    train_and_fail(trainer, ValueError, monkeypatch, during="loading")
    assert len(calls) == 2
    assert not list_checkpoints(tmp_path)


def test_an_error_right_after_a_save_does_not_save_again(tmp_path, monkeypatch):
    trainer, writes = create_trainer(tmp_path, "SAVE_STEPS", 2), []
    save = engine.saver.save_checkpoint
    monkeypatch.setattr(engine.saver, "save_checkpoint", lambda *arguments: writes.append(None) or save(*arguments))
    train_and_fail(trainer, ValueError, monkeypatch, during="loading")
    assert len(writes) == 1


# Stop requests.


def test_a_single_process_stops_after_the_update_in_which_the_signal_arrives(tmp_path):
    """The request arrives in the backward pass of the second update, after the update has sent its requests."""
    trainer = create_trainer(tmp_path)
    begin_change = trainer.begin_change

    def request_stop() -> None:
        begin_change()
        if trainer.state.num_updates == 1:
            trainer.stop = lambda: True

    trainer.begin_change = request_stop
    with pytest.raises(Stopped, match="the checkpoint after update 2 is saved"):
        trainer.fit()
    assert [read_checkpoint(path)["num_updates"] for path in list_checkpoints(tmp_path)] == [2]


# Updates.


def test_an_update_uses_the_learning_rate_of_its_number_and_then_updates_the_ema_weights(tmp_path):
    """Expected: an SGD step with 3 times the scheduled rate (HEAD_LR_SCALE), then e = 0.9 e + 0.1 w for the EMA weights e."""
    updates = []
    trainer = create_trainer(
        tmp_path, "TRAIN.HEAD_LR_SCALE", 3.0, "TRAIN.WEIGHT_DECAY", 0.0, schedule=lambda update: updates.append(update) or 0.01
    )
    state = trainer.state
    state.num_updates = 3
    weights, initial_ema = (parameters(model) for model in (state.model, state.ema.module))
    batch = next(iter_batches(trainer))
    initial = [weight.clone().requires_grad_() for weight in weights]
    nn.CrossEntropyLoss()(nn.functional.linear(batch.images, *initial), batch.targets).backward()
    trainer.update(iter([(batch.images, batch.targets)]))
    assert updates == [3]
    for weight, before in zip(parameters(state.model), initial, strict=True):
        torch.testing.assert_close(weight, (before - 3 * 0.01 * before.grad).detach())  # all parameters belong to the head
    for new, old, weight in zip(parameters(state.ema.module), initial_ema, parameters(state.model), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * weight)
        assert not torch.equal(new, weight)


def parameters(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in (model.weight, model.bias)]


def iter_batches(trainer: Trainer):
    trainer.train_loader.set_position(0)
    return iter(trainer.train_loader)


def test_random_numbers_of_a_forward_pass_depend_on_seed_position_and_rank(tmp_path):
    """With 2 forward passes per update, update 3 starts with forward pass 6, wherever the run was resumed."""

    def draws(num_updates: int, num_passes: int, **changes) -> list[float]:
        trainer, numbers = create_trainer(tmp_path, "TRAIN.ACCUMULATION_STEPS", 2, "SEED", changes.get("seed", 0)), []
        trainer.state.model.register_forward_pre_hook(lambda *_: numbers.append(torch.rand(1).item()))
        trainer.world = World(changes.get("rank", 0), 0, 2, DEVICE)
        trainer.state.num_updates = num_updates
        mixed = trainer.mix(iter_batches(trainer))
        for _ in range(num_passes // 2):
            trainer.update(mixed)
        return numbers

    uninterrupted = draws(0, 8)
    assert len(set(uninterrupted)) == 8
    assert draws(3, 2) == uninterrupted[6:]
    assert not set(draws(0, 8, rank=1)) & set(uninterrupted)
    assert not set(draws(0, 8, seed=1)) & set(uninterrupted)


def test_mixup_receives_the_number_of_the_forward_pass(tmp_path):
    numbers = []
    trainer = create_trainer(tmp_path, "TRAIN.ACCUMULATION_STEPS", 2)
    trainer.mixup = lambda images, targets, number: numbers.append(number) or (images, targets)
    trainer.state.num_updates = 3
    mixed = trainer.mix(iter_batches(trainer))
    next(mixed), next(mixed)
    assert numbers == [6, 7]


class Metrics:
    """Replacement for ``MetricsWriter`` that records the calls of the trainer."""

    def __init__(self):
        self.points = []

    def scalars(self, step, kind, values, *, file_only=()):
        self.points.append((step, kind, values))

    def image(self, name, image, step):
        self.points.append((step, name, image))

    def image_grid(self, name, images, step):
        pass

    def flush(self):
        pass


def test_a_logged_point_has_the_mean_loss_since_the_previous_point_and_the_last_learning_rate(
    tmp_path, correct_counts, monkeypatch
):
    """PRINT_FREQ is 3 in an epoch of 4 updates: points are logged after 3 and after 4 updates."""
    trainer, reports = create_trainer(tmp_path, "TRAIN.EPOCHS", 1, "PRINT_FREQ", 3), []
    trainer.metrics = Metrics()
    step = engine.trainer.train_step

    def record(*arguments, **options):
        reports.append(step(*arguments, **options))
        return reports[-1]

    monkeypatch.setattr(engine.trainer, "train_step", record)
    trainer.fit()
    points = [(step, values) for step, kind, values in trainer.metrics.points if kind == "train"]
    assert [step for step, _ in points] == [3, 4]
    first, second = (values for _, values in points)
    loss, norm = (torch.stack([getattr(report, name) for report in reports]) for name in ("loss", "grad_norm"))
    assert first["loss"] == pytest.approx(float(loss[:3].mean()))
    assert second["loss"] == pytest.approx(float(loss[3]))
    assert first["grad_norm"] == pytest.approx(float(norm[2]))
    assert (first["lr"], second["lr"]) == (pytest.approx(0.03), pytest.approx(0.04))  # rates of updates 2 and 3, counted from 0
    assert first["epoch"] == 0


def test_the_first_batch_is_logged_as_a_grid_with_each_image_scaled_to_its_own_range():
    """The grid has seven images of 2 x 2 pixels, 4 per row, with a margin of 2 pixels.

    The ranges of the images, 0 to 1, 0 to 10, ..., all become 0 to 1.
    """
    metrics = Metrics()
    images = torch.tensor([0.0, 1.0, 0.5, 0.25]).view(1, 1, 2, 2) * 10.0 ** torch.arange(7).view(7, 1, 1, 1)
    MetricsWriter.image_grid(metrics, "first_batch", images.expand(7, 3, 2, 2), 0)
    ((step, name, grid),) = metrics.points
    assert (step, name, grid.shape) == (0, "first_batch", (3, 2 * (2 + 2) + 2, 4 * (2 + 2) + 2))
    for index in range(7):
        row, column = 4 * (index // 4) + 2, 4 * (index % 4) + 2
        torch.testing.assert_close(grid[0, row : row + 2, column : column + 2], torch.tensor([[0.0, 1.0], [0.5, 0.25]]))


def test_only_the_first_batch_of_a_run_is_logged_as_images(tmp_path, correct_counts):
    for num_updates in (0, 3):
        trainer, shown = create_trainer(tmp_path), []
        trainer.metrics = Metrics()
        trainer.metrics.image_grid = lambda name, images, step, shown=shown: shown.append(images)
        trainer.state.num_updates = num_updates
        trainer.run_epoch(0)
        trainer.finish_saving()
        first = next(iter_batches(trainer)).images
        assert [torch.equal(images, first) for images in shown] == ([True] if num_updates == 0 else [])


def test_a_model_already_on_the_evaluation_device_is_not_copied():
    model = nn.Linear(2, 3)
    assert engine.evaluation.on_device(model, DEVICE) is model
    copied = engine.evaluation.on_device(model, torch.device("meta"))
    assert copied.weight.device.type == "meta"
    assert model.weight.device.type == "cpu"


def test_a_logged_point_has_the_images_per_second_of_all_processes(tmp_path):
    """The interval has three updates of 7 images, and started two seconds ago."""
    trainer = create_trainer(tmp_path)
    trainer.metrics = Metrics()
    trainer.training_log.reports += [Report(loss=1.0, grad_norm=1.0, num_stops=0, num_saves=0)] * 3
    trainer.state.num_updates = 3
    trainer.training_log._started -= 2
    trainer.log()
    ((_, _, values),) = trainer.metrics.points
    assert values["images_per_second"] == pytest.approx(3 * 7 / 2, rel=0.05)


def test_further_lines_after_the_first_update_and_after_some_time_are_not_points_of_the_metrics(
    tmp_path, correct_counts, monkeypatch, caplog
):
    monkeypatch.setattr(engine.training_log, "SECONDS_BETWEEN_LINES", 0.0)
    trainer = create_trainer(tmp_path, "TRAIN.EPOCHS", 1, "PRINT_FREQ", 99)
    trainer.metrics = Metrics()
    with caplog.at_level("INFO", "engine.training_log"):
        trainer.fit()
    lines = [message for message in caplog.messages if "loss" in message]
    assert [line[: len("epoch 1/1 [1/4]")] for line in lines] == [f"epoch 1/1 [{done}/4]" for done in (1, 2, 3, 4)]
    assert "first update in" in lines[0]
    assert [step for step, kind, _ in trainer.metrics.points if kind == "train"] == [4]


def test_the_remaining_time_includes_evaluations_once_their_duration_is_known(tmp_path):
    """After 4 of 12 updates, 8 updates of 7 images remain, and evaluations after epochs 2 and 3."""
    trainer = create_trainer(tmp_path, "TRAIN.EPOCHS", 3, "EVAL_FREQ", 2)
    trainer.state.num_updates = 4
    assert trainer.training_log.eta(images_per_second=14.0) == "0:00:04 + 2 evaluations"
    trainer.training_log.evaluation_seconds = 10.0
    assert trainer.training_log.eta(images_per_second=14.0) == "0:00:24"


@pytest.mark.parametrize(
    ("best", "advice"),
    [(-1, "start a new run with a lower TRAIN.BASE_LR and another --tag"), (4, "that are later than update 4")],
)
def test_the_error_of_diverged_weights_says_which_checkpoints_to_delete(best, advice, tmp_path, monkeypatch):
    def evaluate(*_, **__):
        raise TrainingError("the raw weights give outputs that are not finite")

    monkeypatch.setattr(engine.trainer, "evaluate", evaluate)
    trainer = create_trainer(tmp_path)
    trainer.state.best["num_updates"] = best
    with pytest.raises(TrainingError, match=f"outputs that are not finite. If the weights have diverged.*{advice}"):
        trainer.evaluate(1)
