"""Focused linear attention on a GPU: launches of the Triton kernels, registered as operators of torch.

As registered operators, the kernels work with ``torch.compile(fullgraph=True)``, activation checkpointing, autocast and DDP.
Triton is imported at the first launch: importing this module needs no Triton.

Shapes: B images or windows, N queries, M keys, H heads, D channels per head, C = H * D.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .fused_attention import unfused_gradients
from .tracing import is_batched
from .windows import ceil_divide

HALF_PRECISION = (torch.float16, torch.bfloat16)
MAX_BLOCKS = 8  # per chunk: more blocks write fewer partial sums, fewer blocks occupy more of the GPU
COMPILER_OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


class Plan(NamedTuple):
    """Division of the tokens of an image: ``num_chunks`` programs, each with ``num_blocks`` blocks of ``block_size`` tokens."""

    block_size: int
    num_blocks: int
    num_chunks: int


def plan(num_tokens: int, block_size: int) -> Plan:
    """Divide the tokens of an image into chunks of similar size.

    The division depends on the number of tokens only. Otherwise, the order of sums would depend on the batch.
    """
    num_blocks = ceil_divide(num_tokens, block_size)
    blocks_per_chunk = ceil_divide(num_blocks, ceil_divide(num_blocks, MAX_BLOCKS))
    return Plan(block_size, blocks_per_chunk, ceil_divide(num_blocks, blocks_per_chunk))


def choose_precision(dtype: torch.dtype) -> str:
    """Precision of products of matrices: ``tf32``, or ``tf32x3`` with the accuracy of float32."""
    return "tf32" if dtype in HALF_PRECISION or torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def launch_options(head_dim: int, precision: str) -> dict[str, int]:
    """Tokens per block and warps per program. The larger tiles of accurate products spill registers with 32 tokens."""
    return {"block_size": 16 if head_dim == 64 and precision == "tf32x3" else 32, "num_warps": 4}


def launch(
    kernel: str,
    num_programs: int,
    inputs: list[Tensor | None],
    outputs: list[Tensor | None],
    numbers: list[int],
    constants: dict,
) -> None:
    """Launch a kernel of ``models/kernels.py``. Tensors that are None are not used by this variant of the kernel."""
    from . import kernels

    with torch.cuda.device_of(inputs[0]):
        getattr(kernels, kernel)[(num_programs,)](*fill(inputs, outputs), *numbers, **constants, **COMPILER_OPTIONS)


def fill(inputs: list[Tensor | None], outputs: list[Tensor | None]) -> list[Tensor]:
    """Replace None, which a kernel cannot receive as an address, by the first tensor."""
    return [inputs[0] if tensor is None else tensor for tensor in [*inputs, *outputs]]


class KernelRun:
    """One forward or backward pass: its tensors in the layout of the kernels, and the launches.

    Args:
        kernel: (C, 1, side, side); None without the convolution.
        key_weight: (B, 1, M, 1); None for 1 / M.
        power: exponent p.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor,
        scale: Tensor,
        kernel: Tensor | None,
        key_weight: Tensor | None,
        num_heads: int,
        power: float,
        height: int,
        width: int,
        prefix: int,
    ):
        # The kernels read views of a joint projection with their strides; only channels must be adjacent.
        self.q, self.k, self.v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        self.num_images, self.num_queries, self.channels = q.shape
        self.num_keys = k.shape[1]
        self.num_heads = num_heads
        self.head_dim = self.channels // num_heads
        self.position = position.float().contiguous()
        self.inverse_scale = (1 / scale.float()).flatten()
        self.side = 0 if kernel is None else kernel.shape[-1]
        self.filter = None if kernel is None else kernel.float().view(self.channels, -1).t().contiguous()  # (side^2, C)
        self.key_weight = None if key_weight is None else key_weight.float().reshape(self.num_images, -1).contiguous()
        self.grid = [height, width, prefix]
        precision = choose_precision(q.dtype)
        options = launch_options(self.head_dim, precision)
        block_size = options.pop("block_size")
        self.query_plan = plan(self.num_queries, block_size)
        self.key_plan = plan(self.num_keys, block_size)
        is_integer = power == int(power) and power < 64
        self.constants = {
            "POWER": int(power) if is_integer else power,
            "D": self.head_dim,
            "BN": block_size,
            "PRECISION": precision,
            **options,
        }

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def empty_summary(self, num_chunks: int) -> Tensor:
        return self.empty(self.num_images, num_chunks, self.num_heads, self.head_dim + 1, self.head_dim)

    def forward(self, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output (B, N, C), summaries (B, H, D + 1, D), and statistics (B, 3, n) of queries and keys."""
        images, heads = self.num_images, self.num_heads
        _, num_blocks, num_chunks = self.key_plan
        key_statistics, partial = self.empty(images, 3, self.num_keys), self.empty_summary(num_chunks)
        launch(
            "key_summary_kernel",
            images * num_chunks,
            [self.k, self.v, self.position, self.inverse_scale, self.key_weight],
            [key_statistics, partial],
            [*self.k.stride()[:2], *self.v.stride()[:2], self.num_keys, heads, num_blocks, num_chunks],
            self.constants | {"HAS_WEIGHT": self.key_weight is not None},
        )
        summary = add_chunks(partial)
        query_statistics = self.empty(images, 3, self.num_queries)
        out = torch.empty((images, self.num_queries, self.channels), dtype=self.v.dtype, device=self.v.device)
        num_chunks = ceil_divide(self.num_queries, self.query_plan.block_size)
        bias = None if bias is None else bias.float()
        launch(
            "output_kernel",
            images * num_chunks,
            [self.q, self.v, self.inverse_scale, summary, self.filter, bias],
            [query_statistics, out],
            [*self.q.stride()[:2], *self.v.stride()[:2], self.num_queries, heads, *self.grid, num_chunks],
            self.constants | {"SIDE": self.side},
        )
        return out, summary, query_statistics, key_statistics

    def empty_gradients(self) -> tuple[Tensor, Tensor]:
        """Buffers for the gradients of q, k and v: (B, N, 3C) and an empty one if N = M, else (B, N, C) and (B, M, 2C)."""
        if self.num_queries == self.num_keys:
            return self.q.new_empty(self.num_images, self.num_queries, 3 * self.channels), self.q.new_empty(0)
        return self.q.new_empty(self.q.shape), self.q.new_empty(self.num_images, self.num_keys, 2 * self.channels)

    def backward(
        self, gradient: Tensor, summary: Tensor, query_statistics: Tensor, key_statistics: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k and v (see ``empty_gradients``), position, scale, kernel and bias; the last two may be empty."""
        gradient = gradient.contiguous()
        buffers = self.empty_gradients()
        grad_q, grad_k, grad_v = split_gradients(*buffers, self.channels)
        grad_summary, grad_log_scale, grad_bias = self.query_gradients(gradient, summary, query_statistics, grad_q)
        key_grad_log_scale, grad_filter = self.key_gradients(gradient, grad_summary, key_statistics, grad_k, grad_v)
        grad_scale = -((grad_log_scale + key_grad_log_scale) * self.inverse_scale).view(1, 1, -1)
        grad_position = grad_k.sum(dim=0, keepdim=True, dtype=torch.float32)
        if self.filter is None:
            return *buffers, grad_position, grad_scale, self.empty(0), self.empty(0)
        grad_kernel = grad_filter.t().reshape(self.channels, 1, self.side, self.side).contiguous()
        return *buffers, grad_position, grad_scale, grad_kernel, grad_bias

    def query_gradients(
        self, gradient: Tensor, summary: Tensor, statistics: Tensor, grad_q: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write the gradient of q; return the gradients of the summary, of log(1 / scale) (C,) and of the bias (C,)."""
        images, heads = self.num_images, self.num_heads
        _, num_blocks, num_chunks = self.query_plan
        partial = self.empty_summary(num_chunks)
        scratch = self.empty(images, heads + 1, self.num_queries)
        grad_log_scale, grad_bias = (self.empty(images, num_chunks, self.channels) for _ in range(2))
        launch(
            "query_gradient_kernel",
            images * num_chunks,
            [self.q, gradient, self.inverse_scale, summary, statistics],
            [scratch, partial, grad_log_scale, grad_bias, grad_q],
            [*self.q.stride()[:2], *grad_q.stride()[:2], self.num_queries, heads, self.grid[2], num_blocks, num_chunks],
            self.constants,
        )
        return add_chunks(partial), grad_log_scale.sum(dim=(0, 1)), grad_bias.sum(dim=(0, 1))

    def key_gradients(
        self, gradient: Tensor, grad_summary: Tensor, statistics: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Write the gradients of k and v; return the gradients of log(1 / scale) (C,) and of the filter (side^2, C)."""
        images, heads = self.num_images, self.num_heads
        _, num_blocks, num_chunks = self.key_plan
        scratch = self.empty(images, heads + 1, self.num_keys)
        grad_log_scale = self.empty(images, num_chunks, self.channels)
        grad_filter = None if self.filter is None else self.empty(images, num_chunks, *self.filter.shape)
        launch(
            "key_gradient_kernel",
            images * num_chunks,
            [
                self.k,
                self.v,
                gradient,
                self.position,
                self.inverse_scale,
                self.key_weight,
                grad_summary,
                self.filter,
                statistics,
            ],
            [scratch, grad_log_scale, grad_filter, grad_k, grad_v],
            [
                *self.k.stride()[:2],
                *self.v.stride()[:2],
                *grad_k.stride()[:2],
                self.num_keys,
                heads,
                *self.grid,
                num_blocks,
                num_chunks,
            ],
            self.constants | {"SIDE": self.side, "HAS_WEIGHT": self.key_weight is not None},
        )
        return grad_log_scale.sum(dim=(0, 1)), None if grad_filter is None else grad_filter.sum(dim=(0, 1))


def add_chunks(partial: Tensor) -> Tensor:
    """Sum of the partial summaries. (B, chunks, H, D + 1, D) -> (B, H, D + 1, D)."""
    return partial.squeeze(1) if partial.shape[1] == 1 else partial.sum(dim=1)


def split_gradients(first: Tensor, second: Tensor, channels: int) -> tuple[Tensor, ...]:
    """Gradients of q, k and v as views of the buffers of ``KernelRun.empty_gradients``."""
    return first.split(channels, dim=-1) if second.numel() == 0 else (first, *second.split(channels, dim=-1))


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    scale: Tensor,
    kernel: Tensor | None,
    bias: Tensor | None,
    key_weight: Tensor | None,
    num_heads: int,
    power: float,
    height: int,
    width: int,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, and the summaries and statistics that the backward pass needs; see ``focused_attention``."""
    run = KernelRun(q, k, v, position, scale, kernel, key_weight, num_heads, power, height, width, prefix)
    return run.forward(bias)


# One namespace for each name under which the package is imported: torch would replace operators of the same name.
NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")
attention_operator = torch.library.custom_op(f"{NAMESPACE}::focused_attention", run_forward, mutates_args=())


@attention_operator.register_fake
def _(q, k, v, position, scale, kernel, bias, key_weight, num_heads, power, height, width, prefix):
    (num_images, num_queries, channels), num_keys, head_dim = q.shape, k.shape[1], q.shape[2] // num_heads
    return (
        v.new_empty(num_images, num_queries, channels),
        q.new_empty(num_images, num_heads, head_dim + 1, head_dim, dtype=torch.float32),
        q.new_empty(num_images, 3, num_queries, dtype=torch.float32),
        q.new_empty(num_images, 3, num_keys, dtype=torch.float32),
    )


def run_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    scale: Tensor,
    kernel: Tensor | None,
    key_weight: Tensor | None,
    summary: Tensor,
    query_statistics: Tensor,
    key_statistics: Tensor,
    num_heads: int,
    power: float,
    height: int,
    width: int,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients; see ``KernelRun.backward``. Outputs of an operator must not share memory, so views are taken outside."""
    run = KernelRun(q, k, v, position, scale, kernel, key_weight, num_heads, power, height, width, prefix)
    return run.backward(gradient, summary, query_statistics, key_statistics)


attention_backward_operator = torch.library.custom_op(f"{NAMESPACE}::focused_attention_backward", run_backward, mutates_args=())


@attention_backward_operator.register_fake
def _(gradient, q, k, v, position, scale, kernel, key_weight, summary, *_):
    packed = q.shape[1] == k.shape[1]
    empty_parameter = q.new_empty(0, dtype=torch.float32)
    return (
        q.new_empty(q.shape[0], q.shape[1], 3 * q.shape[2] if packed else q.shape[2]),
        q.new_empty(0) if packed else q.new_empty(q.shape[0], k.shape[1], 2 * q.shape[2]),
        q.new_empty(position.shape, dtype=torch.float32),
        q.new_empty(scale.shape, dtype=torch.float32),
        empty_parameter if kernel is None else q.new_empty(kernel.shape, dtype=torch.float32),
        q.new_empty(0 if kernel is None else q.shape[2], dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, position, scale, kernel, bias, key_weight, *options = inputs
    ctx.save_for_backward(q, k, v, position, scale, kernel, bias, key_weight, *output[1:])
    ctx.options = options
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient, *_):
    q, k, v, position, scale, kernel, bias, key_weight, *saved = ctx.saved_tensors
    if torch.is_grad_enabled() or is_batched(gradient):  # gradients are enabled by create_graph=True
        num_heads, power, *grid, num_prefix = ctx.options
        inputs, options = [q, k, v, position, scale, kernel, bias, key_weight], (num_heads, power, tuple(grid), num_prefix)
        gradients = unfused_gradients(inputs, ctx.needs_input_grad, options, gradient)
        return *gradients, *(None,) * len(ctx.options)
    first, second, grad_position, grad_scale, grad_kernel, grad_bias = attention_backward_operator(
        gradient, q, k, v, position, scale, kernel, key_weight, *saved, *ctx.options
    )
    grad_q, grad_k, grad_v = split_gradients(first, second, q.shape[-1])
    return (
        grad_q,
        grad_k,
        grad_v,
        grad_position.to(position.dtype),
        grad_scale.to(scale.dtype),
        None if kernel is None else grad_kernel.to(kernel.dtype),
        None if bias is None else grad_bias.to(bias.dtype),
        *(None,) * (1 + len(ctx.options)),
    )


attention_operator.register_autograd(_backward, setup_context=_setup_context)


def focused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    position: Tensor,
    scale: Tensor,
    kernel: Tensor | None,
    bias: Tensor | None,
    key_weight: Tensor | None,
    num_heads: int,
    power: float,
    grid: tuple[int, int],
    num_prefix_tokens: int,
) -> Tensor:
    """Same as ``models.fused_attention.focused_attention``, computed by the Triton kernels.

    The kernels compute in float32. The products of matrices use TF32 if the inputs are in half precision or
    ``torch.backends.cuda.matmul.allow_tf32`` is set.
    """
    return attention_operator(
        q, k, v, position, scale, kernel, bias, key_weight, num_heads, float(power), *grid, num_prefix_tokens
    )[0]
