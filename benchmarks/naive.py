"""Naive implementation of focused linear attention, the baseline of the benchmarks."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.cswin import LinearStripes
from models.linear_attention import DepthwiseFilters, FocusedLinearAttention
from models.plain_attention import unpack

EPS = 1e-6


def naive_attention(q: Tensor, k: Tensor, v: Tensor, module: FocusedLinearAttention, grid: tuple[int, int]) -> Tensor:
    """Compute eq. 3 to 8 of the paper step by step, with the parameters of ``module`` and without masks.

    Args:
        q: (B, N, C).
        k, v: (B, M, C), where M is the number of tokens of the module's positional encoding.
        grid: (height, width) of the token map of the queries.

    Returns:
        (B, N, C).
    """
    num_heads, power = module.num_heads, module.focusing_factor
    k = k + module.positional_encoding
    scale = F.softplus(module.scale)
    q, k = (F.relu(q) + EPS) / scale, (F.relu(k) + EPS) / scale
    q_norm, k_norm = q.norm(dim=-1, keepdim=True), k.norm(dim=-1, keepdim=True)
    q, k = q**power, k**power
    q = q / q.norm(dim=-1, keepdim=True) * q_norm
    k = k / k.norm(dim=-1, keepdim=True) * k_norm
    q, k, values = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    normaliser = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + EPS)
    root_scale = k.shape[-2] ** -0.5
    out = q @ ((k.transpose(-2, -1) * root_scale) @ (values * root_scale)) * normaliser
    out = out.transpose(1, 2).flatten(2)
    num_prefix, num_images = module.num_prefix_tokens, v.shape[0]
    maps = v[:, num_prefix:]
    if maps.shape[1] != grid[0] * grid[1]:
        maps = F.interpolate(maps.transpose(1, 2), size=grid[0] * grid[1], mode="linear").transpose(1, 2)
    head_maps = maps.unflatten(-1, (num_heads, -1)).permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, grid)
    conv_out = convolve(head_maps.contiguous(), module.dwc)
    conv_out = conv_out.flatten(2).unflatten(0, (num_images, num_heads)).flatten(1, 2).transpose(1, 2)
    out = out + (F.pad(conv_out, (0, 0, num_prefix, 0)) if num_prefix else conv_out)
    if isinstance(module, LinearStripes):
        local_encoding = convolve(v.transpose(1, 2).contiguous().unflatten(-1, grid), module.get_v)
        out = out + local_encoding.flatten(2).transpose(1, 2)
    return out


def convolve(maps: Tensor, filters: DepthwiseFilters) -> Tensor:
    """Depthwise convolution of maps, (B, C, height, width), with C filters."""
    return F.conv2d(maps, filters.weight, filters.bias, padding=filters.kernel_size // 2, groups=maps.shape[1])


def use_naive_attention(model: nn.Module) -> nn.Module:
    """Replace the linear attention of a model by ``naive_attention``, in place. Returns the model."""

    def replace(module: FocusedLinearAttention) -> None:
        def attend(q, k=None, v=None, *, grid=None, key_grid=None, key_mask=None):
            if key_mask is not None:
                raise ValueError(
                    "the naive implementation does not support masks; choose an --img-size for which no window is padded"
                )
            return naive_attention(*unpack(q, k, v), module, grid or module.grid)

        module.attend = attend

    for module in model.modules():
        if isinstance(module, FocusedLinearAttention):
            replace(module)
    return model
