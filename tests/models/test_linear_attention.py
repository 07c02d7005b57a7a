"""Linear attention equals its definition, which is computed here with an explicit N x M attention matrix.

In these tests, ``operator`` is a ``FocusedLinearAttention`` module.

Shapes: B images, N queries, M keys, H heads, D channels per head, C = H * D channels.
"""

import pytest
import torch
import torch.nn.functional as F

from models.linear_attention import ATTENTION_KINDS, FocusedLinearAttention, stretch_tokens
from models.plain_attention import focus, linear_attention

B, H, D, GRID = 2, 3, 4, (5, 6)
N, C = GRID[0] * GRID[1], H * D


def split_heads(x):
    return x.unflatten(-1, (H, D)).transpose(1, 2)


def random_operator(**options) -> FocusedLinearAttention:
    torch.manual_seed(0)
    operator = FocusedLinearAttention(C, H, GRID, **options).double()
    for parameter in operator.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return operator


def random_inputs(num_queries=N, num_keys=N):
    generator = torch.Generator().manual_seed(1)
    shapes = [(B, num_queries, C), (B, num_keys, C), (B, num_keys, C)]
    return [torch.randn(shape, generator=generator, dtype=torch.double, requires_grad=True) for shape in shapes]


def convolve(filters, maps):
    return F.conv2d(maps, filters.weight, filters.bias, padding=filters.kernel_size // 2, groups=maps.shape[1])


def definition(operator, q, k, v, grid=GRID):
    """Compute the output by equations 3 to 8 of the paper, with an explicit weight for every pair of query and key."""

    def map_features(x):
        x = (F.relu(x) + 1e-6) / F.softplus(operator.scale)
        if not operator.focusing:
            return x
        powered = x**operator.focusing_factor
        return x.norm(dim=-1, keepdim=True) * powered / powered.norm(dim=-1, keepdim=True)

    q, k = split_heads(map_features(q)), split_heads(map_features(k + operator.positional_encoding))
    num_keys = k.shape[2]
    similarity = q @ k.transpose(-2, -1)  # (B, H, N, M)
    out = (similarity / num_keys) @ split_heads(v) / (similarity.mean(dim=-1, keepdim=True) + 1e-6)
    out = out.transpose(1, 2).flatten(2)
    if operator.dwc is None:
        return out
    stretched = (
        F.interpolate(v.transpose(1, 2), size=out.shape[1], mode="linear") if num_keys != out.shape[1] else v.transpose(1, 2)
    )
    maps = stretched.reshape(B * H, D, *grid)  # heads become batch entries, as in the reference
    return out + convolve(operator.dwc, maps).reshape(B, C, -1).transpose(1, 2)


def assert_same_forward_and_backward(one, other, inputs):
    torch.testing.assert_close(one, other)
    weights = torch.randn(one.shape, dtype=one.dtype, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((out * weights).sum(), inputs, retain_graph=True) for out in (one, other)]
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("power", [2, 3, 4, 8])
def test_focus_equals_equation_6_forward_and_backward(power):
    x = (torch.rand(7, 12, dtype=torch.double) + 0.1).requires_grad_()
    powered = x**power
    assert_same_forward_and_backward(
        focus(x, power), x.norm(dim=-1, keepdim=True) * powered / powered.norm(dim=-1, keepdim=True), [x]
    )


def test_focus_keeps_length_and_sharpens_direction():
    x = torch.tensor([[3.0, 4.0]])
    focused = focus(x, 3)  # (27, 64) scaled to length 5: 5 / sqrt(27^2 + 64^2) = 0.07198
    torch.testing.assert_close(focused, torch.tensor([[1.94349, 4.60679]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e3, 1e20])
@pytest.mark.parametrize("power", [3, 32])
def test_focus_has_no_overflow_or_underflow(magnitude, power):
    x = torch.rand(5, 64) + 0.01
    torch.testing.assert_close(focus(x * magnitude, power) / magnitude, focus(x.double(), power).float(), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("key_grid", [None, (2, 3)], ids=["full", "reduced"])
@pytest.mark.parametrize("options", [{}, {"focusing": False}, {"rank_restoration": False}, {"focusing_factor": 4}], ids=str)
def test_the_operator_equals_its_definition_forward_and_backward(options, key_grid):
    operator = random_operator(key_grid=key_grid, **options)
    num_keys = N if key_grid is None else 6
    q, k, v = random_inputs(num_keys=num_keys)
    inputs = [q, k, v, *operator.parameters()]
    assert_same_forward_and_backward(operator(q, k, v), definition(operator, q, k, v), inputs)


def similarity_attention(similarity, v):
    return similarity @ v / similarity.sum(dim=-1, keepdim=True)


def naive(kind, q, k, v):
    """Compute one of the attention kinds other than ``focused``, with an explicit weight for every pair of query and key."""
    if kind == "hydra":
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        # Every channel is a separate head with similarity q_n * k_m. Hydra does not divide by the sum over keys.
        return torch.einsum("bnc,bmc,bmc->bnc", q, k, v)
    q, k, v = split_heads(q), split_heads(k), split_heads(v)
    if kind == "softmax":
        out = (q @ k.transpose(-2, -1) / D**0.5).softmax(dim=-1) @ v
    elif kind == "efficient":
        out = (q.softmax(dim=-1) @ k.softmax(dim=-2).transpose(-2, -1)) @ v
    elif kind == "angular":
        cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        out = similarity_attention(0.5 + cosine / torch.pi, v)
    else:
        out = similarity_attention((F.relu(q) + 1e-6) @ (F.relu(k) + 1e-6).transpose(-2, -1), v)
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kind", [kind for kind in ATTENTION_KINDS if kind != "focused"])
def test_every_kind_except_focused_equals_its_naive_form_forward_and_backward(kind):
    operator = random_operator(kind=kind)
    q, k, v = random_inputs()
    expected = naive(kind, q, k, v)
    if kind == "enhanced":
        maps = v.transpose(1, 2).reshape(B * H, D, *GRID)
        expected = expected + convolve(operator.dwc, maps).reshape(B, C, N).transpose(1, 2)
    out = operator(q, k, v)
    assert_same_forward_and_backward(out, expected, [q, k, v])


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_masked_padding_does_not_change_the_outputs_of_real_tokens(kind):
    """A padded map with a key mask gives the same output for the original tokens as the map without padding."""
    operator = random_operator(kind=kind)
    q, k, v = random_inputs()
    if kind == "focused":
        torch.nn.init.zeros_(operator.positional_encoding)  # resizing it to the padded map would change its values

    def pad(x, value):
        return F.pad(x.unflatten(1, GRID), (0, 0, 0, 1, 0, 2), value=value).flatten(1, 2)

    mask = pad(torch.ones(B, N, 1), 0).bool().squeeze(-1)
    grid = (GRID[0] + 2, GRID[1] + 1)
    out = operator(pad(q, 0), pad(k, 7.0), pad(v, 9.0), grid=grid, key_mask=mask)
    torch.testing.assert_close(out[mask].view(B, N, C), operator(q, k, v))


def test_prefix_tokens_attend_and_are_not_convolved():
    operator = random_operator(num_prefix_tokens=1)
    q, k, v = random_inputs(N + 1, N + 1)
    attended = definition_without_convolution(operator, q, k, v)
    convolved = convolve(operator.dwc, v[:, 1:].transpose(1, 2).reshape(B * H, D, *GRID)).reshape(B, C, N).transpose(1, 2)
    expected = torch.cat([attended[:, :1], attended[:, 1:] + convolved], dim=1)
    torch.testing.assert_close(operator(q, k, v), expected)


def definition_without_convolution(operator, q, k, v):
    dwc = operator.dwc
    operator.dwc = None
    try:
        return definition(operator, q, k, v)
    finally:
        operator.dwc = dwc


def test_linear_attention_weights_are_not_negative_and_sum_to_one():
    q, k = torch.rand(1, 1, 9, 4), torch.rand(1, 1, 20, 4)
    weights = linear_attention(q, k, torch.eye(20).expand(1, 1, -1, -1))  # one-hot values: the output equals the weights
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 1, 9))


# Bounds of the maximum error, relative to the largest output. The measured errors are 4e-7, 6e-4 and 4e-3. In half precision,
# they include the rounding of the convolution and of the output.
ERROR_BOUNDS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", ERROR_BOUNDS, ids=str)
@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("side", [7, 96])
def test_every_precision_is_within_an_error_bound_of_float64(dtype, magnitude, side):
    torch.manual_seed(0)
    operator = FocusedLinearAttention(32, 2, side)
    torch.nn.init.normal_(operator.scale, std=0.5)
    torch.nn.init.normal_(operator.positional_encoding, std=0.1 * magnitude)
    q, k, v = (torch.randn(1, side * side, 32) for _ in range(3))
    q, k = (q * magnitude).to(dtype), (k * magnitude).to(dtype)
    v = v.to(dtype)
    q[:, 3], k[:, 4] = 0, 0  # tokens whose channels are all zero
    exact = copy_in_double(operator)(q.double(), k.double(), v.double())
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        out = operator(*inputs)
    assert torch.isfinite(out).all()
    error = (out.double() - exact).abs().max() / exact.abs().max()
    assert error < ERROR_BOUNDS[dtype]
    out.float().square().mean().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in (*inputs, *operator.parameters()))


def copy_in_double(operator):
    copied = FocusedLinearAttention(operator.dim, operator.num_heads, operator.grid).double()
    copied.load_state_dict(operator.state_dict())
    return copied


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size=4"),
        ({"kernel_size": -1}, "kernel_size=-1"),
        ({"kind": "fokused"}, "choose one of focused"),
        ({"num_heads": 5}, "not divisible"),
        ({"num_heads": 0}, "not divisible"),
    ],
    ids=["even kernel", "negative kernel", "unknown kind", "number of heads", "no heads"],
)
def test_invalid_arguments_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        FocusedLinearAttention(**{"dim": C, "num_heads": H, "grid": GRID, **options})


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_an_image_with_all_keys_masked_gives_zeros_and_finite_gradients(kind):
    operator = random_operator(kind=kind)
    q, k, v = random_inputs()
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0] = False
    out = operator(q, k, v, key_mask=mask)
    assert not out[0].any()
    torch.testing.assert_close(out[1], operator(q, k, v)[1])
    gradients = torch.autograd.grad(out.square().sum(), [q, k, v, *operator.parameters()])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert not any(gradient[0].any() for gradient in gradients[:3])


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "options", "message"),
    [
        (N + 1, N, {}, "q has 31 tokens, .* require 30; pass the grid"),
        (N, N - 1, {}, "k has 29 tokens, .* require 30; pass the key_grid"),
        (N, N, {"key_grid": (2, 3)}, "k has 30 tokens, .* require 6; pass the key_grid"),
        (N, N, {"num_prefix_tokens": 1}, "q has 30 tokens, .* num_prefix_tokens=1 require 31; pass the grid"),
    ],
    ids=["queries", "keys", "reduced keys", "prefix"],
)
def test_the_error_for_a_wrong_number_of_tokens_contains_the_given_and_required_numbers(
    num_queries, num_keys, options, message
):
    with pytest.raises(ValueError, match=message):
        random_operator(**options)(*random_inputs(num_queries, num_keys))


def test_tokens_without_a_batch_or_split_into_heads_are_rejected():
    q, k, v = random_inputs()
    for tokens in (q[0], q.reshape(B, H, N, C // H)):
        with pytest.raises(ValueError, match=r"q has shape .*; reshape it to \(batch, tokens, channels\)"):
            random_operator()(tokens, k, v)


@pytest.mark.parametrize("mask", [torch.ones(B, N), torch.ones(B, N, dtype=torch.long), torch.ones(B, N - 1, dtype=torch.bool)])
def test_a_mask_that_is_not_boolean_or_has_another_shape_is_rejected(mask):
    with pytest.raises(ValueError, match=rf"key_mask is .* of shape .*; give a bool tensor of shape \({B}, {N}\)"):
        random_operator()(*random_inputs(), key_mask=mask)


@pytest.mark.parametrize("grid", [0, (0, 4), (4,), "44", 4.0], ids=str)
def test_a_grid_without_two_positive_sides_is_rejected(grid):
    for options in ({"grid": grid}, {"grid": (4, 4), "key_grid": grid}):
        with pytest.raises(ValueError, match=r"grid=.*(at least 1|\(height, width\))"):
            FocusedLinearAttention(32, 2, **options)
    for name in ("grid", "key_grid"):
        with pytest.raises(ValueError, match=rf"{name}=.*(height|require)"):
            random_operator()(*random_inputs(), **{name: grid})


def test_different_numbers_of_keys_and_values_are_rejected():
    q, k, v = random_inputs()
    with pytest.raises(ValueError, match="v has 29 tokens"):
        random_operator()(q, k, v[:, 1:])


@pytest.mark.parametrize(("num_values", "num_tokens"), [(49, 3136), (49, 196), (6, 20), (1, 9), (7, 5), (4, 4)])
def test_stretched_tokens_equal_linear_interpolation(num_values, num_tokens):
    x = torch.randn(2, num_values, 3, dtype=torch.double, requires_grad=True)
    expected = F.interpolate(x.transpose(1, 2), size=num_tokens, mode="linear", align_corners=False).transpose(1, 2)
    assert_same_forward_and_backward(stretch_tokens(x, num_tokens), expected, [x])
