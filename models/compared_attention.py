"""The attention functions that the paper compares with focused linear attention, and the softmax attention of the backbones.

Shapes: B images or windows, N queries, M keys, H heads, D channels per head, C = H * D.

All attention functions take q (B, H, N, D), k (B, H, M, D) and v (B, H, M, D'), and return (B, H, N, D'); D' is the number of
channels of v. A ``key_mask`` is (B, 1, M, 1) bool, False for masked keys; at least one key of every image or window must not be
masked.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .plain_attention import EPS, linear_attention
from .tracing import is_function_transformed


def efficient_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Efficient attention (https://arxiv.org/abs/1812.01243): softmax of q over its channels and of k over its tokens."""
    if key_mask is not None:
        k = k.masked_fill(~key_mask, float("-inf"))
    return q.softmax(dim=-1) @ (k.softmax(dim=-2).transpose(-2, -1) @ v)


def hydra_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Hydra attention (https://arxiv.org/abs/2209.07484): cosine similarity; every channel acts as a head.

    q (B, 1, N, C), k and v (B, 1, M, C) are passed as a single head with all C channels, over which q and k are normalised.
    """
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if key_mask is not None:
        k = k * key_mask
    return q * (k * v).sum(dim=-2, keepdim=True)


def angular_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Linear term of Castling-ViT's attention (https://arxiv.org/abs/2211.10526), with similarity 1/2 + cos(q, k) / pi."""
    q, k = F.normalize(q, dim=-1) / torch.pi, F.normalize(k, dim=-1)
    ones = torch.ones_like(k[..., :1])
    if key_mask is not None:
        k, ones = k * key_mask, ones * key_mask
    q = torch.cat([q, torch.full_like(q[..., :1], 0.5)], dim=-1)  # (q, 1/2) . (k, 1) = 1/2 + q . k
    k = torch.cat([k, ones], dim=-1)
    return linear_attention(q, k, v, count_keys(key_mask))


def relu_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Vanilla linear attention with the similarity (relu(q) + EPS) . (relu(k) + EPS)."""
    q, k = F.relu(q) + EPS, F.relu(k) + EPS
    if key_mask is not None:
        k = k * key_mask
    return linear_attention(q, k, v, count_keys(key_mask))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Softmax attention, softmax(q k^T / sqrt(D)) v, the baseline of the paper's comparison."""
    return scaled_dot_product_attention(q, k, v, None if key_mask is None else key_mask.transpose(-2, -1))


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, dropout: float = 0.0
) -> Tensor:
    """``F.scaled_dot_product_attention``, which also supports ``torch.func``, forward-mode derivatives and empty batches.

    The kernels of torch cannot differentiate a mask under ``torch.func.vmap``, have no forward-mode derivatives, and give the
    mask no gradient if the batch is empty. In these cases, this function computes the attention with standard operations.

    Args:
        mask: added to the attention logits, or bool, False for keys to ignore; must broadcast to (B, H, N, M).
    """
    compiled = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if compiled or not (is_function_transformed() or q.shape[0] == 0):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    return F.dropout(logits.softmax(dim=-1), dropout) @ v


def count_keys(key_mask: Tensor | None) -> Tensor | None:
    """Number of unmasked keys, (B, 1, 1, 1); None without a mask."""
    return None if key_mask is None else key_mask.sum(dim=-2, keepdim=True)


class ComparedAttention(NamedTuple):
    """An attention function that can replace focused linear attention in an ablation, and how to call it.

    Attributes:
        function: maps (q, k, v, key_mask) to the output; shapes as in the module docstring.
        single_head: pass q, k and v as one head with all channels.
        has_convolution: add a depthwise convolution of v to the output, as in focused linear attention.
    """

    function: Callable[..., Tensor]
    single_head: bool = False
    has_convolution: bool = False


COMPARED_ATTENTIONS = {
    "relu": ComparedAttention(relu_attention),
    "efficient": ComparedAttention(efficient_attention),
    "hydra": ComparedAttention(hydra_attention, single_head=True),
    "angular": ComparedAttention(angular_attention),
    "enhanced": ComparedAttention(relu_attention, has_convolution=True),
    "softmax": ComparedAttention(softmax_attention),
}


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention with qkv and output projections. (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, attn_drop: float, proj_drop: float, **factory):
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def attend(self, x: Tensor, bias: Tensor | None = None, region: Tensor | None = None) -> Tensor:
        """Project x to q, k and v, apply softmax attention, and project the output.

        Args:
            x: (B, N, C).
            bias: (1, H, N, N), added to the attention logits.
            region: (nW, N) region ids for nW windows per image; requires a bias. Tokens attend only to tokens with the same
                id. Window i of the batch uses row i modulo nW.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, D)
        attn_drop = self.attn_drop if self.training else 0.0
        if bias is not None:
            bias = bias.to(q.dtype)
        if region is None:
            x = scaled_dot_product_attention(q, k, v, bias, dropout=attn_drop)
        else:
            # Masks differ between windows but not between images: treat windows as heads, so that all images share one mask.
            num_windows = len(region)
            masked = region.unsqueeze(1) != region.unsqueeze(2)  # (nW, N, N)
            bias = bias.masked_fill(masked.unsqueeze(1), float("-inf")).flatten(0, 1)  # (nW * H, N, N)
            q, k, v = (t.unflatten(0, (-1, num_windows)).flatten(1, 2) for t in (q, k, v))  # (B / nW, nW * H, N, D)
            x = scaled_dot_product_attention(q, k, v, bias.unsqueeze(0), dropout=attn_drop)
            x = x.unflatten(1, (num_windows, -1)).flatten(0, 1)  # (B, H, N, D)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))
