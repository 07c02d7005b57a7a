"""FLatten-PVTv2: PVT v2 (https://arxiv.org/abs/2106.13797) with focused linear attention.

Shapes: B images, H x W a token map, C channels.
"""

import math
from collections.abc import Iterator

from timm.layers import Mlp
from torch import Tensor, nn

from .linear_attention import DepthwiseFilters
from .pvt import PyramidBackbone


class DepthwiseConvolution(nn.Module):
    """Depthwise 3 x 3 convolution. (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, **factory):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvolutionalMlp(Mlp):
    """MLP with a depthwise convolution before its activation. (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, hidden_dim: int, drop: float, **factory):
        super().__init__(dim, hidden_dim, drop=drop, **factory)
        self.dwconv = DepthwiseConvolution(hidden_dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.dwconv(self.fc1(x))))
        return self.drop2(self.fc2(x))


class PyramidVisionTransformerV2(PyramidBackbone):
    """FLatten-PVTv2: overlapping patch embeddings, convolutional MLPs, a norm after every stage and no position embeddings.

    See ``PyramidBackbone`` for the arguments.
    """

    kernel_sizes = (7, 3, 3, 3)
    version_part_name = "norm"
    map_part_name = "norm"

    def __init__(self, **options):
        super().__init__(**options)
        self.apply(_init_convolution)

    def create_mlp(self, dim: int, hidden_dim: int, drop: float, **factory) -> nn.Module:
        return ConvolutionalMlp(dim, hidden_dim, drop, **factory)

    def create_version_part(self, dim: int, grid: tuple[int, int], **factory) -> nn.Module:
        return nn.LayerNorm(dim, eps=1e-6, **factory)

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        for index in range(len(self.feature_info)):
            x = self.stage_part("patch_embed", index)(x if index == 0 else x.permute(0, 3, 1, 2))
            x = self.stage_part("norm", index)(self.stage_part("block", index)(x))
            yield x


def _init_convolution(module: nn.Module) -> None:
    """Initialise a convolution from a normal distribution of variance 2 / fan-out, and its bias with 0."""
    if isinstance(module, (nn.Conv2d, DepthwiseFilters)):
        groups = len(module.weight) if isinstance(module, DepthwiseFilters) else module.groups
        num_outputs, _, height, width = module.weight.shape
        nn.init.normal_(module.weight, std=math.sqrt(2 / (height * width * num_outputs // groups)))
        nn.init.zeros_(module.bias)


SIZES = {
    "flatten_pvt_v2_b0": {"dims": (32, 64, 160, 256), "depths": (2, 2, 2, 2)},
    "flatten_pvt_v2_b1": {"depths": (2, 2, 2, 2)},
    "flatten_pvt_v2_b2": {"depths": (3, 4, 6, 3)},
    "flatten_pvt_v2_b3": {"depths": (3, 4, 18, 3)},
    "flatten_pvt_v2_b4": {"depths": (3, 8, 27, 3)},
    "flatten_pvt_v2_b5": {"depths": (3, 6, 40, 3), "mlp_ratios": (4, 4, 4, 4)},
}
