"""The Triton kernels, interpreted on the CPU, within torch.compile, activation checkpointing and autocast.

``tests/models/test_kernels.py`` runs this file with TRITON_INTERPRET=1.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from models import create_model, kernel_operator, kernel_selection
from models.kernel_operator import attention_operator
from models.linear_attention import FocusedLinearAttention

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value) encountered:RuntimeWarning")
H, D = 1, 16
C = H * D


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Names of the kernels that were launched. All variants count as checked."""
    names, launch = [], kernel_operator.launch
    monkeypatch.setattr(kernel_selection, "_check", lambda variant: "")
    monkeypatch.setattr(kernel_selection, "_verdicts", {})
    monkeypatch.setattr(kernel_operator, "launch", lambda kernel, *rest: (names.append(kernel), launch(kernel, *rest))[1])
    return names


def create_operator(**options) -> FocusedLinearAttention:
    torch.manual_seed(0)
    operator = FocusedLinearAttention(C, H, (2, 3), kernel_size=3, backend="triton", **options)
    for parameter in operator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return operator


def output_and_gradients(function, packed, operator) -> list[torch.Tensor]:
    out = function(packed)
    weights = torch.linspace(0, 1, out.numel()).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [packed, *operator.parameters()])]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's check reads it
@pytest.mark.parametrize(("num_keys", "side"), [(6, 3), (2, 0)])
def test_the_operators_pass_the_checks_of_torch(num_keys, side, launches):
    """Schema, autograd registration, shapes of the fake implementation, and compilation with dynamic shapes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    shapes = [(1, 6, C), (1, num_keys, C), (1, num_keys, C), (1, num_keys, C)]
    scale = torch.full((1, 1, C), 0.7).requires_grad_()
    filters = (random(C, 1, side, side), random(C)) if side else (None, None)
    arguments = (*(random(*shape) for shape in shapes), scale, *filters, None, H, 3.0, 2, 3, 0)
    torch.library.opcheck(attention_operator, arguments)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_checkpointed_and_eager_modules_give_the_same_bits(launches):
    operator = create_operator()
    packed = torch.randn(1, 6, 3 * C).requires_grad_()

    def attend(x):
        return operator(x)

    eager = output_and_gradients(attend, packed, operator)
    assert len(launches) == 4
    compiled = output_and_gradients(torch.compile(attend, backend="aot_eager", fullgraph=True), packed, operator)
    assert len(launches) == 8
    recomputed = output_and_gradients(lambda x: checkpoint(attend, x, use_reentrant=False), packed, operator)
    assert len(launches) == 14
    for x, y, z in zip(eager, compiled, recomputed, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


def test_compilation_without_a_previous_check_uses_standard_operations(launches):
    operator = create_operator()
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(*torch.randn(1, 6, 3 * C).chunk(3, dim=-1))
    assert launches == []


def test_functorch_and_export_use_standard_operations(launches):
    operator = create_operator()
    packed = torch.randn(1, 6, 3 * C)

    def loss(x):
        return operator(x).square().sum()

    gradient = torch.func.grad(loss)(packed)
    exported = torch.export.export(operator, packed.chunk(3, dim=-1))
    assert launches == []
    assert not any("focused_attention" in str(node.target) for node in exported.graph.nodes)
    x = packed.requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(x), x)[0], rtol=1e-4, atol=1e-5)
    assert len(launches) == 4


def test_second_derivatives_equal_those_of_standard_operations(launches):
    operator, results = create_operator(), []
    packed = torch.randn(1, 6, 3 * C).requires_grad_()
    for backend_name in ("triton", "torch"):
        operator.backend = backend_name
        (gradient,) = torch.autograd.grad(operator(packed).square().sum(), packed, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), [packed, *operator.parameters()]))
    assert len(launches) == 4  # also the second derivative needs the gradient of the output once, without a graph
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


def test_autocast_runs_the_kernels_in_bfloat16(launches):
    model = create_model("flatten_deit_t", img_size=32, embed_dim=16, depth=1, num_heads=1, num_classes=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randn(1, 3, 32, 32))
    out.float().sum().backward()
    assert len(launches) == 4
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert {variant.dtype for variant in kernel_selection._verdicts} == {torch.bfloat16}


def test_the_self_check_finds_wrong_results_and_errors(monkeypatch, caplog):
    monkeypatch.setattr(kernel_selection, "_verdicts", {})
    variant = kernel_selection.Variant(torch.device("cpu"), torch.float32, 16, 0, 3.0, False, "tf32x3")
    small = {"num_images": 1, "num_heads": 1, "grid": (2, 2)}
    assert kernel_selection.compare(variant, **small) == ""
    correct, compare = kernel_operator.KernelRun.forward, kernel_selection.compare
    monkeypatch.setattr(kernel_selection, "compare", lambda variant: compare(variant, **small))

    def wrong(run):
        out, *rest = correct(run)
        return out * 1.001, *rest

    monkeypatch.setattr(kernel_operator.KernelRun, "forward", wrong)
    assert "output differs from that of torch operations by 1.0e-03" in kernel_selection._check(variant)
    monkeypatch.setattr(kernel_operator, "launch", lambda *_: 1 / 0)
    assert kernel_selection._check(variant) == "a kernel failed: ZeroDivisionError: division by zero"
    assert len(caplog.records) == 2
