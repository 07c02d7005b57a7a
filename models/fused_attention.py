"""Focused linear attention in two forms: standard operations, and a custom backward pass that needs less time and memory.

Both forms have the same outputs and derivatives. For the standard operations (``unfused_attention``), autograd stores about
twelve tensors of the size of q. The other form (``focused_attention``) stores only q, k, v, the (D, D + 1) key-value summary of
each head (see below) and three statistics per token, and its backward pass recomputes the rest. On a CPU, it processes tokens
in blocks that fit into the caches. If its gradients are to be differentiated again, it computes them with the standard
operations instead.

Shapes: B images or windows, N queries, M keys, H heads, D channels per head, C = H * D; b images and n tokens per block.

For each token, let x = (relu(input) + EPS) / scale and t = x / max(x). The feature f_p(x) (eq. 6 of the paper) is c * u, where
u = t^p and c = max(x) |t| / |u|. Subscripts q and k denote queries and keys. The products c * u are not computed: c_k
multiplies the values, and c_q cancels except in EPS / c_q. Let e = [c_k * v, c_k] / M for each key. The key-value
summary of an image, per head, is u_k^T e = [S, s], and the output for a query, before the convolution is added, is

    u_q S / (u_q s + EPS / c_q).

In the backward pass, ``grad_<name>`` is the gradient of the loss with respect to <name>.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compared_attention import EPS, focus, linear_attention
from .tracing import is_batched, is_transformed

# Elements of q or k per block: larger blocks exceed the caches, smaller ones add call overhead.
MAX_BLOCK_ELEMENTS_ON_CPU = 2**19


class Features(NamedTuple):
    """Features of a block of tokens, split into heads, and their statistics; the module docstring defines the symbols."""

    positive: Tensor  # (b, H, n, D), relu(input)
    unit: Tensor  # (b, H, n, D), t
    powers: Tensor  # (b, H, n, D), u
    statistics: Tensor  # (3, b, 1, n, 1), per token: max(x), |t| and |u|

    @property
    def unit_norm(self) -> Tensor:
        return self.statistics[1]

    @property
    def powers_norm(self) -> Tensor:
        return self.statistics[2]

    @property
    def factor(self) -> Tensor:
        """The factor c of each token."""
        return self.statistics[0] * self.statistics[1] / self.statistics[2]


class Scratch:
    """Named buffers, reused by successive blocks. Calls with the same name return the same memory, uninitialised at first."""

    def __init__(self, num_elements: int, like: Tensor, dtype: torch.dtype):
        self._size = num_elements
        self._options = {"dtype": dtype, "device": like.device}
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self._size, **self._options)
        return self._buffers[name][: math.prod(shape)].view(shape)


class Blocks:
    """Splits a batch into blocks that fit into the caches of a CPU; on other devices, the batch is one block.

    A block contains whole images. If a single image exceeds ``MAX_BLOCK_ELEMENTS_ON_CPU``, its tokens are split as well.
    """

    def __init__(self, num_images: int, num_tokens: int, channels: int, device: torch.device):
        limit = MAX_BLOCK_ELEMENTS_ON_CPU if device.type == "cpu" else num_images * num_tokens * channels
        self.num_images = num_images
        self.images_per_block = max(1, min(num_images, limit // (num_tokens * channels)))
        self.tokens_per_block = max(1, limit // channels)
        self.size = self.images_per_block * min(num_tokens, self.tokens_per_block) * channels

    def images(self) -> Iterator[slice]:
        for first in range(0, self.num_images, self.images_per_block):
            yield slice(first, min(first + self.images_per_block, self.num_images))

    def tokens(self, num_tokens: int) -> Iterator[slice]:
        for first in range(0, num_tokens, self.tokens_per_block):
            yield slice(first, min(first + self.tokens_per_block, num_tokens))


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Disable autocast: sums over thousands of keys would overflow or lose digits in half precision."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """View of the channels as heads. (b, n, C) -> (b, H, n, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def norm_over_channels(x: Tensor) -> Tensor:
    """L2 norm of each token over all heads. (b, H, n, D) -> (b, 1, n, 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().sum(dim=1, keepdim=True).sqrt_()


class _FocusedAttention(torch.autograd.Function):
    """See ``focused_attention``."""

    @staticmethod
    def forward(ctx, q, k, v, position, scale, kernel, bias, key_weight, num_heads, power, grid, num_prefix):
        run = _Run(q, k, v, position, scale, kernel, key_weight, num_heads, power, grid, num_prefix)
        with without_autocast(q.device):
            out, *saved = run.forward(bias)
        ctx.save_for_backward(q, k, v, position, scale, kernel, bias, key_weight, *saved)
        ctx.options = num_heads, power, grid, num_prefix
        return out

    @staticmethod
    def backward(ctx, gradient):
        *inputs, bias, key_weight, summaries, query_statistics, key_statistics = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(gradient):  # gradients are enabled by create_graph=True
            gradients = unfused_gradients([*inputs, bias, key_weight], ctx.needs_input_grad, ctx.options, gradient)
        else:
            run = _Run(*inputs, key_weight, *ctx.options)
            with without_autocast(gradient.device):
                gradients = *run.backward(gradient, summaries, query_statistics, key_statistics), None
        return *gradients, None, None, None, None


def unfused_gradients(
    inputs: list[Tensor | None], needed: tuple[bool, ...], options: tuple, gradient: Tensor
) -> list[Tensor | None]:
    """Gradients of ``unfused_attention``, which autograd can differentiate again and ``vmap`` can batch.

    Args:
        inputs: the tensors among the arguments of ``unfused_attention``.
        needed: for each input, whether to compute its gradient.
        options: the other arguments of ``unfused_attention``.
        gradient: (B, N, C), gradient of the output.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # If one input depends on another, the gradient of the latter must not include the path through the former. Hence the
        # gradients are those of aliases, which do not depend on each other.
        aliases = [None if value is None else value.view_as(value) for value in inputs]
        out = unfused_attention(*aliases, *options)
        wanted = [alias for alias, is_needed in zip(aliases, needed, strict=False) if is_needed]
        gradients = iter(torch.autograd.grad(out, wanted, gradient, create_graph=create_graph))
    return [next(gradients) if is_needed else None for _, is_needed in zip(aliases, needed, strict=False)]


class _Run:
    """One call of ``focused_attention``: its tensors and options, and the forward and backward computations per block."""

    def __init__(self, q, k, v, position, scale, kernel, key_weight, num_heads, power, grid, num_prefix):
        self.q = q
        self.k = k
        self.v = v
        self.position = position
        self.kernel = kernel
        self.key_weight = key_weight
        self.num_heads = num_heads
        self.power = power
        self.grid = grid
        self.num_prefix = num_prefix
        self.num_images, self.num_queries, self.channels = q.shape
        self.num_keys = k.shape[1]
        self.head_dim = q.shape[2] // num_heads
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.inverse_scale = split_heads(1 / scale.to(self.dtype), num_heads)  # (1, H, 1, D)
        self.offset = EPS * self.inverse_scale
        self.zero = torch.zeros_like(self.inverse_scale[..., :1, :1])
        self.blocks = Blocks(self.num_images, max(self.num_queries, self.num_keys), self.channels, q.device)
        self.scratch = Scratch(self.blocks.size // self.head_dim * (self.head_dim + 1), q, self.dtype)

    # Used in both passes

    def features(
        self, tokens: Tensor, statistics: Tensor, position: Tensor | None = None, *, reuse_statistics: bool
    ) -> Features:
        """Features of a block of tokens.

        Args:
            tokens: (b, n, C).
            statistics: (3, b, 1, n, 1), see ``Features``.
            position: (1, n, C), added to the tokens.
            reuse_statistics: read ``statistics`` (backward pass); if False, compute and write them (forward pass).
        """
        tokens = split_heads(tokens, self.num_heads)
        positive, unit, powers = (self.scratch(name, *tokens.shape) for name in ("positive", "unit", "powers"))
        if position is None:
            torch.maximum(tokens, self.zero, out=positive)  # unlike clamp, accepts an output of another dtype
        else:
            torch.add(tokens, split_heads(position, self.num_heads), out=positive).clamp_(min=0)
        torch.addcmul(self.offset, positive, self.inverse_scale, out=unit)
        if not reuse_statistics:
            torch.amax(unit.amax(dim=-1, keepdim=True), dim=1, keepdim=True, out=statistics[0])
        unit.div_(statistics[0])  # prevents overflow and underflow of the powers
        torch.pow(unit, self.power, out=powers)
        if not reuse_statistics:
            statistics[1] = norm_over_channels(unit)
            statistics[2] = norm_over_channels(powers)
        return Features(positive, unit, powers, statistics)

    def query_features(self, images: slice, tokens: slice, statistics: Tensor, *, reuse_statistics: bool) -> Features:
        return self.features(self.q[images, tokens], statistics[:, images, :, tokens], reuse_statistics=reuse_statistics)

    def key_features(self, images: slice, tokens: slice, statistics: Tensor, *, reuse_statistics: bool) -> Features:
        return self.features(
            self.k[images, tokens],
            statistics[:, images, :, tokens],
            self.position[:, tokens],
            reuse_statistics=reuse_statistics,
        )

    def key_factor(self, keys: Features, images: slice, tokens: slice) -> Tensor:
        """Factor c of each key times the key's weight (1 / M by default, 0 for masked keys). (b, 1, n, 1)."""
        if self.key_weight is None:
            return keys.factor / self.num_keys
        return keys.factor * self.key_weight[images, :, tokens]

    def weighted_values(self, factor: Tensor, images: slice, tokens: slice) -> Tensor:
        """Weighted values e = [c * v, c] / M. (b, H, n, D + 1)."""
        values = split_heads(self.v[images, tokens], self.num_heads)
        weighted = self.scratch("values", *values.shape[:-1], self.head_dim + 1)
        torch.mul(values, factor, out=weighted[..., :-1])
        weighted[..., -1:] = factor
        return weighted

    def attend(self, queries: Features, summary: Tensor) -> tuple[Tensor, Tensor]:
        """Numerator (b, H, n, D) and denominator (b, H, n, 1) of the queries' outputs."""
        product = self.scratch("product", *queries.powers.shape[:-1], self.head_dim + 1)
        torch.matmul(queries.powers, summary, out=product)
        product[..., -1:] += EPS / queries.factor
        return product[..., :-1], product[..., -1:]

    def as_maps(self, tokens: Tensor) -> Tensor:
        """Convert tokens to maps in channels-last memory format, without prefix tokens. (b, n, C) -> (b, C, height, width)."""
        tokens = tokens[:, self.num_prefix :].contiguous()
        return tokens.view(len(tokens), *self.grid, self.channels).permute(0, 3, 1, 2)

    def as_tokens(self, maps: Tensor) -> Tensor:
        """Inverse of ``as_maps``, split into heads, with zeros for prefix tokens: (b, H, n, D)."""
        tokens = maps.permute(0, 2, 3, 1).flatten(1, 2).to(self.dtype)
        return split_heads(F.pad(tokens, (0, 0, self.num_prefix, 0)) if self.num_prefix else tokens, self.num_heads)

    # Forward

    def forward(self, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output (B, N, C), summaries (B, H, D, D + 1), and statistics of queries and keys."""
        out = self.v.new_empty(self.num_images, self.num_queries, self.channels)
        summaries = self.q.new_zeros(self.num_images, self.num_heads, self.head_dim, self.head_dim + 1, dtype=self.dtype)
        query_statistics, key_statistics = (
            self.q.new_empty(3, self.num_images, 1, count, 1, dtype=self.dtype) for count in (self.num_queries, self.num_keys)
        )
        for images in self.blocks.images():
            summary = summaries[images]
            for tokens in self.blocks.tokens(self.num_keys):
                keys = self.key_features(images, tokens, key_statistics, reuse_statistics=False)
                values = self.weighted_values(self.key_factor(keys, images, tokens), images, tokens)
                summary += keys.powers.transpose(-2, -1) @ values
            convolved = self.convolve(images, bias)
            for tokens in self.blocks.tokens(self.num_queries):
                numerator, denominator = self.attend(
                    self.query_features(images, tokens, query_statistics, reuse_statistics=False), summary
                )
                block = split_heads(out[images, tokens], self.num_heads)
                if convolved is None:
                    torch.div(numerator, denominator, out=block)
                else:
                    torch.addcdiv(convolved[:, :, tokens], numerator, denominator, out=block)
        return out, summaries, query_statistics, key_statistics

    def convolve(self, images: slice, bias: Tensor | None) -> Tensor | None:
        """The depthwise convolution of the values, (b, H, N, D); None without a kernel."""
        if self.kernel is None:
            return None
        maps, kernel, bias = self.as_maps(self.v[images]), self.kernel.to(self.v.dtype), bias.to(self.v.dtype)
        return self.as_tokens(torch.conv2d(maps, kernel, bias, padding=kernel.shape[-1] // 2, groups=self.channels))

    # Backward

    def backward(
        self, gradient: Tensor, summaries: Tensor, query_statistics: Tensor, key_statistics: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, position, scale, kernel and bias.

        Args:
            gradient: (B, N, C), gradient of the output.
            summaries, query_statistics, key_statistics: from ``forward``.
        """
        gradient = gradient.contiguous()
        # grad_q, grad_k and grad_v share a buffer: if q, k and v are parts of one tensor, ``split_channels`` returns the
        # buffer as the gradient of that tensor, without a copy. If N and M differ, only grad_k and grad_v share a buffer.
        if self.num_queries == self.num_keys:
            grad_q, grad_k, grad_v = self.q.new_empty(self.num_images, self.num_queries, 3 * self.channels).chunk(3, dim=-1)
        else:
            grad_q = torch.empty_like(self.q, memory_format=torch.contiguous_format)
            grad_k, grad_v = self.k.new_empty(self.num_images, self.num_keys, 2 * self.channels).chunk(2, dim=-1)
        self.grad_log_inverse_scale = torch.zeros_like(self.inverse_scale)
        grad_kernel = None if self.kernel is None else torch.zeros_like(self.kernel)
        for images in self.blocks.images():
            grad_summary = self.query_gradients(images, gradient[images], summaries[images], query_statistics, grad_q[images])
            conv_grad_v = None
            if self.kernel is not None:
                conv_grad_v, block_grad_kernel = self.convolution_gradients(images, gradient[images])
                grad_kernel += block_grad_kernel
            self.key_gradients(images, grad_summary, key_statistics, conv_grad_v, grad_k[images], grad_v[images])
        grad_scale = -(self.grad_log_inverse_scale * self.inverse_scale).transpose(1, 2).flatten(2)
        grad_bias = None if self.kernel is None else gradient[:, self.num_prefix :].sum(dim=(0, 1))
        grad_position = grad_k.sum(dim=0, keepdim=True, dtype=self.position.dtype)
        return grad_q, grad_k, grad_v, grad_position, grad_scale, grad_kernel, grad_bias

    def query_gradients(self, images: slice, gradient: Tensor, summary: Tensor, statistics: Tensor, grad_q: Tensor) -> Tensor:
        """Write the gradient of q to ``grad_q``, and return the gradient of the summaries."""
        grad_summary = torch.zeros_like(summary)
        for tokens in self.blocks.tokens(self.num_queries):
            queries = self.query_features(images, tokens, statistics, reuse_statistics=True)
            numerator, denominator = self.attend(queries, summary)
            grad_product = self.scratch("values", *numerator.shape[:-1], self.head_dim + 1)
            grad_numerator, grad_denominator = grad_product[..., :-1], grad_product[..., -1:]
            torch.div(split_heads(gradient[:, tokens], self.num_heads), denominator, out=grad_numerator)
            numerator.mul_(grad_numerator)
            torch.sum(numerator, dim=-1, keepdim=True, out=grad_denominator)
            grad_denominator.div_(denominator).neg_()
            grad_log_factor = -EPS / queries.factor * grad_denominator.sum(dim=1, keepdim=True)
            grad_summary += queries.powers.transpose(-2, -1) @ grad_product
            scaled_grad_powers = self.scratch("gradient", *queries.powers.shape)
            torch.matmul(grad_product, self.power * summary.transpose(-2, -1), out=scaled_grad_powers)
            self.feature_gradients(queries, scaled_grad_powers, grad_log_factor, grad_q[:, tokens])
        return grad_summary

    def key_gradients(
        self,
        images: slice,
        grad_summary: Tensor,
        statistics: Tensor,
        conv_grad_v: Tensor | None,
        grad_k: Tensor,
        grad_v: Tensor,
    ) -> None:
        """Write the gradients of k and v; ``conv_grad_v``, (b, H, N, D), is the part of grad_v from the convolution."""
        for tokens in self.blocks.tokens(self.num_keys):
            keys = self.key_features(images, tokens, statistics, reuse_statistics=True)
            factor = self.key_factor(keys, images, tokens)
            values = self.weighted_values(factor, images, tokens)
            grad_values = self.scratch("product", *values.shape)
            torch.matmul(keys.powers, grad_summary, out=grad_values)
            grad_block = split_heads(grad_v[:, tokens], self.num_heads)
            if conv_grad_v is None:
                torch.mul(grad_values[..., :-1], factor, out=grad_block)
            else:
                torch.addcmul(conv_grad_v[:, :, tokens], grad_values[..., :-1], factor, out=grad_block)
            grad_log_factor = grad_values.mul_(values).sum(dim=(1, 3), keepdim=True)
            scaled_grad_powers = self.scratch("gradient", *keys.powers.shape)
            torch.matmul(values, self.power * grad_summary.transpose(-2, -1), out=scaled_grad_powers)
            self.feature_gradients(keys, scaled_grad_powers, grad_log_factor, grad_k[:, tokens])

    def feature_gradients(
        self, features: Features, scaled_grad_powers: Tensor, grad_log_factor: Tensor, grad_tokens: Tensor
    ) -> None:
        """Write the gradient of a block of q or k.

        Args:
            scaled_grad_powers: (b, H, n, D), p times the gradient of u; overwritten.
            grad_log_factor: (b, 1, n, 1), gradient of the loss with respect to log(c).
            grad_tokens: (b, n, C), the gradient to write.
        """
        # Gradient of the loss with respect to log(x):
        #     scaled_grad_powers * u + grad_log_factor * (t^2 / |t|^2 - p u^2 / |u|^2).
        # max(x) is treated as a constant, because it cancels in the output.
        positive, unit, powers = features.positive, features.unit, features.powers
        scaled_grad_powers.addcmul_(powers, -self.power * grad_log_factor / features.powers_norm.square()).mul_(powers)
        torch.mul(unit, grad_log_factor / features.unit_norm.square(), out=powers)
        grad_log_x = scaled_grad_powers.addcmul_(powers, unit)
        self.grad_log_inverse_scale += grad_log_x.sum(dim=(0, 2), keepdim=True)
        torch.ops.aten.threshold_backward.grad_input(grad_log_x, positive, 0, grad_input=grad_log_x)
        torch.div(grad_log_x, positive.add_(EPS), out=split_heads(grad_tokens, self.num_heads))

    def convolution_gradients(self, images: slice, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the values, (b, H, N, D), and of the kernel."""
        maps, gradient_maps, padding = self.as_maps(self.v[images]), self.as_maps(gradient), self.kernel.shape[-1] // 2
        uses_correlation = maps.device.type == "cpu" and min(self.grid) > self.kernel.shape[-1] > 3
        grad_maps, grad_kernel, _ = torch.ops.aten.convolution_backward(
            gradient_maps,
            maps,
            self.kernel.to(maps.dtype),
            bias_sizes=None,
            stride=[1, 1],
            padding=[padding, padding],
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=self.channels,
            output_mask=[True, not uses_correlation, False],
        )
        if uses_correlation:
            grad_kernel = correlate(maps, gradient_maps, padding)
        return self.as_tokens(grad_maps), grad_kernel.to(self.kernel.dtype)


def correlate(maps: Tensor, gradient: Tensor, padding: int) -> Tensor:
    """Gradient of a depthwise kernel, (C, 1, side, side): convolve the maps with the output gradient as the kernel.

    On a CPU, for kernels larger than 3 x 3, this takes one third of the time of torch's backward pass (one tenth in bfloat16).

    Args:
        maps, gradient: input of the convolution and gradient of its output, (b, C, height, width).
        padding: side // 2.
    """
    num_images, channels, height, width = maps.shape
    product = torch.conv2d(
        maps.reshape(1, -1, height, width),
        gradient.reshape(-1, 1, height, width),
        padding=padding,
        groups=num_images * channels,
    )
    return product.view(num_images, channels, 1, *product.shape[-2:]).sum(dim=0)


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
    """Focused linear attention plus a depthwise convolution of the values, (B, N, C) in the dtype of ``v``.

    First derivatives have a custom backward pass; derivatives of higher order are those of ``unfused_attention``. Except for
    the convolution, computations are in float32 or higher precision.

    Args:
        q: (B, N, C).
        k, v: (B, M, C).
        position: (1, M, C), added to k.
        scale: (1, 1, C), positive; divides q and k.
        kernel, bias: (C, 1, side, side) and (C,) of the convolution, which requires M = N; None omits it.
        key_weight: (B, 1, M, 1), weight of each key in sums over the keys; 1 / M by default.
        power: exponent p of the focused function, eq. 6 of the paper; 1 for plain linear attention.
        grid: height and width of the token map.
        num_prefix_tokens: tokens before the map, excluded from the convolution.
    """
    return _FocusedAttention.apply(
        q, k, v, position, scale, kernel, bias, key_weight, num_heads, power, grid, num_prefix_tokens
    )


def unfused_attention(
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
    grid: tuple[int, int],
    num_prefix_tokens: int,
) -> Tensor:
    """``focused_attention``, computed with standard torch operations, so that it has derivatives of any order and kind."""
    with without_autocast(q.device):
        dtype = torch.promote_types(q.dtype, torch.float32)
        queries, keys = ((F.relu(x) + EPS) / scale for x in (q.to(dtype), k.to(dtype) + position))
        if power != 1:  # norms are over all channels of a token, before the split into heads
            queries, keys = focus(queries, power), focus(keys, power)
        queries, keys, values = (split_heads(x, num_heads) for x in (queries, keys, v.to(dtype)))
        if key_weight is None:
            out = linear_attention(queries, keys, values, eps=EPS)
        else:
            out = linear_attention(queries, keys * key_weight, values, num_keys=1, eps=EPS)
        out = out.transpose(1, 2).flatten(2).to(v.dtype)  # (B, N, C)
        return out if kernel is None else out + depthwise_convolution(v, kernel, bias, grid, num_prefix_tokens)


def depthwise_convolution(v: Tensor, kernel: Tensor, bias: Tensor, grid: tuple[int, int], num_prefix_tokens: int = 0) -> Tensor:
    """Depthwise convolution of the map tokens of ``v``, (B, N, C), in its dtype; the result is zero for prefix tokens."""
    maps = v[:, num_prefix_tokens:].transpose(1, 2).unflatten(-1, grid)  # (B, C, height, width)
    kernel, bias = kernel.to(v.dtype), bias.to(v.dtype)
    maps = F.conv2d(maps, kernel, bias, padding=kernel.shape[-1] // 2, groups=len(kernel))
    tokens = maps.flatten(2).transpose(1, 2)
    return F.pad(tokens, (0, 0, num_prefix_tokens, 0)) if num_prefix_tokens else tokens


class _SplitChannels(torch.autograd.Function):
    """See ``split_channels``."""

    @staticmethod
    def forward(ctx, packed: Tensor, num_parts: int):
        ctx.shape = packed.shape
        return packed.chunk(num_parts, dim=-1)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        if torch.is_grad_enabled() or is_batched(gradients[0]):  # create_graph=True: they may be differentiated again
            return torch.cat(gradients, dim=-1), None
        first, width = gradients[0], gradients[0].shape[-1]
        storage, offset = first.untyped_storage()._cdata, first.storage_offset()
        adjacent = first.stride(-1) == 1 and all(
            part.untyped_storage()._cdata == storage
            and part.storage_offset() == offset + index * width
            and part.stride() == first.stride()
            for index, part in enumerate(gradients)
        )
        return first.as_strided(ctx.shape, first.stride()) if adjacent else torch.cat(gradients, dim=-1), None


def split_channels(packed: Tensor, num_parts: int) -> tuple[Tensor, ...]:
    """Split the last dimension into views of equal size.

    The backward pass does not copy gradients that are adjacent in memory, such as those from ``focused_attention``.
    """
    if is_transformed():
        return packed.chunk(num_parts, dim=-1)
    return _SplitChannels.apply(packed, num_parts)
