"""FLatten-CSwin: CSwin Transformer (https://arxiv.org/abs/2107.00652) with focused linear attention.

Shapes: B images, H x W a token map, nW stripes per image, each of h x w = N tokens, C channels, D channels per head.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import register_notrace_module
from torch import Tensor, nn

from .backbone import Backbone
from .blocks import NO_OPTIONS, Stage, init_weights, plan_blocks
from .compared_attention import scaled_dot_product_attention
from .linear_attention import DepthwiseFilters, FocusedLinearAttention
from .positions import PositionTable
from .windows import PADDING, cached_constant, ceil_divide, merge_windows, partition_windows, window_regions

# Directions of stripes. The value is the axis of the map that is split: height for horizontal and width for vertical stripes.
HORIZONTAL = 0
VERTICAL = 1


def stripe_size(grid: tuple[int, int], axis: int | None, width: int | None) -> tuple[int, int]:
    """Height and width of a stripe with at most ``width`` tokens along ``axis``, and all tokens along the other axis.

    If ``axis`` or ``width`` is None, the stripe is the whole map.
    """
    if axis is None or width is None:
        return grid
    return (min(width, grid[0]), grid[1]) if axis == HORIZONTAL else (grid[0], min(width, grid[1]))


def valid_tokens(
    grid: tuple[int, int], stripe: tuple[int, int], padded: tuple[int, int], *, device: torch.device | None = None
) -> Tensor | None:
    """Key mask (nW, N) of a map, False for padding; None if there is no padding."""
    region = window_regions(grid, stripe, (0, 0), padded, device=device)
    return None if region is None else region != PADDING


class StripedAttention(nn.Module):
    """Mixin: attention plus a depthwise convolution of v within stripes. q, k, v: (B, H, W, C); returns (B, H, W, C).

    The convolution is CSwin's locally-enhanced positional encoding (LePE); subclasses create its filters, ``get_v``. The native
    map is the token map at the model's native input size. If one stripe covers the whole native map, one stripe also covers
    maps of other sizes. Otherwise the stripe width is fixed: maps of other sizes are padded to a multiple of the width, and the
    padding is masked.
    """

    def set_stripes(self, grid: tuple[int, int], axis: int | None, width: int | None) -> None:
        """Set the layout of the stripes.

        Args:
            grid: height and width of the native map.
            axis: ``VERTICAL`` or ``HORIZONTAL``; None for attention over the whole map.
            width: stripe width in tokens along ``axis``. If it is None or at least the side of the native map along that axis,
                one stripe covers the whole map.
        """
        self.axis = axis
        self.width = None if stripe_size(grid, axis, width) == grid else width

    def layout(self, grid: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Sizes (height, width) of a stripe and of the padded map, for a map of size ``grid``."""
        stripe = stripe_size(grid, self.axis, self.width)
        return stripe, tuple(ceil_divide(side, size) * size for side, size in zip(grid, stripe, strict=True))

    def attend_within(self, q: Tensor, k: Tensor, v: Tensor, stripe: tuple[int, int], mask: Tensor | None) -> Tensor:
        """Attention plus LePE. q, k, v: (B * nW, N, C); mask: (B * nW, N), False for padding."""
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grid = tuple(q.shape[1:3])
        stripe, padded = self.layout(grid)
        mask = cached_constant(valid_tokens, grid, stripe, padded, like=q)
        if mask is not None:
            padding = (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0])
            q, k, v = (F.pad(t, padding) for t in (q, k, v))
            mask = mask.repeat(q.shape[0], 1)
        q, k, v = (partition_windows(t, stripe) for t in (q, k, v))
        out = self.attend_within(q, k, v, stripe, mask)
        out = merge_windows(out, stripe, padded)
        return out[:, : grid[0], : grid[1]] if padded != grid else out


class LinearStripes(FocusedLinearAttention, StripedAttention):
    """Focused linear attention within stripes."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        axis: int | None,
        width: int | None,
        linear: Mapping,
        **factory,
    ):
        super().__init__(dim, num_heads, stripe_size(grid, axis, width), **factory, **linear)
        self.set_stripes(grid, axis, width)
        self.get_v = DepthwiseFilters(dim, 3, **factory)

    forward = StripedAttention.forward  # otherwise inherited from FocusedLinearAttention, the first base class

    def attend_within(self, q: Tensor, k: Tensor, v: Tensor, stripe: tuple[int, int], mask: Tensor | None) -> Tensor:
        return self.attend(q, k, v, grid=stripe, key_mask=mask)

    def local_filter(self) -> tuple[Tensor, Tensor]:
        """Kernel and bias of one convolution for both rank restoration and LePE: the sums of their kernels and biases."""
        (kernel, bias), (lepe_kernel, lepe_bias) = super().local_filter(), self.get_v()
        if kernel is None:
            return lepe_kernel, lepe_bias
        margin = (kernel.shape[-1] - lepe_kernel.shape[-1]) // 2
        if margin >= 0:
            return kernel + F.pad(lepe_kernel, (margin,) * 4), bias + lepe_bias
        return F.pad(kernel, (-margin,) * 4) + lepe_kernel, bias + lepe_bias

    @property
    def filter_side(self) -> int:
        return max(self.get_v.kernel_size, super().filter_side)

    def set_map_size(self, grid: tuple[int, int]) -> None:
        """Change the size of the native map in place."""
        self.set_grid(self.layout(grid)[0])

    def source_grid(self, stage_map: tuple[int, int], num_positions: int) -> tuple[int, int] | None:
        height, width = stage_map
        if self.axis == VERTICAL:
            return height, min(num_positions // height, width)
        if self.axis == HORIZONTAL:
            return min(num_positions // width, height), width
        return stage_map

    def position_tables(self) -> list[PositionTable]:
        # The number of tokens in a stripe does not determine its height and width, and stripes are usually not square.
        return [table._replace(assume_square=self.axis is None) for table in super().position_tables()]


class SoftmaxStripes(StripedAttention):
    """Softmax attention within stripes."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        axis: int | None,
        width: int | None,
        attn_drop: float,
        **factory,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.set_stripes(grid, axis, width)
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)

    def attend_within(self, q: Tensor, k: Tensor, v: Tensor, stripe: tuple[int, int], mask: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B * nW, heads, N, D)
        mask = None if mask is None else mask[:, None, None]
        attn_drop = self.attn_drop if self.training else 0.0
        x = scaled_dot_product_attention(q, k, v, mask, dropout=attn_drop)
        value_map = v.transpose(-2, -1).flatten(1, 2).unflatten(-1, stripe)
        return x.transpose(1, 2).flatten(2) + self.get_v(value_map).flatten(2).transpose(1, 2)


@register_notrace_module  # FX cannot trace control flow that depends on the size of the map
class Block(nn.Module):
    """Cross-shaped window attention and MLP, each pre-norm with a residual connection. (B, H, W, C) -> (B, H, W, C).

    One half of the channels attends within vertical stripes and the other half within horizontal ones. If the stripe width is
    at least the longer side of the native map, all channels attend over the whole map.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        *,
        attention_type: str,
        split_size: int | None,
        mlp_ratio: float,
        qkv_bias: bool,
        proj_drop: float,
        attn_drop: float,
        drop_path: float,
        linear: Mapping,
        **factory,
    ):
        super().__init__()
        self.attention_type = attention_type
        axes = (None,) if split_size is None or split_size >= max(grid) else (VERTICAL, HORIZONTAL)
        axis_dim, axis_heads = dim // len(axes), num_heads // len(axes)
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.attns = nn.ModuleList(
            LinearStripes(axis_dim, axis_heads, grid, axis, split_size, linear, **factory)
            if attention_type == "L"
            else SoftmaxStripes(axis_dim, axis_heads, grid, axis, split_size, attn_drop, **factory)
            for axis in axes
        )
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **factory)

    @property
    def window_sides(self) -> tuple[int | None, ...]:
        """Width in tokens of the stripes of each direction; None where one stripe covers the map."""
        return tuple(attention.width for attention in self.attns)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        inputs = zip(*(t.chunk(len(self.attns), dim=-1) for t in (q, k, v)), strict=True)
        out = [attn(*qkv) for attn, qkv in zip(self.attns, inputs, strict=True)]
        return self.proj_drop(self.proj(torch.cat(out, dim=-1)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ChannelsLast(nn.Module):
    """Move the channels last. (B, C, H, W) -> (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class Merge(nn.Module):
    """Strided convolution that halves the map and doubles the channels. (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2C)."""

    def __init__(self, dim: int, **factory):
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, **factory)
        self.norm = nn.LayerNorm(2 * dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class CSwinTransformer(Backbone):
    """FLatten-CSwin; see ``Backbone`` for the arguments that all families share.

    ``proj_drop_rate`` also applies to the output projection of attention. The paper's code creates that dropout but never calls
    it, so this model differs from the paper's code at rates above 0; every config of the paper uses 0.

    Args:
        linear_splits: stripe width of linear blocks in tokens, one per stage; None for attention over the whole map, which is
            the default in every stage.
        softmax_splits: stripe width of softmax blocks in tokens, one per stage. In the last stage, ``linear_splits`` and
            ``softmax_splits`` are ignored and all blocks attend over the whole map.
    """

    first_conv = "stage1_conv_embed.0"

    def __init__(
        self,
        *,
        img_size: int | Iterable[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        attn_type: str = "LLSS",
        linear_splits: Sequence[int | None] | None = None,
        softmax_splits: Sequence[int] = (1, 2, 7, 7),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        linear: Mapping = NO_OPTIONS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_chans=in_chans, num_classes=num_classes, global_pool=global_pool)
        factory = {"device": device, "dtype": dtype}
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.feature_info = [
            {"num_chs": embed_dim * 2**index, "reduction": 4 * 2**index, "module": f"stage{index + 1}"}
            for index in range(len(depths))
        ]
        grids = self.native_grids(img_size)
        splits = {"L": linear_splits or (None,) * len(depths), "S": softmax_splits}
        plan = plan_blocks(attn_type, depths, drop_path_rate=drop_path_rate, attn_drop_rate=attn_drop_rate)
        options = {
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "proj_drop": proj_drop_rate,
            "attn_drop": attn_drop_rate,
            "linear": linear,
            **factory,
        }
        self.stage1_conv_embed = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim, 7, stride=4, padding=2, **factory),
            ChannelsLast(),
            nn.LayerNorm(embed_dim, **factory),
        )
        for index, grid in enumerate(grids):
            dim, last = embed_dim * 2**index, index == len(grids) - 1
            blocks = []
            for letter, rate in plan[index]:
                split_size = None if last else splits[letter][index]
                block_options = {"attention_type": letter, "split_size": split_size, "drop_path": rate}
                blocks.append(Block(dim, num_heads[index], grid, **block_options, **options))
            setattr(self, f"stage{index + 1}", Stage(*blocks))
            if not last:
                setattr(self, f"merge{index + 1}", Merge(dim, **factory))
        self.norm = nn.LayerNorm(self.num_features, **factory)
        self.apply(init_weights)
        self.build_head(drop_rate, **factory)

    def stage_grids(self, img_size: tuple[int, int]) -> list[tuple[int, int]]:
        grids = [tuple((side - 3) // 4 + 1 for side in img_size)]  # kernel 7 x 7, stride 4, padding 2
        while len(grids) < len(self.feature_info):
            grids.append(tuple(ceil_divide(side, 2) for side in grids[-1]))
        return grids

    def stage_blocks(self) -> list[Iterable[nn.Module]]:
        return [getattr(self, f"stage{index + 1}") for index in range(len(self.feature_info))]

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        x = self.stage1_conv_embed(x)
        for index in range(1, len(self.feature_info) + 1):
            x = getattr(self, f"stage{index}")(x)
            yield x
            if index < len(self.feature_info):
                x = getattr(self, f"merge{index}")(x)

    def drop_stages(self, num_kept: int) -> None:
        for index in range(num_kept, len(self.feature_info)):
            delattr(self, f"merge{index}")
            delattr(self, f"stage{index + 1}")

    def group_matcher(self, coarse: bool = False) -> dict:
        stem = r"^stage1_conv_embed"
        if coarse:
            return {"stem": stem, "blocks": [(r"^(?:stage|merge)(\d+)", None), (r"^norm", (99999,))]}
        return {
            "stem": stem,
            "blocks": [(r"^stage(\d+)\.(\d+)", None), (r"^merge(\d+)", (99,)), (r"^norm", (99999,))],
        }


SIZES = {
    "flatten_cswin_t": {"embed_dim": 64, "depths": (2, 4, 18, 1), "num_heads": (2, 4, 8, 16)},
    "flatten_cswin_s": {"embed_dim": 64, "depths": (2, 4, 32, 2), "num_heads": (2, 4, 8, 16)},
    "flatten_cswin_b": {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)},
}
SIZES["flatten_cswin_b_384"] = {**SIZES["flatten_cswin_b"], "img_size": 384, "softmax_splits": (1, 2, 12, 12)}
