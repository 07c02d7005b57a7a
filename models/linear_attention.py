"""Focused linear attention (FLatten Transformer, https://arxiv.org/abs/2308.00442).

Shapes: B images or windows, N queries, M keys, H heads, D channels per head, C = H * D.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernel_operator
from .compared_attention import COMPARED_ATTENTIONS, count_keys
from .fused_attention import focused_attention
from .kernel_selection import BACKENDS, supports
from .plain_attention import Inputs, Options, depthwise_convolution, plain_attention, split_heads, unpack, without_autocast
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


def mean_weights(key_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight of each key in a mean over the unmasked keys: 1 over their number, or 0. key_mask: (B, 1, M, 1) bool."""
    return key_mask / count_keys(key_mask).to(dtype)


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
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}; choose num_heads from the divisors of dim")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: give an odd number of at least 1, which keeps the size of the map")
        if kind not in ATTENTION_KINDS:
            raise ValueError(f"kind={kind!r}: choose one of {', '.join(ATTENTION_KINDS)}")
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.backend = backend
        self.num_heads = num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.grid = to_pair(grid, "grid")
        self.key_grid = self.grid if key_grid is None else to_pair(key_grid, "key_grid")
        for name, sides in (("grid", self.grid), ("key_grid", self.key_grid)):
            if min(sides) < 1:
                raise ValueError(f"{name}={sides}: height and width must be at least 1")
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
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        grid: tuple[int, int] | None = None,
        key_grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of q over k and v, before any output projection.

        Args:
            q: (B, N, C); or the joint projection to q, k and v, (B, N, 3C), if k and v are omitted.
            k: (B, M, C), M < N with spatial reduction; or the joint projection to k and v, (B, M, 2C), if v is omitted. A joint
                projection saves a copy of its gradient.
            v: (B, M, C).
            grid, key_grid: heights and widths of the token maps of this call, see ``grids_of_call``; the positional encoding is
                resized to ``key_grid`` by bicubic interpolation.
            key_mask: (B, M) bool, False for masked keys (padding). The output is zero if all keys of an image are masked.

        Returns:
            (B, N, C), in the dtype of ``v``.

        Raises:
            ValueError: q, k or v does not have three dimensions, or its number of tokens or channels does not match ``grid``,
                ``key_grid`` or ``dim``; ``grid`` or ``key_grid`` is not a pair; or ``key_mask`` is not (B, M) bool.
        """
        grid, key_grid = self.grids_of_call(grid, key_grid)
        packed, (q, k, v) = (q, k, v), unpack(q, k, v)
        self._check_tokens("q", q, "grid", grid)
        self._check_tokens("k", k, "key_grid", key_grid)
        self._check_tokens("v", v, "key_grid", key_grid)
        has_keys = None
        if key_mask is not None:
            if key_mask.dtype != torch.bool or key_mask.shape != k.shape[:2]:
                raise ValueError(
                    f"key_mask is {str(key_mask.dtype).removeprefix('torch.')} of shape {tuple(key_mask.shape)}; give a bool "
                    f"tensor of shape {tuple(k.shape[:2])}, False for masked keys (for numbers: key_mask > 0)"
                )
            v = v * key_mask.unsqueeze(-1)
            packed = q, k, v
            has_keys = key_mask.any(dim=1, keepdim=True)  # (B, 1)
            # If all keys are masked, the output would be 0 / 0. Attend to all keys instead; their values are zero.
            key_mask = (key_mask | ~has_keys)[:, None, :, None]
        kernel, bias = self.local_filter()
        if self.kind != "focused":
            out = self._attend_compared(q, k, v, key_mask)
        elif q.shape[1] == k.shape[1]:  # every form of focused attention includes the convolution, but not of reduced values
            out, kernel = self._attend_focused(packed, kernel, bias, grid, key_grid, key_mask), None
        else:
            out = self._attend_focused(packed, None, None, grid, key_grid, key_mask)
        if kernel is not None:
            out = self._restore_rank(out, v, grid, kernel, bias)
        return out if has_keys is None else out * has_keys.unsqueeze(-1)

    forward = attend

    def grids_of_call(
        self, grid: tuple[int, int] | None, key_grid: tuple[int, int] | None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heights and widths of the token maps of queries and keys of a call, where None stands for the default.

        ``grid`` is that of the constructor by default. ``key_grid`` equals ``grid`` by default, unless the constructor was
        given another ``key_grid``, which is then the default.
        """
        for name, value in (("grid", grid), ("key_grid", key_grid)):
            if value is not None and not (isinstance(value, tuple | list) and len(value) == 2):
                raise ValueError(f"{name}={value!r}: give (height, width) of the token map, or None")
        grid = self.grid if grid is None else grid
        if key_grid is None:
            key_grid = grid if self.key_grid == self.grid else self.key_grid
        return grid, key_grid

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

    def _choose_form(self, q: Tensor, k: Tensor, v: Tensor, *, side: int, masked: bool) -> Callable[[Inputs, Options], Tensor]:
        """The form of focused attention for this call: the Triton kernels, the custom backward pass, or standard operations.

        Args:
            side: side of the convolution's kernel; 0 without it.
        """
        if not self.fused:
            return plain_attention
        options = {"num_heads": self.num_heads, "side": side, "power": self.power, "masked": masked}
        if supports(q, k, v, **options, requested=self.backend):
            return kernel_operator.focused_attention
        return plain_attention if is_transformed() else focused_attention

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
        if tokens.ndim != 3:
            raise ValueError(f"{name} has shape {tuple(tokens.shape)}; reshape it to (batch, tokens, channels)")
        expected = self.num_prefix_tokens + grid[0] * grid[1]
        if tokens.shape[1] != expected:
            raise ValueError(
                f"{name} has {tokens.shape[1]} tokens, but {grid_name}={grid[0]} x {grid[1]} and "
                f"num_prefix_tokens={self.num_prefix_tokens} require {expected}; "
                f"pass the {grid_name} (height and width) of these tokens"
            )
        if tokens.shape[-1] != self.dim:
            raise ValueError(f"{name} has {tokens.shape[-1]} channels, but dim={self.dim}")

    def _attend_focused(
        self,
        packed: tuple[Tensor, Tensor | None, Tensor | None],
        kernel: Tensor | None,
        bias: Tensor | None,
        grid: tuple[int, int],
        key_grid: tuple[int, int],
        key_mask: Tensor | None,
    ) -> Tensor:
        """Focused attention of ``packed`` q, k and v, and the convolution of the values if ``kernel`` is given: (B, N, C)."""
        q, k, v = unpack(*packed)
        side = 0 if kernel is None else kernel.shape[-1]
        form = self._choose_form(q, k, v, side=side, masked=key_mask is not None)
        inputs = Inputs(
            *((q, k, v) if form is plain_attention else packed),
            position=resize_grid(self.positional_encoding, self.key_grid, key_grid, self.num_prefix_tokens),
            scale=F.softplus(self.scale),
            kernel=kernel,
            bias=bias,
            key_weight=None if key_mask is None else mean_weights(key_mask, torch.promote_types(q.dtype, torch.float32)),
        )
        return form(inputs, Options(self.num_heads, self.power, *grid, self.num_prefix_tokens))

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


class ProjectedLinearAttention(FocusedLinearAttention):
    """Focused linear attention with a joint projection to q, k and v, and an output projection. (B, N, C) -> (B, N, C)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        *,
        qkv_bias: bool,
        proj_drop: float,
        linear: Mapping,
        num_prefix_tokens: int = 0,
        **factory,
    ):
        super().__init__(dim, num_heads, grid, num_prefix_tokens=num_prefix_tokens, **factory, **linear)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: tuple[int, int], key_mask: Tensor | None = None) -> Tensor:
        return self.proj_drop(self.proj(self.attend(self.qkv(x), grid=grid, key_mask=key_mask)))
