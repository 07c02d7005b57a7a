import pytest
import torch
import torch.nn.functional as F

from models import build_model, create_model
from models.blocks import drop_path_rates, parse_attention_types
from models.swin import SwinTransformer
from models.windows import merge_windows, partition_windows, window_regions
from tests.conftest import CONFIGS
from utils.config.loading import load_config


def toy(**options):
    torch.manual_seed(0)
    defaults = {"img_size": 64, "num_classes": 5, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "attn_type": "LS"}
    model = SwinTransformer(**{**defaults, **options}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(
    ("attn_type", "expected"),
    [
        ("LLSS", ["LL", "LL", "SSSSSS", "SS"]),
        ("LLMS3", ["LL", "LL", "LLLSSS", "SS"]),
        ("MSSM1", ["LS", "SS", "SSSSSS", "LS"]),
        ("LLMS12", ["LL", "LL", "LLLLLL", "SS"]),
    ],
)
def test_attention_types_expand_to_one_letter_per_block(attn_type, expected):
    assert parse_attention_types(attn_type, (2, 2, 6, 2)) == expected


@pytest.mark.parametrize("attn_type", ["LLS", "LLXS", "LLMS", "LLSS3", "LLSSS"])
def test_invalid_attention_types_are_rejected(attn_type):
    with pytest.raises(ValueError, match=attn_type):
        parse_attention_types(attn_type, (2, 2, 6, 2))


def test_merge_inverts_the_partition_into_windows():
    x = torch.arange(2 * 6 * 8 * 3).view(2, 6, 8, 3)
    windows = partition_windows(x, (3, 4))
    assert windows.shape == (8, 12, 3)
    assert torch.equal(windows[1].view(3, 4, 3), x[0, :3, 4:])  # windows are ordered row by row
    assert torch.equal(merge_windows(windows, (3, 4), (6, 8)), x)


def test_window_regions_of_a_shifted_map_equal_a_hand_computed_example():
    """The map has 4 x 4 tokens, the windows have 2 x 2, and the shift is 1.

    The last window contains the four corner tokens of the map, each in a different region.
    """
    regions = window_regions((4, 4), (2, 2), (1, 1), (4, 4))
    assert regions[0].unique().numel() == 1
    assert regions[1].view(2, 2).tolist() == [[0, 2], [0, 2]]
    assert regions[3].unique().numel() == 4


def naive_position_bias(attention, window):
    """Bias (heads, N, N) of each pair of tokens in a window, looked up by the difference of their rows and columns."""
    rows, columns = (2 * side - 1 for side in attention.window)
    table = attention.relative_position_bias_table.detach().T.unflatten(1, (rows, columns))
    height, width = window
    table = F.interpolate(table[None], size=(2 * height - 1, 2 * width - 1), mode="bicubic")[0]  # unchanged at the native size
    tokens = [(row, column) for row in range(height) for column in range(width)]
    pairs = [table[:, a - c + height - 1, b - d + width - 1] for a, b in tokens for c, d in tokens]
    return torch.stack(pairs, dim=1).unflatten(1, (len(tokens), len(tokens)))


def naive_softmax_block(block, x, window):
    """Compute the output of a softmax block one window at a time, from the real tokens of the window (without padding)."""
    attention, height, width = block.attn, x.shape[1], x.shape[2]
    normed, out = block.norm1(x), torch.zeros_like(x)
    bias = naive_position_bias(attention, window)
    for top in range(0, height, window[0]):
        for left in range(0, width, window[1]):
            tokens = normed[:, top : top + window[0], left : left + window[1]]
            rows, columns = tokens.shape[1:3]
            real = [r * window[1] + c for r in range(rows) for c in range(columns)]
            q, k, v = attention.qkv(tokens.flatten(1, 2)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + bias[:, real][:, :, real]
            attended = attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            out[:, top : top + rows, left : left + columns] = attended.unflatten(1, (rows, columns))
    x = x + out
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("side", [14, 10, 17], ids=["divisible", "padded", "larger than the native map"])
def test_softmax_window_attention_equals_a_loop_over_windows_without_padding(side):
    model = toy(attn_type="SS", img_size=40 if side == 10 else 56)
    block = model.layers[0].blocks[0]
    x = torch.randn(2, side, side, 16)
    torch.testing.assert_close(block(x), naive_softmax_block(block, x, (7, 7)), rtol=1e-4, atol=1e-5)


def naive_linear_block(block, x, window):
    """Like ``naive_softmax_block``, for linear attention."""
    attention, height, width = block.attn, x.shape[1], x.shape[2]
    normed, out = block.norm1(x), torch.zeros_like(x)
    for top in range(0, height, window[0]):
        for left in range(0, width, window[1]):
            tokens = normed[:, top : top + window[0], left : left + window[1]]
            rows, columns = tokens.shape[1:3]
            # Temporarily crop the positional encoding and the grids of the module to the real tokens of the window.
            table = attention.positional_encoding.unflatten(1, window)[:, :rows, :columns].flatten(1, 2)
            q, k, v = attention.qkv(tokens.flatten(1, 2)).chunk(3, dim=-1)
            full_table = attention.positional_encoding.data
            attention.positional_encoding.data = table.data
            attention.grid, attention.key_grid, grids = (rows, columns), (rows, columns), (attention.grid, attention.key_grid)
            attended = attention.proj(attention.attend(q, k, v))
            attention.positional_encoding.data, (attention.grid, attention.key_grid) = full_table, grids
            out[:, top : top + rows, left : left + columns] = attended.unflatten(1, (rows, columns))
    x = x + out
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("side", [12, 10], ids=["divisible", "padded"])
def test_linear_window_attention_equals_a_loop_over_windows_without_padding(side):
    model = toy(attn_type="LL", window_size=6, img_size=48)
    block = model.layers[0].blocks[0]
    x = torch.randn(2, side, side, 16)
    with torch.no_grad():
        torch.testing.assert_close(block(x), naive_linear_block(block, x, (6, 6)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [64, 96, (64, 96), (60, 52)], ids=str)
def test_images_of_any_size_give_finite_logits(size):
    height, width = (size, size) if isinstance(size, int) else size
    logits = toy(window_size=8)(torch.randn(2, 3, height, width))
    assert logits.shape == (2, 5)
    assert torch.isfinite(logits).all()


def test_a_global_block_stays_global_at_every_size():
    model = toy(attn_type="LL", window_size=56)
    block = model.layers[0].blocks[1]
    # The layout consists of window, shift, and size of the padded map.
    assert block.layout((31, 47)) == ((31, 47), (0, 0), (31, 47))
    windowed = toy(attn_type="LL", window_size=8).layers[0].blocks[1]
    assert windowed.layout((31, 47)) == ((8, 8), (4, 4), (32, 48))


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for enable in (False, True):
        model = toy().train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        model(torch.ones(2, 3, 64, 64)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_every_parameter_gets_a_gradient():
    model = toy(attn_type="MM1", drop_path_rate=0.0).train()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


def test_the_error_for_an_unknown_model_name_suggests_the_most_similar_name():
    with pytest.raises(ValueError, match="did you mean 'flatten_swin_t'"):
        create_model("flaten_swin_t")


def test_the_error_for_pretrained_weights_names_the_function_of_timm():
    with pytest.raises(TypeError, match=r"use timm\.create_model\('flatten_swin_t', pretrained=\.\.\.\)"):
        create_model("flatten_swin_t", pretrained=True)


def test_reset_classifier_replaces_the_head():
    model = toy()
    model.reset_classifier(7)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 32)


def test_the_softmax_window_is_an_argument_and_does_not_depend_on_the_image_size():
    """By default, the window is 7 tokens wide, or 12 in the model for images of 384 pixels, as in the paper's code."""
    model = create_model("flatten_swin_t", img_size=256, device="meta")
    assert {block.window for block in model.layers[2].blocks} == {(7, 7)}
    large = create_model("flatten_swin_b_384", device="meta")
    assert {block.window for block in large.layers[2].blocks} == {(12, 12)}
    assert {block.window for block in toy(softmax_window=5, img_size=128).layers[1].blocks} == {(5, 5)}


@pytest.mark.parametrize(("window", "softmax_window"), [(56, 7), (57, 12)])
def test_the_softmax_window_is_7_for_config_window_sizes_up_to_56_and_12_above(window, softmax_window):
    cfg = load_config(CONFIGS / "flatten_swin_t.yaml", ["MODEL.SWIN.WINDOW_SIZE", window])
    with torch.device("meta"):
        model = build_model(cfg)
    assert {block.window for block in model.layers[2].blocks} == {(softmax_window, softmax_window)}


def test_resizing_position_tables_at_loading_equals_resizing_them_in_the_forward_pass():
    source, target = toy(img_size=224), toy(img_size=256)
    target.load_state_dict(source.state_dict() | target.resize_position_tables(source.state_dict(), img_size=224))
    images = torch.randn(1, 3, 256, 256)
    torch.testing.assert_close(target(images), source(images), rtol=1e-4, atol=1e-4)


def test_drop_path_rates_increase_linearly_from_zero_to_the_given_rate():
    assert drop_path_rates(0.3, (2, 2)) == [pytest.approx([0, 0.1]), pytest.approx([0.2, 0.3])]
    assert drop_path_rates(0.3, (1,)) == [[0]]


def test_initial_weights_have_a_standard_deviation_of_0_02():
    """Linear weights and relative position tables have this standard deviation; biases are 0, and norm weights are 1."""
    model = create_model("flatten_swin_t")
    assert model.layers[2].blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.layers[2].blocks[0].attn.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not model.head.bias.any()
    assert (model.norm.weight == 1).all()
