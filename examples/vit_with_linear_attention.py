"""Replace the attention of a stock timm ViT with focused linear attention.

Run: python examples/vit_with_linear_attention.py
"""

import sys
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from models.linear_attention import FocusedLinearAttention


class LinearAttention(nn.Module):
    """Focused linear attention with the query, key, value and output projections of a timm ``Attention``.

    Args:
        attention: the timm module to replace; its projections are reused.
        grid: height and width of the patch grid, in tokens.
        num_prefix_tokens: number of class and register tokens before the patch tokens.
    """

    def __init__(self, attention: nn.Module, grid: tuple[int, int], num_prefix_tokens: int):
        super().__init__()
        self.qkv = attention.qkv
        self.proj = attention.proj
        self.operator = FocusedLinearAttention(
            self.proj.in_features, attention.num_heads, grid, num_prefix_tokens=num_prefix_tokens
        )

    def forward(self, x: Tensor, **_unused) -> Tensor:
        return self.proj(self.operator(self.qkv(x)))


def replace_attention(model: nn.Module) -> nn.Module:
    """Replace the attention module of every block of a timm VisionTransformer, in place."""
    for block in model.blocks:
        block.attn = LinearAttention(block.attn, model.patch_embed.grid_size, model.num_prefix_tokens)
    return model


if __name__ == "__main__":
    vit = replace_attention(timm.create_model("vit_tiny_patch16_224", num_classes=10))
    print(vit(torch.randn(2, 3, 224, 224)).shape)
