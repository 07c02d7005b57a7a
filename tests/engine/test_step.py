import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.evaluation import evaluate
from engine.optim import amp_dtype, build_criterion, build_ema, build_optimizer, build_scaler, eval_dtype
from engine.state import TrainState
from engine.step import Requests, train_step
from models import create_model
from tests.conftest import CONFIGS
from tests.launch import run_in_processes
from tests.runs import LinearClassifier, assert_equal
from utils.config.loading import load_config
from utils.distributed import World, start_sum, wrap

CPU_WORLD = World(0, 0, 1, torch.device("cpu"))


def setup(*opts):
    cfg = load_config(CONFIGS / "flatten_swin_t.yaml", ["EMA.ENABLED", True, "EMA.DECAY", 0.9, *opts])
    torch.manual_seed(0)
    model = LinearClassifier(6, 3)
    return model, build_optimizer(cfg, model), build_scaler(cfg, torch.device("cpu")), build_ema(cfg, model)


def step(model, optimizer, scaler, batches, max_grad_norm=float("inf"), dtype=torch.float32):
    report = train_step(
        wrap(model, CPU_WORLD),
        nn.CrossEntropyLoss(),
        optimizer,
        scaler,
        batches,
        seeds=range(len(batches)),
        amp_dtype=dtype,
        max_grad_norm=max_grad_norm,
    )
    return report.loss, report.grad_norm


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_equal_the_gradients_of_the_whole_batch(parts):
    images, targets = torch.randn(64, 6), torch.randint(0, 3, (64,))
    whole, optimizer, scaler, _ = setup("TRAIN.OPTIMIZER.NAME", "sgd")
    divided, other_optimizer, _, _ = setup("TRAIN.OPTIMIZER.NAME", "sgd")
    loss, norm = step(whole, optimizer, scaler, [(images, targets)])
    accumulated_loss, accumulated_norm = step(
        divided, other_optimizer, scaler, list(zip(images.chunk(parts), targets.chunk(parts), strict=True))
    )
    torch.testing.assert_close(accumulated_loss, loss)
    torch.testing.assert_close(accumulated_norm, norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(divided.weight, whole.weight, rtol=1e-6, atol=1e-8)


def test_clipping_bounds_the_update_and_reports_the_norm_before_clipping():
    images, targets = 100 * torch.randn(8, 6), torch.randint(0, 3, (8,))
    model, _, scaler, _ = setup()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = copy.deepcopy(model)
    _, norm = step(model, optimizer, scaler, [(images, targets)], max_grad_norm=0.5)
    changes = [(new - old).detach().flatten() for new, old in zip(model.parameters(), before.parameters(), strict=True)]
    assert norm > 1
    assert torch.cat(changes).norm() == pytest.approx(0.5, rel=1e-4)


def test_infinite_gradients_in_fp16_change_no_weight_and_lower_the_loss_scale():
    model, optimizer, scaler, _ = setup("AMP", True, "AMP_DTYPE", "fp16")
    before, scale = copy.deepcopy(model.state_dict()), scaler.get_scale()
    images = torch.full((8, 6), 6e4)
    step(model, optimizer, scaler, [(images, torch.zeros(8, dtype=torch.long))], dtype=torch.float16)
    assert scaler.get_scale() < scale
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weight_decay_is_zero_for_parameters_that_the_model_exempts():
    model, optimizer, _, _ = setup()
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(model.weight)] == 0.05
    assert decays[id(model.bias)] == 0


def test_ema_weights_equal_a_hand_computed_average():
    model, optimizer, scaler, ema = setup()
    start = model.weight.detach().clone()
    step(model, optimizer, scaler, [(torch.randn(8, 6), torch.randint(0, 3, (8,)))])
    ema.update(model)
    torch.testing.assert_close(ema.module.weight, 0.9 * start + 0.1 * model.weight)


@pytest.mark.parametrize("mixed", [False, True])
def test_label_smoothing_is_applied_once_with_or_without_mixup(mixed):
    cfg = load_config(CONFIGS / "flatten_swin_t.yaml", ["MODEL.LABEL_SMOOTHING", 0.1])
    logits, targets = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    smoothed = 0.9 * nn.functional.one_hot(targets, 5) + 0.1 / 5
    expected = -(smoothed * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(build_criterion(cfg, mixed=mixed)(logits, smoothed if mixed else targets), expected)


def test_a_training_state_is_restored_from_a_checkpoint_with_or_without_ema_weights():
    model, optimizer, scaler, ema = setup()
    state = TrainState(model, optimizer, scaler, ema, num_updates=3)
    step(model, optimizer, scaler, [(torch.randn(8, 6), torch.randint(0, 3, (8,)))])
    saved = copy.deepcopy(state.to_dict())
    restored = TrainState(*setup())
    restored.load_dict(saved)
    assert restored.num_updates == 3
    assert torch.equal(restored.ema.module.weight, ema.module.weight)
    saved["state_dict_ema"] = None
    restored.load_dict(saved)
    assert torch.equal(restored.ema.module.weight, model.weight)


class Batch:
    def __init__(self, images, targets):
        self.images = images
        self.targets = targets


@pytest.mark.parametrize("num_classes", [3, 10, 11])
def test_evaluation_counts_equal_hand_computed_counts(num_classes):
    """The model ranks the classes 0, 1, 2, ...: top-1 is correct for class 0, and top-5 for classes below 5."""
    targets = torch.arange(num_classes)
    model = nn.Linear(1, num_classes)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(-torch.arange(num_classes))
    batches = [Batch(torch.zeros(len(part), 1), part) for part in targets.split(2)]
    result = evaluate({"raw": model}, batches, amp_dtype=torch.float32, world=CPU_WORLD)["raw"]
    assert (result.correct1, result.correct5, result.num_images) == (1, min(5, num_classes), num_classes)
    expected = nn.functional.cross_entropy(model.bias.expand(num_classes, -1), targets).item()
    assert result.loss == pytest.approx(expected, rel=1e-6)
    # With ten classes, a random top-5 prediction is correct for half of the images, so Acc@5 is omitted.
    expected_texts = {3: " * Acc@1 33.333", 10: " * Acc@1 10.000", 11: " * Acc@1 9.091 Acc@5 45.455"}
    assert str(result) == expected_texts[num_classes]


class HostAccess(TorchDispatchMode):
    """Records operations that make the host wait for a GPU: reads of tensor values, and copies between devices."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        between_devices = len({tensor.device.type for tensor in tensors if tensor.numel() > 1}) > 1
        if between_devices or function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.operations.append(str(function))
        return out


@pytest.mark.parametrize("name", ["flatten_swin_t", "flatten_pvt_t", "flatten_pvt_v2_b0", "flatten_cswin_t", "flatten_deit_t"])
@pytest.mark.parametrize("size", [(224, 224), (160, 192)], ids=["native", "padded"])
def test_no_model_reads_values_or_copies_between_devices_in_training(name, size):
    """A read of a meta tensor raises an error, and ``HostAccess`` records operations that involve both host and meta tensors.

    At a size other than 224 x 224, the first forward pass, which is not recorded, builds masks and indices for later passes.
    """
    model = create_model(name, device="meta", drop_path_rate=0.1).train()
    images, targets = torch.empty(2, 3, *size, device="meta"), torch.empty(2, dtype=torch.long, device="meta")
    if size != (224, 224):
        with torch.inference_mode():
            model(images)
    with HostAccess() as access:
        nn.CrossEntropyLoss(label_smoothing=0.1)(model(images), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    assert access.operations == []
    # Control: HostAccess records a read and a copy.
    with HostAccess() as access:
        torch.ones(3).max().item()
        torch.empty(2).to("meta")
    assert access.operations == ["aten._local_scalar_dense.default", "aten._to_copy.default"]


@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_reads_no_tensor_value_on_the_host(dtype, optimizer_name):
    model, optimizer, scaler, ema = setup("TRAIN.OPTIMIZER.NAME", optimizer_name)
    batches = [(torch.randn(8, 6), torch.randint(0, 3, (8,)))]
    step(model, optimizer, scaler, batches, 1.0, dtype)  # creates the state of the optimizer
    ema.update(model)
    with HostAccess() as access:
        step(model, optimizer, scaler, batches, 1.0, dtype)
        ema.update(model)
    assert access.operations == []


def test_sgd_gives_finite_weights_after_a_skipped_first_update():
    """The test fills uninitialised memory with NaN: momentum that is read from it would make the weights NaN."""
    torch.use_deterministic_algorithms(True)  # fills uninitialised tensors with NaN
    try:
        model, optimizer, scaler, _ = setup("TRAIN.OPTIMIZER.NAME", "sgd", "AMP", True, "AMP_DTYPE", "fp16")
        initial = copy.deepcopy(model)
        for gradient in (float("inf"), 1.0):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            scaler.scale(torch.ones(()))  # initialises the loss scale
            scaler.step(optimizer)
            scaler.update()
        for parameter, before in zip(model.parameters(), initial.parameters(), strict=True):
            assert parameter.isfinite().all()
            assert not torch.equal(parameter, before)
    finally:
        torch.use_deterministic_algorithms(False)


class AveragedGradients(nn.Module):
    """A wrapper other than DDP, without ``no_sync``: hooks average each gradient over the processes."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: start_sum(gradient.div_(2))() and gradient)

    def forward(self, images):
        return self.model(images)


def train_with_two_wrappers(world) -> None:
    weights = []
    for wrapper in (AveragedGradients, lambda model: wrap(model, world)):
        model, optimizer, scaler, _ = setup()
        wrapped, failed = wrapper(model), torch.zeros(())
        for number in range(4):  # the fourth loss is NaN in one process
            torch.manual_seed(10 * number + world.rank)
            images, targets = torch.randn(8, 6), torch.randint(0, 3, (8,))
            report = train_step(
                wrapped,
                lambda logits, labels, scale=math.nan if (number, world.rank) == (3, 1) else 1: (
                    scale * nn.functional.cross_entropy(logits, labels)
                ),
                optimizer,
                scaler,
                [(images, targets)],
                seeds=[0],
                amp_dtype=torch.float32,
                max_grad_norm=1.0,
                requests=lambda: Requests(stop=True, save=world.is_main),
                failed=failed,
            )
            before, after = (weights[-1] if weights else None), copy.deepcopy(model.state_dict())
            weights.append(after)
            assert report.is_finite == (number < 3)
            assert (int(report.num_stops), int(report.num_saves)) == (2, 1)
        assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert_equal(weights[:4], weights[4:])


def test_any_wrapper_that_averages_gradients_trains_as_ddp_does():
    run_in_processes(train_with_two_wrappers, processes=2)


def test_fp16_clips_the_unscaled_gradient_and_reports_its_norm():
    """With SGD at learning rate 1, the weights change by the clipped gradient, whose norm is 0.01.

    The loss scale of 65,536 does not affect this norm.
    """
    model, _, _, _ = setup()
    reference = copy.deepcopy(model)
    images, targets = torch.randn(8, 6), torch.randint(0, 3, (8,))
    _, norm = step(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        torch.amp.GradScaler("cpu"),
        [(images, targets)],
        0.01,
        torch.float16,
    )
    nn.CrossEntropyLoss()(reference(images), targets).backward()
    expected = nn.utils.get_total_norm([parameter.grad for parameter in reference.parameters()])
    torch.testing.assert_close(norm, expected, rtol=1e-2, atol=0)
    changes = [(new - old).detach().flatten() for new, old in zip(model.parameters(), reference.parameters(), strict=True)]
    assert torch.cat(changes).norm() == pytest.approx(0.01, rel=1e-2)


def test_sgd_uses_nesterov_momentum():
    """Two hand-computed steps: v = 0.9 v + g, w = w - lr (g + 0.9 v)."""
    model, optimizer, _, _ = setup("TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.OPTIMIZER.MOMENTUM", 0.9, "TRAIN.WEIGHT_DECAY", 0.0)
    expected, velocity = model.weight.detach().clone(), torch.zeros(3, 6)
    for value in (1.0, 2.0):
        model.weight.grad = torch.full((3, 6), value)
        model.bias.grad = torch.zeros(3)
        optimizer.step()
        velocity = 0.9 * velocity + value
        expected -= optimizer.param_groups[0]["lr"] * (value + 0.9 * velocity)
    torch.testing.assert_close(model.weight.detach(), expected)


def test_a_restored_state_has_the_loss_scale_of_the_checkpoint_and_the_weight_decay_of_the_config():
    saved = TrainState(*setup("AMP", True, "AMP_DTYPE", "fp16", "TRAIN.WEIGHT_DECAY", 0.3))
    saved.scaler.scale(torch.ones(()))  # initialises the loss scale
    saved.scaler.update(128.0)
    state = TrainState(*setup("AMP", True, "AMP_DTYPE", "fp16", "TRAIN.WEIGHT_DECAY", 0.1))
    state.load_dict(copy.deepcopy(saved.to_dict()))
    assert state.scaler.get_scale() == 128
    assert {group["weight_decay"] for group in state.optimizer.param_groups} == {0.1, 0.0}


@pytest.mark.parametrize(
    ("options", "training", "evaluation"),
    [
        ([], torch.float32, torch.float32),
        (["AMP", True, "AMP_DTYPE", "bf16"], torch.bfloat16, torch.float32),
        (["AMP", True, "AMP_DTYPE", "bf16", "TEST.PRECISION", "train"], torch.bfloat16, torch.bfloat16),
        (["AMP", True, "AMP_DTYPE", "fp16", "TEST.PRECISION", "fp32"], torch.float16, torch.float32),
    ],
)
def test_evaluation_uses_fp32_unless_the_config_selects_the_training_precision(options, training, evaluation):
    cfg = load_config(CONFIGS / "flatten_swin_t.yaml", options)
    assert (amp_dtype(cfg), eval_dtype(cfg)) == (training, evaluation)


def test_the_warm_up_of_the_ema_follows_timms_formula_and_continues_after_a_resume():
    """Before update n, counted from 0, the decay is 1 - (1 + n) ** (-2/3), but not above EMA.DECAY (0.9)."""
    average, state = None, TrainState(*setup("EMA.WARMUP", True))
    for update in range(40):
        with torch.no_grad():
            state.model.weight.add_(1.0)
        state.update_ema()
        decay = min(1 - (1 + update) ** (-2 / 3), 0.9)
        weight = state.model.weight.double()
        average = weight.clone() if average is None else decay * average + (1 - decay) * weight
        if update == 10:
            saved = copy.deepcopy(state.to_dict())
            state = TrainState(*setup("EMA.WARMUP", True))
            state.load_dict(saved)
    torch.testing.assert_close(state.ema.module.weight.double(), average, rtol=1e-5, atol=1e-5)
    del saved["ema_updates"]  # as in a checkpoint of an earlier version
    saved |= {"num_updates": 14, "num_skipped": 3}
    state.load_dict(saved)
    assert state.ema_updates == 11
    saved["state_dict_ema"] = None  # the average starts now
    state.load_dict(saved)
    assert state.ema_updates == 0
