"""FLatten-DeiT: DeiT (https://arxiv.org/abs/2012.12877) with focused linear attention in every block.

The paper reports it, its code was never published: the class token stays, attention is over all tokens, and the
depthwise convolution covers the patch tokens. (So the last block's convolution has no influence on the class token, and
its gradient is zero.)

Shapes: B images, N = 1 + H * W tokens, C channels.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed, trunc_normal_
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


class LinearAttention(FocusedLinearAttention):
    """Focused linear attention over class and patch tokens. (B, N, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int], *, qkv_bias: bool, proj_drop: float, linear: Mapping):
        super().__init__(dim, num_heads, grid, num_prefix_tokens=1, **linear)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj_drop(self.proj(self.attend(q, k, v, grid=grid)))


class SoftmaxAttention(nn.Module):
    """DeiT's own attention. (B, N, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, proj_drop: float):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Attention and MLP, both residual and pre-normed. (B, N, C) -> the same."""

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float, drop_rate: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop_rate)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DeiT(Backbone):
    """FLatten-DeiT. Its feature maps are those of its blocks, the class token left out.

    Args:
        img_size: native input size; the model takes others, resizing its position tables (bicubic).
        attn_type: one letter, L for linear attention in every block or S for softmax; or M with the number of blocks
            that are linear, as in M4.
        linear: options of ``FocusedLinearAttention``.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attn_type: str = "L",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        linear: Mapping = NO_OPTIONS,
    ):
        super().__init__()
        self.num_classes, self.num_features, self.patch_size = num_classes, embed_dim, patch_size
        self.grid = tuple(side // patch_size for side in to_pair(img_size))
        self.patch_embed = PatchEmbed(
            img_size=None, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, strict_img_size=False
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        options = {"qkv_bias": qkv_bias, "proj_drop": drop_rate}
        (attention_types,) = parse_attention_types(attn_type, (depth,))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                LinearAttention(embed_dim, num_heads, self.grid, linear=linear, **options)
                if kind == "L"
                else SoftmaxAttention(embed_dim, num_heads, **options),
                mlp_ratio,
                drop_rate,
                rate,
            )
            for kind, rate in zip(attention_types, drop_path_rates(drop_path_rate, (depth,))[0], strict=True)
        )
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{index}"} for index in range(depth)
        ]
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)
        self.head = create_classifier(self.num_features, num_classes)

    def position_tables(self) -> list[PositionTable]:
        return [PositionTable("pos_embed", self.grid, 1)]

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"cls_token", "pos_embed"}

    def grid_of(self, image_size: Sequence[int]) -> tuple[int, int]:
        return tuple(side // self.patch_size for side in image_size)

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """(B, 3, H, W) -> the tokens after each block, (B, N, C)."""
        grid = self.grid_of(x.shape[-2:])
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x + resize_grid(self.pos_embed, self.grid, grid, 1))
        for block in self.blocks:
            x = self.run_block(block, x, grid)
            yield x

    def to_map(self, features: Tensor, image_size: Sequence[int]) -> Tensor:
        return features[:, 1:].unflatten(1, self.grid_of(image_size))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token, then the classifier. (B, N, C) -> (B, num_classes), or (B, C) with ``pre_logits``."""
        x = x[:, 0]
        return x if pre_logits else self.head(x)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, "avg" if global_pool == "token" else global_pool)

    def drop_stages(self, num_kept: int) -> None:
        self.blocks = self.blocks[:num_kept]

    def group_matcher(self, coarse: bool = False) -> dict:
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


SIZES = {
    "flatten_deit_t": {"embed_dim": 192, "num_heads": 3},
    "flatten_deit_s": {"embed_dim": 384, "num_heads": 6},
    "flatten_deit_b": {"embed_dim": 768, "num_heads": 12},
}
