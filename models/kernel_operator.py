"""Focused linear attention on a GPU: launches of the Triton kernels, registered as operators of torch.

As registered operators, the kernels work with ``torch.compile(fullgraph=True)``, activation checkpointing, autocast and DDP.
Triton is imported at the first launch: importing this module needs no Triton.

Shapes: B images or windows, N queries, M keys, H heads, D channels per head, C = H * D.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .plain_attention import Inputs, Options, plain_gradients, unpack
from .tracing import is_batched
from .windows import ceil_divide

HALF_PRECISION = (torch.float16, torch.bfloat16)
# Head dimension -> maximum number of tokens in a chunk. Larger chunks write fewer partial summaries, which have head_dim + 1
# rows; smaller chunks occupy more of the GPU.
MAX_TOKENS = {16: 256, 32: 256, 64: 512}
COMPILER_OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


class Plan(NamedTuple):
    """Division of the tokens of an image: ``num_chunks`` programs, each with ``num_blocks`` blocks of ``block_size`` tokens."""

    block_size: int
    num_blocks: int
    num_chunks: int


def plan(num_tokens: int, block_size: int, max_tokens: int) -> Plan:
    """Divide the tokens of an image into chunks of similar size, at most ``max_tokens``.

    The division does not depend on the number of images. Otherwise, the order of sums would depend on the batch.
    """
    num_blocks = ceil_divide(num_tokens, block_size)
    blocks_per_chunk = ceil_divide(num_blocks, ceil_divide(num_blocks, max_tokens // block_size))
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
    """One forward or backward pass: its tensors in the layout of the kernels, and the launches."""

    def __init__(self, inputs: Inputs, options: Options):
        self.inputs = inputs
        self.num_heads, power, *self.grid = options  # the grid is height, width and num_prefix_tokens
        q, k, v = unpack(*inputs[:3])
        # The kernels read views of a joint projection with their strides; only channels must be adjacent.
        self.q, self.k, self.v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        self.num_images, self.num_queries, self.channels = q.shape
        self.num_keys = k.shape[1]
        self.head_dim = self.channels // self.num_heads
        self.position = inputs.position.float().contiguous()
        self.inverse_scale = (1 / inputs.scale.float()).flatten()
        kernel, weight = inputs.kernel, inputs.key_weight
        self.side = 0 if kernel is None else kernel.shape[-1]
        self.filter = None if kernel is None else kernel.float().view(self.channels, -1).t().contiguous()  # (side^2, C)
        self.key_weight = None if weight is None else weight.float().reshape(self.num_images, -1).contiguous()
        self.key_inputs = [self.k, self.v, self.position, self.inverse_scale, self.key_weight]
        precision = choose_precision(q.dtype)
        tile = launch_options(self.head_dim, precision)
        block_size = tile.pop("block_size")
        self.query_plan, self.key_plan = (
            plan(count, block_size, MAX_TOKENS[self.head_dim]) for count in (self.num_queries, self.num_keys)
        )
        is_integer = power == int(power) and power < 64
        self.constants = {
            "POWER": int(power) if is_integer else power,
            "D": self.head_dim,
            "BN": block_size,
            "PRECISION": precision,
            **tile,
        }

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def empty_summary(self, num_chunks: int) -> Tensor:
        return self.empty(self.num_images, num_chunks, self.num_heads, self.head_dim + 1, self.head_dim)

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output (B, N, C), summaries (B, H, D + 1, D), and statistics (B, 3, n) of queries and keys."""
        images, heads = self.num_images, self.num_heads
        _, num_blocks, num_chunks = self.key_plan
        key_statistics, partial = self.empty(images, 3, self.num_keys), self.empty_summary(num_chunks)
        launch(
            "key_summary_kernel",
            images * num_chunks,
            self.key_inputs,
            [key_statistics, partial],
            [*self.k.stride()[:2], *self.v.stride()[:2], self.num_keys, heads, num_blocks, num_chunks],
            self.constants | {"HAS_WEIGHT": self.key_weight is not None},
        )
        summary = add_chunks(partial)
        query_statistics = self.empty(images, 3, self.num_queries)
        out = torch.empty((images, self.num_queries, self.channels), dtype=self.v.dtype, device=self.v.device)
        num_chunks = ceil_divide(self.num_queries, self.query_plan.block_size)
        bias = None if self.inputs.bias is None else self.inputs.bias.float()
        launch(
            "output_kernel",
            images * num_chunks,
            [self.q, self.v, self.inverse_scale, summary, self.filter, bias],
            [query_statistics, out],
            [*self.q.stride()[:2], *self.v.stride()[:2], self.num_queries, heads, *self.grid, num_chunks],
            self.constants | {"SIDE": self.side},
        )
        return out, summary, query_statistics, key_statistics

    def backward(self, gradient: Tensor, summary: Tensor, query_statistics: Tensor, key_statistics: Tensor) -> list[Tensor]:
        """Gradients of the ``Inputs`` that are not None, without the weights of the keys."""
        gradient = gradient.contiguous()
        packed_gradients = [None if packed is None else packed.new_empty(packed.shape) for packed in self.inputs[:3]]
        grad_q, grad_k, grad_v = unpack(*packed_gradients)
        grad_summary, grad_log_scale, grad_bias = self.query_gradients(gradient, summary, query_statistics, grad_q)
        key_grad_log_scale, grad_filter = self.key_gradients(gradient, grad_summary, key_statistics, grad_k, grad_v)
        grad_scale = -((grad_log_scale + key_grad_log_scale) * self.inverse_scale).view(1, 1, -1)
        grad_position = grad_k.sum(dim=0, keepdim=True, dtype=torch.float32)
        gradients = [*(x for x in packed_gradients if x is not None), grad_position, grad_scale]
        if grad_filter is not None:
            gradients += [grad_filter.t().reshape(self.channels, 1, self.side, self.side).contiguous(), grad_bias]
        return gradients

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
        strides = [stride for x in (self.k, self.v, grad_k) for stride in x.stride()[:2]]
        launch(
            "key_gradient_kernel",
            images * num_chunks,
            [*self.key_inputs[:2], gradient, *self.key_inputs[2:], grad_summary, self.filter, statistics],
            [scratch, grad_log_scale, grad_filter, grad_k, grad_v],
            [*strides, self.num_keys, heads, *self.grid, num_blocks, num_chunks],
            self.constants | {"SIDE": self.side, "HAS_WEIGHT": self.key_weight is not None},
        )
        return grad_log_scale.sum(dim=(0, 1)), None if grad_filter is None else grad_filter.sum(dim=(0, 1))


def add_chunks(partial: Tensor) -> Tensor:
    """Sum of the partial summaries. (B, chunks, H, D + 1, D) -> (B, H, D + 1, D)."""
    return partial.squeeze(1) if partial.shape[1] == 1 else partial.sum(dim=1)


# The kernels are registered as operators of torch, whose arguments are those of ``Inputs`` and ``Options``, one by one.
ARGUMENTS = (
    "Tensor q, Tensor? k, Tensor? v, Tensor position, Tensor scale, Tensor? kernel, Tensor? bias, Tensor? key_weight, "
    "int num_heads, float power, int height, int width, int num_prefix_tokens"
)


def create_run(arguments: tuple) -> KernelRun:
    num_inputs = len(Inputs._fields)
    return KernelRun(Inputs(*arguments[:num_inputs]), Options(*arguments[num_inputs:]))


def run_forward(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, and the summaries and statistics that the backward pass needs; see ``KernelRun.forward``."""
    return create_run(arguments).forward()


def run_backward(
    gradient: Tensor, summary: Tensor, query_statistics: Tensor, key_statistics: Tensor, *arguments
) -> list[Tensor]:
    """Gradients; see ``KernelRun.backward``."""
    return create_run(arguments).backward(gradient, summary, query_statistics, key_statistics)


# One namespace for each name under which the package is imported: torch would replace operators of the same name.
NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")
attention_operator = torch.library.custom_op(
    f"{NAMESPACE}::focused_attention", run_forward, mutates_args=(), schema=f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
attention_backward_operator = torch.library.custom_op(
    f"{NAMESPACE}::focused_attention_backward",
    run_backward,
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor summary, Tensor query_statistics, Tensor key_statistics, {ARGUMENTS}) -> Tensor[]",
)


@attention_operator.register_fake
def _(*arguments):
    q, k, v = unpack(*arguments[:3])
    num_heads = arguments[len(Inputs._fields)]
    (num_images, num_queries, channels), num_keys, head_dim = q.shape, k.shape[1], q.shape[2] // num_heads
    return (
        v.new_empty(num_images, num_queries, channels),
        q.new_empty(num_images, num_heads, head_dim + 1, head_dim, dtype=torch.float32),
        q.new_empty(num_images, 3, num_queries, dtype=torch.float32),
        q.new_empty(num_images, 3, num_keys, dtype=torch.float32),
    )


@attention_backward_operator.register_fake
def _(gradient, summary, query_statistics, key_statistics, q, k, v, *arguments):
    packed_gradients = [x.new_empty(x.shape) for x in (q, k, v) if x is not None]
    return packed_gradients + [x.new_empty(x.shape, dtype=torch.float32) for x in arguments[:4] if x is not None]


def _setup_context(ctx, inputs, output) -> None:
    num_inputs = len(Inputs._fields)
    ctx.save_for_backward(*inputs[:num_inputs], *output[1:])
    ctx.options = Options(*inputs[num_inputs:])
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient, *_):
    *inputs, summary, query_statistics, key_statistics = ctx.saved_tensors  # must be read once only
    inputs = Inputs(*inputs)
    if torch.is_grad_enabled() or is_batched(gradient):  # gradients are enabled by create_graph=True
        gradients = plain_gradients(inputs, ctx.options, ctx.needs_input_grad[: len(inputs)], gradient)
    else:
        statistics = query_statistics, key_statistics
        computed = iter(attention_backward_operator(gradient, summary, *statistics, *inputs, *ctx.options))
        gradients = [None if x is None else next(computed).to(x.dtype) for x in inputs._replace(key_weight=None)]
    return *gradients, *(None for _ in ctx.options)


attention_operator.register_autograd(_backward, setup_context=_setup_context)


def focused_attention(inputs: Inputs, options: Options) -> Tensor:
    """``plain_attention``, computed by the Triton kernels.

    The kernels compute in float32. The products of matrices use TF32 if the inputs are in half precision or
    ``torch.backends.cuda.matmul.allow_tf32`` is set.
    """
    return attention_operator(*inputs, *options._replace(power=float(options.power)))[0]
