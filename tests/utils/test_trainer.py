"""The trainer alone, with a linear model and a loader of fixed batches."""

import threading
import time
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import utils.engine
from tests.conftest import CONFIGS
from tests.runs import assert_equal
from utils.checkpoint import BEST, list_checkpoints
from utils.config import load_config
from utils.distributed import World, wrap
from utils.engine import EvalResult, Recipe, Trainer, TrainState
from utils.optim import build_ema, build_optimizer, build_scaler
from weights.reader import CheckpointError, read_checkpoint

DEVICE = torch.device("cpu")
UPDATES_PER_EPOCH = 4


@dataclass
class Batch:
    images: Tensor
    targets: Tensor


class Loader:
    """Endless different batches of 7 images."""

    updates_per_epoch = UPDATES_PER_EPOCH
    seconds_waited = 0.0

    def set_position(self, epoch: int, first_update: int = 0) -> None:
        self.first = epoch * UPDATES_PER_EPOCH + first_update

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(self.first)
            self.first += 1
            yield Batch(torch.randn(7, 6, generator=generator), torch.randint(0, 3, (7,), generator=generator))


class Linear(nn.Linear):
    def no_weight_decay(self) -> set[str]:
        return {"bias"}

    def get_classifier(self) -> nn.Module:
        return self


def create_trainer(output, *opts, schedule=lambda num_updates: 1e-2 * (1 + num_updates), **recipe) -> Trainer:
    settings = ["EMA.ENABLED", True, "EMA.DECAY", 0.9, "TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.OPTIMIZER.MOMENTUM", 0.0]
    cfg = load_config(CONFIGS / "flatten_swin_t.yaml", [*settings, *opts])
    torch.manual_seed(0)
    model = Linear(6, 3)
    defaults = {
        "num_epochs": 2,
        "accumulation": 1,
        "amp_dtype": torch.float32,
        "eval_dtype": torch.float32,
        "max_grad_norm": float("inf"),
        "seed": 0,
        "print_freq": 2,
        "save_freq": 1,
        "save_steps": 0,
        "save_minutes": 0.0,
        "eval_freq": 1,
        "keep_checkpoints": 99,
    }
    world = World(0, 0, 1, DEVICE)
    return Trainer(
        state=TrainState(model, build_optimizer(cfg, model), build_scaler(cfg, DEVICE), build_ema(cfg, model)),
        model=wrap(model, world, num_values=3),
        criterion=nn.CrossEntropyLoss(),
        schedule=schedule,
        train_loader=Loader(),
        val_loader=None,
        mixup=None,
        recipe=Recipe(**defaults | recipe),
        world=world,
        output=output,
        header={"config": {}},
    )


@pytest.fixture
def accuracies(monkeypatch) -> list[int]:
    """Correct predictions of 10, for one evaluation after the other; the last one repeats."""
    counts = [5]

    def evaluate(models, *_, **__):
        count = counts.pop(0) if len(counts) > 1 else counts[0]
        return {label: EvalResult(label, count, count, 10, 1.0, 3) for label in models}

    monkeypatch.setattr(utils.engine, "evaluate", evaluate)
    return counts


# --- Saving in the background


def test_a_checkpoint_has_the_state_of_its_update_although_training_continues(tmp_path, accuracies, monkeypatch):
    """The first write waits until two further updates are done."""
    expected = create_trainer(tmp_path / "expected", save_steps=1)
    (tmp_path / "expected").mkdir()
    expected.fit()

    trainer = create_trainer(tmp_path, save_steps=1)
    save, trained, seen = utils.engine.save_checkpoint, threading.Event(), []

    def save_late(state, path):
        trained.wait(30)
        seen.append(trainer.state.num_updates)
        save(state, path)

    def step_and_tell(*arguments, **options):
        if trainer.state.num_updates == 1:
            trained.set()
        return step(*arguments, **options)

    step = utils.engine.train_step
    monkeypatch.setattr(utils.engine, "train_step", step_and_tell)
    monkeypatch.setattr(utils.engine, "save_checkpoint", save_late)
    trainer.fit()
    assert len(seen) == 8
    for path in list_checkpoints(tmp_path):
        assert_equal(read_checkpoint(path), read_checkpoint(tmp_path / "expected" / path.name))


def test_a_failed_write_ends_training_at_the_next_update(tmp_path, accuracies, monkeypatch):
    trainer = create_trainer(tmp_path, save_steps=1)

    def fail(state, path):
        raise CheckpointError("no space")

    def step_after_failure(*arguments, **options):
        while trainer.state.num_updates == 1 and not trainer.writing.failed:
            time.sleep(0.01)
        return step(*arguments, **options)

    step = utils.engine.train_step
    monkeypatch.setattr(utils.engine, "train_step", step_after_failure)
    monkeypatch.setattr(utils.engine, "save_checkpoint", fail)
    with pytest.raises(CheckpointError, match="no space"):
        trainer.fit()
    assert trainer.state.num_updates == 2


def test_a_failed_write_asks_all_processes_for_a_save(tmp_path, accuracies, monkeypatch):
    trainer = create_trainer(tmp_path)
    assert trainer.requests().tolist() == [0, 0]

    def fail(state, path):
        raise CheckpointError("no space")

    monkeypatch.setattr(utils.engine, "save_checkpoint", fail)
    trainer.save()
    while not trainer.writing.failed:
        time.sleep(0.01)
    assert trainer.requests().tolist() == [0, 1]


def test_the_last_write_fails_the_run(tmp_path, accuracies, monkeypatch):
    def fail(state, path):
        raise CheckpointError("no space")

    monkeypatch.setattr(utils.engine, "save_checkpoint", fail)
    with pytest.raises(CheckpointError, match="no space"):
        create_trainer(tmp_path, num_epochs=1).fit()


# --- Order


def test_the_best_checkpoint_is_the_later_of_equals(tmp_path, accuracies):
    accuracies[:] = [4, 6, 6, 5]
    trainer = create_trainer(tmp_path, num_epochs=4)
    trainer.fit()
    assert trainer.state.best == {"acc1": 60.0, "weights": "ema", "epoch": 2, "num_updates": 3 * UPDATES_PER_EPOCH}
    best = read_checkpoint(tmp_path / BEST)
    assert best["num_updates"] == 3 * UPDATES_PER_EPOCH
    assert best["best"] == trainer.state.best  # saved after its evaluation
