"""Measures of a model's attention, computed on a set of images, and scripts/analyze_focus.py, which writes them."""

import csv
import json

import pytest
import torch

import scripts.analyze_focus
from analysis.maps import capture
from analysis.measures import entropy
from analysis.summary import MEASURES, OWN, WITH_CONVOLUTION, evenly_spaced, matrices, mean_over_heads, report, summarise
from models.deit import DeiT
from models.swin import SwinTransformer
from tests.analysis.test_maps import SMALL_DEIT, SMALL_SWIN, randomise
from tests.launch import run_script


@pytest.mark.parametrize("randomised", [False, True], ids=["initial parameters", "random parameters"])
def test_the_rank_of_linear_attention_exceeds_the_head_dimension_only_with_the_convolution(randomised):
    model = SwinTransformer(img_size=48, attn_type="LL", **SMALL_SWIN).double().eval()
    if randomised:
        model = randomise(model)
    rows = summarise(model, [torch.randn(3, 48, 48).double() for _ in range(2)])
    for row in rows:
        if row.form == OWN:
            assert max(row.values["rank"]) <= row.head_dim
        if row.form == WITH_CONVOLUTION:
            assert min(row.values["rank"]) > row.head_dim


def test_measures_are_means_over_queries_with_one_value_per_image():
    model = DeiT(img_size=32, attn_type="M1", **SMALL_DEIT).eval()
    images = [torch.randn(3, 32, 32) for _ in range(2)]
    rows = summarise(model, images)
    with torch.no_grad(), capture(model) as attentions:
        model(images[0].unsqueeze(0))
    for attention in attentions:
        expected = entropy(attention.matrix()[0, :, 1:, 1:]).mean(dim=-1)
        for head in range(2):
            (row,) = [r for r in rows if (r.block, r.form, r.head) == (attention.name, OWN, head)]
            assert row.values["entropy"][0] == pytest.approx(expected[head].item(), abs=1e-5)
            assert len(row.values["entropy"]) == 2
        weights = attention.matrix()[0, :, 1:, 1:]  # without the class token, rows sum to less than 1: normalise again
        weights = (weights / weights.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True).values
        (row,) = [r for r in rows if (r.block, r.form, r.head) == (attention.name, OWN, 1)]
        assert (row.head_dim, row.num_keys) == (attention.q.shape[3], weights.shape[2])
        for measure, num_largest in (("top 1 %", 1), ("top 5 %", 1), ("top 10 %", 2)):  # there are 16 keys
            assert row.values[measure][0] == pytest.approx(weights[1, :, :num_largest].sum(dim=-1).mean().item(), abs=1e-5)
    softmax_rows = [row for row in rows if row.block == "blocks.1.attn"]
    assert {row.form for row in softmax_rows} == {OWN, "softmax", "linear", "focused", "efficient"}
    assert mean_over_heads(rows, "blocks.1.attn", WITH_CONVOLUTION, "gini") is None
    own, softmax = (mean_over_heads(rows, "blocks.1.attn", form, "entropy") for form in (OWN, "softmax"))
    assert own == pytest.approx(softmax, abs=1e-5)  # without masks and biases, the block's attention is plain softmax


def test_the_share_of_the_convolution_in_the_weights_is_zero_without_the_convolution():
    model = SwinTransformer(img_size=32, attn_type="LL", **SMALL_SWIN).eval()
    rows = summarise(model, [torch.randn(3, 32, 32)], ["layers.0.blocks.0.attn"])
    assert {row.block for row in rows} == {"layers.0.blocks.0.attn"}
    shares = {row.form: row.mean("convolution share") for row in rows}
    assert shares[OWN] == 0
    assert 0 < shares[WITH_CONVOLUTION] < 1


def test_at_most_784_evenly_spaced_positions_are_sampled():
    assert evenly_spaced(5).tolist() == [0, 1, 2, 3, 4]
    assert len(evenly_spaced(3136)) == 784
    assert evenly_spaced(3136)[-1] == 3135


def test_the_measured_matrices_exclude_the_class_token():
    model = DeiT(img_size=32, attn_type="L", **SMALL_DEIT).eval()
    with torch.no_grad(), capture(model) as attentions:
        model(torch.randn(1, 3, 32, 32))
    assert {matrix.shape for matrix in matrices(attentions[0]).values()} == {(1, 2, 16, 16)}


def test_analyze_focus_writes_tables_plots_and_a_report(trained, toy_data, tmp_path):
    arguments = ["--resume", trained, "--images", toy_data / "val", "--every", 11, "--output", tmp_path]
    outcome = run_script(scripts.analyze_focus, arguments, tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    content = json.loads((tmp_path / "focus.json").read_text())
    assert content["images"].startswith("3 from")
    assert all(len(row["values"]["entropy"]) == 3 for row in content["rows"])
    with open(tmp_path / "focus.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(content["rows"])
    assert float(lines[0]["entropy"]) == pytest.approx(sum(content["rows"][0]["values"]["entropy"]) / 3, rel=1e-4)
    text = (tmp_path / "report.md").read_text()
    assert all(f"## {name}" in text for name in MEASURES)
    assert "toy" in text
    for name in ("measures.png", "ranks.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_every_table_of_the_report_has_a_row_per_block():
    model = SwinTransformer(img_size=32, attn_type="LS", **SMALL_SWIN).eval()
    text = report(summarise(model, [torch.randn(3, 32, 32)]), {"model": "small"})
    assert text.count("| `layers.0.blocks.0.attn` | linear |") == len(MEASURES)
    assert text.count("| `layers.1.blocks.1.attn` | softmax |") == len(MEASURES)
