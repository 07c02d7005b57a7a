"""FLatten-Swin: Swin Transformer (https://arxiv.org/abs/2103.14030) with focused linear attention.

Shapes: B images, H x W a token map, nW windows of h x w = N tokens, C channels, heads D channels wide.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed, trunc_normal_
from torch import Tensor, nn

from models.layers import (
    NO_OPTIONS,
    PADDING,
    Backbone,
    PositionTable,
    create_classifier,
    drop_path_rates,
    init_weights,
    merge,
    parse_attention_types,
    partition,
    resize_grid,
    to_pair,
    window_regions,
)
from models.linear_attention import FocusedLinearAttention

SOFTMAX_WINDOW = 7  # of softmax blocks, where linear windows are at most LARGE_WINDOW wide
SOFTMAX_WINDOW_LARGE = 12
LARGE_WINDOW = 56


class LinearWindowAttention(FocusedLinearAttention):
    """Focused linear attention within windows. (B * nW, N, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, window: tuple[int, int], *, qkv_bias: bool, proj_drop: float, **operator):
        super().__init__(dim, num_heads, window, **operator)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, window: tuple[int, int], region: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        key_mask = None if region is None else (region != PADDING).repeat(x.shape[0] // region.shape[0], 1)
        x = self.attend(q, k, v, grid=window, key_mask=key_mask)
        return self.proj_drop(self.proj(x))


class SoftmaxWindowAttention(nn.Module):
    """Softmax attention within windows, with relative-position bias. (B * nW, N, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, window: tuple[int, int], *, qkv_bias: bool, proj_drop: float):
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros(_num_offsets(window), num_heads))
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def position_tables(self) -> list[PositionTable]:
        return [PositionTable("relative_position_bias_table", _offset_grid(self.window))]

    def position_bias(self, window: tuple[int, int]) -> Tensor:
        """(1, H, N, N): a learned number for every offset between two tokens."""
        table, index = self.relative_position_bias_table, self.relative_position_index
        if window != self.window:
            table = resize_grid(table.unsqueeze(0), _offset_grid(self.window), _offset_grid(window))[0]
            index = relative_position_index(window).to(table.device)
        num_tokens = window[0] * window[1]
        return table[index.flatten()].view(1, num_tokens, num_tokens, -1).permute(0, 3, 1, 2)

    def forward(self, x: Tensor, window: tuple[int, int], region: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B * nW, H, N, D)
        bias = self.position_bias(window).to(q.dtype)
        if region is None:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            # Windows differ in their mask but images do not: windows join the heads, so that one mask serves the batch.
            num_windows = region.shape[0]
            apart = region.unsqueeze(1) != region.unsqueeze(2)  # (nW, N, N)
            bias = bias.masked_fill(apart.unsqueeze(1), float("-inf")).flatten(0, 1)  # (nW * H, N, N)
            q, k, v = (t.unflatten(0, (-1, num_windows)).flatten(1, 2) for t in (q, k, v))  # (B, nW * H, N, D)
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))
            x = x.unflatten(1, (num_windows, -1)).flatten(0, 1)  # (B * nW, H, N, D)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class SwinBlock(nn.Module):
    """Window attention and MLP, both residual and pre-normed. (B, H, W, C) -> the same.

    A window that covers a side of the native map covers that side of any map. One that does not keeps its size, and
    maps that it does not divide are padded; padding takes no part in attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        *,
        attention: str,
        window_size: int,
        shifted: bool,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_rate: float,
        drop_path: float,
        linear: Mapping,
    ):
        super().__init__()
        self.covers = tuple(window_size >= side for side in grid)
        self.window = tuple(min(window_size, side) for side in grid)
        self.grid, self.shifted = grid, shifted
        options = {"qkv_bias": qkv_bias, "proj_drop": drop_rate}
        self.norm1 = nn.LayerNorm(dim)
        if attention == "L":
            self.attn = LinearWindowAttention(dim, num_heads, self.window, **options, **linear)
        else:
            self.attn = SoftmaxWindowAttention(dim, num_heads, self.window, **options)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop_rate)
        # Known for the native map, so that a step builds no masks.
        self.register_buffer("native_region", self.regions(grid), persistent=False)

    def layout(self, grid: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Window, shift and padded map for a map of this size."""
        window = tuple(side if covers else size for side, size, covers in zip(grid, self.window, self.covers, strict=True))
        padded = tuple(-(-side // size) * size for side, size in zip(grid, window, strict=True))
        shift = tuple(size // 2 if self.shifted and side > size else 0 for side, size in zip(padded, window, strict=True))
        return window, shift, padded

    def regions(self, grid: tuple[int, int]) -> Tensor | None:
        """The parts that the blocks' attention keeps apart: linear attention only keeps out padding."""
        window, shift, padded = self.layout(grid)
        if padded == grid and isinstance(self.attn, LinearWindowAttention):
            return None
        return window_regions(grid, window, shift, padded)

    def attention(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:3])
        window, shift, padded = self.layout(grid)
        if grid == self.grid:
            region = self.native_region
        else:
            region = self.regions(grid)
            region = None if region is None else region.to(x.device)
        if padded != grid:
            x = F.pad(x, (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0]))
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
        x = self.attn(partition(x, window), window, region)
        x = merge(x, window, padded)
        if any(shift):
            x = x.roll(shift, dims=(1, 2))
        return x[:, : grid[0], : grid[1]] if padded != grid else x

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Halve the map and double the channels. (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # Down a column first, then the next: the order in which released weights expect the four.
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


class SwinStage(nn.Module):
    """Blocks on one map, then the step down to the next, kept apart so that a feature pyramid gets the finer map."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class SwinTransformer(Backbone):
    """FLatten-Swin.

    Args:
        img_size: native input size; the model takes others, resizing its position tables (bicubic).
        attn_type: see ``parse_attention_types``.
        window_size: window of the linear blocks, capped at the map. When not given, the first stage's map: linear
            attention is then global there and beyond. Softmax blocks use 7, or 12 where this is more than 56.
        drop_path_rate: stochastic depth of the last block.
        linear: options of ``FocusedLinearAttention``: focusing_factor, kernel_size, kind, focusing, rank_restoration.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        attn_type: str = "LLSS",
        window_size: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        linear: Mapping = NO_OPTIONS,
    ):
        super().__init__()
        grid = tuple(-(-side // patch_size) for side in to_pair(img_size))
        if window_size is None:
            window_size = max(grid)
        softmax_window = SOFTMAX_WINDOW if window_size <= LARGE_WINDOW else SOFTMAX_WINDOW_LARGE
        self.num_classes, self.num_features = num_classes, embed_dim * 2 ** (len(depths) - 1)
        self.patch_embed = PatchEmbed(
            img_size=None,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            norm_layer=nn.LayerNorm if patch_norm else None,
            output_fmt="NHWC",
            strict_img_size=False,
            dynamic_img_pad=True,
        )
        self.pos_drop = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList()
        self.feature_info = []
        rates = drop_path_rates(drop_path_rate, depths)
        for stage, attention_types in enumerate(parse_attention_types(attn_type, depths)):
            dim = embed_dim * 2**stage
            blocks = [
                SwinBlock(
                    dim,
                    num_heads[stage],
                    grid,
                    attention=attention,
                    window_size=window_size if attention == "L" else softmax_window,
                    shifted=index % 2 == 1,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    drop_rate=drop_rate,
                    drop_path=rates[stage][index],
                    linear=linear,
                )
                for index, attention in enumerate(attention_types)
            ]
            last = stage == len(depths) - 1
            self.layers.append(SwinStage(blocks, None if last else PatchMerging(dim)))
            self.feature_info.append({"num_chs": dim, "reduction": patch_size * 2**stage, "module": f"layers.{stage}"})
            grid = tuple(-(-side // 2) for side in grid)
        self.norm = nn.LayerNorm(self.num_features)
        self.apply(init_weights)
        self.head = create_classifier(self.num_features, num_classes)

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        x = self.pos_drop(self.patch_embed(x))
        for stage in self.layers:
            for block in stage.blocks:
                x = self.run_block(block, x)
            yield x
            if stage.downsample is not None:
                x = stage.downsample(x)

    def drop_stages(self, num_kept: int) -> None:
        self.layers = self.layers[:num_kept]
        self.layers[-1].downsample = None

    def group_matcher(self, coarse: bool = False) -> dict:
        blocks = r"^layers\.(\d+)" if coarse else r"^layers\.(\d+)\.blocks\.(\d+)"
        return {
            "stem": r"^patch_embed",
            "blocks": [(blocks, None), (r"^layers\.(\d+)\.downsample", (99,)), (r"^norm", (99999,))],
        }


def relative_position_index(window: tuple[int, int]) -> Tensor:
    """(N, N): the row of the bias table for each pair of tokens of a window."""
    rows, columns = torch.meshgrid(torch.arange(window[0]), torch.arange(window[1]), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    row_offset = rows[:, None] - rows[None, :] + window[0] - 1
    column_offset = columns[:, None] - columns[None, :] + window[1] - 1
    return row_offset * (2 * window[1] - 1) + column_offset


def _offset_grid(window: tuple[int, int]) -> tuple[int, int]:
    return 2 * window[0] - 1, 2 * window[1] - 1


def _num_offsets(window: tuple[int, int]) -> int:
    height, width = _offset_grid(window)
    return height * width


SIZES = {
    "flatten_swin_t": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "flatten_swin_s": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "flatten_swin_b": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
}
