"""Benchmark the attention operator alone: time per token for a given number of tokens, and memory traffic."""

import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.counting import TrafficCounter, num_bytes
from benchmarks.naive import naive_attention
from benchmarks.timing import speedup, time_in_turn
from models.kernel_selection import choose_backend
from models.linear_attention import FocusedLinearAttention
from models.windows import merge_windows, partition_windows

OURS = "focused"  # torch operations
KERNELS = "focused, Triton kernels"
NAIVE = "naive implementation"
SOFTMAX = "softmax"
WINDOWS = "softmax in 7 x 7 windows"
WINDOW = 7

Attention = Callable[[Tensor], Tensor]  # joint projection to q, k and v, (B, N, 3C) -> output, (B, N, C)


def create_attentions(
    operator: FocusedLinearAttention, side: int, *, with_softmax: bool, with_kernels: bool
) -> dict[str, Attention]:
    """Attention functions by name, for maps of side * side tokens."""

    def focused(qkv: Tensor, backend: str) -> Tensor:
        operator.backend = backend
        return operator(qkv)

    grid, num_heads = (side, side), operator.num_heads

    def softmax(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def windows(qkv: Tensor) -> Tensor:
        out = softmax(partition_windows(qkv.unflatten(1, grid), (WINDOW, WINDOW)))
        return merge_windows(out, (WINDOW, WINDOW), grid).flatten(1, 2)

    attentions = {
        OURS: partial(focused, backend="torch"),
        NAIVE: lambda qkv: naive_attention(*qkv.chunk(3, dim=-1), module=operator, grid=grid),
    }
    if with_kernels:
        attentions[KERNELS] = partial(focused, backend="triton")
    if with_softmax:
        attentions[SOFTMAX] = softmax
    if side % WINDOW == 0:
        attentions[WINDOWS] = windows
    return attentions


def forward_and_backward(attend: Attention, qkv: Tensor, parameters: list[Tensor], gradient: Tensor) -> None:
    out = attend(qkv)
    torch.autograd.grad(out, [qkv, *parameters], gradient, allow_unused=True)


def measure_operator(
    num_tokens: int,
    *,
    dim: int,
    num_heads: int,
    batch_size: int,
    max_softmax_tokens: int,
    rounds: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[dict]:
    """Time the attention functions for one number of tokens: the forward pass, and forward and backward pass together.

    Returns:
        One record per pass and attention function: nanoseconds per token, and median, minimum and maximum of
        the speed-up over the naive implementation.

    Raises:
        ValueError: ``num_tokens`` is not a square number.
    """
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"--tokens {num_tokens}: give a square number, such as {side * side}")
    torch.manual_seed(0)
    operator = FocusedLinearAttention(dim, num_heads, (side, side)).to(device, dtype)
    qkv = torch.randn(batch_size, num_tokens, 3 * dim, device=device, dtype=dtype).requires_grad_()
    gradient, parameters = torch.randn(batch_size, num_tokens, dim, device=device, dtype=dtype), list(operator.parameters())
    with_kernels = device.type == "cuda" and not choose_backend(operator, device, [dtype], "auto")
    attentions = create_attentions(operator, side, with_softmax=num_tokens <= max_softmax_tokens, with_kernels=with_kernels)

    def infer(attend: Attention) -> None:
        with torch.no_grad():
            attend(qkv)

    records = []
    for pass_name, run in (
        ("forward", infer),
        ("forward and backward", lambda attend: forward_and_backward(attend, qkv, parameters, gradient)),
    ):
        tasks = {name: (lambda attend=attend, run=run: run(attend)) for name, attend in attentions.items()}
        timings = time_in_turn(tasks, rounds=rounds, device=device)
        for name, timing in timings.items():
            records.append(
                {
                    "tokens": num_tokens,
                    "batch_size": batch_size,
                    "pass": pass_name,
                    "attention": name,
                    "ns_per_token": 1e9 * statistics.median(timing) / (batch_size * num_tokens),
                    "speedup_over_naive": speedup(timing, timings[NAIVE]),
                }
            )
    return records


def count_traffic(
    num_tokens: int, *, dim: int, num_heads: int, batch_size: int, dtype: torch.dtype = torch.float32
) -> list[dict]:
    """Count kernel launches and bytes moved by the operator, in both forms, and by the naive implementation.

    The tensors are on the meta device, so nothing is computed. The minimum traffic counts each input and output once: the
    forward pass must read q, k and v and write the output; the backward pass must read q, k, v and the output's gradient and
    write the gradients of q, k and v.

    Returns:
        One record per attention and pass. ``tensors``: bytes divided by the size of one (B, N, C) tensor. ``over_minimum``:
        bytes divided by the minimum traffic.
    """
    side = math.isqrt(num_tokens)
    with torch.device("meta"):
        operator = FocusedLinearAttention(dim, num_heads, (side, side)).to(dtype)
        qkv = torch.empty(batch_size, num_tokens, 3 * dim, dtype=dtype).requires_grad_()
        gradient = torch.empty(batch_size, num_tokens, dim, dtype=dtype)
    attentions = create_attentions(operator, side, with_softmax=False, with_kernels=True)
    tensor_bytes = num_bytes(gradient)
    records = []
    for name in (OURS, KERNELS, NAIVE):
        for pass_name, min_tensors in (("forward", 4), ("forward and backward", 4 + 7)):
            with TrafficCounter() as counter:
                if pass_name == "forward":
                    with torch.no_grad():
                        attentions[name](qkv)
                else:
                    forward_and_backward(attentions[name], qkv, list(operator.parameters()), gradient)
            records.append(
                {
                    "pass": pass_name,
                    "attention": name,
                    "kernels": counter.num_kernels,
                    "bytes": counter.num_bytes,
                    "tensors": counter.num_bytes / tensor_bytes,
                    "over_minimum": counter.num_bytes / (min_tensors * tensor_bytes),
                }
            )
    return records
