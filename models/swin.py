"""FLatten-Swin: Swin Transformer (https://arxiv.org/abs/2103.14030) with focused linear attention.

Shapes: B images, H x W a token map, nW windows per image, each of h x w = N tokens, C channels, D channels per head.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed, trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from .backbone import Backbone
from .blocks import NO_OPTIONS, Block, Stage, init_weights, plan_blocks
from .compared_attention import SoftmaxAttention
from .linear_attention import ProjectedLinearAttention
from .positions import PositionTable, resize_grid, resized_parameter
from .windows import PADDING, cached_constant, ceil_divide, merge_windows, partition_windows, window_regions


class LinearWindowAttention(ProjectedLinearAttention):
    """Focused linear attention within windows. (B * nW, N, C) -> (B * nW, N, C)."""

    def forward(self, x: Tensor, window: tuple[int, int], region: Tensor | None) -> Tensor:
        key_mask = None if region is None else (region != PADDING).repeat(x.shape[0] // region.shape[0], 1)
        return super().forward(x, window, key_mask)

    def set_window(self, window: tuple[int, int]) -> None:
        self.set_grid(window)

    def source_grid(self, stage_map: tuple[int, int], num_positions: int) -> tuple[int, int] | None:
        return next((window for window in capped_windows(stage_map) if window[0] * window[1] == num_positions), None)


class SoftmaxWindowAttention(SoftmaxAttention):
    """Softmax attention within windows, with relative-position bias. (B * nW, N, C) -> (B * nW, N, C)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: tuple[int, int],
        *,
        qkv_bias: bool,
        proj_drop: float,
        attn_drop: float,
        **factory,
    ):
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop, attn_drop=attn_drop, **factory)
        self.window = window
        height, width = offset_grid(window)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(height * width, num_heads, **factory))
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def set_window(self, window: tuple[int, int]) -> None:
        """Change the window size in place; a resized bias table is a new parameter."""
        self.relative_position_bias_table = resized_parameter(
            self.relative_position_bias_table, offset_grid(self.window), offset_grid(window)
        )
        self.window = window

    def source_grid(self, stage_map: tuple[int, int], num_positions: int) -> tuple[int, int] | None:
        grids = (offset_grid(window) for window in capped_windows(stage_map))
        return next((grid for grid in grids if grid[0] * grid[1] == num_positions), None)

    def position_tables(self) -> list[PositionTable]:
        return [PositionTable("relative_position_bias_table", offset_grid(self.window), self.source_grid)]

    def position_bias(self, window: tuple[int, int], like: Tensor) -> Tensor:
        """Learned bias for every pair of tokens in a window, (1, heads, N, N), on the device of ``like``."""
        table = self.relative_position_bias_table
        if window != self.window:
            table = resize_grid(table.unsqueeze(0), offset_grid(self.window), offset_grid(window))[0]
        index = cached_constant(relative_position_index, window, like=like)
        num_tokens = window[0] * window[1]
        return table[index.flatten()].view(1, num_tokens, num_tokens, -1).permute(0, 3, 1, 2)

    def forward(self, x: Tensor, window: tuple[int, int], region: Tensor | None) -> Tensor:
        return self.attend(x, self.position_bias(window, like=x), region)


class SwinBlock(Block):
    """Window attention and MLP. (B, H, W, C) -> (B, H, W, C).

    The native map is the token map at the model's native input size. If a window covers a side of the native map, it also
    covers that side of maps of other sizes. Otherwise the window size is fixed: maps are padded to a multiple of the window
    size, and the padding is masked.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        *,
        attention_type: str,
        window_size: int,
        shifted: bool,
        mlp_ratio: float,
        qkv_bias: bool,
        proj_drop: float,
        attn_drop: float,
        drop_path: float,
        linear: Mapping,
        **factory,
    ):
        window = tuple(min(window_size, side) for side in grid)
        options = {"qkv_bias": qkv_bias, "proj_drop": proj_drop, **factory}
        if attention_type == "L":
            attention = LinearWindowAttention(dim, num_heads, window, linear=linear, **options)
        else:
            attention = SoftmaxWindowAttention(dim, num_heads, window, attn_drop=attn_drop, **options)
        super().__init__(dim, attention, Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **factory), drop_path, **factory)
        self.attention_type = attention_type
        self.covers = tuple(window_size >= side for side in grid)
        self.window = window
        self.shifted = shifted

    @property
    def window_sides(self) -> tuple[int | None, ...]:
        """Height and width of a window in tokens; None along an axis where it covers the map."""
        return tuple(None if covers else size for size, covers in zip(self.window, self.covers, strict=True))

    def set_map_size(self, grid: tuple[int, int]) -> None:
        """Change the size of the native map in place."""
        self.window, _, _ = self.layout(grid)
        self.attn.set_window(self.window)

    def layout(self, grid: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Sizes (height, width) of a window, its shift and the padded map, for a map of size ``grid``."""
        window = tuple(side if covers else size for side, size, covers in zip(grid, self.window, self.covers, strict=True))
        padded = tuple(ceil_divide(side, size) * size for side, size in zip(grid, window, strict=True))
        shift = tuple(size // 2 if self.shifted and side > size else 0 for side, size in zip(padded, window, strict=True))
        return window, shift, padded

    def attend(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:3])
        window, shift, padded = self.layout(grid)
        region = None
        if padded != grid or isinstance(self.attn, SoftmaxWindowAttention):
            # Linear attention masks only padding, so its windows may mix tokens from opposite edges of the map.
            region = cached_constant(window_regions, grid, window, shift, padded, like=x)
        if padded != grid:
            x = F.pad(x, (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0]))
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
        x = self.attn(partition_windows(x, window), window, region)
        x = merge_windows(x, window, padded)
        if any(shift):
            x = x.roll(shift, dims=(1, 2))
        return x[:, : grid[0], : grid[1]] if padded != grid else x


@register_notrace_module  # FX cannot trace control flow that depends on the size of the map
class PatchMerging(nn.Module):
    """Halve the map and double the channels. (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2C)."""

    def __init__(self, dim: int, **factory):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, **factory)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # Concatenate the tokens of each 2 x 2 group column by column, the order that released weights expect.
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


class SwinStage(nn.Module):
    """The blocks of a stage and its downsampling layer.

    They are called separately, because the feature map of the stage is the output of the blocks, before downsampling.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks = Stage(*blocks)
        self.downsample = downsample


def create_patch_embed(
    patch_size: int, in_chans: int, embed_dim: int, norm_layer: type[nn.Module] | None, **factory
) -> PatchEmbed:
    """Create a patch embedding for images of any size; it pads incomplete patches. (B, C, H, W) -> (B, h, w, embed_dim)."""
    return PatchEmbed(
        img_size=None,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        norm_layer=norm_layer,
        output_fmt="NHWC",
        strict_img_size=False,
        dynamic_img_pad=True,
        **factory,
    )


def create_blocks(
    dim: int,
    num_heads: int,
    grid: tuple[int, int],
    plan: Sequence[tuple[str, float]],
    windows: Mapping[str, int],
    **options,
) -> list[SwinBlock]:
    """Create the blocks of a stage; every second one has shifted windows.

    Args:
        plan: see ``plan_blocks``.
        windows: window size of each attention type.
        options: see ``SwinBlock``.
    """
    return [
        SwinBlock(
            dim,
            num_heads,
            grid,
            attention_type=attention_type,
            window_size=windows[attention_type],
            shifted=index % 2 == 1,
            drop_path=rate,
            **options,
        )
        for index, (attention_type, rate) in enumerate(plan)
    ]


class SwinTransformer(Backbone):
    """FLatten-Swin; see ``Backbone`` for the arguments that all families share.

    Args:
        window_size: window side of linear blocks in tokens, capped at the side of the map. The default is the longer side of
            the first stage's map, which makes linear attention global in every stage.
        softmax_window: window side of softmax blocks in tokens, capped at the side of the map.
        pos_drop_rate: dropout after the patch embedding.
    """

    first_conv = "patch_embed.proj"
    unused_entries = re.compile(r".*\.(attn_mask|relative_position_index)")

    def __init__(
        self,
        *,
        img_size: int | Iterable[int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        attn_type: str = "LLSS",
        window_size: int | None = None,
        softmax_window: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        linear: Mapping = NO_OPTIONS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_chans=in_chans, num_classes=num_classes, global_pool=global_pool)
        factory = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.feature_info = [
            {"num_chs": embed_dim * 2**stage, "reduction": patch_size * 2**stage, "module": f"layers.{stage}.blocks"}
            for stage in range(len(depths))
        ]
        grids = self.native_grids(img_size)
        plan = plan_blocks(attn_type, depths, drop_path_rate=drop_path_rate, attn_drop_rate=attn_drop_rate)
        windows = {"L": max(grids[0]) if window_size is None else window_size, "S": softmax_window}
        options = {
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "proj_drop": proj_drop_rate,
            "attn_drop": attn_drop_rate,
            "linear": linear,
            **factory,
        }
        norm_layer = nn.LayerNorm if patch_norm else None
        self.patch_embed = create_patch_embed(patch_size, in_chans, embed_dim, norm_layer, **factory)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.layers = nn.ModuleList()
        for stage, grid in enumerate(grids):
            dim = embed_dim * 2**stage
            blocks = create_blocks(dim, num_heads[stage], grid, plan[stage], windows, **options)
            last = stage == len(grids) - 1
            self.layers.append(SwinStage(blocks, None if last else PatchMerging(dim, **factory)))
        self.norm = nn.LayerNorm(self.num_features, **factory)
        self.apply(init_weights)
        self.build_head(drop_rate, **factory)

    def stage_grids(self, img_size: tuple[int, int]) -> list[tuple[int, int]]:
        grids = [tuple(ceil_divide(side, self.patch_size) for side in img_size)]
        while len(grids) < len(self.feature_info):
            grids.append(tuple(ceil_divide(side, 2) for side in grids[-1]))
        return grids

    def stage_blocks(self) -> list[Iterable[nn.Module]]:
        return [stage.blocks for stage in self.layers]

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        x = self.pos_drop(self.patch_embed(x))
        for stage in self.layers:
            x = stage.blocks(x)
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


def capped_windows(grid: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield windows of side 1, 2, ..., capped at the sides of the map; the number of tokens identifies a window."""
    for size in range(1, max(grid) + 1):
        yield min(size, grid[0]), min(size, grid[1])


def relative_position_index(window: tuple[int, int], *, device: torch.device | None = None) -> Tensor:
    """Row index into the bias table for each pair of tokens in a window, (N, N)."""
    rows, columns = torch.meshgrid(*(torch.arange(side, device=device) for side in window), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    row_offset = rows[:, None] - rows[None, :] + window[0] - 1
    column_offset = columns[:, None] - columns[None, :] + window[1] - 1
    return row_offset * (2 * window[1] - 1) + column_offset


def offset_grid(window: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the bias table: one entry per offset between two tokens of a window."""
    return 2 * window[0] - 1, 2 * window[1] - 1


SIZES = {
    "flatten_swin_t": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "flatten_swin_s": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "flatten_swin_b": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
}
SIZES["flatten_swin_b_384"] = {**SIZES["flatten_swin_b"], "img_size": 384, "softmax_window": 12}
