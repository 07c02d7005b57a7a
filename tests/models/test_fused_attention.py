"""Focused linear attention with its custom backward pass equals standard operations with autograd (the plain form).

In these tests, ``operator`` is a ``FocusedLinearAttention`` module.
"""

import contextlib

import pytest
import torch

import models.fused_attention
from models.fused_attention import Blocks
from models.linear_attention import FocusedLinearAttention

H, D = 3, 4
C = H * D


def random_operator(grid, **options) -> FocusedLinearAttention:
    torch.manual_seed(0)
    operator = FocusedLinearAttention(C, H, grid, **options).double()
    for parameter in operator.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return operator


def random_tokens(num_images, num_queries, num_keys, *, std=1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(num_images, count, C) for count in (num_queries, num_keys, num_keys)]
    return [(std * torch.randn(shape, generator=generator).double()).requires_grad_() for shape in shapes]


@contextlib.contextmanager
def plain_form():
    """Make operators use the plain form, by simulating that torch.compile is active."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        yield


def outputs_and_gradients(operator, tokens, **options):
    out = operator(*tokens, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return out, torch.autograd.grad((out * weights).sum(), [*tokens, *operator.parameters()])


def assert_equals_plain_form(operator, tokens, **options):
    out, gradients = outputs_and_gradients(operator, tokens, **options)
    with plain_form():
        expected_out, expected = outputs_and_gradients(operator, tokens, **options)
    torch.testing.assert_close(out, expected_out)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)
    with torch.no_grad():
        torch.testing.assert_close(operator(*tokens, **options), expected_out)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"focusing_factor": 1},
        {"focusing_factor": 2.5},
        {"focusing_factor": 32},
        {"focusing": False},
        {"rank_restoration": False},
        {"kernel_size": 3},
    ],
    ids=str,
)
def test_values_and_gradients_equal_those_of_the_plain_form(options, prefix):
    operator = random_operator((4, 5), num_prefix_tokens=prefix, **options)
    assert_equals_plain_form(operator, random_tokens(3, 20 + prefix, 20 + prefix))


@pytest.mark.parametrize("key_grid", [(2, 3), (1, 1)])
def test_gradients_with_spatially_reduced_keys_equal_those_of_the_plain_form(key_grid):
    operator = random_operator((4, 5), key_grid=key_grid)
    assert_equals_plain_form(operator, random_tokens(3, 20, key_grid[0] * key_grid[1]))


def test_gradients_with_masked_keys_equal_those_of_the_plain_form():
    operator = random_operator((4, 5))
    mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[1] = False  # all keys of this image are masked
    assert_equals_plain_form(operator, random_tokens(3, 20, 20), key_mask=mask)


def test_gradients_with_resized_positional_encodings_equal_those_of_the_plain_form():
    assert_equals_plain_form(random_operator((4, 5)), random_tokens(2, 24, 24), grid=(6, 4))


@pytest.mark.parametrize("std", [1e-12, 1e-3, 1e3])
def test_gradients_of_inputs_dominated_by_epsilon_equal_those_of_the_plain_form(std):
    """``EPS``, added after the ReLU, exceeds tiny inputs and is the value of all channels if none of them is positive."""
    operator = random_operator((4, 5))
    q, k, v = random_tokens(2, 20, 20, std=std)
    with torch.no_grad():
        q[:, 3] = -q[:, 3].abs()
        k[:, 5] = -10 - k[:, 5].abs()  # remains negative after the positional encoding is added
    assert_equals_plain_form(operator, [q, k, v])


@pytest.mark.parametrize("scale", [0.0, 5.0, 20.0, 50.0])
@pytest.mark.parametrize("std", [1e-3, 1.0, 1e6])
def test_single_precision_neither_overflows_nor_underflows(scale, std):
    """For a token that is negative in all channels, ReLU, ``EPS`` and scale give 1e-6 / softplus(scale) in each channel.

    The norm of the cubes of these values requires a sum of sixth powers, which underflow in float32 for large scales.
    """
    operator = random_operator((4, 5), rank_restoration=False)
    torch.nn.init.constant_(operator.scale, scale)
    q, k, v = random_tokens(2, 20, 20, std=std)
    with torch.no_grad():
        q[:, 3] = -q[:, 3].abs()
        k[:, 5] = -10 - k[:, 5].abs()
    exact = outputs_and_gradients(operator, [q, k, v])
    tokens = [part.detach().float().requires_grad_() for part in (q, k, v)]
    out, gradients = outputs_and_gradients(operator.float(), tokens)
    for single, expected in zip([out, *gradients], [exact[0], *exact[1]], strict=True):
        assert (single - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("limit", [C, 7 * C, 20 * C, 45 * C])
@pytest.mark.parametrize("num_keys", [20, 6])
def test_the_block_size_changes_neither_values_nor_gradients(monkeypatch, limit, num_keys):
    """The four limits give blocks of one token, several tokens, one image, and two images."""
    monkeypatch.setattr(models.fused_attention, "MAX_BLOCK_ELEMENTS_ON_CPU", limit)
    operator = random_operator((4, 5), key_grid=(4, 5) if num_keys == 20 else (2, 3))
    assert_equals_plain_form(operator, random_tokens(5, 20, num_keys))


@pytest.mark.parametrize(
    ("limit", "num_image_blocks", "num_token_blocks"), [(1, 5, 5), (4, 5, 3), (7, 5, 2), (12, 5, 1), (24, 3, 1), (10**6, 1, 1)]
)
def test_blocks_cover_every_image_and_token_exactly_once(monkeypatch, limit, num_image_blocks, num_token_blocks):
    monkeypatch.setattr(models.fused_attention, "MAX_BLOCK_ELEMENTS_ON_CPU", limit)
    blocks = Blocks(5, 5, 2, torch.device("cpu"))
    partitions = [list(blocks.images()), list(blocks.tokens(5))]
    assert [len(partition) for partition in partitions] == [num_image_blocks, num_token_blocks]
    for partition in partitions:
        assert [position for block in partition for position in range(5)[block]] == list(range(5))


def test_batches_are_split_into_blocks_only_on_the_cpu():
    blocks = Blocks(64, 10_000, 768, torch.device("meta"))
    assert len(list(blocks.images())) == len(list(blocks.tokens(10_000))) == 1


def test_gradients_equal_finite_differences():
    operator = random_operator((2, 3))
    tokens = random_tokens(2, 6, 6)
    parameters = dict(operator.named_parameters())

    def run(q, k, v, *values):
        return torch.func.functional_call(operator, dict(zip(parameters, values, strict=True)), (q, k, v))

    assert torch.autograd.gradcheck(run, [*tokens, *parameters.values()], fast_mode=False)


def test_torch_func_uses_the_plain_form():
    operator = random_operator((2, 3))
    packed = torch.randn(2, 6, 3 * C).double().requires_grad_()

    def loss(x):
        return operator(x).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(packed.detach()), torch.autograd.grad(loss(packed), packed)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_equal_float32_gradients_up_to_rounding(dtype):
    operator = random_operator((8, 8)).float()
    tokens = [part.detach().float().requires_grad_() for part in random_tokens(2, 64, 64)]
    _, exact = outputs_and_gradients(operator, tokens)
    with torch.autocast("cpu", dtype=dtype):
        half_tokens = [part.detach().to(dtype).requires_grad_() for part in tokens]
        out, rounded = outputs_and_gradients(operator, half_tokens)
    assert out.dtype == dtype
    assert [gradient.dtype for gradient in rounded] == 3 * [dtype] + [torch.float32] * 4
    for gradient, expected in zip(rounded, exact, strict=True):
        error = (gradient.float() - expected).norm() / expected.norm()
        assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("key_grid", [(4, 5), (2, 3)])
def test_a_joint_projection_has_the_gradient_of_its_parts_without_a_copy(monkeypatch, key_grid):
    """With keys of another number than queries, the joint projection is that to k and v."""
    operator = random_operator((4, 5), key_grid=key_grid)
    q, k, v = random_tokens(2, 20, key_grid[0] * key_grid[1])
    packed = [torch.cat([q, k, v], dim=-1)] if key_grid == (4, 5) else [q, torch.cat([k, v], dim=-1)]
    packed = [x.detach().requires_grad_() for x in packed]
    expected_out, expected = outputs_and_gradients(operator, [q, k, v])
    monkeypatch.setattr(torch, "cat", lambda *_, **__: pytest.fail("the gradients were copied by torch.cat"))
    out, gradients = outputs_and_gradients(operator, packed)
    assert torch.equal(out, expected_out)
    parts = [part for x in gradients[: len(packed)] for part in x.split(C, dim=-1)]
    for part, gradient in zip([*parts, *gradients[len(packed) :]], expected, strict=True):
        assert torch.equal(part, gradient)


@pytest.mark.parametrize("shapes", [[36, 12], [12, 12], [24], [12, 12, 6]])
def test_projections_with_another_number_of_channels_are_rejected(shapes):
    with pytest.raises(ValueError, match="channels, but dim=12"):
        random_operator((4, 5))(*(torch.zeros(1, 20, channels).double() for channels in shapes))


def test_the_forward_pass_saves_only_small_tensors_besides_inputs_and_parameters():
    """Saved tensors that are neither inputs nor parameters have fewer elements in total than q."""
    operator = random_operator((8, 8))
    tokens = random_tokens(2, 64, 64)
    inputs = {part.data_ptr() for part in [*tokens, *operator.parameters()]}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in inputs:
            saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        operator(*tokens)
    assert sum(saved.values()) < tokens[0].numel()


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("grid", [(8, 9), (4, 12)], ids=str)
def test_gradients_of_the_convolution_equal_those_of_autograd(kernel_size, grid):
    """The map of 8 x 9 tokens is larger than every kernel; the map of 4 x 12 has fewer rows than kernels of size 5 and 7."""
    operator = random_operator(grid, kernel_size=kernel_size)
    num_tokens = grid[0] * grid[1]
    assert_equals_plain_form(operator, random_tokens(3, num_tokens, num_tokens))


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_the_convolution_equals_a_sum_of_shifted_and_weighted_maps(kernel_size):
    """Rank restoration adds a depthwise convolution of the zero-padded values; a subtraction isolates this term."""
    operator = random_operator((6, 7), kernel_size=kernel_size)
    tokens = random_tokens(2, 42, 42)
    with torch.no_grad():
        with_convolution = operator(*tokens)
        kernel, bias = operator.local_filter()
        operator.dwc = None
        local = with_convolution - operator(*tokens)
        padded = torch.nn.functional.pad(tokens[2].unflatten(1, (6, 7)), (0, 0, *(kernel_size // 2,) * 4))
        expected = sum(
            padded[:, row : row + 6, column : column + 7] * kernel[:, 0, row, column]
            for row in range(kernel_size)
            for column in range(kernel_size)
        )
    torch.testing.assert_close(local, (expected + bias).flatten(1, 2))
