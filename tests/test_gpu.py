"""Tests that need a GPU. Run them with: FLATTEN_TEST_GPU=1 python -m pytest tests/test_gpu.py"""

import pytest
import torch
from torch import nn

from models import create_model
from models.linear_attention import FocusedLinearAttention
from tests.conftest import CONFIGS
from utils.config import load_config
from utils.distributed import World, wrap
from utils.optim import build_optimizer, build_scaler
from utils.step import train_step

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
    wrapped = wrap(model, World(0, 0, 1, GPU), num_scalars=3)
    images, targets = torch.randn(4, 3, 224, 224, device=GPU), torch.zeros(4, dtype=torch.long, device=GPU)
    options = {"seeds": [0], "amp_dtype": torch.bfloat16, "max_grad_norm": 5.0}
    # The first update also creates the optimizer state, so only the second one is checked.
    train_step(wrapped, nn.CrossEntropyLoss(), optimizer, scaler, [(images, targets)], **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        report = train_step(wrapped, nn.CrossEntropyLoss(), optimizer, scaler, [(images, targets)], **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert report.isfinite().all()
