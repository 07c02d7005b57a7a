"""Losses and gradients that are not finite (rows N1 and N2 of docs/reliability.md).

A run that stops at an update with a non-finite loss or gradient saves that update in a replay file. ``main.py --replay``
computes this update again.
"""

import copy
import math

import pytest
import torch
from torch import nn

import jobs.train
from engine.optim import build_optimizer, build_scaler
from engine.replay import find_non_finite
from engine.step import train_step
from models.checkpoints.reader import read_checkpoint
from tests.conftest import CONFIGS
from tests.launch import run_main
from tests.runs import LinearClassifier, assert_equal, toy_arguments
from utils.config.loading import load_config
from utils.config.optimizers import OPTIMIZERS
from utils.distributed import World, wrap
from utils.run_files import list_checkpoints

pytestmark = pytest.mark.reliability
UPDATE = 3  # the update at which a fault is injected, counted from 0


class FaultyLoss(nn.CrossEntropyLoss):
    """Cross entropy whose value or gradient is NaN at the update ``UPDATE``."""

    def __init__(self, fault: str):
        super().__init__()
        self.fault = fault
        self.calls = 0

    def forward(self, logits, targets):
        loss = super().forward(logits, targets)
        self.calls += 1
        if self.calls == UPDATE + 1:
            if self.fault == "loss":
                return loss + math.nan  # the gradient stays finite
            logits.register_hook(lambda gradient: gradient * math.nan)
        return loss


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_n1_nan_in_one_rank_stops_all_ranks_and_leaves_the_weights_unchanged(fault, toy_config, toy_data, tmp_path):
    def prepare(rank: int) -> None:
        if rank == 1:
            jobs.train.build_criterion = lambda *_, **__: FaultyLoss(fault)

    options = ["SAVE_STEPS", 1, "DATA.BATCH_SIZE", 4, "KEEP_CHECKPOINTS", 9]
    arguments = toy_arguments(toy_config, toy_data, tmp_path, *options)
    outcome = run_main(arguments, tmp_path / "log", processes=2, prepare=prepare)
    assert outcome.exit_codes == [1, 1], outcome.output
    assert f"at update {UPDATE + 1} of the run (epoch 1/" in outcome.output
    folder = tmp_path / "toy/default"
    newest, replay_path = list_checkpoints(folder)[0], folder / f"replay_{UPDATE:09d}.pth"
    checkpoint, replay_state = read_checkpoint(newest), read_checkpoint(replay_path)
    assert checkpoint["num_updates"] == UPDATE
    assert all(torch.equal(value, checkpoint["model"][name]) for name, value in replay_state["model"].items())
    images = replay_state["replay"]["images"]
    assert [len(names) for passes in images for names in passes] == [4, 4]
    assert replay_state["config"]["SEED"] == 0
    # The replayed loss and gradients are finite because the replay does not use the faulty loss of this test.
    replayed = run_main(["--replay", replay_path, "--data-path", toy_data], tmp_path / "log")
    assert replayed.exit_codes == [0], replayed.output
    assert f"update {UPDATE + 1} of the run: every output and gradient is finite" in replayed.output


@pytest.mark.parametrize("print_freq", [1, 5])
def test_n1_the_error_gives_the_update_of_the_nan_loss_even_if_another_update_follows(
    print_freq, toy_config, toy_data, tmp_path
):
    """With PRINT_FREQ 5, the loss of an update is read only after the next update has been launched.

    That next update must not change the weights.
    """

    def prepare(rank: int) -> None:
        jobs.train.build_criterion = lambda *_, **__: FaultyLoss("loss")

    arguments = toy_arguments(toy_config, toy_data, tmp_path, "PRINT_FREQ", print_freq)
    outcome = run_main(arguments, tmp_path / "log", prepare=prepare)
    assert outcome.exit_codes == [1], outcome.output
    assert f"at update {UPDATE + 1} of the run (epoch 1/" in outcome.output
    replay_state = read_checkpoint(tmp_path / f"toy/default/replay_{UPDATE:09d}.pth")

    arguments = toy_arguments(toy_config, toy_data, tmp_path / "undisturbed", "SAVE_STEPS", UPDATE, "KEEP_CHECKPOINTS", 99)
    assert run_main(arguments, tmp_path / "log").exit_codes == [0]
    expected = read_checkpoint(tmp_path / f"undisturbed/toy/default/checkpoint_{UPDATE:09d}.pth")["model"]
    assert all(torch.equal(value, expected[name]) for name, value in replay_state["model"].items())


def test_n1_the_replay_names_the_first_module_that_overflows(toy_config, toy_data, tmp_path):
    options = ["TRAIN.WARMUP_EPOCHS", 0, "TRAIN.BASE_LR", 1e20, "TRAIN.CLIP_GRAD", 0, "DATA.BATCH_SIZE", 4]
    arguments = toy_arguments(toy_config, toy_data, tmp_path, *options)
    outcome = run_main(arguments, tmp_path / "log", processes=2)
    assert outcome.exit_codes == [1, 1], outcome.output
    replay_path = tmp_path / "toy/default/replay_000000001.pth"
    replayed = run_main(["--replay", replay_path, "--data-path", toy_data], tmp_path / "log")
    assert replayed.exit_codes == [0], replayed.output
    assert "the first non-finite values are computed by layers.0.blocks.0.attn itself" in replayed.output
    first_image = read_checkpoint(replay_path)["replay"]["images"][0][0][0]
    assert f"images of this batch: {first_image}" in replayed.output


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_n1_weights_do_not_change_at_or_after_a_non_finite_update(name):
    cfg = load_config(CONFIGS / "flatten_swin_t.yaml", ["TRAIN.OPTIMIZER.NAME", name])
    world = World(0, 0, 1, torch.device("cpu"))
    torch.manual_seed(0)
    model = LinearClassifier(6, 3)
    optimizer, scaler, failed = build_optimizer(cfg, model), build_scaler(cfg, world.device), torch.zeros(())
    wrapped, reports, states = wrap(model, world), [], []
    for update in range(4):
        images = torch.randn(8, 6) * (math.inf if update == 2 else 1)
        batch = [(images, torch.randint(0, 3, (8,)))]
        options = {"seeds": [0], "amp_dtype": torch.float32, "max_grad_norm": 1.0, "failed": failed}
        reports.append(train_step(wrapped, nn.CrossEntropyLoss(), optimizer, scaler, batch, **options))
        states.append(copy.deepcopy({**model.state_dict(), **optimizer.state_dict()}))
    assert [report.is_finite for report in reports] == [True, True, False, True]
    assert not torch.equal(states[0]["weight"], states[1]["weight"])
    for later_state in states[2:]:
        assert_equal(later_state, states[1])


class Splitter(nn.Module):
    """Returns its input, and a tensor that is infinite because of a division by zero."""

    def forward(self, x):
        return x, x[:, :2] / 0


class PairClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.splitter = Splitter()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        finite, infinite = self.splitter(x)
        return self.head(finite) + infinite.sum()


def test_n1_replay_finds_a_non_finite_tensor_in_a_tuple_of_outputs():
    finding = find_non_finite(
        PairClassifier(), nn.CrossEntropyLoss(), torch.ones(4, 6), torch.zeros(4, dtype=torch.long), torch.float32
    )
    assert finding.startswith(
        "the output of splitter (Splitter) is the first non-finite output: 8 of 8 values are not finite, shape (4, 2)"
    )


def test_n1_replay_reports_the_shape_of_a_non_finite_output():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    nn.init.constant_(model[1].weight, float("inf"))
    finding = find_non_finite(model, nn.CrossEntropyLoss(), torch.ones(4, 6), torch.zeros(4, dtype=torch.long), torch.float32)
    assert finding.startswith(
        "the output of 1 (Linear) is the first non-finite output: 12 of 12 values are not finite, shape (4, 3)"
    )


def overflow_in(first: int, last: int):
    """Return a ``prepare`` function that makes gradients infinite in forward passes ``first`` to ``last``, counted from 1."""

    class Overflowing(nn.CrossEntropyLoss):
        calls = 0

        def forward(self, logits, targets):
            Overflowing.calls += 1
            if first <= Overflowing.calls <= last:
                logits.register_hook(lambda gradient: gradient * math.inf)
            return super().forward(logits, targets)

    def prepare(rank: int) -> None:
        jobs.train.build_criterion = lambda *_, **__: Overflowing()

    return prepare


FP16 = ["AMP", True, "AMP_DTYPE", "fp16", "PRINT_FREQ", 1, "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0]


def test_n2_a_skipped_fp16_update_changes_neither_weights_nor_ema_nor_schedule(toy_config, toy_data, tmp_path):
    arguments = toy_arguments(toy_config, toy_data, tmp_path, *FP16, "SAVE_STEPS", 1, "KEEP_CHECKPOINTS", 99)
    outcome = run_main(arguments, tmp_path / "log", prepare=overflow_in(4, 6))
    assert outcome.exit_codes == [0], outcome.output
    states = {(state := read_checkpoint(path))["num_updates"]: state for path in list_checkpoints(tmp_path / "toy/default")}
    before = states[3]
    for skipped, update in enumerate((4, 5, 6), start=1):
        after = states[update]
        assert after["num_skipped"] == skipped
        for weights in ("model", "state_dict_ema"):
            assert all(torch.equal(value, before[weights][name]) for name, value in after[weights].items())
        assert after["scaler"]["scale"] < before["scaler"]["scale"]
    assert not torch.equal(states[7]["model"]["head.weight"], before["model"]["head.weight"])
    learning_rates = {number: state["optimizer"]["param_groups"][0]["lr"] for number, state in states.items()}
    # Updates are counted from 1, including skipped ones. Update 7, the first after the skipped ones, uses the learning rate of
    # update 4, the first skipped one.
    assert learning_rates[7] == learning_rates[4] != learning_rates[3]


def test_n2_twenty_skipped_updates_in_a_row_end_the_run(toy_config, toy_data, tmp_path):
    arguments = toy_arguments(toy_config, toy_data, tmp_path, *FP16, "TRAIN.EPOCHS", 3, "DATA.BATCH_SIZE", 4)
    outcome = run_main(arguments, tmp_path / "log", prepare=overflow_in(3, 99))
    assert outcome.exit_codes == [1], outcome.output
    assert "20 updates in a row" in outcome.output
    assert "the last at update 22 of the run " in outcome.output
    assert "AMP_DTYPE bf16" in outcome.output
