"""Image sizes: non-square and changed sizes, checkpoints trained at other sizes, and sizes below the minimum."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.checkpoint_writer import to_host
from models.checkpoints.reader import read_checkpoint
from models.cswin import CSwinTransformer
from models.deit import DeiT
from models.pvt import PyramidVisionTransformer
from models.pvt_v2 import PyramidVisionTransformerV2
from models.swin import SwinTransformer
from tests.runs import load_weights

TOY_PVT = {"dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2), "mlp_ratios": (2, 2), "num_classes": 5}
TOY_SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}  # also used for CSwin
TOY_DEIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
# Constructor and options of one small model per kind of position table (position embedding, positional encoding of the keys,
# or relative position bias).
TABLE_KINDS = {
    "swin, global": (SwinTransformer, {**TOY_SWIN, "attn_type": "LL"}),
    "swin, linear windows": (SwinTransformer, {**TOY_SWIN, "attn_type": "LL", "window_size": 3}),
    "swin, softmax windows": (SwinTransformer, {**TOY_SWIN, "attn_type": "SS", "softmax_window": 3}),
    "pvt": (PyramidVisionTransformer, {**TOY_PVT, "attn_type": "LL"}),
    "pvt, reduced keys": (PyramidVisionTransformer, {**TOY_PVT, "attn_type": "LS", "linear_reductions": (2, 1)}),
    "pvt v2": (PyramidVisionTransformerV2, {**TOY_PVT, "attn_type": "LL"}),
    "cswin, global": (CSwinTransformer, {**TOY_SWIN, "attn_type": "LL"}),
    "cswin, linear stripes": (CSwinTransformer, {**TOY_SWIN, "attn_type": "LL", "linear_splits": (3, None)}),
    "cswin, softmax stripes": (CSwinTransformer, {**TOY_SWIN, "attn_type": "SS", "softmax_splits": (3, 3)}),
    "deit": (DeiT, {**TOY_DEIT, "patch_size": 8}),
}


def build(kind: str, img_size) -> torch.nn.Module:
    """Build a model in evaluation mode with random values in every parameter."""
    constructor, options = TABLE_KINDS[kind]
    model = constructor(**options, img_size=img_size).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def assert_same_logits(one, other, size):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(one(images), other(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("source_size", "size"), [((64, 64), (48, 96)), ((48, 96), (64, 64)), ((96, 48), (48, 96))], ids=str)
@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_a_checkpoint_loaded_at_another_image_size_gives_the_logits_of_its_source_model(kind, source_size, size):
    """If the image size of the checkpoint is given, the loaded model equals the source model called at the new size."""
    source, target = build(kind, source_size), build(kind, size)
    state_dict = source.state_dict()
    target.load_state_dict(state_dict | target.resize_position_tables(state_dict, img_size=source_size))
    assert_same_logits(target, source, size)


def test_a_checkpoint_for_224_pixels_loaded_at_a_non_square_size_gives_the_logits_of_its_source_model():
    """The size changes from 224 x 224 to 160 x 320 pixels. Stage 2 has stripes of 28 x 7 tokens."""
    options = {**TOY_SWIN, "attn_type": "LLL", "linear_splits": (14, 7, None), "depths": (1, 1, 1), "num_heads": (2, 4, 8)}
    source, target = (CSwinTransformer(**options, img_size=size).eval() for size in (224, (160, 320)))
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state_dict = source.state_dict()
    assert state_dict["stage2.0.attns.0.positional_encoding"].shape == (1, 28 * 7, 16)
    target.load_state_dict(state_dict | target.resize_position_tables(state_dict, img_size=224))
    assert_same_logits(target, source, (160, 320))


def test_resizing_keeps_the_width_of_a_stripe():
    """A table of 196 positions belongs to a stripe of 28 x 7 tokens, not to a square of 14 x 14. It is resized to 56 x 7."""
    options = {**TOY_SWIN, "attn_type": "LL", "linear_splits": (7, None)}
    source, target = (CSwinTransformer(**options, img_size=size, device="meta") for size in (112, 224))
    shapes = {name: value.shape for name, value in source.state_dict().items()}
    names = [f"stage1.{block}.attns.{axis}.positional_encoding" for block in (0, 1) for axis in (0, 1)]
    assert {tuple(shapes[name]) for name in names} == {(1, 196, 8)}
    state_dict = {name: torch.randn(shapes[name]) for name in names}
    resized = target.resize_position_tables(state_dict, img_size=112)
    for name in names:
        old_grid, new_grid = ((28, 7), (56, 7)) if ".attns.0." in name else ((7, 28), (7, 56))
        table = state_dict[name].view(1, *old_grid, 8).permute(0, 3, 1, 2)
        expected = F.interpolate(table, size=new_grid, mode="bicubic").permute(0, 2, 3, 1).reshape(1, -1, 8)
        torch.testing.assert_close(resized[name], expected)


def test_a_relative_position_table_of_a_non_square_window_is_resized_as_a_2d_map():
    """A stage of 2 x 4 tokens has windows of 2 x 4 tokens and therefore 3 x 7 relative positions."""
    options = {**TOY_SWIN, "attn_type": "SS", "patch_size": 16, "depths": (1, 1)}
    source, target = SwinTransformer(**options, img_size=(32, 64)), SwinTransformer(**options, img_size=64)
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    table = torch.randn(3 * 7, 2)
    resized = target.resize_position_tables(source.state_dict() | {name: table}, img_size=(32, 64))
    expected = F.interpolate(table.view(1, 3, 7, 2).permute(0, 3, 1, 2), size=(7, 7), mode="bicubic")
    torch.testing.assert_close(resized[name], expected.permute(0, 2, 3, 1).reshape(49, 2))


def test_a_table_of_equal_shape_but_another_grid_is_resized_if_the_image_size_is_given():
    source, target = (DeiT(**TOY_DEIT, img_size=size).eval() for size in ((32, 128), (64, 64)))
    assert source.pos_embed.shape == target.pos_embed.shape  # 16 patches each: 2 x 8 and 4 x 4
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state_dict = dict(source.state_dict())  # without metadata
    assert target.resize_position_tables(state_dict) == {}
    resized = target.resize_position_tables(state_dict, img_size=(32, 128))
    assert set(resized) == {"pos_embed", "blocks.0.attn.positional_encoding", "blocks.1.attn.positional_encoding"}
    target.load_state_dict(state_dict | resized)
    assert_same_logits(target, source, (64, 64))


@pytest.mark.parametrize(
    ("model", "source", "message"),
    [
        (
            DeiT(**TOY_DEIT, img_size=64),
            DeiT(**TOY_DEIT, img_size=(32, 96)),
            "pos_embed: the checkpoint's 12 positions .* img_size",
        ),
        (
            CSwinTransformer(**TOY_SWIN, attn_type="LL", linear_splits=(4, None), img_size=64),
            CSwinTransformer(**TOY_SWIN, attn_type="LL", linear_splits=(4, None), img_size=96),
            "stage1.0.attns.0.positional_encoding: the checkpoint's 96 positions .* img_size",
        ),
    ],
    ids=["non-square", "stripe"],
)
def test_a_table_with_an_ambiguous_grid_is_rejected_without_the_image_size_of_the_checkpoint(model, source, message):
    without_metadata = dict(source.state_dict())
    with pytest.raises(ValueError, match=message):
        model.resize_position_tables(without_metadata)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(without_metadata)


def test_a_table_that_does_not_match_the_given_image_size_is_rejected():
    source, target = DeiT(**TOY_DEIT, img_size=64), DeiT(**TOY_DEIT, img_size=96)
    with pytest.raises(ValueError, match=r"pos_embed: 16 positions .* 32 x 96 pixels"):
        target.resize_position_tables(dict(source.state_dict()), img_size=(32, 96))


def as_saved(state_dict, path):
    torch.save(state_dict, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_a_saved_state_dict_of_another_grid_with_as_many_tokens_gives_the_logits_of_its_source_model(kind, tmp_path):
    """A state dict records the heights and widths of its tables. Models for 48 x 96 and 96 x 48 pixels have equal numbers."""
    source, target = build(kind, (48, 96)), build(kind, (96, 48))
    assert sum(parameter.numel() for parameter in source.parameters()) == sum(p.numel() for p in target.parameters())
    target.load_state_dict(as_saved(source.state_dict(), tmp_path / "weights.pth"))
    assert_same_logits(target, source, (96, 48))
    nested = torch.nn.ModuleDict({"backbone": build(kind, (96, 48))})
    nested.load_state_dict(as_saved(torch.nn.ModuleDict({"backbone": source}).state_dict(), tmp_path / "nested.pth"))
    assert_same_logits(nested["backbone"], source, (96, 48))


@pytest.mark.parametrize("kind", ["pvt", "swin, global"])
def test_a_checkpoint_of_a_run_at_another_grid_with_as_many_tokens_is_resized_on_every_path(kind, tmp_path):
    """Paths: as the state of a run, by ``load_weights`` without and with the config of the run, and behind a prefix."""
    source = build(kind, (48, 96))
    state = to_host({"model": source.state_dict(), "config": {"DATA": {"IMG_SIZE": [48, 96]}}})
    torch.save(state, tmp_path / "run.pth")
    resumed = build(kind, (96, 48))
    resumed.load_state_dict(read_checkpoint(tmp_path / "run.pth")["model"])
    assert_same_logits(resumed, source, (96, 48))
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    torch.save({"model": dict(source.state_dict()), "config": state["config"]}, tmp_path / "old.pth")
    torch.save(torch.nn.ModuleDict({"net": source}).state_dict(), tmp_path / "prefixed.pth")
    for name in ("run", "bare", "old", "prefixed"):
        loaded = build(kind, (96, 48))
        report = load_weights(loaded, tmp_path / f"{name}.pth")
        assert sorted(report.resized) == sorted(loaded.position_grids())
        assert_same_logits(loaded, source, (96, 48))


@pytest.mark.parametrize("kind", ["pvt", "deit", "cswin, global"])
def test_weights_without_metadata_are_loaded_into_a_non_square_model_with_a_warning_and_the_remedy_works(kind, caplog):
    source, same, other = build(kind, (48, 96)), build(kind, (48, 96)), build(kind, (96, 48))
    without_metadata = dict(source.state_dict())
    same.load_state_dict(without_metadata)
    assert "do not record the height and width" in caplog.text
    assert_same_logits(same, source, (48, 96))
    caplog.clear()
    other.load_state_dict(other.adapt_state_dict(without_metadata, img_size=(48, 96)))  # the remedy in the warning
    assert_same_logits(other, source, (96, 48))
    build(kind, 64).load_state_dict(dict(build(kind, 64).state_dict()))  # released weights are square
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_table_that_was_resized_by_hand_is_loaded_as_it_is(tmp_path):
    """The recorded height and width no longer match the table, and are ignored."""
    source, target = (DeiT(**TOY_DEIT, img_size=size) for size in (64, 96))  # patches of 16 x 16 pixels
    state_dict = as_saved(source.state_dict(), tmp_path / "weights.pth")
    state_dict["pos_embed"] = torch.randn(1, 1 + 6 * 6, 16)
    target.load_state_dict(state_dict)
    assert torch.equal(target.pos_embed, state_dict["pos_embed"])


@pytest.mark.parametrize("grids", [None, 3, {"pos_embed": "8x8"}, {"pos_embed": [0, 64]}, {"pos_embed": [-8, -8]}], ids=str)
def test_invalid_metadata_of_a_state_dict_are_ignored(grids):
    source, target = build("deit", 64), build("deit", 64)
    state_dict = source.state_dict()
    state_dict._metadata[""]["position_grids"] = grids
    target.load_state_dict(state_dict)
    assert_same_logits(target, source, (64, 64))


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_only_the_head_trains_after_a_frozen_model_is_resized(kind):
    """A resized table is a new parameter; it stays frozen."""
    model = build(kind, 64)
    model.freeze_features()
    model.set_input_size(84)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {"head.weight", "head.bias"}
    model.train()(torch.randn(2, 3, 84, 84)).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("size", [(48, 96), (96, 96), (40, 32)], ids=str)
@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_set_input_size_preserves_the_logits_at_the_new_size(kind, size):
    model, changed = build(kind, 64), build(kind, 64)
    changed.set_input_size(img_size=size)
    assert_same_logits(changed, model, size)
    for _, table in changed.named_position_tables():
        num_rows = changed.get_parameter(table.name).flatten(0, -2).shape[0]
        assert num_rows == table.grid[0] * table.grid[1] + table.num_prefix_tokens
    changed.set_input_size(img_size=64)
    assert {name: value.shape for name, value in changed.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize("size", [(32, 32), (40, 72)], ids=str)
@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_gradients_at_another_size_equal_those_of_tables_that_torch_resizes(kind, size):
    """A training step at another size trains the tables of the native size, through ``F.interpolate``."""
    model, resized = build(kind, 64), build(kind, 64)
    resized.set_input_size(size)  # its tables are replaced below
    native = {table.name: table for _, table in model.named_position_tables()}
    parameters = dict(model.named_parameters())
    for _, new in resized.named_position_tables():
        old, value = native[new.name], parameters[new.name]
        prefix, rows = value.flatten(0, -2).split([old.num_prefix_tokens, old.grid[0] * old.grid[1]])
        rows = rows.T.view(1, -1, *old.grid)
        rows = rows if old.grid == new.grid else F.interpolate(rows, size=new.grid, mode="bicubic", align_corners=False)
        parameters[new.name] = torch.cat([prefix, rows.flatten(2)[0].T]).view(*value.shape[:-2], -1, value.shape[-1])
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(
        torch.func.functional_call(resized, parameters, images).square().sum(), list(model.parameters()), allow_unused=True
    )
    loss = model(images).square().sum()
    for (name, _), own, other in zip(
        model.named_parameters(), torch.autograd.grad(loss, list(model.parameters()), allow_unused=True), expected, strict=True
    ):
        assert (own is None) == (other is None), name
        if own is not None:
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4 * float(other.abs().max() + 1e-3), msg=name)


# Models with fixed windows or softmax stripes are excluded, because their table shapes do not depend on the image size.
@pytest.mark.parametrize("kind", [kind for kind in TABLE_KINDS if "windows" not in kind and "softmax" not in kind])
def test_set_input_size_gives_tables_of_the_same_shapes_as_a_model_built_at_that_size(kind):
    changed = build(kind, 64)
    changed.set_input_size(img_size=(48, 96))
    built = build(kind, (48, 96))
    assert {name: value.shape for name, value in changed.state_dict().items()} == {
        name: value.shape for name, value in built.state_dict().items()
    }
    assert all(parameter.requires_grad for parameter in changed.parameters())


@pytest.mark.parametrize(
    "size", [np.int64(64), torch.Size((64, 64)), [64, 64], (np.int32(64), 64)], ids=lambda size: str(type(size))
)
def test_image_sizes_may_be_integers_and_sequences_of_any_type(size):
    assert DeiT(**TOY_DEIT, img_size=size).pos_embed.shape == (1, 17, 16)


# Minimum image side in pixels, computed by hand. PVT has patches of 4 pixels and halves the map three times. The first
# convolution of CSwin has a kernel of 7 pixels and adds 4 pixels of padding. The first softmax blocks of PVTv2 reduce a map of
# ceil(side / 4) tokens per side by a factor of 8, so they need at least 8 tokens per side.
MINIMUM_SIZES = {
    "swin": (SwinTransformer, {}, 1),
    "pvt": (PyramidVisionTransformer, {}, 32),
    "pvt v2": (PyramidVisionTransformerV2, {}, 1),
    "pvt v2, softmax": (PyramidVisionTransformerV2, {"attn_type": "SSSS"}, 29),
    "cswin": (CSwinTransformer, {}, 3),
    "deit": (DeiT, {}, 16),
}


@pytest.mark.parametrize(("constructor", "options", "smallest"), MINIMUM_SIZES.values(), ids=MINIMUM_SIZES)
def test_images_below_the_minimum_size_are_rejected_and_the_error_states_the_minimum(constructor, options, smallest):
    depth_options = {"depth": 1} if constructor is DeiT else {"depths": (1, 1, 1, 1)}
    model = constructor(img_size=smallest, num_classes=3, **depth_options, **options).eval()
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(1, 3, smallest, smallest + 5))).all()
    too_small = (smallest - 1, smallest + 5)
    message = f"{too_small[0]} x {too_small[1]} pixels .* {smallest} x {smallest}"
    with pytest.raises(ValueError, match=message):
        model(torch.randn(1, 3, *too_small))
    with pytest.raises(ValueError, match=message):
        model.forward_intermediates(torch.randn(1, 3, *too_small))
    with pytest.raises(ValueError, match=message):
        model.set_input_size(too_small)
    with pytest.raises(ValueError, match=message):
        constructor(img_size=too_small, **depth_options, **options)
