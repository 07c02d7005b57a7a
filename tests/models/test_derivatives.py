"""Derivatives other than those of a plain backward pass: of higher order, vectorised, in forward mode and of empty batches."""

import pytest
import timm.optim
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.linear_attention import FocusedLinearAttention
from tests.models.tiny import OPTIONS, tiny, tiny_images

FAMILIES = list(OPTIONS)


def unfuse(model):
    """Make a model use standard operations only."""
    for module in model.modules():
        if isinstance(module, FocusedLinearAttention):
            module.fused = False
    return model


def loss(model, images):
    with sdpa_kernel(SDPBackend.MATH):  # other kernels of softmax attention have no second derivatives
        return model(images).square().sum()


def directions(parameters):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) for parameter in parameters]


@sdpa_kernel(SDPBackend.MATH)  # also for the blocks that checkpointing recomputes in the backward pass
def hessian_vector_product(model, images):
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(model, images), parameters, create_graph=True)
    return torch.autograd.grad(gradients, parameters, directions(parameters))


def finite_difference(model, images, step=1e-6):
    """The Hessian-vector product by a central difference of first derivatives, computed with standard operations."""
    model, gradients = unfuse(model), []
    parameters = list(model.parameters())
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions(parameters), strict=True):
                parameter.add_(direction, alpha=sign * step)
        gradients.append(torch.autograd.grad(loss(model, images), parameters))
    return [(plus - minus) / (2 * step) for plus, minus in zip(*gradients, strict=True)]


def assert_close(actual, expected, tolerance):
    """Compare lists of tensors by their difference relative to the largest value of each tensor."""
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max() + 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_hessian_vector_products_of_models_equal_finite_differences(name):
    options, images = {"dtype": torch.float64, "softmax": name != "flatten_deit_t"}, tiny_images(dtype=torch.float64)
    expected = finite_difference(tiny(name, **options), images)
    assert_close(hessian_vector_product(tiny(name, **options), images), expected, 1e-5)
    checkpointed = tiny(name, **options)
    checkpointed.set_grad_checkpointing()
    assert_close(hessian_vector_product(checkpointed, images), expected, 1e-5)


def test_second_derivatives_through_a_fast_kernel_of_softmax_attention_are_rejected():
    model = tiny("flatten_pvt_t", softmax=True)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model(tiny_images()).square().sum(), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative .* is not implemented"):
        torch.autograd.grad(gradients, parameters, directions(parameters))


@pytest.mark.parametrize("num_keys", [6, 2])
def test_second_derivatives_of_the_operator_equal_those_of_standard_operations_on_every_path(num_keys):
    """q, k and v are parts of one tensor or depend on each other, as in y + attention(y, 2 y, y^2)."""
    torch.manual_seed(0)
    operator = FocusedLinearAttention(12, 3, (2, 3), key_grid=None if num_keys == 6 else (1, 2)).double()
    for parameter in operator.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    mask = torch.ones(2, num_keys, dtype=torch.bool)
    mask[0, -1] = False

    def packed(x):
        qkv = x.repeat(1, 1, 3) * torch.arange(1, 37).double()
        return operator(qkv[..., :12], qkv[:, :num_keys, 12:]).square().sum()

    def masked(x):
        q, k, v = (x.repeat(1, 1, 3) * torch.arange(1, 37).double()).chunk(3, dim=-1)
        return operator(q, k[:, :num_keys], v[:, :num_keys], key_mask=mask).square().sum()

    def dependent(x):
        k = 2 * x[:, :num_keys]
        return (x + operator(x, k, k.square(), key_mask=mask)).square().sum()

    def same(x):
        return operator(x, x[:, :num_keys], x[:, :num_keys]).square().sum()

    x = torch.randn(2, 6, 12).double()
    for function in (packed, masked, dependent, same):
        results = []
        for fused in (True, False):
            operator.fused = fused
            _, product = torch.autograd.functional.hvp(function, x, torch.ones_like(x))
            _, reverse = torch.autograd.functional.vhp(function, x, torch.ones_like(x))
            hessian = torch.autograd.functional.hessian(function, x[:, :1].repeat(1, 6, 1), vectorize=True)
            leaf = x.clone().requires_grad_()
            torch.autograd.grad(function(leaf), leaf, create_graph=True)[0].norm().backward()
            first = torch.autograd.grad(function(leaf), leaf, create_graph=True)[0]
            second = torch.autograd.grad(first.sum(), leaf, create_graph=True)[0]
            third = torch.autograd.grad(second.sum(), leaf)[0]
            results.append([product, reverse, hessian, leaf.grad, third])
        assert_close(*results, 1e-9)
        assert results[0][0].any()


@pytest.mark.parametrize("name", ["flatten_pvt_t", "flatten_deit_t"])
def test_a_gradient_penalty_under_autocast_equals_that_of_standard_operations_up_to_rounding(name):
    results = []
    for prepare in (lambda model: model, unfuse):
        model, images = prepare(tiny(name)), tiny_images().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(images)
        (gradient,) = torch.autograd.grad(logits.float().square().sum(), images, create_graph=True)
        gradient.square().mean().backward()
        results.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    flat = [torch.cat([gradient.flatten() for gradient in gradients]) for gradients in results]
    assert (flat[0] - flat[1]).norm() < 0.02 * flat[1].norm()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_second_order_optimizer_updates_a_model_like_one_of_standard_operations():
    updated = []
    for prepare in (lambda model: model, unfuse):
        model = prepare(tiny("flatten_deit_t", dtype=torch.float64))
        optimizer = timm.optim.create_optimizer_v2(model, "adahessian", lr=0.1)
        loss(model, tiny_images(dtype=torch.float64)).backward(create_graph=True)
        optimizer.step()
        updated.append([parameter.detach() for parameter in model.parameters()])
    assert_close(*updated, 1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's forward mode calls it
@pytest.mark.parametrize("name", FAMILIES)
def test_vectorised_and_forward_mode_jacobians_equal_row_by_row_jacobians(name):
    model, images = tiny(name, softmax=True, dtype=torch.float64), tiny_images(1, dtype=torch.float64)
    patch = images[..., :2, :2].clone()  # few inputs, because forward mode takes one pass per input

    def logits(corner):
        return model(torch.cat([torch.cat([corner, images[..., :2, 2:]], dim=-1), images[..., 2:, :]], dim=-2))

    expected = torch.autograd.functional.jacobian(logits, patch)
    assert expected.any()
    vectorised = torch.autograd.functional.jacobian(logits, patch, vectorize=True)
    forward_mode = torch.autograd.functional.jacobian(logits, patch, vectorize=True, strategy="forward-mode")
    _, product = torch.func.jvp(logits, (patch,), (torch.ones_like(patch),))
    assert_close([vectorised, forward_mode, product], [expected, expected, expected.sum(dim=(2, 3, 4, 5))], 1e-9)


def test_gradients_of_stacked_models_under_vmap_equal_those_of_the_single_models():
    models = [tiny("flatten_swin_t", softmax=True, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(0.5)
    images = tiny_images(dtype=torch.float64)
    stacked, _ = torch.func.stack_module_state(models)

    def square_sum(parameters):
        return torch.func.functional_call(models[0], parameters, (images,)).square().sum()

    inside = torch.func.vmap(torch.func.grad(square_sum))(stacked)
    losses = torch.func.vmap(square_sum)(stacked)
    outside = dict(zip(stacked, torch.autograd.grad(losses.sum(), list(stacked.values())), strict=True))
    for index, model in enumerate(models):
        expected = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
        for gradients in (inside, outside):
            assert_close([gradients[name][index] for name, _ in model.named_parameters()], expected, 1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_empty_batch_gives_every_parameter_a_gradient_of_zeros(name):
    model = tiny(name, softmax=True)
    model(tiny_images(0)).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
