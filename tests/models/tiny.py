"""One tiny model per family, with linear attention and, where the family has them, windows, stripes, masks and reduced keys."""

import torch

from models import create_model

_PVT = {"dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "mlp_ratios": (2, 2), "linear_reductions": (2, 1)}
# Options for linear attention only; ``attn_type`` S replaces half of the blocks by softmax attention in ``tiny(softmax=True)``.
OPTIONS = {
    "flatten_swin_t": {"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 5, "softmax_window": 3},
    "flatten_pvt_t": _PVT,
    "flatten_pvt_v2_b0": _PVT,
    "flatten_cswin_t": {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "linear_splits": (3, None)},
    "flatten_deit_t": {"embed_dim": 8, "depth": 2, "num_heads": 2},
}


def tiny(name: str, *, softmax: bool = False, **options) -> torch.nn.Module:
    """A model in training mode for images of 32 x 32 pixels, without drop path, with random values in every parameter.

    Args:
        softmax: use softmax attention in half of the blocks.
    """
    linear = {"attn_type": "L"} if "deit" in name else {"attn_type": "LL"}
    mixed = {"attn_type": "M1"} if "deit" in name else {"attn_type": "LS"}
    defaults = {"num_classes": 3, "img_size": 32, "drop_path_rate": 0.0}
    model = create_model(name, **{**defaults, **OPTIONS[name], **(mixed if softmax else linear), **options})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_meta:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_images(count: int = 2, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
