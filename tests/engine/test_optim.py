import copy
import shlex

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from torch import nn

from engine.checkpoint_writer import save_checkpoint
from engine.compatibility import check_optimizer, example_states
from engine.optim import build_criterion, build_optimizer, build_scaler
from engine.state import TrainState
from engine.step import train_step
from models import build_model
from models.checkpoints.reader import CheckpointError, read_checkpoint
from tests.conftest import CONFIGS
from tests.runs import assert_equal
from utils.config.keys import KEYS
from utils.config.loading import load_config
from utils.config.optimizers import OPTIMIZERS, OPTIONS
from utils.errors import ConfigError

CPU = torch.device("cpu")


def build_config(*opts):
    return load_config(CONFIGS / "flatten_swin_t.yaml", ["MODEL.NUM_CLASSES", 3, *opts])


class Classifier(nn.Sequential):
    """A model with a convolution, a norm and a linear layer, which muon and lars treat differently."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, 3))

    def no_weight_decay(self):
        return {"2.weight"}

    def get_classifier(self):
        return self[3]


def build_state(name):
    model = Classifier()
    cfg = build_config("TRAIN.OPTIMIZER.NAME", name, "TRAIN.HEAD_LR_SCALE", 2.0)
    return TrainState(model, build_optimizer(cfg, model), build_scaler(cfg, CPU), None)


def train(state, updates):
    """Train as the trainer does: it sets the learning rate before each update."""
    for update in updates:
        generator = torch.Generator().manual_seed(update)
        for group in state.optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + update) * group["lr_scale"]
        F.cross_entropy(state.model(torch.randn(6, 3, 5, 5, generator=generator)), torch.arange(6) % 3).backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues_bit_equal_from_the_checkpoint_of_every_optimizer(name, tmp_path):
    state, resumed = build_state(name), build_state(name)
    train(state, range(3))
    save_checkpoint(state.to_dict(), tmp_path / "checkpoint_000000003.pth")
    train(state, range(3, 6))
    saved = read_checkpoint(tmp_path / "checkpoint_000000003.pth")
    check_optimizer(resumed.optimizer, saved["optimizer"])
    resumed.load_dict(saved)
    train(resumed, range(3, 6))
    assert_equal(resumed.to_dict(), state.to_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_in_fp16_a_non_finite_batch_changes_only_the_loss_scale_and_the_next_batch_is_trained(name):
    state = build_state(name)
    scaler, states = torch.amp.GradScaler("cpu", init_scale=4.0), []
    for factor in (1.0, float("inf"), 1.0):
        batch = (torch.randn(6, 3, 5, 5) * factor, torch.arange(6) % 3)
        options = {"seeds": [0], "amp_dtype": torch.float16, "max_grad_norm": 1.0}
        train_step(state.model, nn.CrossEntropyLoss(), state.optimizer, scaler, [batch], **options)
        states.append(copy.deepcopy(state.to_dict()))
    assert scaler.get_scale() == 2.0
    assert_equal(states[1], states[0])
    assert all(tensor.isfinite().all() for tensor in states[2]["model"].values())
    assert not torch.equal(states[2]["model"]["3.weight"], states[1]["model"]["3.weight"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_options_have_the_defaults_of_timm_and_those_that_an_optimizer_does_not_take_are_refused(name):
    parameter = nn.Parameter(torch.zeros(2, 2))
    expected = create_optimizer_v2([parameter], opt=name).defaults
    options = build_config("TRAIN.OPTIMIZER.NAME", name).TRAIN.OPTIMIZER
    built = build_state(name).optimizer.defaults
    for option in OPTIONS:
        default = expected.get(option.lower())
        if option in OPTIMIZERS[name]:
            assert options[option] == (list(default) if isinstance(default, tuple) else default)
            assert built[option.lower()] == default
        else:
            assert default is None
            assert options[option] == KEYS[f"TRAIN.OPTIMIZER.{option}"].default
            value = "[0.5, 0.5]" if option == "BETAS" else 0.5
            opts = ("TRAIN.OPTIMIZER.NAME", name, f"TRAIN.OPTIMIZER.{option}", value)
            with pytest.raises(ConfigError, match=f"{option}=.* has no effect with TRAIN.OPTIMIZER.NAME={name}") as error:
                build_config(*opts)
            remedy = shlex.split(str(error.value).partition(" --opts ")[2])
            assert build_config(*opts, *remedy).TRAIN.OPTIMIZER[option] == KEYS[f"TRAIN.OPTIMIZER.{option}"].default


def test_an_explicit_option_has_precedence_over_the_default_of_the_optimizer():
    cfg = build_config("TRAIN.OPTIMIZER.NAME", "lamb", "TRAIN.OPTIMIZER.EPS", 1e-8)
    assert build_optimizer(cfg, Classifier()).defaults["eps"] == 1e-8


@pytest.mark.parametrize("opts", [(), ("TRAIN.LAYER_DECAY", 0.8, "TRAIN.HEAD_LR_SCALE", 10.0)], ids=["plain", "layer_decay"])
@pytest.mark.parametrize("name", ["flatten_swin_t", "flatten_deit_t"])
def test_muon_trains_the_weights_of_linear_layers_and_convolutions_but_not_the_classifier_nor_position_tables(name, opts):
    cfg = load_config(CONFIGS / f"{name}.yaml", ["TRAIN.OPTIMIZER.NAME", "muon", *opts])
    with torch.device("meta"):
        model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    states = example_states(optimizer)[0]
    trained = {name for name, state in zip(names, states, strict=True) if state["use_muon"]}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    assert trained == {f"{name}.weight" for name, layer in layers.items() if layer is not model.get_classifier()}


# Optimizer -> (function that changes its stored state, start of the error).
MISFITS = {
    "lion": (lambda s: s["state"][0].update(exp_avg=torch.zeros(1)), r"optimizer.state\[0.weight\].exp_avg has shape \[1\]"),
    "mars": (lambda s: s["state"][0].update(step="x"), r"optimizer.state\[0.weight\].step is not of type int"),
    "laprop": (lambda s: s["state"][0].update(step=torch.ones(2)), r"\.step is not a single floating-point value"),
    "muon": (lambda s: s["state"][0].update(other=1), r"optimizer.state\[0.weight\] is not a state of Muon"),
    "lamb": (lambda s: s["param_groups"][0].pop("step"), r"optimizer.param_groups\[0\].step is not a single"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_stored_state_that_does_not_fit_the_optimizer_is_rejected_by_name(name):
    state, (change, message) = build_state(name), MISFITS[name]
    train(state, range(1))
    stored = state.optimizer.state_dict()
    check_optimizer(build_state(name).optimizer, stored)
    change(stored)
    with pytest.raises(CheckpointError, match=message):
        check_optimizer(build_state(name).optimizer, stored)


# --- Loss


def test_class_weights_that_are_too_long_for_the_command_line_are_accepted_from_a_yaml_file(tmp_path):
    weights, file = [float(number) for number in range(1, 1001)], tmp_path / "weights.yaml"
    opts = ["MODEL.NUM_CLASSES", 1000]
    with pytest.raises(ConfigError, match="give at most 4096, or write the list in a YAML file, and add this file to --cfg"):
        load_config(CONFIGS / "flatten_swin_t.yaml", [*opts, "TRAIN.CLASS_WEIGHTS", str(weights)])
    file.write_text(f"TRAIN: {{CLASS_WEIGHTS: {weights}}}")
    loaded = load_config([CONFIGS / "flatten_swin_t.yaml", file], opts).TRAIN.CLASS_WEIGHTS
    assert loaded == weights


LABELS = np.array([0] * 6 + [1] * 3 + [2])
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, -2.0], [1.0, 1.0, 3.0], [-1.0, 0.0, 0.0]])
TARGETS = torch.tensor([0, 1, 2, 2])
SOFT = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.9, 0.1], [0.2, 0.2, 0.6], [0.5, 0.5, 0.0]])


def test_balanced_weights_equal_those_of_scikit_learn_and_each_image_counts_with_the_weight_of_its_class():
    criterion = build_criterion(build_config("TRAIN.CLASS_WEIGHTS", "balanced"), mixed=True, labels=LABELS)
    weights = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    assert criterion.weight.tolist() == pytest.approx(weights.tolist())
    losses = [-weights[target] * logits.log_softmax(0)[target] for logits, target in zip(LOGITS, TARGETS, strict=True)]
    assert criterion(LOGITS, TARGETS).item() == pytest.approx(sum(losses).item() / 4)
    soft = [-(torch.tensor(weights) * t * logits.log_softmax(0)).sum() for logits, t in zip(LOGITS, SOFT, strict=True)]
    assert criterion(LOGITS, SOFT).item() == pytest.approx(sum(soft).item() / 4)
    # The loss of an update does not depend on its division into forward passes.
    assert (criterion(LOGITS[:2], TARGETS[:2]) + criterion(LOGITS[2:], TARGETS[2:])) / 2 == criterion(LOGITS, TARGETS)
    with pytest.raises(ConfigError, match="the class with id 2 has no training images"):
        build_criterion(build_config("TRAIN.CLASS_WEIGHTS", "balanced"), mixed=True, labels=LABELS[:-1])


@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_binary_cross_entropy_equals_that_of_timm_and_a_hand_calculation_with_weights(threshold):
    opts = ("TRAIN.LOSS", "bce", "MODEL.LABEL_SMOOTHING", 0.1, "TRAIN.BCE_THRESHOLD", threshold)
    plain = build_criterion(build_config(*opts), mixed=False)
    assert torch.equal(plain(LOGITS, TARGETS), BinaryCrossEntropy(0.1, threshold or None)(LOGITS, TARGETS))
    criterion = build_criterion(build_config(*opts, "TRAIN.CLASS_WEIGHTS", "[1.0, 2.0, 4.0]"), mixed=True)
    targets = (SOFT > 0.2).float() if threshold else SOFT
    positive, negative = targets * F.logsigmoid(LOGITS) * torch.tensor([1.0, 2.0, 4.0]), (1 - targets) * F.logsigmoid(-LOGITS)
    torch.testing.assert_close(criterion(LOGITS, SOFT), -(positive + negative).mean())
