"""Properties of every registered model, or of one model per family."""

import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torchvision.ops import FeaturePyramidNetwork

from engine.optim import build_optimizer
from models import build_model, create_model, list_models, nearest_model
from models.cswin import CSwinTransformer, StripedAttention, stripe_size
from models.linear_attention import ATTENTION_KINDS
from models.plain_attention import focus
from scripts.complexity import PAPER, measure
from tests.conftest import CONFIGS, seeded_image
from tests.models.tiny import tiny, tiny_images
from tests.runs import load_weights
from utils.config.loading import load_config

ROOT = Path(__file__).parent.parent.parent
FAMILIES = ["flatten_swin_t", "flatten_pvt_t", "flatten_pvt_v2_b0", "flatten_cswin_t", "flatten_deit_t"]
HIERARCHICAL = [name for name in FAMILIES if "deit" not in name]


def randomise(model):
    """Randomise position tables and scales: most of them are initialised with zeros, which would hide errors."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "positional_encoding" in name or name.endswith((".scale", "bias_table")):
                parameter.normal_(std=0.2)
    return model


def small(name, **options):
    """A model with one block per stage, or two blocks in DeiT, and random values in its tables."""
    depths = {"depth": 2} if "deit" in name else {"depths": (1, 1, 1, 1)}
    torch.manual_seed(0)
    return randomise(create_model(name, **{"num_classes": 5, "img_size": 64, **depths, **options})).eval()


def with_slow_sizes(names):
    """The smallest model of every family by default; all models with ``-m slow``."""
    return [pytest.param(name, marks=() if name in FAMILIES else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", with_slow_sizes(list_models()))
def test_every_parameter_of_every_model_gets_a_gradient(name):
    model = create_model(name, num_classes=3, drop_path_rate=0.0)
    # A small size suffices, because the set of parameters that get a gradient does not depend on the size.
    model(torch.randn(2, 3, 32, 64)).square().sum().backward()
    gradients = {entry: parameter.grad for entry, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    # DeiT's logits depend only on the class token, which the convolution of patch tokens in the last block does not affect.
    without_gradient = {entry for entry, gradient in gradients.items() if not gradient.any()}
    assert without_gradient == ({"blocks.11.attn.dwc.weight", "blocks.11.attn.dwc.bias"} if "deit" in name else set())


@pytest.mark.parametrize("name", PAPER)
def test_numbers_of_parameters_match_the_paper(name):
    num_parameters = sum(parameter.numel() for parameter in create_model(name, device="meta").parameters())
    millions, _ = PAPER[name]
    # The paper gives some numbers of parameters in whole millions.
    assert num_parameters / 1e6 == pytest.approx(millions, abs=0.1 if isinstance(millions, float) else 0.6)


@pytest.mark.parametrize("name", with_slow_sizes(PAPER))
def test_multiply_adds_match_the_paper(name):
    _, billions = PAPER[name]
    assert measure(name)[1] / 1e9 == pytest.approx(billions, rel=0.02, abs=0.05)


def test_deit_tiny_has_the_hand_computed_number_of_parameters():
    """The original DeiT-T has 5,717,416 parameters.

    Linear attention adds to each of the 12 blocks 192 scales, a positional encoding of 197 x 192 values, and 64
    convolution filters, each with 25 weights and one bias.
    """
    assert measure("flatten_deit_t")[0] == 5_717_416 + 12 * (192 + 197 * 192 + 64 * 26)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_state_dict_loads_with_identical_logits(name, tmp_path):
    source, loaded = small(name), small(name)
    for parameter in loaded.parameters():
        torch.nn.init.zeros_(parameter)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    report = load_weights(loaded, tmp_path / "weights.pth")
    assert report.missing == report.unused == report.resized == report.reinitialised == []
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(images), source(images))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(name):
    gradients = []
    for enable in (False, True):
        model = small(name).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        model(seeded_image(0, (2, 3, 64, 64))).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_and_exported_models_equal_the_model_up_to_rounding(name):
    model, images = tiny(name, softmax=True), tiny_images()
    expected = model(images)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(run(images).square().sum(), list(model.parameters())) for run in (model, compiled)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(exported(images), expected, rtol=1e-4, atol=1e-5)
    larger_batch = tiny_images(5)
    torch.testing.assert_close(exported(larger_batch), model(larger_batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_and_evaluation_compile_to_one_graph_each(name):
    """Training and evaluation alternate twice, with two forward and backward passes per training phase."""
    model, graphs = tiny(name, softmax=True, drop_path_rate=0.2), []

    def record(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=record, fullgraph=True)
    for _ in range(2):
        compiled.train()
        for _ in range(2):
            compiled(tiny_images()).square().sum().backward()
        compiled.eval()
        with torch.no_grad():
            compiled(tiny_images())
    assert len(graphs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_every_model_can_be_exported(name):
    native_size = 384 if name.endswith("_384") else 224
    model, images = randomise(create_model(name)).eval(), torch.randn(1, 3, native_size, native_size)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), model(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_every_parameter_gets_a_gradient_with_every_kind_of_attention(kind):
    model = create_model("flatten_deit_t", num_classes=3, img_size=64, depth=2, drop_path_rate=0.0, linear={"kind": kind})
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_wrong_arguments_and_images_are_rejected_with_the_argument_and_the_value():
    for size in ("64", (64,), 64.5):
        with pytest.raises(ValueError, match=re.escape(f"img_size={size!r}: give an integer, or (height, width)")):
            create_model("flatten_swin_t", img_size=size, device="meta")
    for num_classes in (-1, 1.5, "10"):
        with pytest.raises(ValueError, match=f"num_classes={num_classes!r}: give the number of classes"):
            create_model("flatten_deit_t", num_classes=num_classes, device="meta")
    model = create_model("flatten_pvt_v2_b0", img_size=64, depths=(1, 1, 1, 1))
    for call in (model, model.forward_intermediates):
        with pytest.raises(ValueError, match=r"shape \(3, 64, 64\).*images\.unsqueeze\(0\)"):
            call(torch.zeros(3, 64, 64))


def test_the_nearest_model_of_a_state_dict_is_found_by_names_and_shapes():
    state_dict = create_model("flatten_swin_s", num_classes=3, device="meta").state_dict()
    assert nearest_model(state_dict) == "flatten_swin_s"
    assert nearest_model({f"module.{entry}": value for entry, value in state_dict.items()}) == ""


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_a_feature_pyramid_is_trainable_on_the_maps_of_the_four_stages(name):
    features = timm.create_model(name, features_only=True, depths=(1, 1, 1, 1))
    channels, reductions = features.feature_info.channels(), features.feature_info.reduction()
    assert reductions == [4, 8, 16, 32]
    maps = features(torch.randn(1, 3, 128, 160))
    assert [tuple(m.shape) for m in maps] == [(1, c, 128 // r, 160 // r) for c, r in zip(channels, reductions, strict=True)]
    pyramid = FeaturePyramidNetwork(channels, 32)(dict(zip("abcd", maps, strict=True)))
    sum(m.square().mean() for m in pyramid.values()).backward()
    assert [name for name, parameter in features.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_feature_extractors_of_early_stages_have_no_unused_parameter(name):
    depths = {"depth": 3} if "deit" in name else {"depths": (1, 1, 1, 1)}
    features = timm.create_model(name, features_only=True, out_indices=(0, 1), img_size=64, **depths)
    sum(m.square().mean() for m in features(torch.randn(1, 3, 64, 64))).backward()
    assert [name for name, parameter in features.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_group_matcher_numbers_layers_in_the_order_of_execution(name):
    from timm.models import group_parameters

    model = create_model(name, device="meta").eval()
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    executed = []
    for prefix, module in model.named_modules():
        if prefix:
            names = [f"{prefix}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
            module.register_forward_pre_hook(lambda module, args, names=names: executed.extend(names))
    model(torch.empty(1, 3, 224, 224, device="meta"))
    order = [layers[parameter] for parameter in executed]
    assert order == sorted(order)
    assert order[0] == min(layers.values()) == 0
    assert {parameter for parameter in layers if layers[parameter] == max(order)} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", FAMILIES)
def test_coarse_groups_of_group_matcher_are_the_stem_the_stages_and_the_head(name):
    from timm.models import group_parameters

    model = create_model(name, device="meta")
    layers = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    num_stages = 12 if "deit" in name else 4
    assert set(layers.values()) == set(range(1 + num_stages + 1))
    per_stage = {index: [name for name in layers if layers[name] == index] for index in range(1, num_stages + 1)}
    for index, info in enumerate(model.feature_info, start=1):
        assert any(name.startswith(info["module"]) for name in per_stage[index])


@pytest.mark.parametrize("name", FAMILIES)
def test_inference_frees_the_maps_of_earlier_stages(name):
    """When the last block runs, the outputs of at most two other blocks or stages are still in memory."""
    model = small(name)
    outputs, alive = [], []
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(lambda module, args, out: outputs.append(weakref.ref(out)))
    last = model.stage_blocks()[-1][-1]
    last.register_forward_pre_hook(lambda module, args: alive.extend(ref() is not None for ref in outputs))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert len(outputs) == len(model.feature_info)
    assert sum(alive) <= 2


def test_a_model_without_a_head_switches_between_training_and_evaluation_mode():
    model = small("flatten_swin_t")
    model.head = None
    assert model.train().training
    assert not model.eval().norm.training


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_decay_gives_every_parameter_the_same_learning_rate_and_weight_decay_as_timm(name):
    cfg = load_config(CONFIGS / f"{name}.yaml", ["TRAIN.LAYER_DECAY", 0.7])
    with torch.device("meta"):
        model = create_model(name)
    expected = param_groups_layer_decay(model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.7)
    theirs = {id(p): (group["lr_scale"], group["weight_decay"]) for group in expected for p in group["params"]}
    groups = build_optimizer(cfg, model).param_groups
    ours = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert ours.keys() == theirs.keys()
    for key, values in ours.items():
        assert values == pytest.approx(theirs[key])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_linear_probe_trains_only_the_head_and_disables_dropout_and_drop_path_in_the_backbone(name):
    torch.manual_seed(0)
    model = small(name, num_classes=3, drop_path_rate=0.5, proj_drop_rate=0.5)
    model.freeze_features()
    cfg = load_config(CONFIGS / f"{name}.yaml", ["TRAIN.FREEZE_BACKBONE", True, "TRAIN.HEAD_LR_SCALE", 3.0])
    optimizer = build_optimizer(cfg, model.train())
    assert [(group["lr_scale"], len(group["params"])) for group in optimizer.param_groups] == [(3.0, 1), (3.0, 1)]
    assert model.training
    assert model.head.training
    before = {entry: value.clone() for entry, value in model.state_dict().items()}
    images = torch.randn(2, 3, 64, 64)
    first = model(images)
    assert torch.equal(model(images), first)  # no drop path, no dropout
    first.square().sum().backward()
    optimizer.step()
    changed = {entry for entry, value in model.state_dict().items() if not torch.equal(value, before[entry])}
    assert changed == {"head.weight", "head.bias"}
    assert torch.equal(model.eval()(images), model.train()(images))


@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_number_of_input_channels_is_an_argument(name, in_chans):
    assert small(name, in_chans=in_chans)(torch.randn(1, in_chans, 64, 64)).shape == (1, 5)


def convolve(maps, filters):
    return F.conv2d(maps, filters.weight, filters.bias, padding=filters.weight.shape[-1] // 2, groups=maps.shape[1])


def naive_stripes(attention, q, k, v, window):
    """Compute attention, rank restoration and CSwin's positional encoding (LePE) per stripe, from real tokens (no padding)."""
    out = torch.zeros_like(q)
    height, width = q.shape[1:3]
    num_heads, head_dim = attention.num_heads, q.shape[-1] // attention.num_heads
    for top in range(0, height, window[0]):
        for left in range(0, width, window[1]):
            box = (slice(None), slice(top, top + window[0]), slice(left, left + window[1]))
            grid = tuple(q[box].shape[1:3])
            queries, keys, values = (t[box].flatten(1, 2) for t in (q, k, v))
            maps = v[box].permute(0, 3, 1, 2)
            if hasattr(attention, "positional_encoding"):
                keys = keys + attention.positional_encoding.unflatten(1, attention.grid)[:, : grid[0], : grid[1]].flatten(1, 2)
            queries, keys, values = (t.unflatten(-1, (num_heads, head_dim)).transpose(1, 2) for t in (queries, keys, values))
            if hasattr(attention, "positional_encoding"):
                queries, keys = (t.transpose(1, 2).flatten(2) for t in (queries, keys))
                scale = F.softplus(attention.scale)
                queries, keys = (focus((F.relu(t) + 1e-6) / scale, 3) for t in (queries, keys))
                queries, keys = (t.unflatten(-1, (num_heads, head_dim)).transpose(1, 2) for t in (queries, keys))
                similarity = queries @ keys.transpose(-2, -1)
                attended = similarity @ values / (similarity.sum(dim=-1, keepdim=True) + 1e-6 * similarity.shape[-1])
                heads = maps.unflatten(1, (num_heads, head_dim)).flatten(0, 1)
                restored = convolve(heads, attention.dwc).unflatten(0, (-1, num_heads)).flatten(1, 2).permute(0, 2, 3, 1)
            else:
                attended = (queries @ keys.transpose(-2, -1) / head_dim**0.5).softmax(dim=-1) @ values
                restored = 0
            lepe = convolve(maps, attention.get_v).permute(0, 2, 3, 1)
            out[box] = attended.transpose(1, 2).flatten(2).unflatten(1, grid) + restored + lepe
    return out


@pytest.mark.parametrize("attn_type", ["L", "S"])
@pytest.mark.parametrize("side", [12, 10], ids=["divisible", "padded"])
def test_cswin_stripe_attention_equals_a_loop_over_stripes_without_padding(attn_type, side):
    model = randomise(
        CSwinTransformer(
            img_size=48,
            embed_dim=16,
            depths=(1, 1),
            num_heads=(2, 4),
            attn_type=attn_type * 2,
            linear_splits=(3, None),
            softmax_splits=(3, 3),
        )
    )
    generator = torch.Generator().manual_seed(0)
    for attention, window in zip(model.stage1[0].attns, ((side, 3), (3, side)), strict=True):
        q, k, v = (torch.randn(2, side, side, 8, generator=generator) for _ in range(3))
        if attn_type == "L":  # crop the positional encoding of the stripe from 12 to ``side`` tokens
            attention.grid = attention.key_grid = tuple(min(s, side) for s in attention.grid)
            table = attention.positional_encoding.data.unflatten(1, (12, 3) if window[1] == 3 else (3, 12))
            attention.positional_encoding.data = table[:, :side, :side].flatten(1, 2).contiguous()
            attention.grid = attention.key_grid = tuple(table[:, :side, :side].shape[1:3])
        with torch.no_grad():
            torch.testing.assert_close(attention(q, k, v), naive_stripes(attention, q, k, v, window), rtol=1e-4, atol=1e-5)


def test_blocks_of_the_last_cswin_stage_attend_over_the_whole_map_for_any_stripe_width():
    """As in the paper's code, each block has one attention over all channels, with a table of 7 x 7 positions."""
    opts = ["MODEL.LA.ATTN_TYPE", "LLLL", "MODEL.LA.CSWIN_LA_SPLIT_SIZE", "7-7-7-1"]
    with torch.device("meta"):
        model = build_model(load_config(CONFIGS / "flatten_cswin_t.yaml", opts))
    tables = {entry: value.shape for entry, value in model.state_dict().items() if entry.endswith("positional_encoding")}
    assert {entry: shape for entry, shape in tables.items() if entry.startswith("stage4")} == {
        "stage4.0.attns.0.positional_encoding": (1, 49, 512)
    }
    assert tables["stage3.0.attns.1.positional_encoding"] == (1, 7 * 14, 128)


def test_the_example_replaces_the_attention_of_a_timm_model():
    command = [sys.executable, "examples/vit_with_linear_attention.py"]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "[2, 10]" in completed.stdout


@pytest.mark.parametrize("name", ["flatten_swin_t", "flatten_cswin_t"])
def test_models_with_cached_masks_train_after_fake_tensor_tracing_and_inference_mode(name):
    # Masks are cached at their first use. Fake tensors must not be cached, nor inference tensors, which autograd cannot save.
    torch.manual_seed(0)
    model = create_model(name, depths=(2, 2, 2, 2)).eval()
    images = torch.randn(1, 3, 96, 160)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert isinstance(model(mode.from_tensor(images)), FakeTensor)
    with torch.inference_mode():
        expected = model(images)
    out = model(images)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["flatten_pvt_t", "flatten_pvt_v2_b1"])
def test_pvt_reduces_keys_by_factors_8_4_2_1_in_softmax_blocks_and_by_given_factors_in_linear_blocks(name):
    softmax = create_model(name, attn_type="SSSS", device="meta")
    linear = create_model(name, attn_type="LLLL", linear_reductions=(4, 2, 1, 1), device="meta")
    assert [next(iter(blocks)).attn.reduction for blocks in softmax.stage_blocks()] == [8, 4, 2, 1]
    assert [next(iter(blocks)).attn.reduction for blocks in linear.stage_blocks()] == [4, 2, 1, 1]


def test_the_class_token_of_deit_is_first_at_every_image_size():
    """The first input token of the first block is cls_token + pos_embed[0] for every image and size."""
    model = create_model("flatten_deit_t", img_size=64)
    captured = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    with torch.no_grad():
        for size in (64, 96):
            model(torch.randn(1, 3, size, size))
            torch.testing.assert_close(captured[-1][0, 0], model.cls_token[0, 0] + model.pos_embed[0, 0])
            assert captured[-1].shape[1] == 1 + (size // 16) ** 2


def test_deit_exempts_class_token_and_position_table_from_weight_decay():
    exempt = create_model("flatten_deit_t", device="meta").no_weight_decay()
    assert {"cls_token", "pos_embed", "norm.weight", "blocks.0.attn.qkv.bias"} <= exempt
    assert not {"blocks.0.attn.qkv.weight", "head.weight"} & exempt


@pytest.mark.parametrize("name", FAMILIES)
def test_linear_layers_and_norms_are_initialised_alike_in_every_family(name):
    """Linear weights have a standard deviation of 0.02; biases are 0, and norm weights are 1."""
    torch.manual_seed(0)
    for module_name, module in create_model(name).named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), module_name
            assert module.bias is None or not module.bias.any(), module_name
        if isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all(), module_name
            assert not module.bias.any(), module_name


@pytest.mark.parametrize(("name", "largest"), [("flatten_cswin_t", 7), ("flatten_cswin_b_384", 12)])
def test_softmax_stripes_of_cswin_have_the_widths_of_the_cswin_paper(name, largest):
    """In the last stage, a stripe is the whole map: 7 x 7 tokens at 224 pixels, and 12 x 12 at 384."""
    model = create_model(name, attn_type="SSSS", device="meta")
    widths = []
    native_size = 384 if name.endswith("_384") else 224
    for blocks, grid in zip(model.stage_blocks(), model.native_grids(native_size), strict=True):
        stripes = [module for module in next(iter(blocks)).modules() if isinstance(module, StripedAttention)]
        widths.append({min(stripe_size(grid, stripe.axis, stripe.width)) for stripe in stripes})
    assert widths == [{1}, {2}, {largest}, {largest}]


@pytest.mark.parametrize("name", ["flatten_swin_t", "flatten_pvt_t", "flatten_pvt_v2_b1", "flatten_cswin_t", "flatten_deit_t"])
def test_default_arguments_of_a_backbone_class_give_the_parameter_shapes_of_a_registered_model(name):
    model = create_model(name, device="meta")
    default = type(model)(device="meta")
    assert [(key, value.shape) for key, value in default.state_dict().items()] == [
        (key, value.shape) for key, value in model.state_dict().items()
    ]


def test_models_that_the_paper_omits_have_the_size_of_the_original_models():
    """The stages of PVTv2-B5 have 3, 6, 40 and 3 blocks; DeiT-S and DeiT-B have 12 blocks of 384 and 768 channels."""
    pvt = create_model("flatten_pvt_v2_b5", device="meta")
    assert [len(list(blocks)) for blocks in pvt.stage_blocks()] == [3, 6, 40, 3]
    hidden_dims = [{block.mlp.fc1.out_features for block in blocks} for blocks in pvt.stage_blocks()]
    assert hidden_dims == [{4 * 64}, {4 * 128}, {4 * 320}, {4 * 512}]
    for name, channels in (("flatten_deit_s", 384), ("flatten_deit_b", 768)):
        deit = create_model(name, device="meta")
        assert (len(deit.blocks), deit.num_features) == (12, channels)
