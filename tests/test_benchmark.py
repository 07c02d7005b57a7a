"""Benchmarks: counts of memory traffic and peak memory, the naive implementation, and runs of scripts/benchmark.py."""

import json

import pytest
import torch
from torch import nn

import scripts.benchmark
from benchmarks.counting import MemoryCounter, TrafficCounter
from benchmarks.naive import use_naive_attention
from benchmarks.networks import PEERS, count_step_traffic, create_variants
from benchmarks.operator import KERNELS, NAIVE, OURS, count_traffic
from benchmarks.timing import speedup
from models import create_model
from tests.launch import run_script

BYTES_PER_FLOAT = 4  # bytes of a float32 element


def write_arms(path):
    """Write an ablation file with two arms that have the same number of tokens."""
    arms = "{linear: {}, softmax: {MODEL.LA.ATTN_TYPE: S}}"
    options = "{DATA.BATCH_SIZE: 2, MODEL.DEIT.DEPTH: 1, MODEL.DEIT.PATCH_SIZE: 2}"
    path.write_text(
        f"cfg: [configs/flatten_deit_cifar10.yaml]\nopts: {options}\nseeds: [0, 1]\nbaseline: softmax\narms: {arms}\n"
    )
    return path


def test_every_benchmark_mode_writes_records_and_two_modes_write_a_figure(toy_config, toy_data, tmp_path):
    # First in this file: after a backward pass on the meta device, torch refuses backward passes in forked processes.
    common = ["--rounds", 1, "--json", tmp_path / "records.json"]
    runs = {
        "attention": ["--tokens", 49, 64, "--dim", 8, "--heads", 2, "--batch-size", 1, "--png", tmp_path / "attention.png"],
        "model": ["flatten_deit_t", "--img-size", 32, "--batch-size", 1, "--png", tmp_path / "model.png"],
        "traffic": ["flatten_deit_t", "--img-size", 32, "--batch-size", 1],
        "data": ["--images", toy_data / "val/class0", "--workers", 1],
        "arms": [write_arms(tmp_path / "arms.yaml")],
        "epoch": ["--cfg", toy_config, "--data-path", toy_data, "--updates", 2],
    }
    for mode, arguments in runs.items():
        outcome = run_script(scripts.benchmark, [mode, *arguments, *common], tmp_path / "log")
        assert outcome.exit_codes == [0], outcome.output
        content = json.loads((tmp_path / "records.json").read_text())
        assert content["torch"] == torch.__version__
        assert content["records"]
        for record in content["records"]:
            assert all(value > 0 for value in record.values() if isinstance(value, float))
        if mode == "arms":
            check_arms(content["records"])
    for mode in ("attention", "model"):
        assert (tmp_path / f"{mode}.png").read_bytes().startswith(b"\x89PNG")


def check_arms(records):
    """Check tokens and memory of the arms of ``write_arms``: 16 x 16 patches, and two heads."""
    linear, softmax, stored = records
    assert [record["arm"] for record in records] == ["linear", "softmax", "softmax, matrix stored"]
    assert {record["tokens"] for record in records} == {256}
    # The linear arm has 257 positional encodings, a scale, and a convolution of 5 x 5 with a bias.
    assert linear["parameters"] - softmax["parameters"] == 257 * 64 + 64 + 32 * 26
    matrix_mib = 2 * 257**2 * BYTES_PER_FLOAT / 2**20
    assert stored["peak_memory_mib_per_image"] - softmax["peak_memory_mib_per_image"] > 0.9 * matrix_mib


def test_memory_traffic_counts_the_bytes_that_kernels_read_and_write():
    x, row = torch.ones(10, 6), torch.ones(6)
    out = torch.empty(10, 6)
    with TrafficCounter() as counter:
        y = x + row  # reads 60 and 6 elements, writes 60
        y.t().view(6, 2, 5)  # views move no bytes
        torch.empty_like(y)
        y += row  # reads 60 and 6, writes 60
        torch.mul(x, row.expand(10, 6), out=out)  # reads 60 and the 6 stored elements of the row, writes 60
        out.copy_(y)  # reads 60, writes 60
        y.square()  # reads 60, writes 60
    assert counter.num_kernels == 5
    assert (counter.bytes_read, counter.bytes_written) == (BYTES_PER_FLOAT * (66 + 66 + 66 + 60 + 60), BYTES_PER_FLOAT * 5 * 60)


def test_peak_memory_counts_the_tensors_alive_at_the_same_time():
    x = torch.ones(100)
    with MemoryCounter() as counter:
        y = x + 1
        z = y + 1
        del y
        z = z + 1
        view = z[:10]  # keeps the memory of z alive
        del z
        w = view + 1
    assert counter.peak == 2 * 100 * BYTES_PER_FLOAT
    assert counter.current == (100 + 10) * BYTES_PER_FLOAT
    del w


def test_speedup_is_computed_per_round():
    ratio = speedup([1.0, 2.0, 4.0], [2.0, 6.0, 4.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.0, 3.0)
    assert str(ratio) == "2.00 (1.00 to 3.00)"


@pytest.mark.parametrize("name", ["flatten_swin_t", "flatten_pvt_t", "flatten_cswin_t", "flatten_deit_t"])
def test_naive_attention_changes_neither_logits_nor_gradients(name):
    """The benchmarks compare the speed of the naive attention and ours, so both must compute the same function."""
    depths = {"flatten_deit_t": {"depth": 2}}.get(name, {"depths": (1, 1, 1, 1)})
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, img_size=64, drop_path_rate=0.0, **depths)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    images = torch.randn(2, 3, 64, 64)
    results = []
    for network in (model, use_naive_attention(model)):
        logits = network(images)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    for ours, naive in zip(*results, strict=True):
        torch.testing.assert_close(ours, naive, rtol=2e-3, atol=2e-4 * naive.abs().max().item())


def test_a_model_is_compared_with_its_naive_implementation_the_softmax_baseline_and_timm():
    with torch.device("meta"):  # nothing is initialised
        variants = create_variants("flatten_deit_t", 64)
        without_peer = create_variants("flatten_cswin_t", 224)
        others = {name: create_variants(name, 224) for name in PEERS if name.endswith(("_t", "_b0"))}
    assert list(variants) == ["focused", "naive implementation", "softmax baseline", "timm deit_tiny_patch16_224"]
    assert {type(block.attn).__name__ for block in variants["softmax baseline"].blocks} == {"SoftmaxTokenAttention"}
    assert "timm" not in " ".join(without_peer)
    assert all(f"timm {PEERS[name]}" in labels for name, labels in others.items())


def test_the_attention_operator_moves_fewer_bytes_than_the_naive_implementation():
    """The bounds are slightly above the values in docs/performance.md. ``tensors`` is the traffic in units of the size of q."""
    records = {(r["attention"], r["pass"]): r for r in count_traffic(3136, dim=96, num_heads=3, batch_size=8)}
    for pass_name, max_ratio in (("forward", 0.65), ("forward and backward", 0.6)):
        assert records[OURS, pass_name]["bytes"] < max_ratio * records[NAIVE, pass_name]["bytes"]
    assert records[OURS, "forward and backward"]["tensors"] < 134


def test_the_triton_kernels_move_at_most_17_tensors_in_few_launches():
    """Counted on the meta device. The minimum, one pass over every input and output, is 11 tensors."""
    for dtype in (torch.float32, torch.bfloat16):
        records = count_traffic(3136, dim=96, num_heads=3, batch_size=128, dtype=dtype)
        record = next(r for r in records if r["attention"] == KERNELS and r["pass"] == "forward and backward")
        assert 11 < record["tensors"] < 17
        assert record["kernels"] < 40


def test_swin_with_the_triton_kernels_moves_fewer_bytes_than_with_softmax_attention():
    records = {r["variant"]: r for r in count_step_traffic("flatten_swin_t", img_size=224, batch_size=128)}
    assert records["focused, triton"]["gigabytes"] < 112
    assert records["focused, triton"]["gigabytes"] < 0.81 * records["softmax baseline"]["gigabytes"]
