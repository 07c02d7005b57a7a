"""FLatten-PVT: Pyramid Vision Transformer (https://arxiv.org/abs/2102.12122) with focused linear attention.

Shapes: B images, H x W a token map, N = H * W tokens, M keys after spatial reduction, C channels, D channels per head.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn

from .backbone import Backbone
from .blocks import NO_OPTIONS, Block, Stage, init_weights, plan_blocks
from .compared_attention import scaled_dot_product_attention
from .linear_attention import FocusedLinearAttention
from .plain_attention import split_heads, unpack
from .positions import PositionTable, resized_parameter, whole_map
from .windows import ceil_divide

SOFTMAX_REDUCTIONS = (8, 4, 2, 1)  # spatial reduction ratio of softmax blocks, one per stage


class SpatialReduction(nn.Module):
    """Mixin with projections: q is projected from the map, k and v from the map after a strided convolution."""

    def build_projections(self, dim: int, reduction: int, *, qkv_bias: bool, proj_drop: float, **factory) -> None:
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reduction = reduction
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, stride=reduction, **factory)
            self.norm = nn.LayerNorm(dim, **factory)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Project a map (B, H, W, C) to q (B, N, C) and to k and v (B, M, 2C); also return the size of the keys' map."""
        q, keys = self.q(x.flatten(1, 2)), x
        if self.reduction > 1:
            keys = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return q, self.kv(keys.flatten(1, 2)), tuple(keys.shape[1:3])


def reduce_grid(grid: tuple[int, int], reduction: int) -> tuple[int, int]:
    """Height and width of the keys' map after a convolution with kernel size and stride ``reduction``."""
    return grid[0] // reduction, grid[1] // reduction


class LinearAttention(FocusedLinearAttention, SpatialReduction):
    """Focused linear attention over the whole map. (B, H, W, C) -> (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        reduction: int,
        linear: Mapping,
        *,
        qkv_bias: bool,
        proj_drop: float,
        **factory,
    ):
        super().__init__(dim, num_heads, grid, key_grid=reduce_grid(grid, reduction), **factory, **linear)
        self.build_projections(dim, reduction, qkv_bias=qkv_bias, proj_drop=proj_drop, **factory)

    def forward(self, x: Tensor) -> Tensor:
        q, kv, key_grid = self.project(x)
        out = self.attend(q, kv, grid=tuple(x.shape[1:3]), key_grid=key_grid)
        return self.proj_drop(self.proj(out)).view_as(x)

    def set_map_size(self, grid: tuple[int, int]) -> None:
        """Change the size of the native token map in place."""
        self.set_grid(grid, reduce_grid(grid, self.reduction))

    def source_grid(self, stage_map: tuple[int, int], num_positions: int) -> tuple[int, int] | None:
        return reduce_grid(stage_map, self.reduction)


class SoftmaxAttention(SpatialReduction):
    """Softmax attention over the whole map. (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, num_heads: int, reduction: int, *, attn_drop: float, **projections):
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.build_projections(dim, reduction, **projections)

    def forward(self, x: Tensor) -> Tensor:
        q, kv, _ = self.project(x)
        q, k, v = (split_heads(t, self.num_heads) for t in unpack(q, kv, None))  # (B, heads, N or M, D)
        out = scaled_dot_product_attention(q, k, v, dropout=self.attn_drop if self.training else 0.0)
        out = out.transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out)).view_as(x)


def create_attention(
    attention_type: str,
    dim: int,
    num_heads: int,
    grid: tuple[int, int],
    reduction: int,
    *,
    linear: Mapping,
    attn_drop: float,
    **projections,
) -> nn.Module:
    """Create the attention module of a linear (``L``) or softmax (``S``) block."""
    if attention_type == "L":
        return LinearAttention(dim, num_heads, grid, reduction, linear, **projections)
    return SoftmaxAttention(dim, num_heads, reduction, attn_drop=attn_drop, **projections)


class PatchEmbed(nn.Module):
    """Strided convolution and layer norm. (B, C, H, W) -> (B, h, w, C')."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, **factory):
        super().__init__()
        # A kernel wider than its stride overlaps neighbouring patches; the padding centres it on its patch.
        padding = kernel_size // 2 if kernel_size > stride else 0
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, padding=padding, **factory)
        self.norm = nn.LayerNorm(dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PyramidBackbone(Backbone):
    """Base of PVT and PVTv2: stage i consists of ``patch_embed{i}``, ``block{i}`` and one version-specific part.

    Args, besides those of ``Backbone``:
        linear_reductions: spatial reduction ratio of linear blocks, one per stage; softmax blocks use 8, 4, 2, 1.
    """

    first_conv = "patch_embed1.proj"
    kernel_sizes: tuple[int, ...]  # one per patch embedding
    version_part_name: str  # name of the version-specific part: position embeddings in PVT, norms in PVTv2
    map_part_name: str  # name of the module whose output is the feature map of the stage

    def __init__(
        self,
        *,
        img_size: int | Iterable[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        attn_type: str = "LLLL",
        linear_reductions: Sequence[int] = (1, 1, 1, 1),
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
        self.num_features = dims[-1]
        self.feature_info = [
            {"num_chs": dims[index], "reduction": 4 * 2**index, "module": f"{self.map_part_name}{index + 1}"}
            for index in range(len(depths))
        ]
        plan = plan_blocks(attn_type, depths, drop_path_rate=drop_path_rate, attn_drop_rate=attn_drop_rate)
        reductions = {"L": linear_reductions, "S": SOFTMAX_REDUCTIONS}
        self.reductions = [max(reductions[letter][index] for letter, _ in stage) for index, stage in enumerate(plan)]
        self.grids = self.native_grids(img_size)
        factory = {"device": device, "dtype": dtype}
        options = {"linear": linear, "attn_drop": attn_drop_rate, "qkv_bias": qkv_bias, "proj_drop": proj_drop_rate, **factory}
        for index, grid in enumerate(self.grids):
            dim, stride = dims[index], 2 if index else 4
            embed = PatchEmbed(dims[index - 1] if index else in_chans, dim, self.kernel_sizes[index], stride, **factory)
            blocks = []
            for letter, rate in plan[index]:
                attention = create_attention(letter, dim, num_heads[index], grid, reductions[letter][index], **options)
                mlp = self.create_mlp(dim, int(dim * mlp_ratios[index]), proj_drop_rate, **factory)
                blocks.append(Block(dim, attention, mlp, rate, eps=1e-6, **factory))
            parts = {
                "patch_embed": embed,
                self.version_part_name: self.create_version_part(dim, grid, **factory),
                "block": Stage(*blocks),
            }
            for part, module in parts.items():
                setattr(self, f"{part}{index + 1}", module)
        self.norm = nn.Identity()  # neither version has a final norm
        self.apply(init_weights)
        self.build_head(drop_rate, **factory)

    def create_mlp(self, dim: int, hidden_dim: int, drop: float, **factory) -> nn.Module:
        """Create the MLP of a block; ``factory`` is the device and dtype of its parameters."""
        raise NotImplementedError

    def create_version_part(self, dim: int, grid: tuple[int, int], **factory) -> nn.Module | nn.Parameter:
        """Create the version-specific part of a stage; ``factory`` is the device and dtype of its parameters."""
        raise NotImplementedError

    def stage_part(self, part: str, index: int) -> nn.Module | nn.Parameter:
        """Part of stage ``index``, counted from 0. Attribute names count from 1, as in released checkpoints."""
        return getattr(self, f"{part}{index + 1}")

    def stage_grids(self, img_size: tuple[int, int]) -> list[tuple[int, int]]:
        grids, grid = [], img_size
        for index in range(len(self.feature_info)):
            stride = 2 if index else 4
            # Overlapping kernels are padded at the border; other kernels ignore an incomplete last patch.
            overlaps = self.kernel_sizes[index] > stride
            grid = tuple(ceil_divide(side, stride) if overlaps else side // stride for side in grid)
            grids.append(grid)
        return grids

    def min_map_sides(self) -> list[int]:
        return self.reductions[: len(self.feature_info)]

    def stage_blocks(self) -> list[Iterable[nn.Module]]:
        return [self.stage_part("block", index) for index in range(len(self.feature_info))]

    def drop_stages(self, num_kept: int) -> None:
        for index in range(num_kept, len(self.feature_info)):
            for part in ("patch_embed", self.version_part_name, "block"):
                delattr(self, f"{part}{index + 1}")

    def group_matcher(self, coarse: bool = False) -> dict:
        stem = r"^(?:patch_embed1|pos_embed1)"
        if coarse:
            return {"stem": stem, "blocks": [(r"^(?:patch_embed|pos_embed|block|norm)(\d+)", None)]}
        return {
            "stem": stem,
            "blocks": [
                (r"^block(\d+)\.(\d+)", None),
                (r"^(?:patch_embed|pos_embed)(\d+)", (0,)),
                (r"^norm(\d+)", (99,)),
            ],
        }


class PyramidVisionTransformer(PyramidBackbone):
    """FLatten-PVT, with position embeddings in every stage; see ``PyramidBackbone`` for the other arguments.

    Args:
        pos_drop_rate: dropout after the position embeddings of each stage are added.
    """

    kernel_sizes = (4, 2, 2, 2)
    version_part_name = "pos_embed"
    map_part_name = "block"
    unused_entries = re.compile(r"norm\.(weight|bias)")  # the paper's code creates a final norm but never calls it

    def __init__(self, *, pos_drop_rate: float = 0.0, **options):
        super().__init__(**options)
        self.pos_drop = nn.Dropout(pos_drop_rate)

    def create_mlp(self, dim: int, hidden_dim: int, drop: float, **factory) -> nn.Module:
        return Mlp(dim, hidden_dim, drop=drop, **factory)

    def create_version_part(self, dim: int, grid: tuple[int, int], **factory) -> nn.Parameter:
        return nn.Parameter(trunc_normal_(torch.empty(1, grid[0] * grid[1], dim, **factory), std=0.02))

    def named_position_tables(self) -> Iterator[tuple[int, PositionTable]]:
        yield from super().named_position_tables()
        for index in range(len(self.feature_info)):
            yield index, PositionTable(f"pos_embed{index + 1}", self.grids[index], whole_map)

    def set_input_size(self, img_size: int | Iterable[int]) -> None:
        super().set_input_size(img_size)
        grids = self.native_grids(img_size)
        for index, grid in enumerate(grids):
            table = resized_parameter(self.stage_part("pos_embed", index), self.grids[index], grid)
            setattr(self, f"pos_embed{index + 1}", table)
        self.grids = grids

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        for index in range(len(self.feature_info)):
            x = self.stage_part("patch_embed", index)(x if index == 0 else x.permute(0, 3, 1, 2))
            _, height, width, channels = x.shape
            table = self.resized_positions(self.stage_part("pos_embed", index), self.grids[index], (height, width))
            x = self.pos_drop(x + table.view(1, height, width, channels))
            x = self.stage_part("block", index)(x)
            yield x


SIZES = {
    "flatten_pvt_t": {"depths": (2, 2, 2, 2)},
    "flatten_pvt_s": {"depths": (3, 4, 6, 3)},
    "flatten_pvt_m": {"depths": (3, 4, 18, 3)},
    "flatten_pvt_b": {"depths": (3, 8, 27, 3)},  # PVT-Large in the paper's code
}
