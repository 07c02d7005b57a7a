"""FLatten-DeiT: DeiT (https://arxiv.org/abs/2012.12877) with focused linear attention in every block.

The paper reports results of this model, but the published code does not contain it. This implementation keeps the class token,
attends over all tokens, and applies the depthwise convolution to the patch tokens only. With ``global_pool`` "token", the
convolution of the last block therefore does not influence the logits and has a zero gradient.

Shapes: B images, N = 1 + H * W tokens, C channels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from timm.layers import Mlp, PatchEmbed, trunc_normal_
from torch import Tensor, nn

from .backbone import Backbone, check_output_fmt
from .blocks import NO_OPTIONS, Block, init_weights, plan_blocks, run_block
from .compared_attention import SoftmaxAttention
from .linear_attention import ProjectedLinearAttention
from .positions import PositionTable, resized_parameter, whole_map


class LinearAttention(ProjectedLinearAttention):
    """Focused linear attention over class and patch tokens. (B, N, C) -> (B, N, C)."""

    def set_map_size(self, grid: tuple[int, int]) -> None:
        """Change the size of the native token map in place."""
        self.set_grid(grid)


class SoftmaxTokenAttention(SoftmaxAttention):
    """Softmax attention over class and patch tokens. (B, N, C) -> (B, N, C)."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.attend(x)


def create_attention(
    attention_type: str, dim: int, num_heads: int, grid: tuple[int, int], *, linear: Mapping, attn_drop: float, **options
) -> nn.Module:
    """Create the attention module of a linear (``L``) or softmax (``S``) block."""
    if attention_type == "L":
        return LinearAttention(dim, num_heads, grid, linear=linear, num_prefix_tokens=1, **options)
    return SoftmaxTokenAttention(dim, num_heads, attn_drop=attn_drop, **options)


class DeiT(Backbone):
    """FLatten-DeiT, with the interface of timm's VisionTransformer and one feature map per block.

    Args, besides those of ``Backbone``:
        global_pool: "token" for the class token, "avg" for the mean of the patch tokens, "" for all tokens.
        attn_type: "L" for linear or "S" for softmax attention in every block; or "M" and a number of blocks, as in "M4", for
            linear attention in the first 4 blocks and softmax attention in the rest.
        fc_norm: apply the final norm after pooling instead of before it; by default, only if ``global_pool`` is "avg".
        pos_drop_rate: dropout after the position embeddings are added.
    """

    output_fmt = "NLC"
    first_conv = "patch_embed.proj"
    global_pools = ("token", "avg", "")
    num_prefix_tokens = 1

    def __init__(
        self,
        *,
        img_size: int | Iterable[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attn_type: str = "L",
        fc_norm: bool | None = None,
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
        self.num_features = self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{index}"} for index in range(depth)
        ]
        self.grid = self.native_grids(img_size)[0]
        (plan,) = plan_blocks(attn_type, (depth,), drop_path_rate=drop_path_rate, attn_drop_rate=attn_drop_rate)
        factory = {"device": device, "dtype": dtype}
        options = {"linear": linear, "attn_drop": attn_drop_rate, "qkv_bias": qkv_bias, "proj_drop": proj_drop_rate, **factory}
        embed = {"in_chans": in_chans, "embed_dim": embed_dim, "strict_img_size": False, **factory}
        self.patch_embed = PatchEmbed(img_size=None, patch_size=patch_size, **embed)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **factory))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], embed_dim, **factory))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.ModuleList()
        for letter, rate in plan:
            attention = create_attention(letter, embed_dim, num_heads, self.grid, **options)
            mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), drop=proj_drop_rate, **factory)
            self.blocks.append(Block(embed_dim, attention, mlp, rate, eps=1e-6, **factory))
        norm_after_pooling = global_pool == "avg" if fc_norm is None else fc_norm
        self.norm = nn.Identity() if norm_after_pooling else nn.LayerNorm(embed_dim, eps=1e-6, **factory)
        self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6, **factory) if norm_after_pooling else nn.Identity()
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)
        self.build_head(drop_rate, **factory)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the patch grid, in tokens, for an image of ``height`` x ``width`` pixels."""
        return height // self.patch_size, width // self.patch_size

    def stage_grids(self, img_size: tuple[int, int]) -> list[tuple[int, int]]:
        return [self.grid_of(*img_size)] * len(self.feature_info)

    def stage_blocks(self) -> list[Iterable[nn.Module]]:
        return [(block,) for block in self.blocks]

    def named_position_tables(self) -> Iterator[tuple[int, PositionTable]]:
        yield 0, PositionTable("pos_embed", self.grid, whole_map, self.num_prefix_tokens)
        yield from super().named_position_tables()

    def set_input_size(self, img_size: int | Iterable[int]) -> None:
        super().set_input_size(img_size)
        grid = self.native_grids(img_size)[0]
        self.pos_embed = resized_parameter(self.pos_embed, self.grid, grid, self.num_prefix_tokens)
        self.grid = grid

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"cls_token", "pos_embed"}

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the tokens after each block. (B, 3, H, W) -> (B, N, C)."""
        grid = self.grid_of(x.shape[-2], x.shape[-1])
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x + self.resized_positions(self.pos_embed, self.grid, grid, self.num_prefix_tokens))
        for block in self.blocks:
            x = run_block(block, x, grid, recompute=self.grad_checkpointing)
            yield x

    def pool(self, x: Tensor) -> Tensor:
        """Pool the tokens. (B, N, C) -> (B, C); unchanged if ``global_pool`` is ""."""
        if self.global_pool == "token":
            return x[:, 0]
        return x[:, self.num_prefix_tokens :].mean(dim=1) if self.global_pool else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify. (B, N, C) -> (B, num_classes), or (B, C) with ``pre_logits``.

        With ``global_pool`` "" the head is applied to every token: (B, N, num_classes) or (B, N, C).
        """
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list | tuple[Tensor, list]:
        """Outputs of the selected blocks, with the interface of timm's VisionTransformer.

        Args:
            indices: indices of blocks; an integer n selects the last n blocks, None selects all.
            return_prefix_tokens: pair every output with its class token, (B, 1, C).
            norm: apply the final norm to every output.
            stop_early: skip the blocks after the last selected one.
            output_fmt: NCHW for maps, or NLC for patch tokens.
            intermediates_only: return only the list of selected outputs.

        Returns:
            The output of the last computed block after the final norm, (B, N, C), and the selected outputs in the order of the
            blocks; with ``intermediates_only``, only the selected outputs.

        Raises:
            ValueError: an index out of range, an unknown format, or an image side smaller than ``min_img_size``.
        """
        check_output_fmt(output_fmt, ("NCHW", "NLC"))
        grid = self.grid_of(x.shape[-2], x.shape[-1])
        features, tokens = self.run_stages(x, self.take_indices(indices), stop_early)
        if norm:
            tokens = [self.norm(output) for output in tokens]
        prefixes = [output[:, : self.num_prefix_tokens] for output in tokens]
        outputs = [output[:, self.num_prefix_tokens :] for output in tokens]
        if output_fmt == "NCHW":
            outputs = [output.transpose(1, 2).unflatten(2, grid).contiguous() for output in outputs]
        if return_prefix_tokens:
            outputs = list(zip(outputs, prefixes, strict=True))
        return outputs if intermediates_only else (self.norm(features), outputs)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list:
        """``forward_intermediates`` with the arguments of DINO's ``get_intermediate_layers``, as in timm's VisionTransformer.

        Args:
            n: number of blocks from the end, or indices of blocks.
            reshape: return (B, C, h, w) maps instead of (B, h * w, C) tokens.
        """
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        selected = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.fc_norm = nn.Identity()
        return selected

    def drop_stages(self, num_kept: int) -> None:
        self.blocks = self.blocks[:num_kept]

    def group_matcher(self, coarse: bool = False) -> dict:
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


SIZES = {
    "flatten_deit_t": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "flatten_deit_s": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "flatten_deit_b": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}
