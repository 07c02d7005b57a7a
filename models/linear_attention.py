"""Focused linear attention (FLatten Transformer, https://arxiv.org/abs/2308.00442).

Shapes: B images or windows, N queries, M keys, H heads, D channels per head, C = H * D.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import COMPARED_ATTENTIONS, count_keys, linear_attention
from models.fused_attention import EPS, focused_attention, is_transformed, without_autocast
from models.layers import PositionTable, resize_grid, resized_parameter, to_pair


def focus(x: Tensor, power: float) -> Tensor:
    """Focused function f_p (eq. 6): raise elements to ``power`` and restore the norm of each vector. x: (..., C), positive."""
    largest = x.amax(dim=-1, keepdim=True)
    unit = x / largest  # prevents overflow and underflow of the powers; ``largest`` is multiplied back below
    sharp = unit**power
    return sharp * (largest * unit.norm(dim=-1, keepdim=True) / sharp.norm(dim=-1, keepdim=True))


ATTENTION_KINDS = ("focused", *COMPARED_ATTENTIONS)


def stretch_tokens(x: Tensor, num_tokens: int) -> Tensor:
    """Change the number of tokens by linear interpolation of the token sequence. (B, M, C) -> (B, num_tokens, C).

    The tokens are interpolated as a 1-D sequence, not as a 2-D map, because released weights were trained this way.
    Equivalent to ``F.interpolate(mode="linear")`` along the tokens, which is slow on GPUs.
    """
    num_input_tokens = x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    position = (torch.arange(num_tokens, device=x.device, dtype=dtype) + 0.5) * (num_input_tokens / num_tokens) - 0.5
    position = position.clamp(0, num_input_tokens - 1)
    lower = position.long()
    upper = (lower + 1).clamp(max=num_input_tokens - 1)
    return torch.lerp(x[:, lower], x[:, upper], (position - lower).to(x.dtype).unsqueeze(-1))


class FocusedLinearAttention(nn.Module):
    """Focused linear attention, or an alternative selected by ``kind``, for projected q, k and v of a token map.

    The module has no projections: the backbones' subclasses add them, so that parameter names match those of released
    checkpoints (``attn.qkv``, ``attn.dwc``, ...). It has no attention dropout, because linear attention has no attention
    matrix.

    Args:
        dim: channels C of q, k and v.
        num_heads: heads H; must divide ``dim``.
        grid: height and width of the queries' token map, N = height * width (+ prefix tokens).
        key_grid: height and width of the token map of keys and values if it is spatially reduced; ``grid`` by default.
        num_prefix_tokens: number of tokens before the map (such as a class token), in queries and keys.
        focusing_factor: exponent p of the focused function f_p, eq. 6.
        kernel_size: side of the depthwise convolution's kernel, odd.
        kind: one of ``ATTENTION_KINDS``; only ``focused`` has a positional encoding and a scale.
        focusing: apply the focused function f_p; has an effect on ``focused`` only.
        rank_restoration: add the depthwise convolution of v; has an effect on ``focused`` and ``enhanced`` only.

    Attributes:
        fused: for kind ``focused``, use a custom backward pass, which supports only first derivatives. False selects the
            unfused form, which supports derivatives of any order but needs more time and memory.

    Raises:
        ValueError: an unknown kind, an even kernel, or heads that do not divide the channels.
    """

    fused = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: int | tuple[int, int],
        *,
        key_grid: int | tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
        focusing_factor: float = 3,
        kernel_size: int = 5,
        kind: str = "focused",
        focusing: bool = True,
        rank_restoration: bool = True,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}; choose num_heads from the divisors of dim")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: an even kernel changes the size of the map; use an odd one")
        if kind not in ATTENTION_KINDS:
            raise ValueError(f"kind={kind!r}: choose one of {', '.join(ATTENTION_KINDS)}")
        self.dim = dim
        self.num_heads = num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.grid = to_pair(grid)
        self.key_grid = self.grid if key_grid is None else to_pair(key_grid)
        self.focusing_factor = focusing_factor
        self.kind = kind
        self.focusing = focusing
        if kind == "focused":
            num_keys = num_prefix_tokens + self.key_grid[0] * self.key_grid[1]
            self.scale = nn.Parameter(torch.zeros(1, 1, dim))
            self.positional_encoding = nn.Parameter(torch.zeros(1, num_keys, dim))
        has_convolution = rank_restoration and (kind == "focused" or COMPARED_ATTENTIONS[kind].has_convolution)
        head_dim = dim // num_heads
        # One filter per channel of a head, shared by all heads.
        self.dwc = (
            nn.Conv2d(head_dim, head_dim, kernel_size, padding=kernel_size // 2, groups=head_dim) if has_convolution else None
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: tuple[int, int] | None = None,
        key_grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of q over k and v, before any output projection.

        Args:
            q: (B, N, C).
            k, v: (B, M, C); M < N with spatial reduction.
            grid, key_grid: heights and widths of the token maps of this call if they differ from those given to the
                constructor; the positional encoding is then resized by bicubic interpolation.
            key_mask: (B, M) bool, False for masked keys (padding). The output is zero if all keys of an image are masked.

        Returns:
            (B, N, C), in the dtype of ``v``.

        Raises:
            ValueError: the number of tokens of q, k or v does not match ``grid`` or ``key_grid``.
        """
        grid = grid or self.grid
        key_grid = key_grid or (grid if self.key_grid == self.grid else self.key_grid)
        self._check_tokens("q", q, "grid", grid)
        self._check_tokens("k", k, "key_grid", key_grid)
        self._check_tokens("v", v, "key_grid", key_grid)
        has_keys = None
        if key_mask is not None:
            v = v * key_mask.unsqueeze(-1)
            has_keys = key_mask.any(dim=1, keepdim=True)  # (B, 1)
            # If all keys are masked, the output would be 0 / 0. Attend to all keys instead; their values are zero.
            key_mask = (key_mask | ~has_keys)[:, None, :, None]
        kernel, bias = self.local_filter()
        if self.kind == "focused" and self.fused and not is_transformed():
            out = self._attend_fused(q, k, v, grid, key_grid, key_mask, kernel, bias)
        else:  # only "focused" has a fused form; compilers and tracers need standard operations
            out = self._attend_unfused(q, k, v, key_grid, key_mask)
            if kernel is not None:
                out = self._restore_rank(out, v, grid, kernel, bias)
        return out if has_keys is None else out * has_keys.unsqueeze(-1)

    forward = attend

    def local_filter(self) -> tuple[Tensor | None, Tensor | None]:
        """Kernel (C, 1, side, side) and bias (C,) of the depthwise convolution of v; (None, None) without it."""
        if self.dwc is None:
            return None, None
        # All heads share the filters. Repeating the filters avoids splitting the value map into heads, which would copy it.
        return self.dwc.weight.repeat(self.num_heads, 1, 1, 1), self.dwc.bias.repeat(self.num_heads)

    def attention_matrix(
        self, q: Tensor, k: Tensor, *, key_grid: tuple[int, int] | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        """Attention weights of ``attend``, without its convolution.

        For analysis only: time and memory are quadratic in the number of tokens. See ``attend`` for the arguments.

        Returns:
            (B, H, N, M), to be multiplied by the values of each head; (B, C, N, M) for ``hydra``, where every channel is a
            head.
        """
        num_keys = k.shape[1]
        one_hot = torch.eye(num_keys, dtype=k.dtype, device=k.device)
        mask = None
        if key_mask is not None:
            one_hot = one_hot * key_mask.unsqueeze(-1)
            mask = (key_mask | ~key_mask.any(dim=1, keepdim=True))[:, None, :, None]
        one_hot = one_hot.expand(k.shape[0], -1, -1)  # (B, M, M)
        key_grid = key_grid or self.key_grid
        if self.kind != "focused" and COMPARED_ATTENTIONS[self.kind].single_head:
            columns = []
            for column in one_hot.unbind(-1):
                values = column.unsqueeze(-1).expand(-1, -1, self.dim)
                columns.append(self._attend_unfused(q, k, values, key_grid, mask))
            return torch.stack(columns, dim=-1).transpose(1, 2)
        weights = self._attend_unfused(q, k, one_hot.repeat(1, 1, self.num_heads), key_grid, mask)  # (B, N, H * M)
        return weights.unflatten(-1, (self.num_heads, num_keys)).transpose(1, 2)

    def set_grid(self, grid: tuple[int, int], key_grid: tuple[int, int] | None = None) -> None:
        """Change ``grid`` and ``key_grid``. A positional encoding of another size is replaced by a new, resized parameter."""
        key_grid = key_grid or grid
        if self.kind == "focused":
            self.positional_encoding = resized_parameter(
                self.positional_encoding, self.key_grid, key_grid, self.num_prefix_tokens
            )
        self.grid = grid
        self.key_grid = key_grid

    def source_grid(self, stage_map: tuple[int, int], num_positions: int) -> tuple[int, int] | None:
        """See ``PositionTable.source_grid``; subclasses with windows or spatially reduced keys override it."""
        return stage_map

    def position_tables(self) -> list[PositionTable]:
        if self.kind != "focused":
            return []
        return [PositionTable("positional_encoding", self.key_grid, self.source_grid, self.num_prefix_tokens)]

    def _check_tokens(self, name: str, tokens: Tensor, grid_name: str, grid: tuple[int, int]) -> None:
        expected = self.num_prefix_tokens + grid[0] * grid[1]
        if tokens.shape[1] != expected:
            raise ValueError(
                f"{name} has {tokens.shape[1]} tokens, but {grid_name}={grid[0]} x {grid[1]} and "
                f"num_prefix_tokens={self.num_prefix_tokens} require {expected}; "
                f"pass the {grid_name} (height and width) of these tokens"
            )

    def _attend_unfused(self, q: Tensor, k: Tensor, v: Tensor, key_grid: tuple[int, int], key_mask: Tensor | None) -> Tensor:
        """Attention without the convolution, computed with standard torch operations. Returns (B, N, C)."""
        with without_autocast(q.device):
            compute_dtype = torch.promote_types(q.dtype, torch.float32)
            q, k, value = q.to(compute_dtype), k.to(compute_dtype), v.to(compute_dtype)
            if self.kind == "focused":
                q, k = self._compute_features(q, k, key_grid)
                q, k, value = (self._split_heads(x, self.num_heads) for x in (q, k, value))
                out = linear_attention(q, k if key_mask is None else k * key_mask, value, count_keys(key_mask), eps=EPS)
            else:
                compared = COMPARED_ATTENTIONS[self.kind]
                num_heads = 1 if compared.single_head else self.num_heads
                out = compared.function(*(self._split_heads(x, num_heads) for x in (q, k, value)), key_mask)
            return out.transpose(1, 2).flatten(2).to(v.dtype)  # (B, N, C)

    def _compute_features(self, q: Tensor, k: Tensor, key_grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        k = k + resize_grid(self.positional_encoding, self.key_grid, key_grid, self.num_prefix_tokens)
        scale = F.softplus(self.scale)
        q, k = (F.relu(q) + EPS) / scale, (F.relu(k) + EPS) / scale
        if self.focusing:  # norms are over all channels of a token, before the split into heads
            q, k = focus(q, self.focusing_factor), focus(k, self.focusing_factor)
        return q, k

    @staticmethod
    def _split_heads(x: Tensor, num_heads: int) -> Tensor:
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, H, N, D)

    def _attend_fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int],
        key_grid: tuple[int, int],
        key_mask: Tensor | None,
        kernel: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """Attention and convolution, computed by ``focused_attention``. Returns (B, N, C)."""
        same_map = q.shape[1] == k.shape[1]
        out = focused_attention(
            q,
            k,
            v,
            position=resize_grid(self.positional_encoding, self.key_grid, key_grid, self.num_prefix_tokens),
            scale=F.softplus(self.scale),
            kernel=kernel if same_map else None,
            bias=bias if same_map else None,
            key_weight=None if key_mask is None else key_mask / count_keys(key_mask),
            num_heads=self.num_heads,
            power=self.focusing_factor if self.focusing else 1,
            grid=grid,
            num_prefix_tokens=self.num_prefix_tokens,
        )
        return out if same_map or kernel is None else self._restore_rank(out, v, grid, kernel, bias)

    def _restore_rank(self, out: Tensor, v: Tensor, grid: tuple[int, int], kernel: Tensor, bias: Tensor) -> Tensor:
        """Add the depthwise convolution of ``v`` to the map tokens of ``out``, (B, N, C); prefix tokens stay unchanged."""
        prefix, (height, width) = self.num_prefix_tokens, grid
        values = v[:, prefix:]
        if values.shape[1] != height * width:
            values = stretch_tokens(values, height * width)
        value_map = values.transpose(1, 2)  # (B, C, N)
        restored = F.conv2d(
            value_map.unflatten(-1, (height, width)), kernel, bias, padding=kernel.shape[-1] // 2, groups=self.dim
        )
        restored = restored.flatten(2).transpose(1, 2)  # (B, N, C)
        if prefix:
            restored = F.pad(restored, (0, 0, prefix, 0))
        return out + restored
