"""FLatten-CSwin: CSwin Transformer (https://arxiv.org/abs/2107.00652) with focused linear attention.

Shapes: B images, H x W a token map, nW stripes of h x w = N tokens, C channels, heads D channels wide.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from models.layers import (
    NO_OPTIONS,
    PADDING,
    Backbone,
    create_classifier,
    drop_path_rates,
    init_weights,
    merge,
    parse_attention_types,
    partition,
    to_pair,
    window_regions,
)
from models.linear_attention import FocusedLinearAttention

Stripe = tuple[int | None, int | None]  # height and width; None for the whole side of the map


class StripedAttention(nn.Module):
    """Mixin: attention within stripes, plus a depthwise convolution of v there (LePE). q, k, v (B, H, W, C) -> the same.

    A side that the stripe covers at the native size it covers at every size; other sides are padded to whole stripes,
    and padding takes no part.
    """

    def build_stripes(self, dim: int, grid: tuple[int, int], stripe: Stripe) -> None:
        self.native, self.stripe = grid, stripe
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        # Known for the native map, so that a step builds no masks.
        self.register_buffer("native_mask", self.mask(grid), persistent=False)

    def layout(self, grid: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Stripe and padded map for a map of this size."""
        window = tuple(side if size is None else size for side, size in zip(grid, self.stripe, strict=True))
        return window, tuple(-(-side // size) * size for side, size in zip(grid, window, strict=True))

    def mask(self, grid: tuple[int, int]) -> Tensor | None:
        """(nW, N), False for padding; None where there is none."""
        window, padded = self.layout(grid)
        region = window_regions(grid, window, (0, 0), padded)
        return None if region is None else region != PADDING

    def attend_within(self, q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], mask: Tensor | None) -> Tensor:
        """q, k, v: (B * nW, N, C); mask: (B * nW, N), False for padding."""
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grid = tuple(q.shape[1:3])
        window, padded = self.layout(grid)
        mask = self.native_mask if grid == self.native else self.mask(grid)
        if mask is not None:
            padding = (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0])
            q, k, v = (F.pad(t, padding) for t in (q, k, v))
            mask = mask.to(q.device).repeat(q.shape[0], 1)
        q, k, v = (partition(t, window) for t in (q, k, v))
        out = self.attend_within(q, k, v, window, mask)
        value_map = v.transpose(1, 2).unflatten(-1, window)
        out = out + self.get_v(value_map).flatten(2).transpose(1, 2)
        out = merge(out, window, padded)
        return out[:, : grid[0], : grid[1]] if padded != grid else out


class LinearStripes(FocusedLinearAttention, StripedAttention):
    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int], stripe: Stripe, linear: Mapping):
        window = tuple(side if size is None else size for side, size in zip(grid, stripe, strict=True))
        super().__init__(dim, num_heads, window, **linear)
        self.build_stripes(dim, grid, stripe)

    forward = StripedAttention.forward

    def attend_within(self, q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], mask: Tensor | None) -> Tensor:
        return self.attend(q, k, v, grid=window, key_mask=mask)


class SoftmaxStripes(StripedAttention):
    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int], stripe: Stripe):
        super().__init__()
        self.num_heads = num_heads
        self.build_stripes(dim, grid, stripe)

    def attend_within(self, q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], mask: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B * nW, heads, N, D)
        mask = None if mask is None else mask[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Cross-shaped attention and MLP, both residual and pre-normed. (B, H, W, C) -> the same.

    One half of the channels attends in upright stripes, the other in lying ones; where a stripe is as wide as the map,
    all channels attend over the whole map.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        *,
        attention: str,
        split_size: int | None,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_rate: float,
        drop_path: float,
        linear: Mapping,
    ):
        super().__init__()
        covers = [split_size is None or split_size >= side for side in grid]
        stripes: list[Stripe] = [(None, None)]
        if not all(covers):
            stripes = [(None, None if covers[1] else split_size), (None if covers[0] else split_size, None)]
        share = len(stripes)
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attns = nn.ModuleList(
            LinearStripes(dim // share, num_heads // share, grid, stripe, linear)
            if attention == "L"
            else SoftmaxStripes(dim // share, num_heads // share, grid, stripe)
            for stripe in stripes
        )
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop_rate)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        shares = zip(*(t.chunk(len(self.attns), dim=-1) for t in (q, k, v)), strict=True)
        out = [attend(*share) for attend, share in zip(self.attns, shares, strict=True)]
        return self.proj_drop(self.proj(torch.cat(out, dim=-1)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ChannelsLast(nn.Module):
    """(B, C, H, W) -> (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class Merge(nn.Module):
    """Halve the map and double the channels by a convolution. (B, H, W, C) -> (B, H / 2, W / 2, 2C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class CSwinTransformer(Backbone):
    """FLatten-CSwin.

    Args:
        img_size: native input size; the model takes others, resizing its position tables (bicubic).
        linear_splits: stripe width of linear blocks, a stage each; None for the whole map. When not given, the whole
            map in every stage.
        softmax_splits: the same of softmax blocks; the last stage attends over the whole map.
        linear: options of ``FocusedLinearAttention``.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        attn_type: str = "LLSS",
        linear_splits: Sequence[int | None] | None = None,
        softmax_splits: Sequence[int] = (1, 2, 7, 7),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        linear: Mapping = NO_OPTIONS,
    ):
        super().__init__()
        linear_splits = linear_splits or (None,) * len(depths)
        self.num_classes, self.num_features = num_classes, embed_dim * 2 ** (len(depths) - 1)
        self.stage1_conv_embed = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim, 7, stride=4, padding=2), ChannelsLast(), nn.LayerNorm(embed_dim)
        )
        self.feature_info = []
        grid = tuple((side - 3) // 4 + 1 for side in to_pair(img_size))
        rates = drop_path_rates(drop_path_rate, depths)
        for index, attention_types in enumerate(parse_attention_types(attn_type, depths)):
            dim, last = embed_dim * 2**index, index == len(depths) - 1
            softmax_split = None if last else softmax_splits[index]
            blocks = [
                Block(
                    dim,
                    num_heads[index],
                    grid,
                    attention=attention,
                    split_size=linear_splits[index] if attention == "L" else softmax_split,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    drop_rate=drop_rate,
                    drop_path=rate,
                    linear=linear,
                )
                for attention, rate in zip(attention_types, rates[index], strict=True)
            ]
            setattr(self, f"stage{index + 1}", nn.ModuleList(blocks))
            if not last:
                setattr(self, f"merge{index + 1}", Merge(dim))
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**index, "module": f"stage{index + 1}"})
            grid = tuple(-(-side // 2) for side in grid)
        self.norm = nn.LayerNorm(self.num_features)
        self.apply(init_weights)
        self.head = create_classifier(self.num_features, num_classes)

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        x = self.stage1_conv_embed(x)
        for index in range(1, len(self.feature_info) + 1):
            for block in getattr(self, f"stage{index}"):
                x = self.run_block(block, x)
            yield x
            if index < len(self.feature_info):
                x = getattr(self, f"merge{index}")(x)

    def drop_stages(self, num_kept: int) -> None:
        for index in range(num_kept, len(self.feature_info)):
            delattr(self, f"merge{index}")
            delattr(self, f"stage{index + 1}")

    def group_matcher(self, coarse: bool = False) -> dict:
        blocks = r"^stage(\d+)\." if coarse else r"^stage(\d+)\.(\d+)"
        return {"stem": r"^stage1_conv_embed", "blocks": [(blocks, None), (r"^merge(\d+)", (99,)), (r"^norm", (99999,))]}


SIZES = {
    "flatten_cswin_t": {"embed_dim": 64, "depths": (2, 4, 18, 1), "num_heads": (2, 4, 8, 16)},
    "flatten_cswin_s": {"embed_dim": 64, "depths": (2, 4, 32, 2), "num_heads": (2, 4, 8, 16)},
    "flatten_cswin_b": {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)},
}
