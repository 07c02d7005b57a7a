"""Focused linear attention in standard torch operations (FLatten Transformer, https://arxiv.org/abs/2308.00442).

Equation numbers refer to the paper. ``Inputs`` and ``Options`` are the arguments of every form of focused attention: this one
and the faster ones of ``fused_attention`` and ``kernel_operator``.

Shapes: B images or windows, N queries, M keys, H heads, D channels per head, C = H * D.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # added to features and normalisers to prevent division by zero


class Inputs(NamedTuple):
    """Tensors of one call of focused attention.

    Attributes:
        q, k, v: (B, N, C), (B, M, C) and (B, M, C), or packed, see ``unpack``.
        position: (1, M, C), added to k.
        scale: (1, 1, C), positive; divides q and k.
        kernel, bias: (C, 1, side, side) and (C,) of a depthwise convolution of v that is added to the output, which requires
            M = N; None omits it.
        key_weight: (B, 1, M, 1), weight of each key in sums over the keys; 1 / M if None.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    position: Tensor
    scale: Tensor
    kernel: Tensor | None
    bias: Tensor | None
    key_weight: Tensor | None


class Options(NamedTuple):
    """Numbers of one call of focused attention.

    Attributes:
        power: exponent p of the focused function, eq. 6; 1 for plain linear attention.
        height, width: of the token map of v, for the convolution.
        num_prefix_tokens: tokens before the map, excluded from the convolution.
    """

    num_heads: int
    power: float
    height: int
    width: int
    num_prefix_tokens: int


def unpack(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as separate views. If k and v are None, q contains all three, (B, N, 3C); if v is None, k contains both.

    Forms of attention take the packed tensor of a joint projection as it is and return one gradient for it. Its parts would
    have separate gradients, which autograd would have to concatenate.
    """
    if k is None:
        q, k, v = q.chunk(3, dim=-1)
    elif v is None:
        k, v = k.chunk(2, dim=-1)
    return q, k, v


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Disable autocast: sums over thousands of keys would overflow or lose digits in half precision."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """View of the channels as heads. (b, n, C) -> (b, H, n, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def focus(x: Tensor, power: float) -> Tensor:
    """Focused function f_p (eq. 6): raise elements to ``power`` and restore the norm of each vector. x: (..., C), positive."""
    largest = x.amax(dim=-1, keepdim=True)
    unit = x / largest  # prevents overflow and underflow of the powers; ``largest`` is multiplied back below
    sharp = unit**power
    return sharp * (largest * unit.norm(dim=-1, keepdim=True) / sharp.norm(dim=-1, keepdim=True))


def features(tokens: Tensor, scale: Tensor, power: float) -> Tensor:
    """Features of queries or keys, whose dot products are the similarities. tokens: (B, n, C)."""
    x = (F.relu(tokens) + EPS) / scale
    return x if power == 1 else focus(x, power)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, num_keys: Tensor | int | None = None, *, eps: float = 0.0) -> Tensor:
    """Linear attention: similarities are dot products q . k, and the N x M matrix is not computed (eq. 3).

    Args:
        q, k: (B, H, N, D) and (B, H, M, D), with non-negative dot products q . k; k must be zero for masked keys.
        v: (B, H, M, D').
        num_keys: number of unmasked keys, an integer or a tensor (B, 1, 1, 1); M by default.
        eps: added to the normaliser (the mean of q . k over the keys), which is zero if all similarities are zero.

    Returns:
        (B, H, N, D'): means of ``v`` weighted by q . k.
    """
    num_keys = k.shape[-2] if num_keys is None else num_keys
    key_mean = k.sum(dim=-2, keepdim=True) / num_keys  # (B, H, 1, D)
    summary = (k / num_keys).transpose(-2, -1) @ v  # (B, H, D, D')
    normaliser = q @ key_mean.transpose(-2, -1) + eps  # (B, H, N, 1)
    return (q @ summary) / normaliser


def plain_attention(inputs: Inputs, options: Options) -> Tensor:
    """Focused linear attention plus a depthwise convolution of the values, (B, N, C) in the dtype of v.

    Except for the convolution, computations are in float32 or higher precision. The result has derivatives of any order and
    kind.
    """
    q, k, v = unpack(*inputs[:3])
    with without_autocast(q.device):
        dtype = torch.promote_types(q.dtype, torch.float32)
        # Norms are over all channels of a token, before the split into heads.
        queries, keys = (features(x, inputs.scale, options.power) for x in (q.to(dtype), k.to(dtype) + inputs.position))
        queries, keys, values = (split_heads(x, options.num_heads) for x in (queries, keys, v.to(dtype)))
        if inputs.key_weight is None:
            out = linear_attention(queries, keys, values, eps=EPS)
        else:
            out = linear_attention(queries, keys * inputs.key_weight, values, num_keys=1, eps=EPS)
        out = out.transpose(1, 2).flatten(2).to(v.dtype)  # (B, N, C)
        if inputs.kernel is None:
            return out
        grid = options.height, options.width
        return out + depthwise_convolution(v, inputs.kernel, inputs.bias, grid, options.num_prefix_tokens)


def depthwise_convolution(v: Tensor, kernel: Tensor, bias: Tensor, grid: tuple[int, int], num_prefix_tokens: int = 0) -> Tensor:
    """Depthwise convolution of the map tokens of ``v``, (B, N, C), in its dtype; the result is zero for prefix tokens."""
    maps = v[:, num_prefix_tokens:].transpose(1, 2).unflatten(-1, grid)  # (B, C, height, width)
    kernel, bias = kernel.to(v.dtype), bias.to(v.dtype)
    maps = F.conv2d(maps, kernel, bias, padding=kernel.shape[-1] // 2, groups=len(kernel))
    tokens = maps.flatten(2).transpose(1, 2)
    return F.pad(tokens, (0, 0, num_prefix_tokens, 0)) if num_prefix_tokens else tokens


def plain_gradients(inputs: Inputs, options: Options, needed: tuple[bool, ...], gradient: Tensor) -> list[Tensor | None]:
    """Gradients of ``plain_attention``, which autograd can differentiate again and ``vmap`` can batch.

    Args:
        needed: for each of ``inputs``, whether to compute its gradient.
        gradient: (B, N, C), gradient of the output.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # If one input depends on another, the gradient of the latter must not include the path through the former. Hence the
        # gradients are those of aliases, which do not depend on each other.
        aliases = Inputs(*(None if value is None else value.view_as(value) for value in inputs))
        wanted = [alias for alias, is_needed in zip(aliases, needed, strict=True) if is_needed]
        gradients = iter(torch.autograd.grad(plain_attention(aliases, options), wanted, gradient, create_graph=create_graph))
    return [next(gradients) if is_needed else None for is_needed in needed]
