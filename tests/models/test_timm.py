"""Requirements of timm's test suite for every registered model, and features that timm's users rely on.

Most checks of shapes and names run on the meta device, and most checks of values on images of 64 x 64 pixels.
"""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import get_spatial_dim
from timm.models import create_feature_extractor, get_graph_node_names, is_model, list_pretrained, model_entrypoint
from yacs.config import CfgNode

from models import RELEASED, build_model, checkpoint_filter_fn, create_model, entrypoints, list_models, released
from tests.conftest import CONFIGS, reference
from utils.config.loading import load_config

FAMILIES = ["flatten_swin_t", "flatten_pvt_t", "flatten_pvt_v2_b0", "flatten_cswin_t", "flatten_deit_t"]
HIERARCHICAL = [name for name in FAMILIES if "deit" not in name]
# Options of one small model per family. Together, the models contain linear and softmax attention and every kind of mask and
# position table.
MIXED = {
    "flatten_swin_t": {"attn_type": "LMSS1", "depths": (2, 2, 1, 1), "window_size": 5, "softmax_window": 3},
    "flatten_pvt_t": {"attn_type": "LSLS", "depths": (1, 1, 1, 1)},
    "flatten_pvt_v2_b0": {"attn_type": "LSLS", "depths": (1, 1, 1, 1)},
    "flatten_cswin_t": {"attn_type": "LSSL", "depths": (1, 1, 1, 1), "linear_splits": (3, 2, 1, 1)},
    "flatten_deit_t": {"attn_type": "M1", "depth": 2},
}


def mixed(name: str, **options) -> torch.nn.Module:
    """Build a small model in evaluation mode, with linear and softmax blocks and without all-zero parameters."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 5, "img_size": 64, **MIXED[name], **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_meta and not parameter.any():  # zero-initialised tables and biases would hide errors
                parameter.copy_(torch.sin(torch.arange(parameter.numel()).float()).view_as(parameter) * 0.2)
    return model


def one_block_per_stage(name: str) -> dict:
    """Options of a model of any size with as few blocks as possible."""
    return {"depth": 1} if "deit" in name else {"depths": (1, 1, 1, 1)}


def to_channels_first(features: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Convert (B, h, w, C) maps, or the patch tokens of (B, 1 + h * w, C) tokens, to (B, C, h, w) maps."""
    if features.ndim == 3:
        features = features[:, 1:].unflatten(1, (height, width))
    return features.permute(0, 3, 1, 2)


# All registered names.


def test_every_name_has_one_entry_point_and_one_default_cfg():
    names = list_models()
    assert {name for name in names if is_model(name) and model_entrypoint(name).__name__ == name} == set(names)
    assert set(entrypoints.default_cfgs) == set(names)


@pytest.mark.parametrize("name", list_models())
def test_the_default_cfg_matches_the_model(name):
    """Corresponds to timm's test_model_default_cfgs."""
    model = timm.create_model(name, device="meta", **one_block_per_stage(name)).eval()
    cfg, state_dict = model.default_cfg, model.state_dict()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert f"{cfg['classifier']}.weight" in state_dict
    assert f"{cfg['first_conv']}.weight" in state_dict
    assert (cfg["tag"], cfg["paper_ids"], cfg["crop_mode"]) == ("in1k", "arXiv:2308.00442", "squash")
    features = model.forward_features(torch.empty(2, *cfg["input_size"], device="meta"))
    assert features.shape[-1] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.forward_head(features).shape == (2, 1000)
    if "deit" not in name:
        height, width = get_spatial_dim(model.output_fmt)
        assert (features.shape[height], features.shape[width]) == cfg["pool_size"]
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model.forward_head(features).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model.forward_head(features).shape == features.shape
    model.reset_classifier(7, model.global_pools[0])
    assert model.forward_head(features).shape == (2, 7)
    unpooled = timm.create_model(name, num_classes=0, global_pool="", device="meta", **one_block_per_stage(name))
    assert unpooled.forward_head(features).shape == features.shape


@pytest.mark.parametrize("name", list_models())
def test_input_size_and_crop_follow_the_evaluation_recipe_of_the_reference(name):
    data = timm.data.resolve_model_data_config(timm.create_model(name, device="meta", **one_block_per_stage(name)))
    side = 384 if name.endswith("_384") else 224
    assert data["input_size"] == (3, side, side)
    recipe = reference("recipes")["recipes"].get(name)
    if recipe is not None:
        assert data["crop_pct"] == (0.875 if recipe["TEST.CROP"] else 1.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_feature_maps_have_the_channels_and_strides_of_feature_info(name):
    """Corresponds to timm's test_model_forward_features, for the ``feature_cls`` values "getter" and "hook"."""
    for feature_cls in ("getter", "hook"):
        features = timm.create_model(name, features_only=True, feature_cls=feature_cls, img_size=64, device="meta")
        channels, reductions = features.feature_info.channels(), features.feature_info.reduction()
        side = 64
        maps = features(torch.empty(2, 3, side, side, device="meta"))
        assert len(maps) == len(channels) == (12 if "deit" in name else 4)
        for features_map, num_channels, reduction in zip(maps, channels, reductions, strict=True):
            if feature_cls == "hook":
                features_map = to_channels_first(features_map, side // reduction, side // reduction)
            assert features_map.shape == (2, num_channels, side // reduction, side // reduction)


@pytest.mark.parametrize("name", FAMILIES)
def test_models_have_arguments_for_input_channels_dtype_and_device(name):
    model = timm.create_model(name, in_chans=5, dtype=torch.bfloat16, device="meta")
    assert {(tensor.dtype, tensor.device.type) for tensor in model.parameters()} == {(torch.bfloat16, "meta")}
    assert model.in_chans == model.state_dict()[f"{model.default_cfg['first_conv']}.weight"].shape[1] == 5
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(0).device.type == "cpu"


@pytest.mark.parametrize("name", FAMILIES)
def test_intermediates_of_models_match_the_forward_pass(name):
    """Corresponds to timm's test_model_forward_intermediates, but compares values."""
    model, images = mixed(name), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = model.forward_features(images)
        final, maps = model.forward_intermediates(images, norm=True)
        torch.testing.assert_close(final, features)
        torch.testing.assert_close(maps[-1], to_channels_first(features, *maps[-1].shape[-2:]))
        assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
        (first,) = model.forward_intermediates(images, indices=[0], stop_early=True, intermediates_only=True)
        two = model.forward_intermediates(images, indices=[0, 1], stop_early=True, intermediates_only=True)
        assert len(two) == 2
        (last,) = model.forward_intermediates(images, indices=[-1], norm=True, intermediates_only=True)
        assert torch.equal(last, maps[-1])
    if "deit" not in name:  # ``norm=True`` normalises all maps of DeiT, but only the last map of other models
        torch.testing.assert_close(first, maps[0])
        torch.testing.assert_close(two[1], maps[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_failed_constructor_leaves_the_default_dtype_and_device_of_torch_unchanged(name):
    with pytest.raises(ValueError, match="choose one of focused"):
        create_model(name, dtype=torch.float64, device="meta", linear={"kind": "fokused"})
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(0).device.type == "cpu"


# Feature maps of one model per family.


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("feature_cls", ["hook", "fx"])
def test_feature_cls_hook_and_fx_give_the_same_maps_as_getter(name, feature_cls):
    getter = mixed(name, features_only=True)
    other = mixed(name, features_only=True, feature_cls=feature_cls)
    images = torch.randn(2, 3, 64, 64)
    expected, actual = getter(images), other(images)
    assert len(actual) == len(expected) == (2 if "deit" in name else 4)
    assert other.output_fmt == ("NLC" if "deit" in name else "NHWC")
    for one, features in zip(expected, actual, strict=True):
        torch.testing.assert_close(to_channels_first(features, *one.shape[-2:]), one)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_fx_graph_gives_the_logits_and_gradients_of_the_model(name):
    """Corresponds to timm's test_model_forward_fx and test_model_backward_fx, with an additional size that was not traced."""
    model = mixed(name)
    _, nodes = get_graph_node_names(model)
    graph = create_feature_extractor(model, [nodes[-1]]).eval()
    for size in ((64, 64), (96, 64)):
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(graph(images)[nodes[-1]], model(images))
    expected = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    parameters = [graph.get_parameter(parameter_name) for parameter_name, _ in model.named_parameters()]
    actual = torch.autograd.grad(graph(images)[nodes[-1]].square().sum(), parameters)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_maps_of_hierarchical_models_are_equal_in_nhwc_and_nchw_and_only_the_last_is_normalised(name):
    model, images = mixed(name), torch.randn(2, 3, 64, 64)
    channels_last = model.forward_intermediates(images, norm=True, output_fmt="NHWC", intermediates_only=True)
    without_norm = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
    channels_first = model.forward_intermediates(images, norm=True, intermediates_only=True)
    for one, other in zip(channels_last, channels_first, strict=True):
        torch.testing.assert_close(one.permute(0, 3, 1, 2), other)
    torch.testing.assert_close(channels_last[-1], model.norm(without_norm[-1]))
    if "pvt" not in name:  # PVT has no final norm; PVTv2 has a norm after every stage instead
        assert not torch.allclose(channels_last[-1], without_norm[-1])
    for one, other in zip(channels_last[:-1], without_norm[:-1], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("indices", [0, 6, 13, [4, 99], [-13], []], ids=str)
def test_invalid_indices_of_feature_maps_are_rejected(name, indices):
    # The index 6 is valid for DeiT, which has 12 feature maps, and is replaced by 13 there. The other models have 4 maps.
    with pytest.raises(ValueError, match="feature maps"):
        create_model(name, device="meta").take_indices(indices if "deit" not in name or indices != 6 else 13)


@pytest.mark.parametrize("name", FAMILIES)
def test_deit_has_one_feature_map_per_block_and_other_models_have_one_per_stage(name):
    options = {"depth": 3} if "deit" in name else {"depths": (1, 1, 1), "attn_type": "LLL"}
    features = timm.create_model(name, features_only=True, img_size=64, **options)
    assert len(features(torch.randn(1, 3, 64, 64))) == 3


# DeiT has the interface of timm's VisionTransformer.


def vit_and_deit():
    """Return timm's ViT and our DeiT with softmax attention, which have the same weights, and a batch of images."""
    options = {"img_size": 64, "num_classes": 5, "depth": 3}
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **options).eval()
    deit = timm.create_model("flatten_deit_t", attn_type="S", **options).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    deit.load_state_dict(vit.state_dict())
    return vit, deit, torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize(
    "options", [{}, {"norm": True}, {"output_fmt": "NLC"}, {"return_prefix_tokens": True, "norm": True}], ids=str
)
@pytest.mark.parametrize("indices", [None, 2, [0, -1]], ids=str)
def test_deit_returns_the_same_intermediates_as_the_vit_of_timm(options, indices):
    vit, deit, images = vit_and_deit()
    expected, actual = (model.forward_intermediates(images, indices=indices, **options) for model in (vit, deit))
    torch.testing.assert_close(actual, expected)
    stopped = deit.forward_intermediates(images, indices=[1], stop_early=True, **options)
    torch.testing.assert_close(stopped, vit.forward_intermediates(images, indices=[1], stop_early=True, **options))


@pytest.mark.parametrize("reshape", [False, True])
def test_get_intermediate_layers_of_deit_equals_that_of_the_vit_of_timm(reshape):
    vit, deit, images = vit_and_deit()
    options = {"n": 2, "reshape": reshape, "return_prefix_tokens": True, "norm": True}
    torch.testing.assert_close(deit.get_intermediate_layers(images, **options), vit.get_intermediate_layers(images, **options))
    assert deit.num_prefix_tokens == vit.num_prefix_tokens


@pytest.mark.parametrize("global_pool", ["token", "avg", ""])
def test_deit_pools_like_the_vit_of_timm(global_pool):
    vit, deit, images = vit_and_deit()
    for model in (vit, deit):
        model.reset_classifier(5, global_pool)
    deit.head.load_state_dict(vit.head.state_dict())
    torch.testing.assert_close(deit(images), vit(images))


@pytest.mark.parametrize("global_pool", ["token", "avg", ""])
def test_deit_places_its_norm_like_the_vit_of_timm(global_pool):
    options = {"global_pool": global_pool, "depth": 1, "img_size": 32, "num_classes": 5}
    vit = timm.create_model("vit_tiny_patch16_224", **options).eval()
    deit = timm.create_model("flatten_deit_t", attn_type="S", **options).eval()
    deit.load_state_dict(vit.state_dict())  # strict loading: both models have norm, or both have fc_norm
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(deit(images), vit(images))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_error_for_an_unknown_global_pool_lists_the_choices(name):
    with pytest.raises(ValueError, match=r"global_pool='max': choose one of .*'avg', ''"):
        create_model(name, global_pool="max", device="meta")
    with pytest.raises(ValueError, match="global_pool='max'"):
        create_model(name, device="meta").reset_classifier(3, "max")


# Dropout rates.


@pytest.mark.parametrize("name", FAMILIES)
def test_drop_rate_sets_the_dropout_before_the_classifier(name):
    model = mixed(name, drop_rate=0.5, drop_path_rate=0.0).train()
    images = torch.randn(2, 3, 64, 64)
    features = model.forward_features(images)
    torch.testing.assert_close(model.forward_features(images), features)  # no randomness before the head
    torch.manual_seed(1)
    logits = model.forward_head(features)
    torch.manual_seed(1)
    torch.testing.assert_close(logits, model.head(F.dropout(model.pool(features), 0.5)))
    assert not torch.equal(logits, model.head(model.pool(features)))


RATES = [(name, rate) for name in FAMILIES for rate in ("pos_drop_rate", "proj_drop_rate", "attn_drop_rate")]
# PVTv2 and CSwin do not have the argument ``pos_drop_rate``.
UNSUPPORTED_RATES = [("flatten_pvt_v2_b0", "pos_drop_rate"), ("flatten_cswin_t", "pos_drop_rate")]


@pytest.mark.parametrize(("name", "rate"), RATES)
def test_every_dropout_rate_has_an_effect_only_in_training(name, rate):
    if (name, rate) in UNSUPPORTED_RATES:
        with pytest.raises(TypeError, match=rate):
            create_model(name, **{rate: 0.5})
        return
    model = mixed(name, drop_path_rate=0.0, **{rate: 0.5})
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model.forward_features(images), model.forward_features(images))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rate", [-0.5, 1.5])
def test_a_drop_path_rate_that_is_not_a_probability_is_rejected(name, rate):
    with pytest.raises(ValueError, match=f"drop_path_rate={rate}: give a number from 0 to 1"):
        create_model(name, drop_path_rate=rate, device="meta")


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_dropout_is_rejected_if_all_blocks_are_linear(name):
    linear = {"attn_type": "L" if "deit" in name else "LLLL"}
    with pytest.raises(ValueError, match=r"attn_drop_rate=0\.1 has no effect"):
        create_model(name, attn_drop_rate=0.1, device="meta", **linear)


# Construction on the meta device, dtypes and state dicts.


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_built_on_the_meta_device_equals_its_source_after_loading(name):
    source, images = mixed(name), torch.randn(2, 3, 64, 64)
    expected = source(images)
    assert not list(source.buffers())  # ``to_empty`` would leave them undefined
    copied = mixed(name, device="meta").to_empty(device="cpu")
    state = source.state_dict()
    with torch.no_grad():
        for parameter_name, parameter in copied.named_parameters():
            parameter.copy_(state[parameter_name])
    assert torch.equal(copied(images), expected)

    loaded = mixed(name, device="meta").to_empty(device="cpu")
    loaded.load_state_dict(state)
    assert torch.equal(loaded(images), expected)

    assigned = mixed(name, device="meta")
    assigned.load_state_dict(state, assign=True)
    assert torch.equal(assigned(images), expected)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_model_of_another_dtype_computes_in_that_dtype(name, dtype):
    model = mixed(name, dtype=dtype)
    source = mixed(name)
    source.load_state_dict({entry: value.float() for entry, value in model.state_dict().items()})
    images = torch.randn(2, 3, 64, 64)
    logits = model(images.to(dtype))
    assert logits.dtype == dtype
    error = (logits.float() - source(images)).abs().max() / source(images).abs().max()
    assert error < {torch.float64: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]


@pytest.mark.parametrize("name", FAMILIES)
def test_copied_and_unpickled_models_compute_and_load_like_the_original(name):
    model, images = mixed(name), torch.randn(1, 3, 64, 64)
    for restored in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(restored(images), model(images))
        for parameter in restored.parameters():
            torch.nn.init.zeros_(parameter)
        restored.load_state_dict(model.state_dict())
        assert torch.equal(restored(images), model(images))


# Checkpoints.


def with_unused_entries(name: str, state_dict: dict) -> dict:
    """The state dict with the additional entries that the reference saves but does not use."""
    if "swin_t" in name and "cswin" not in name:
        tables = [entry for entry in state_dict if entry.endswith("relative_position_bias_table")]
        for entry in tables:
            block = entry.removesuffix("attn.relative_position_bias_table")
            state_dict |= {f"{block}attn.relative_position_index": torch.zeros(9, 9), f"{block}attn_mask": torch.zeros(4, 9, 9)}
    if name == "flatten_pvt_t":
        state_dict |= {"norm.weight": torch.ones(512), "norm.bias": torch.zeros(512)}
    return state_dict


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [64, 96])
def test_timm_loads_checkpoints_of_the_reference_at_any_image_size(name, size, tmp_path):
    options = {"num_classes": 5, **one_block_per_stage(name)} | ({"attn_type": "LLLL"} if "deit" not in name else {})
    torch.manual_seed(0)
    source = create_model(name, img_size=64, **options).eval()
    for entry, parameter in source.named_parameters():
        if "positional_encoding" in entry:
            torch.nn.init.normal_(parameter, std=0.2)
    state = with_unused_entries(name, dict(source.state_dict()))
    torch.save({"model": state, "epoch": 3}, tmp_path / "reference.pth")
    images = torch.randn(1, 3, size, size)
    loaded = timm.create_model(name, checkpoint_path=tmp_path / "reference.pth", img_size=size, **options).eval()
    torch.testing.assert_close(loaded(images), source(images), rtol=1e-4, atol=1e-4)
    overlay = {"file": str(tmp_path / "reference.pth"), "num_classes": 5}
    pretrained = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=size, **options).eval()
    torch.testing.assert_close(pretrained(images), source(images), rtol=1e-4, atol=1e-4)


def test_the_checkpoint_filter_drops_the_unused_entries_of_the_reference_and_keeps_unknown_entries():
    swin, pvt = create_model("flatten_swin_t", device="meta"), create_model("flatten_pvt_t", device="meta")
    for model, case in ((swin, "flatten_swin_t"), (pvt, "flatten_pvt_t")):
        model.pretrained_cfg = {"input_size": (3, 224, 224)}
        entries = {entry: torch.empty(shape, device="meta") for entry, shape, _ in reference(case)["state_dict"]}
        assert checkpoint_filter_fn({"model": entries}, model).keys() == model.state_dict().keys()
        assert checkpoint_filter_fn({"state_dict": entries}, model).keys() == model.state_dict().keys()
        assert "stray" in checkpoint_filter_fn({**entries, "stray": torch.zeros(1)}, model)
        with pytest.raises(RuntimeError, match="stray"):
            model.load_state_dict({**entries, "stray": torch.zeros(1)})


def test_the_checkpoint_filter_uses_the_input_size_of_the_pretrained_cfg():
    """The weights of a model for 112 pixels with stripes of 28 x 7 tokens are loaded into a model for 224 pixels."""
    options = {"linear_splits": (7, 3, 3, None), "attn_type": "LLLL", "depths": (1, 1, 1, 1), "num_classes": 5}
    source = timm.create_model("flatten_cswin_t", img_size=112, **options).eval()
    for entry, parameter in source.named_parameters():
        if "positional_encoding" in entry:
            torch.nn.init.normal_(parameter, std=0.2)
    overlay = {"state_dict": source.state_dict(), "input_size": (3, 112, 112), "num_classes": 5}
    model = timm.create_model("flatten_cswin_t", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    table, name = source.stage1[0].attns[0].positional_encoding, "stage1.0.attns.0.positional_encoding"
    expected = F.interpolate(table.view(1, 28, 7, -1).permute(0, 3, 1, 2), size=(56, 7), mode="bicubic")
    torch.testing.assert_close(model.state_dict()[name], expected.permute(0, 2, 3, 1).reshape(1, 56 * 7, -1))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_saved_for_the_hub_loads_from_its_directory(name, tmp_path):
    """timm records the arguments of ``create_model`` and rebuilds the model from them."""
    model, images = mixed(name, img_size=(64, 96), global_pool="avg"), torch.randn(1, 3, 64, 96)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(images), model(images))


def test_models_pruned_to_early_stages_accept_smaller_images():
    """The first stage of PVT needs images of 4 pixels per side, the first two stages need 8, and all four need 32."""
    model = create_model("flatten_pvt_t", img_size=64)
    for num_stages, smallest in ((4, 32), (2, 8), (1, 4)):
        model.prune_intermediate_layers([num_stages - 1])
        assert model.min_img_size == smallest
        (features_map,) = model.forward_intermediates(torch.randn(1, 3, smallest, smallest), 1, intermediates_only=True)
        assert features_map.shape[-2:] == (1, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_pruning_keeps_the_final_norm_unless_its_removal_is_requested_or_the_width_changes(name):
    for prune_norm in (False, True):
        model = mixed(name)
        model.prune_intermediate_layers([-1], **({"prune_norm": True} if prune_norm else {}))
        assert isinstance(model.norm, torch.nn.Identity) == (prune_norm or "pvt" in name)  # PVT and PVTv2 have no final norm
        assert isinstance(model.head, torch.nn.Identity)
    model = mixed(name)
    model.prune_intermediate_layers([0])
    assert isinstance(model.norm, torch.nn.Identity) == ("deit" not in name)  # all blocks of DeiT have the same width


def test_nested_models_load_only_their_own_entries():
    """The load_state_dict hooks of a model change only the entries of that model."""
    source = torch.nn.ModuleDict({"backbone": mixed("flatten_pvt_t"), "norm": torch.nn.LayerNorm(3)})
    target = copy.deepcopy(source)
    for parameter in target.parameters():
        torch.nn.init.zeros_(parameter)
    target.load_state_dict(source.state_dict() | {"backbone.norm.weight": torch.ones(512)})
    assert torch.equal(target["norm"].weight, source["norm"].weight)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(target["backbone"](images), source["backbone"](images))


@pytest.mark.parametrize("source", ["file", "state_dict"])
@pytest.mark.parametrize("features_only", [False, True])
def test_weights_from_a_checkpoint_of_a_run_are_resized_from_the_image_size_of_its_config(tmp_path, source, features_only):
    """Maps of 64 x 128 and 128 x 64 pixels have as many tokens. The config determines the layout of the tables."""
    options = {"num_classes": 3, "dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "attn_type": "LL"}
    options |= {"mlp_ratios": (2, 2), "linear_reductions": (1, 1)}
    trained = timm.create_model("flatten_pvt_t", img_size=(64, 128), **options).eval()
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    checkpoint = {"model": dict(trained.state_dict()), "config": {"DATA": {"IMG_SIZE": [64, 128]}}}
    torch.save(checkpoint, tmp_path / "best.pth")
    overlay = {source: str(tmp_path / "best.pth") if source == "file" else checkpoint, "num_classes": 3}
    loading = {"pretrained": True, "pretrained_cfg_overlay": overlay, "features_only": features_only}
    model = timm.create_model("flatten_pvt_t", img_size=(128, 64), **options, **loading).eval()
    images = torch.randn(2, 3, 128, 64)
    expected = trained.forward_intermediates(images, intermediates_only=True) if features_only else trained(images)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


# Models built from a config.


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        ([], {"crop_mode": "squash", "crop_pct": 0.875, "interpolation": "bicubic", "input_size": (3, 224, 224)}),
        (["TEST.CROP", False], {"crop_mode": "squash", "crop_pct": 1.0}),
        (["TEST.CROP_MODE", "none"], {"crop_mode": "squash", "crop_pct": 1.0}),
        (["TEST.CROP_MODE", "short", "TEST.CROP_PCT", 0.9], {"crop_mode": "center", "crop_pct": 0.9}),
        (["TEST.INTERPOLATION", "bilinear"], {"interpolation": "bilinear"}),
        (["DATA.INTERPOLATION", "random"], {"interpolation": "bilinear"}),
        (["DATA.MEAN", "[0.5,0.5,0.5]", "DATA.STD", "[0.1,0.2,0.3]"], {"mean": (0.5,) * 3, "std": (0.1, 0.2, 0.3)}),
        (["DATA.IMG_SIZE", "[160,320]"], {"input_size": (3, 160, 320)}),
    ],
    ids=str,
)
def test_a_model_built_from_a_config_has_the_evaluation_transform_of_the_config(opts, expected):
    with torch.device("meta"):
        model = build_model(load_config(CONFIGS / "flatten_pvt_v2_b0.yaml", opts))
    data = timm.data.resolve_model_data_config(model)
    assert {key: data[key] for key in expected} == expected


# Released checkpoints.


@pytest.fixture
def released_file(tmp_path, monkeypatch):
    """Replace the download with a local file. Return the model saved in it, and the list of requests (URL and name)."""
    torch.manual_seed(0)
    source = create_model("flatten_pvt_t").eval()
    path = tmp_path / "released.pth"
    state = with_unused_entries("flatten_pvt_t", dict(source.state_dict()))
    torch.save({"model": state, "epoch": 299, "config": CfgNode({"MODEL": CfgNode({"TYPE": "flatten_pvt_tiny"})})}, path)
    requested = []

    def fetch(url: str, name: str):
        requested.append((url, name))
        return path

    monkeypatch.setattr(entrypoints, "fetch", fetch)
    return source, requested


def test_pretrained_models_load_the_released_file(released_file, tmp_path):
    source, requested = released_file
    with pytest.raises(RuntimeError, match="non-allowlisted"):  # timm alone cannot read the file
        timm.models.load_state_dict(tmp_path / "released.pth")
    images = torch.randn(1, 3, 64, 64)
    for name in ("flatten_pvt_t", "flatten_pvt_t.in1k"):
        model = timm.create_model(name, pretrained=True).eval()
        assert torch.equal(model(images), source(images))
        assert "state_dict" not in model.pretrained_cfg
    assert requested == [(RELEASED["flatten_pvt_t"].url, "flatten_pvt_t")] * 2


def test_pretrained_models_adapt_to_classes_channels_and_size(released_file):
    source, _ = released_file
    model = timm.create_model("flatten_pvt_t", pretrained=True, num_classes=7, in_chans=1, img_size=96).eval()
    red, green, blue = source.patch_embed1.proj.weight.unbind(1)
    # timm sums the weights of the RGB channels for one input channel.
    torch.testing.assert_close(model.patch_embed1.proj.weight[:, 0], red + green + blue)
    images = torch.randn(1, 1, 96, 96)
    features = source.forward_features(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(model.forward_features(images), features, rtol=1e-4, atol=1e-4)
    assert model(images).shape == (1, 7)


def test_pretrained_feature_extractors_keep_no_state_dict(released_file):
    source, _ = released_file
    features = timm.create_model("flatten_pvt_t", pretrained=True, features_only=True).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(features(images)[-1], source.forward_intermediates(images, intermediates_only=True)[-1])
    assert not any("state_dict" in getattr(module, "pretrained_cfg", {}) for module in features.modules())


@pytest.mark.parametrize("key", ["file", "state_dict"])
def test_a_file_or_state_dict_in_the_pretrained_cfg_replaces_the_download(released_file, tmp_path, key):
    source, requested = released_file
    torch.save(source.state_dict(), tmp_path / "own.pth")
    value = source.state_dict() if key == "state_dict" else str(tmp_path / "own.pth")
    model = timm.create_model("flatten_pvt_t", pretrained=True, pretrained_cfg_overlay={key: value}).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(images), source(images))
    assert requested == []


def test_a_model_without_a_released_file_raises_the_error_of_timm(released_file):
    with pytest.raises(RuntimeError, match="No pretrained weights exist for flatten_deit_t"):
        timm.create_model("flatten_deit_t", pretrained=True)
    assert released_file[1] == []


def test_accuracies_of_released_checkpoints_equal_those_in_the_readme_of_the_reference():
    assert {name: checkpoint.acc1 for name, checkpoint in RELEASED.items()} == {
        "flatten_pvt_t": 77.758,
        "flatten_pvt_v2_b0": 71.098,
        "flatten_swin_t": 82.106,
        "flatten_swin_s": 83.5,
        "flatten_swin_b": 83.8,
        "flatten_swin_b_384": 85.0,
        "flatten_cswin_t": 83.130,
    }
    assert released("flatten_swin_b_384").img_size == 384
    assert {name.split(".")[0] for name in list_pretrained("flatten_*")} == set(RELEASED)
    with pytest.raises(ValueError, match=r"'flatten_deit_t' has no published weights; .*flatten_cswin_t, flatten_pvt_t"):
        released("flatten_deit_t")
