"""Focused linear attention (FLatten Transformer, https://arxiv.org/abs/2308.00442).

Shapes: B images or windows, N queries, M keys, H heads, D channels per head, C = H * D.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernel_operator
from .compared_attention import COMPARED_ATTENTIONS, count_keys
from .fused_attention import (
    depthwise_convolution,
    focused_attention,
    split_heads,
    unfused_attention,
    without_autocast,
)
from .kernel_selection import BACKENDS, supports
from .positions import PositionTable, resize_grid, resized_parameter
from .tracing import is_transformed
from .windows import to_pair

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


class DepthwiseFilters(nn.Module):
    """Filters of a depthwise convolution. The module returns the filters; its caller computes the convolution.

    Parameters are read only in the forward pass of their own module, so that hooks on the module take effect: pruning,
    reparametrisation, offloading and sharding. For the same reason, the output is a copy: after the forward pass, a hook may
    free the parameters.

    Args:
        dim: number of filters.
        kernel_size: side of a filter, odd.
        repeats: how often the output repeats all filters.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        *,
        repeats: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.kernel_size = kernel_size
        self.repeats = repeats
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel_size, kernel_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # the initialisation of nn.Conv2d
        nn.init.uniform_(self.bias, -1 / kernel_size, 1 / kernel_size)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Kernel (repeats * dim, 1, side, side) and bias (repeats * dim,)."""
        return self.weight.repeat(self.repeats, 1, 1, 1), self.bias.repeat(self.repeats)

    def extra_repr(self) -> str:
        return f"{len(self.bias)}, kernel_size={self.kernel_size}, repeats={self.repeats}"


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
        backend: for kind ``focused``: ``torch`` operations, ``triton`` kernels, or ``auto``. Calls that the kernels do not
            support use torch operations; see ``models/kernel_selection.py``.
        device, dtype: device and data type of the parameters; torch's defaults if None.

    Attributes:
        fused: for kind ``focused``, use a custom backward pass. False selects standard operations, with the same outputs and
            derivatives; they need more time and memory for first derivatives, and less for derivatives of higher order.

    Raises:
        ValueError: an unknown kind or backend, an even kernel, or heads that do not divide the channels.
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
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}; choose num_heads from the divisors of dim")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: an even kernel changes the size of the map; use an odd one")
        if kind not in ATTENTION_KINDS:
            raise ValueError(f"kind={kind!r}: choose one of {', '.join(ATTENTION_KINDS)}")
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.backend = backend
        self.num_heads = num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.grid = to_pair(grid)
        self.key_grid = self.grid if key_grid is None else to_pair(key_grid)
        self.focusing_factor = focusing_factor
        self.kind = kind
        self.focusing = focusing
        if kind == "focused":
            num_keys = num_prefix_tokens + self.key_grid[0] * self.key_grid[1]
            self.scale = nn.Parameter(torch.zeros(1, 1, dim, **factory))
            self.positional_encoding = nn.Parameter(torch.zeros(1, num_keys, dim, **factory))
        has_convolution = rank_restoration and (kind == "focused" or COMPARED_ATTENTIONS[kind].has_convolution)
        # One filter per channel of a head, shared by all heads. Repeating the filters avoids splitting the value map into
        # heads, which would copy it.
        self.dwc = DepthwiseFilters(dim // num_heads, kernel_size, repeats=num_heads, **factory) if has_convolution else None

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
        convolved = False
        if self.kind == "focused":
            form = self._choose_form(q, k, v, kernel, masked=key_mask is not None)
            convolved = q.shape[1] == k.shape[1]  # all forms include the convolution, but not of reduced values
            filters = {"kernel": kernel, "bias": bias} if convolved else {}
            out = self._attend_focused(q, k, v, key_grid, key_mask, form=form, grid=grid, **filters)
        else:
            out = self._attend_compared(q, k, v, key_mask)
        if kernel is not None and not convolved:
            out = self._restore_rank(out, v, grid, kernel, bias)
        return out if has_keys is None else out * has_keys.unsqueeze(-1)

    forward = attend

    def local_filter(self) -> tuple[Tensor | None, Tensor | None]:
        """Kernel (C, 1, side, side) and bias (C,) of the depthwise convolution of v; (None, None) without it."""
        return (None, None) if self.dwc is None else self.dwc()

    @property
    def filter_side(self) -> int:
        """Side of the convolution's kernel if the convolution is computed with the attention; else 0."""
        return self.dwc.kernel_size if self.dwc is not None and self.grid == self.key_grid else 0

    @property
    def power(self) -> float:
        """Exponent p of the focused function; 1 without it."""
        return self.focusing_factor if self.focusing else 1

    def _choose_form(self, q: Tensor, k: Tensor, v: Tensor, kernel: Tensor | None, *, masked: bool) -> Callable[..., Tensor]:
        """The form of focused attention for this call: the Triton kernels, the custom backward pass, or standard operations."""
        if not self.fused:
            return unfused_attention
        side = kernel.shape[-1] if kernel is not None and q.shape[1] == k.shape[1] else 0
        options = {"num_heads": self.num_heads, "side": side, "power": self.power, "masked": masked}
        if supports(q, k, v, **options, requested=self.backend):
            return kernel_operator.focused_attention
        return unfused_attention if is_transformed() else focused_attention

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
                columns.append(self._attend_compared(q, k, values, mask))
            return torch.stack(columns, dim=-1).transpose(1, 2)
        values = one_hot.repeat(1, 1, self.num_heads)
        if self.kind == "focused":
            weights = self._attend_focused(q, k, values, key_grid, mask, form=unfused_attention)  # (B, N, H * M)
        else:
            weights = self._attend_compared(q, k, values, mask)
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

    def _attend_focused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_grid: tuple[int, int],
        key_mask: Tensor | None,
        *,
        form: Callable[..., Tensor],
        grid: tuple[int, int] = (0, 0),
        kernel: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Focused attention, and the convolution of the values if ``kernel`` is given. Returns (B, N, C).

        Args:
            form: ``unfused_attention`` or an equivalent function.
            grid: height and width of the token map of v, for the convolution.
        """
        dtype = torch.promote_types(q.dtype, torch.float32)
        return form(
            q,
            k,
            v,
            position=resize_grid(self.positional_encoding, self.key_grid, key_grid, self.num_prefix_tokens),
            scale=F.softplus(self.scale),
            kernel=kernel,
            bias=bias,
            key_weight=None if key_mask is None else key_mask / count_keys(key_mask).to(dtype),
            num_heads=self.num_heads,
            power=self.power,
            grid=grid,
            num_prefix_tokens=self.num_prefix_tokens,
        )

    def _attend_compared(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Attention of a kind other than ``focused``, without the convolution. Returns (B, N, C)."""
        compared = COMPARED_ATTENTIONS[self.kind]
        num_heads = 1 if compared.single_head else self.num_heads
        with without_autocast(q.device):
            dtype = torch.promote_types(q.dtype, torch.float32)
            out = compared.function(*(split_heads(x.to(dtype), num_heads) for x in (q, k, v)), key_mask)
            return out.transpose(1, 2).flatten(2).to(v.dtype)

    def _restore_rank(self, out: Tensor, v: Tensor, grid: tuple[int, int], kernel: Tensor, bias: Tensor) -> Tensor:
        """Add the depthwise convolution of ``v`` to the map tokens of ``out``, (B, N, C); prefix tokens stay unchanged."""
        num_prefix, num_tokens = self.num_prefix_tokens, grid[0] * grid[1]
        if v.shape[1] - num_prefix != num_tokens:
            v, num_prefix = stretch_tokens(v[:, num_prefix:], num_tokens), 0
        convolved = depthwise_convolution(v, kernel, bias, grid, num_prefix)
        return out + F.pad(convolved, (0, 0, out.shape[1] - convolved.shape[1], 0))
