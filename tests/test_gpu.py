"""Tests that need a GPU. Run them with: FLATTEN_TEST_GPU=1 python -m pytest tests/test_gpu.py"""

import pytest
import torch
from torch import nn

from data.build import build_datasets, build_train_loader
from data.rand_augment import RandAugment
from engine.largest_batch import _fits
from engine.optim import build_optimizer, build_scaler
from engine.run_contents import Contents
from engine.step import train_step
from jobs.initialization import Initialization
from jobs.train import build_data, build_trainer
from models import create_model
from models.kernel_selection import Variant, compare, find_obstacle
from models.linear_attention import FocusedLinearAttention
from tests.conftest import CONFIGS
from tests.launch import torchrun
from tests.runs import toy_arguments
from utils.config.loading import load_config
from utils.distributed import World, wrap

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or GPUs are hidden; set FLATTEN_TEST_GPU=1")
GPU = torch.device("cuda", 0)


def test_linear_attention_has_the_same_outputs_and_gradients_on_gpu_and_cpu():
    torch.manual_seed(0)
    operator = FocusedLinearAttention(96, 3, (14, 14))
    for parameter in operator.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = [torch.randn(4, 196, 96) for _ in range(3)]
    results = []
    for device in (torch.device("cpu"), GPU):
        module, inputs = operator.to(device), [tensor.to(device).requires_grad_() for tensor in tokens]
        with torch.backends.cudnn.flags(allow_tf32=False):
            out = module(*inputs)
            results.append([out, *torch.autograd.grad(out.square().sum(), [*inputs, *module.parameters()])])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3 * on_cpu.abs().max().item())


@pytest.mark.parametrize("name", ["flatten_swin_t", "flatten_pvt_t", "flatten_pvt_v2_b0", "flatten_cswin_t", "flatten_deit_t"])
def test_a_training_update_does_not_synchronise_host_and_gpu(name):
    cfg = load_config(CONFIGS / f"{name}.yaml", ["AMP", True])
    model = create_model(name, drop_path_rate=0.1).to(GPU).train()
    optimizer, scaler = build_optimizer(cfg, model), build_scaler(cfg, GPU)
    wrapped = wrap(model, World(0, 0, 1, GPU))
    images, targets = torch.randn(4, 3, 224, 224, device=GPU), torch.zeros(4, dtype=torch.long, device=GPU)
    options = {"seeds": [0], "amp_dtype": torch.bfloat16, "max_grad_norm": 5.0}
    # The first update also creates the optimizer state, so only the second one is checked.
    train_step(wrapped, nn.CrossEntropyLoss(), optimizer, scaler, [(images, targets)], **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        report = train_step(wrapped, nn.CrossEntropyLoss(), optimizer, scaler, [(images, targets)], **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert report.is_finite


def test_randaugment_on_the_gpu_has_the_pixels_of_the_cpu_and_does_not_synchronise():
    images, keys = torch.randint(0, 256, (64, 3, 96, 96), dtype=torch.uint8), [(0, index) for index in range(64)]
    options = {"mean": (0.5, 0.5, 0.5), "interpolation": "bicubic", "seed": 0}
    expected = RandAugment("rand-m9-n4-mstd0.5-inc1", **options, device=torch.device("cpu"))(images, keys)
    augment, on_gpu = RandAugment("rand-m9-n4-mstd0.5-inc1", **options, device=GPU), images.to(GPU)
    augment(on_gpu, keys)
    torch.cuda.set_sync_debug_mode("error")
    try:
        augmented = augment(on_gpu, keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (augmented.cpu().int() - expected.int()).abs().float()
    assert difference.mean() < 0.1  # geometric operations are not rounded identically


def require_kernels(dtype: torch.dtype = torch.float32) -> Variant:
    """A variant for this GPU; skips the test if the GPU or Triton does not support the kernels."""
    variant = Variant(GPU, dtype, 32, 5, 3.0, False, "tf32" if dtype != torch.float32 else "tf32x3")
    if reason := find_obstacle(variant):
        pytest.skip(reason)
    return variant


@pytest.mark.parametrize(
    ("dtype", "head_dim", "side", "power", "masked"),
    [
        (torch.float32, 32, 5, 3.0, False),
        (torch.bfloat16, 32, 5, 3.0, False),
        (torch.float16, 32, 5, 3.0, False),
        (torch.bfloat16, 16, 3, 2.5, True),
        (torch.float32, 64, 0, 1.0, True),
    ],
)
def test_the_triton_kernels_agree_with_torch_operations(dtype, head_dim, side, power, masked):
    """A few variants, since each compiles four kernels; ``scripts/check_gpu.py`` checks those of the models."""
    variant = require_kernels(dtype)._replace(head_dim=head_dim, side=side, power=power, masked=masked)
    assert compare(variant) == ""


def test_results_of_the_kernels_do_not_depend_on_the_other_images_of_the_batch():
    require_kernels()
    operator = FocusedLinearAttention(96, 3, (28, 28), backend="triton").to(GPU)
    tokens = torch.randn(8, 784, 3 * 96, device=GPU)
    with torch.no_grad():
        batch, single = operator(*tokens.chunk(3, dim=-1)), operator(*tokens[3:4].chunk(3, dim=-1))
    assert torch.equal(batch[3:4], single)


def test_a_compiled_model_uses_the_kernels_and_has_the_same_gradients():
    require_kernels(torch.bfloat16)
    model, images = create_model("flatten_swin_t", depths=(1, 1, 1, 1)).to(GPU), torch.randn(2, 3, 224, 224, device=GPU)
    results = []
    for run in (model, torch.compile(model)):  # the eager call runs the self-check
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            loss = run(images).square().mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert any("query_gradient_kernel" in event.key for event in profile.key_averages())
        results.append(gradients)
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=1e-2 * eager.abs().max().item())


def test_a_nan_in_the_weights_reaches_the_report_and_the_weights_do_not_change():
    cfg = load_config(CONFIGS / "flatten_swin_t.yaml", ["AMP", True])
    model = create_model("flatten_swin_t").to(GPU).train()
    with torch.no_grad():
        model.layers[0].blocks[0].attn.qkv.weight[0, 0] = float("nan")
    before = [parameter.clone() for parameter in model.parameters()]
    wrapped = wrap(model, World(0, 0, 1, GPU))
    batch = torch.randn(2, 3, 224, 224, device=GPU), torch.zeros(2, dtype=torch.long, device=GPU)
    options = {"seeds": [0], "amp_dtype": torch.bfloat16, "max_grad_norm": 5.0}
    optimizer, scaler = build_optimizer(cfg, model), build_scaler(cfg, GPU)
    report = train_step(wrapped, nn.CrossEntropyLoss(), optimizer, scaler, [batch], **options)
    assert not report.is_finite
    for parameter, value in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, value, rtol=0, atol=0, equal_nan=True)


def test_a_run_with_nccl_on_one_process_resumes(toy_config, toy_data, tmp_path):
    log = tmp_path / "log"
    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path, "--opts", "AMP", True, "TRAIN.EPOCHS"]
    for epochs in (1, 2):
        process = torchrun([*arguments, epochs], log, "--standalone", "--nproc_per_node", 1)
        assert process.wait(timeout=120) == 0, log.read_text()
    assert log.read_text().count("attention: t") == 2
    assert "start: resume" in log.read_text()


def test_a_check_on_a_gpu_reports_the_largest_batch_and_lists_operations_by_their_gpu_time(toy_config, toy_data, tmp_path):
    log = tmp_path / "log"
    arguments = [*toy_arguments(toy_config, toy_data, tmp_path / "out"), "--check", "--profile", tmp_path / "profile"]
    process = torchrun(arguments, log, "--standalone", "--nproc_per_node", 1)
    assert process.wait(timeout=300) == 0, log.read_text()
    # The data set has 102 images, which limit the search.
    assert "the largest batch size per process that fits is at least 102; the run uses 8" in log.read_text()
    assert "Operations with the longest GPU time" in log.read_text()
    assert (tmp_path / "profile/toy.pt.trace.json.gz").is_file()


def test_an_update_that_exceeds_the_memory_of_the_gpu_is_survived_and_its_memory_is_free_again(toy_config, toy_data, tmp_path):
    cfg = load_config(toy_config, ["DATA.DATA_PATH", str(toy_data)])
    world = World(0, 0, 1, GPU)
    init = Initialization("scratch", "", Contents(tmp_path))
    data = build_data(cfg, world, init, None)
    trainer = build_trainer(cfg, world, init, None, data, output=tmp_path, find_unused_parameters=False)
    batch = next(iter(trainer.train_loader))
    assert _fits(trainer, batch, 8)
    before = torch.cuda.memory_allocated()
    assert not _fits(trainer, batch, 2**40 // (3 * 40 * 40))  # 4 TiB of images
    assert torch.cuda.memory_allocated() <= before
    assert _fits(trainer, batch, 8)


def test_batches_on_the_gpu_equal_those_on_the_cpu_and_are_copied_without_synchronisation(toy_config, toy_data):
    cfg = load_config(toy_config, ["DATA.DATA_PATH", str(toy_data), "DATA.NUM_WORKERS", 1, "AUG.REPROB", 0.0])
    expected, loader = (
        build_train_loader(cfg, build_datasets(cfg, training=True).train, rank=0, world_size=1, device=device)
        for device in (torch.device("cpu"), GPU)
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):  # the second epoch reuses memory of the first one
            batches = []
            for batch in loader:
                torch.cuda._sleep(10_000_000)  # the GPU still computes while the next batch is copied
                batches.append(batch.images + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(batches, expected, strict=True):
        assert torch.equal(one.cpu(), other.images + 1)
