"""Benchmark models against the same network with softmax attention or naive linear attention, and against timm's model."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.counting import MemoryCounter, TrafficCounter
from benchmarks.naive import use_naive_attention
from benchmarks.timing import speedup, time_in_turn
from models import create_model
from models.backbone import Backbone
from models.compared_attention import SoftmaxAttention
from models.kernel_selection import choose_backend, set_backend

# Our model -> timm's model of the same family and size. timm has no PVT (v1) and no CSwin.
PEERS = {
    "flatten_swin_t": "swin_tiny_patch4_window7_224",
    "flatten_swin_s": "swin_small_patch4_window7_224",
    "flatten_swin_b": "swin_base_patch4_window7_224",
    "flatten_swin_b_384": "swin_base_patch4_window12_384",
    "flatten_deit_t": "deit_tiny_patch16_224",
    "flatten_deit_s": "deit_small_patch16_224",
    "flatten_deit_b": "deit_base_patch16_224",
    **{f"flatten_pvt_v2_b{size}": f"pvt_v2_b{size}" for size in range(6)},
}
STORED = ", matrix stored"  # suffix of an arm whose softmax attention stores its attention matrix


def create_variants(name: str, img_size: int) -> dict[str, nn.Module]:
    """Create the models to compare, by label."""
    ours = create_model(name, img_size=img_size)
    variants = {"focused": ours, "naive implementation": use_naive_attention(create_model(name, img_size=img_size))}
    # One letter per stage. DeiT has a single stage.
    attn_type = "S" if name.startswith("flatten_deit") else "S" * len(ours.feature_info)
    variants["softmax baseline"] = create_model(name, img_size=img_size, attn_type=attn_type)
    if name in PEERS:
        options = {} if name.startswith("flatten_pvt") else {"img_size": img_size}  # timm's PVTv2 accepts any size
        variants[f"timm {PEERS[name]}"] = timm.create_model(PEERS[name], **options)
    return variants


def create_step(model: nn.Module, images: torch.Tensor, *, training: bool, dtype: torch.dtype) -> Callable[[], None]:
    """Create a function for one inference step (forward), or one training step (forward, loss, backward)."""
    targets = torch.arange(len(images), device=images.device) % model.num_classes
    # The meta device has no autocast.
    autocast = nullcontext if dtype == torch.float32 else partial(torch.autocast, images.device.type, dtype)

    def infer() -> None:
        with torch.inference_mode(), autocast():
            model(images)

    def train() -> None:
        with autocast():
            loss = nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return train if training else infer


def measure_model(
    name: str,
    *,
    img_size: int,
    batch_size: int,
    training: bool,
    compiled: bool,
    dtype: torch.dtype,
    rounds: int,
    device: torch.device,
) -> list[dict]:
    """Measure images per second, speed-up over the naive implementation, and peak memory of an uncompiled training step.

    The peak includes the tensors that a step creates, but not weights and images. On a CPU, it excludes workspaces of kernels.
    """
    torch.manual_seed(0)
    variants = create_variants(name, img_size)
    if device.type == "cuda" and not choose_backend(variants["focused"], device, [dtype], "auto"):
        set_backend(variants["focused"], "torch")
        variants["focused, Triton kernels"] = create_model(name, img_size=img_size)
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    steps = {}
    for label, model in variants.items():
        model.to(device).train(training)
        steps[label] = create_step(torch.compile(model) if compiled else model, images, training=training, dtype=dtype)
    timings = time_in_turn(steps, rounds=rounds, device=device)
    records = []
    for label, timing in timings.items():
        records.append(
            {
                "model": name,
                "variant": label,
                "mode": "training" if training else "inference",
                "compiled": compiled,
                "precision": str(dtype).removeprefix("torch."),
                "batch_size": batch_size,
                "images_per_second": batch_size / statistics.median(timing),
                "speedup_over_naive": speedup(timing, timings["naive implementation"]),
                "peak_memory_mib": measure_peak(steps[label], device) / 2**20 if training and not compiled else None,
            }
        )
    return records


def measure_arms(
    arms: Mapping[str, tuple[Backbone, tuple[int, int, int, int]]], *, rounds: int, device: torch.device
) -> list[dict]:
    """Measure time and peak memory of forward and backward passes in fp32, of arms that run alternately.

    Optimizer, clipping and EMA are not included. The memory per image includes the gradients of the weights, so it is smaller
    for larger batches.

    Softmax attention does not store its attention matrix in these measurements if torch has a fused kernel for the device. An
    additional record of every arm with softmax attention has ", matrix stored" after its name.

    Args:
        arms: name -> model, and shape (B, 3, H, W) of a batch of images.

    Returns:
        One record per arm. ``tokens`` is the number of tokens of the first stage, without the class token. The time is that of
        the processor if the device is a CPU, so that other programs affect it less.
    """
    steps, records = {}, []
    for name, (model, shape) in arms.items():
        images = torch.randn(shape, device=device)
        steps[name] = create_step(model.to(device).train(), images, training=True, dtype=torch.float32)
        height, width = model.stage_grids(shape[2:])[0]
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        record = {"arm": name, "tokens": height * width, "parameters": num_parameters, "batch_size": shape[0]}
        records.append(record)
        if any(isinstance(module, SoftmaxAttention) for module in model.modules()):
            steps[f"{name}{STORED}"] = sdpa_kernel(SDPBackend.MATH)(steps[name])
            records.append(record | {"arm": f"{name}{STORED}"})
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    timings = time_in_turn(steps, rounds=rounds, device=device, clock=clock)
    for record in records:
        name, batch_size = record["arm"], record["batch_size"]
        record["ms_per_image"] = 1000 * statistics.median(timings[name]) / batch_size
        record["peak_memory_mib_per_image"] = measure_peak(steps[name], device) / 2**20 / batch_size
    return records


def measure_peak(step: Callable[[], None], device: torch.device) -> int:
    """Peak bytes of the tensors that a step creates."""
    if device.type == "cuda":
        bytes_before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - bytes_before
    with MemoryCounter() as counter:
        step()
    return counter.peak


def count_step_traffic(name: str, *, img_size: int, batch_size: int) -> list[dict]:
    """Count kernel launches and bytes moved by one training step in fp32, on the meta device, so nothing is computed.

    Returns:
        One record per variant of the model; our model appears with torch operations and with the Triton kernels.
    """
    with torch.device("meta"):
        variants = create_variants(name, img_size)
        images = torch.empty(batch_size, 3, img_size, img_size)
    runs = [(f"focused, {backend}", variants["focused"], backend) for backend in ("torch", "triton")]
    runs += [(label, model, "torch") for label, model in variants.items() if label != "focused"]
    records = []
    for label, model, backend in runs:
        set_backend(model, backend)
        with TrafficCounter() as counter:
            create_step(model.train(), images, training=True, dtype=torch.float32)()
        records.append({"model": name, "variant": label, "kernels": counter.num_kernels, "gigabytes": counter.num_bytes / 1e9})
    return records
