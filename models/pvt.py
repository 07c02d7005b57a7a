"""FLatten-PVT: Pyramid Vision Transformer (https://arxiv.org/abs/2102.12122) with focused linear attention.

Shapes: B images, H x W a token map, N = H * W tokens, M keys after spatial reduction, C channels, D channels a head.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn

from models.layers import (
    NO_OPTIONS,
    Backbone,
    PositionTable,
    create_classifier,
    drop_path_rates,
    init_weights,
    parse_attention_types,
    resize_grid,
    to_pair,
)
from models.linear_attention import FocusedLinearAttention

SOFTMAX_REDUCTIONS = (8, 4, 2, 1)  # spatial reduction of softmax blocks, a stage each
BlockNorm = partial(nn.LayerNorm, eps=1e-6)


class Reduction(nn.Module):
    """Mixin: projections to q, and to k and v of a map that a strided convolution has reduced."""

    def build_projections(self, dim: int, reduction: int, *, qkv_bias: bool, proj_drop: float) -> None:
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reduction = reduction
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, stride=reduction)
            self.norm = nn.LayerNorm(dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """(B, H, W, C) -> q (B, N, C), k and v (B, M, C), and the keys' map."""
        q, keys = self.q(x.flatten(1, 2)), x
        if self.reduction > 1:
            keys = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        k, v = self.kv(keys.flatten(1, 2)).chunk(2, dim=-1)
        return q, k, v, tuple(keys.shape[1:3])


class LinearAttention(FocusedLinearAttention, Reduction):
    """Focused linear attention over the whole map. (B, H, W, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int], reduction: int, linear: Mapping, **projections):
        key_grid = tuple(side // reduction for side in grid)
        super().__init__(dim, num_heads, grid, key_grid=key_grid, **linear)
        self.build_projections(dim, reduction, **projections)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, key_grid = self.project(x)
        out = self.attend(q, k, v, grid=tuple(x.shape[1:3]), key_grid=key_grid)
        return self.proj_drop(self.proj(out)).view_as(x)


class SoftmaxAttention(Reduction):
    """Softmax attention over the whole map. (B, H, W, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, reduction: int, **projections):
        super().__init__()
        self.num_heads = num_heads
        self.build_projections(dim, reduction, **projections)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, _ = self.project(x)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, N or M, D)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out)).view_as(x)


def create_attention(
    kind: str,
    dim: int,
    num_heads: int,
    grid: tuple[int, int],
    *,
    stage: int,
    linear_reduction: int,
    linear: Mapping,
    **projections,
) -> nn.Module:
    """The attention of an ``L`` or ``S`` block."""
    if kind == "L":
        return LinearAttention(dim, num_heads, grid, linear_reduction, linear, **projections)
    return SoftmaxAttention(dim, num_heads, SOFTMAX_REDUCTIONS[stage], **projections)


class Block(nn.Module):
    """Attention and MLP, both residual and pre-normed. (B, H, W, C) -> the same."""

    def __init__(self, dim: int, attention: nn.Module, mlp: nn.Module, drop_path: float):
        super().__init__()
        self.norm1 = BlockNorm(dim)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = BlockNorm(dim)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """A strided convolution and a norm. (B, C, H, W) -> (B, h, w, C')."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int):
        super().__init__()
        # Kernels wider than their stride overlap, centred on their patch.
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, padding=kernel_size // 2 if kernel_size > stride else 0)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PyramidBackbone(Backbone):
    """What PVT and PVTv2 share: stage i has ``patch_embed{i}``, ``block{i}`` and a part that the version adds.

    Args:
        img_size: native input size; the model takes others, resizing its position tables (bicubic).
        linear_reductions: spatial reduction of linear blocks, a stage each; softmax blocks keep 8, 4, 2, 1.
        linear: options of ``FocusedLinearAttention``.
    """

    kernel_sizes: tuple[int, ...]  # of the patch embeddings
    own_part: str

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        attn_type: str = "LLLL",
        linear_reductions: Sequence[int] = (1, 1, 1, 1),
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        linear: Mapping = NO_OPTIONS,
    ):
        super().__init__()
        self.num_classes, self.num_features, self.feature_info = num_classes, dims[-1], []
        self.pos_drop = nn.Dropout(drop_rate)
        self.grids = []
        grid, rates = to_pair(img_size), drop_path_rates(drop_path_rate, depths)
        for index, attention_types in enumerate(parse_attention_types(attn_type, depths)):
            dim, kernel_size, stride = dims[index], self.kernel_sizes[index], 2 if index else 4
            # An overlapping kernel reaches past the border, another one leaves out what does not fill a patch.
            grid = tuple(-(-side // stride) if kernel_size > stride else side // stride for side in grid)
            self.grids.append(grid)
            embed = PatchEmbed(dims[index - 1] if index else in_chans, dim, kernel_size, stride)
            blocks = [
                Block(
                    dim,
                    create_attention(
                        kind,
                        dim,
                        num_heads[index],
                        grid,
                        stage=index,
                        linear_reduction=linear_reductions[index],
                        linear=linear,
                        qkv_bias=qkv_bias,
                        proj_drop=drop_rate,
                    ),
                    self.create_mlp(dim, int(dim * mlp_ratios[index]), drop_rate),
                    rate,
                )
                for kind, rate in zip(attention_types, rates[index], strict=True)
            ]
            parts = {"patch_embed": embed, self.own_part: self.create_own_part(dim, grid), "block": nn.ModuleList(blocks)}
            for part, module in parts.items():
                setattr(self, f"{part}{index + 1}", module)
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**index, "module": f"block{index + 1}"})
        self.norm = nn.Identity()  # neither version has a final norm
        self.apply(init_weights)
        self.head = create_classifier(self.num_features, num_classes)

    def create_mlp(self, dim: int, hidden_dim: int, drop_rate: float) -> nn.Module:
        raise NotImplementedError

    def create_own_part(self, dim: int, grid: tuple[int, int]) -> nn.Module | nn.Parameter:
        raise NotImplementedError

    def stage(self, part: str, index: int) -> nn.Module | nn.Parameter:
        """A part of a stage, counted from 0; names count from 1, as in released checkpoints."""
        return getattr(self, f"{part}{index + 1}")

    def drop_stages(self, num_kept: int) -> None:
        for index in range(num_kept, len(self.feature_info)):
            for part in ("patch_embed", self.own_part, "block"):
                delattr(self, f"{part}{index + 1}")

    def group_matcher(self, coarse: bool = False) -> dict:
        blocks = r"^block(\d+)" if coarse else r"^block(\d+)\.(\d+)"
        return {
            "stem": r"^(?:patch_embed1|pos_embed1)",
            "blocks": [(blocks, None), (r"^(?:patch_embed|pos_embed)(\d+)", (0,)), (r"^norm(\d+)", (99,))],
        }


class PyramidVisionTransformer(PyramidBackbone):
    """FLatten-PVT: a position table a stage. The norm that the reference builds at its end, it never uses."""

    kernel_sizes = (4, 2, 2, 2)
    own_part = "pos_embed"

    def create_mlp(self, dim: int, hidden_dim: int, drop_rate: float) -> nn.Module:
        return Mlp(dim, hidden_dim, drop=drop_rate)

    def create_own_part(self, dim: int, grid: tuple[int, int]) -> nn.Parameter:
        return nn.Parameter(trunc_normal_(torch.empty(1, grid[0] * grid[1], dim), std=0.02))

    def position_tables(self) -> list[PositionTable]:
        return [PositionTable(f"pos_embed{index + 1}", self.grids[index]) for index in range(len(self.feature_info))]

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        for index in range(len(self.feature_info)):
            x = self.stage("patch_embed", index)(x if index == 0 else x.permute(0, 3, 1, 2))
            table = resize_grid(self.stage("pos_embed", index), self.grids[index], tuple(x.shape[1:3]))
            x = self.pos_drop(x + table.view(1, *x.shape[1:]))
            for block in self.stage("block", index):
                x = self.run_block(block, x)
            yield x


SIZES = {
    "flatten_pvt_t": {"depths": (2, 2, 2, 2)},
    "flatten_pvt_s": {"depths": (3, 4, 6, 3)},
    "flatten_pvt_m": {"depths": (3, 4, 18, 3)},
    "flatten_pvt_b": {"depths": (3, 8, 27, 3)},  # PVT-Large
}
