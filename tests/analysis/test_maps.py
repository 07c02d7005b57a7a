"""Attention maps captured from models: the weights multiplied by the values equal the output of each attention module.

A form of attention is a formula that computes weights from given queries and keys.

Shapes: G groups of tokens that attend to each other, N queries, M keys, H heads, C channels, D channels per head.
"""

import pytest
import torch

from analysis.maps import attention_modules, capture, compare, convolution_matrix, linear_weights, token_positions
from analysis.measures import attention_distance
from models import create_model
from models.cswin import CSwinTransformer
from models.deit import DeiT
from models.linear_attention import ATTENTION_KINDS, FocusedLinearAttention
from models.pvt import PyramidVisionTransformer
from models.swin import SwinTransformer

SMALL_SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 3}
SMALL_PVT = {"dims": (16, 32, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), "num_classes": 3}
SMALL_CSWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 4, 8), "num_classes": 3}
SMALL_DEIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3, "patch_size": 8}

CASES = {
    "swin global": lambda: (SwinTransformer(img_size=32, attn_type="LS", **SMALL_SWIN), 32),
    "swin windows, shifted and padded": lambda: (
        SwinTransformer(img_size=56, attn_type="LS", window_size=5, softmax_window=4, **SMALL_SWIN),
        56,
    ),
    "swin softmax, shifted": lambda: (SwinTransformer(img_size=64, attn_type="SS", softmax_window=4, **SMALL_SWIN), 64),
    "swin at another input size": lambda: (SwinTransformer(img_size=32, attn_type="LS", **SMALL_SWIN), (40, 48)),
    "pvt with reduction": lambda: (
        PyramidVisionTransformer(img_size=64, attn_type="LLSS", linear_reductions=(8, 4, 2, 1), **SMALL_PVT),
        64,
    ),
    "pvt without reduction": lambda: (PyramidVisionTransformer(img_size=64, attn_type="LSLS", **SMALL_PVT), 64),
    "cswin stripes": lambda: (
        CSwinTransformer(img_size=64, attn_type="LSLS", linear_splits=(3, 2, 7, 7), **SMALL_CSWIN),
        64,
    ),
    "deit linear": lambda: (DeiT(img_size=32, attn_type="L", **SMALL_DEIT), 32),
    "deit softmax": lambda: (DeiT(img_size=32, attn_type="S", **SMALL_DEIT), (32, 48)),
    **{
        f"swin {kind}": lambda kind=kind: (
            SwinTransformer(img_size=32, attn_type="LL", linear={"kind": kind}, **SMALL_SWIN),
            32,
        )
        for kind in ATTENTION_KINDS
    },
    "swin without focusing": lambda: (
        SwinTransformer(img_size=32, attn_type="LL", linear={"focusing": False, "rank_restoration": False}, **SMALL_SWIN),
        32,
    ),
}


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Add noise to all parameters, so that none is zero, as after training. Return the model in float64 and evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()


def capture_case(case: str) -> list:
    """Capture the attention of every module in a forward pass, and assert that capturing does not change the logits."""
    model, size = CASES[case]()
    model = randomise(model)
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        expected = model(images)
        with capture(model) as attentions:
            assert torch.equal(model(images), expected)
        assert torch.equal(model(images), expected)
    assert [attention.name for attention in attentions] == list(attention_modules(model))
    return attentions


@pytest.mark.parametrize("case", CASES)
def test_weights_times_values_equal_the_output_of_the_module(case):
    for attention in capture_case(case):
        matrix = attention.matrix()
        if matrix.shape[1] == attention.v.shape[1]:
            out = matrix @ attention.v  # (G, H, N, D)
        else:  # hydra, where every channel is a head
            values = attention.v.transpose(-2, -1).flatten(1, 2)  # (G, C, M)
            out = (matrix @ values.unsqueeze(-1)).squeeze(-1).unflatten(1, attention.v.shape[1::2]).transpose(-2, -1)
        if (convolution := attention.convolution()) is not None:
            local = torch.einsum("cnm,gmc->gnc", convolution, attention.v.transpose(1, 2).flatten(2))
            local[:, attention.num_prefix_tokens :] += attention.module.local_filter()[1].detach()
            out = out + local.unflatten(-1, attention.v.shape[1::2]).transpose(1, 2)
        out = out.transpose(1, 2).flatten(2)
        if attention.key_mask is not None:
            out = out * attention.key_mask.any(dim=1)[:, None, None]
        torch.testing.assert_close(out, attention.output, rtol=1e-5, atol=1e-5)


def test_rows_of_normalised_attention_sum_to_one():
    for case in ("swin relu", "swin angular", "swin efficient", "swin softmax", "deit softmax"):
        for attention in capture_case(case):
            sums = attention.matrix().sum(dim=-1)
            torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-4, atol=1e-4)
    # The epsilon in the normaliser makes the sum smaller than one if the similarities of a query to all keys are low.
    for attention in capture_case("deit linear"):
        sums = attention.matrix().sum(dim=-1)
        assert sums.max() < 1 + 1e-6
        assert (sums > 0.999).double().mean() > 0.9


def test_the_convolution_matrix_times_values_equals_the_convolution_and_queries_select_its_rows():
    convolution = torch.nn.Conv2d(3, 3, 5, padding=2, groups=3)
    full = convolution_matrix(convolution.weight.detach(), (4, 6), 24)
    torch.testing.assert_close(convolution_matrix(convolution.weight.detach(), (4, 6), 24, queries=[7, 3]), full[:, [7, 3]])
    values = torch.randn(1, 3, 4, 6)
    expected = convolution(values) - convolution.bias[:, None, None]
    torch.testing.assert_close((full @ values.flatten(2)[0].unsqueeze(-1))[..., 0], expected[0].flatten(1))


def test_attention_weights_of_masked_keys_are_zero():
    module = FocusedLinearAttention(8, 2, (2, 3)).double()
    q, k, v = (torch.randn(2, 6, 8).double() for _ in range(3))
    mask = torch.tensor([[True, True, True, True, False, False], [False] * 6])
    matrix = linear_weights(module, *(x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (q, k)), (2, 3), mask).detach()
    assert (matrix[0, :, :, 4:] == 0).all()
    assert (matrix[1] == 0).all()
    heads = (matrix @ v.unflatten(-1, (2, 4)).transpose(1, 2)).transpose(1, 2).flatten(2)
    module.dwc = None
    torch.testing.assert_close(module.attend(q, k, v, key_mask=mask), heads)


@pytest.mark.parametrize("form", ["softmax", "linear", "focused", "efficient"])
def test_compare_computes_every_form_of_attention_by_its_definition(form):
    q, k = torch.randn(2, 3, 5, 4).double(), torch.randn(2, 3, 7, 4).double()
    weights = compare(form, q, k)
    if form == "softmax":
        expected = (q @ k.transpose(-2, -1) / 2).softmax(dim=-1)
    elif form == "efficient":
        expected = q.softmax(dim=-1) @ k.softmax(dim=-2).transpose(-2, -1)
    else:
        q, k = q.relu() + 1e-6, k.relu() + 1e-6
        if form == "focused":
            q, k = (x**3 * (x.norm(dim=-1, keepdim=True) / (x**3).norm(dim=-1, keepdim=True)) for x in (q, k))
        similarity = q @ k.transpose(-2, -1)
        expected = similarity / similarity.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(weights, expected)


def test_unknown_module_names_and_forms_of_attention_are_rejected():
    model = create_model("flatten_swin_t", device="meta")
    with pytest.raises(ValueError, match="not an attention module; choose among"), capture(model, ["layers.9"]):
        pass
    with pytest.raises(ValueError, match="choose one of softmax"):
        compare("sharp", torch.randn(1, 2, 3), torch.randn(1, 2, 3))


@pytest.mark.parametrize("case", ["swin windows, shifted and padded", "swin softmax, shifted", "cswin stripes", "deit linear"])
def test_token_positions_contain_each_token_of_the_map_once(case):
    model, size = CASES[case]()
    with torch.no_grad(), capture(model.eval()) as attentions:
        model(torch.randn(1, 3, size, size))
    for attention in attentions:
        groups, tokens, grid = attention.q.shape[0], attention.q.shape[2] - attention.num_prefix_tokens, attention.map_grid
        positions = token_positions(model, attention)
        assert positions.shape == (groups, tokens)
        assert sorted(positions[positions >= 0].tolist()) == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize("size", [56, (44, 52)], ids=str)
@pytest.mark.parametrize("attn_type", ["SS", "LL"])
def test_token_positions_are_those_of_the_tokens_that_a_shifted_window_contains(attn_type, size):
    """Maps of 14 x 14 tokens (or 11 x 13, padded), windows of 7 x 7 and a shift of 3: compare inputs of block and attention."""
    model = SwinTransformer(img_size=56, attn_type=attn_type, window_size=7, softmax_window=7, **SMALL_SWIN).eval()
    block, seen = model.layers[0].blocks[1], {}
    assert block.layout((14, 14)) == ((7, 7), (3, 3), (14, 14))
    block.norm1.register_forward_hook(lambda module, inputs, output: seen.update(map=output))
    block.attn.register_forward_pre_hook(lambda module, inputs: seen.update(windows=inputs[0]))
    height, width = (size, size) if isinstance(size, int) else size
    with torch.no_grad(), capture(model, ["layers.0.blocks.1.attn"]) as attentions:
        model(torch.randn(1, 3, height, width))
    positions = token_positions(model, attentions[0])
    tokens = torch.cat([seen["map"].flatten(0, 2), torch.zeros(1, 16)])  # the last row, index -1, is padding
    assert torch.equal(tokens[positions], seen["windows"])


def test_token_positions_of_stripes_are_those_of_the_tokens_in_each_stripe():
    """Vertical and horizontal stripes of 2 tokens on a map of 8 x 8 tokens."""
    model = CSwinTransformer(img_size=32, attn_type="LLLL", linear_splits=(2, 2, 2, 2), **SMALL_CSWIN).eval()
    with torch.no_grad(), capture(model, ["stage1.0.attns.0", "stage1.0.attns.1"]) as attentions:
        model(torch.randn(1, 3, 32, 32))
    vertical, horizontal = (token_positions(model, attention) for attention in attentions)
    assert vertical[1].tolist() == [row * 8 + column for row in range(8) for column in (2, 3)]
    assert horizontal[1].tolist() == [row * 8 + column for row in (2, 3) for column in range(8)]


@pytest.mark.parametrize(("side", "distance", "uniform"), [(56, 18.8, 29.1), (28, 9.0, 14.5), (14, 4.2, 7.3)])
def test_the_convolution_over_spatially_reduced_values_is_not_local(side, distance, uniform):
    """Before the convolution, reduced values are interpolated along the flattened tokens, which mixes rows and columns.

    docs/focus.md quotes the distances for a side of 56.
    """
    kernel = torch.ones(1, 1, 5, 5)
    matrix = convolution_matrix(kernel, (side, side), 49)
    actual = attention_distance(matrix, (side, side), (7, 7)).mean().item()
    assert actual == pytest.approx(distance, abs=0.06)
    assert attention_distance(torch.ones_like(matrix), (side, side), (7, 7)).mean().item() == pytest.approx(uniform, abs=0.06)
    if side < 56:  # for 56, this matrix has 10 million entries
        local = convolution_matrix(kernel, (side, side), side * side)
        assert attention_distance(local, (side, side), (side, side)).mean().item() < 1.9
