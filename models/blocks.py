"""What the blocks of all backbones share: attention types, stochastic depth, initialisation and activation checkpointing.

Shapes: B images, N tokens, C channels.
"""

from collections.abc import Iterable, Sequence
from types import MappingProxyType

import torch
from timm.layers import DropPath
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NO_OPTIONS = MappingProxyType({})


def init_weights(module: nn.Module) -> None:
    """Initialise linear weights (normal, std 0.02, truncated at +-2), biases (0) and weights of layer norms (1)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def drop_path_rates(rate: float, depths: Iterable[int]) -> list[list[float]]:
    """Stochastic-depth rates by stage and block, increasing linearly from 0 in the first block to ``rate`` in the last."""
    depths = list(depths)
    steps = max(sum(depths) - 1, 1)
    rates = (rate * block / steps for block in range(sum(depths)))
    return [[next(rates) for _ in range(depth)] for depth in depths]


def parse_attention_types(attn_type: str, depths: Iterable[int]) -> list[str]:
    """Expand an attention type to one letter per block: ``L`` for linear, ``S`` for softmax attention.

    Args:
        attn_type: one letter per stage, followed by a number n if a letter is ``M``: the first n blocks of an ``M`` stage are
            ``L`` and the rest ``S``. For example, ``LLMS3`` with depths (2, 2, 6, 2) gives LL, LL, LLLSSS, SS.

    Raises:
        ValueError: an unknown letter, a wrong number of letters, ``M`` without a number or a number without ``M``.
    """
    depths = list(depths)
    letters = attn_type.rstrip("0123456789")
    digits = attn_type[len(letters) :]
    if len(letters) != len(depths) or set(letters) - set("LSM"):
        raise ValueError(f"attention type {attn_type!r}: give one of L, S, M for each of the {len(depths)} stages")
    if ("M" in letters) != bool(digits):
        raise ValueError(
            f"attention type {attn_type!r}: M needs a number at the end, as in LLMS3; without M, no number is allowed"
        )
    num_linear = int(digits or 0)
    return [
        letter * depth if letter != "M" else "L" * min(num_linear, depth) + "S" * max(depth - num_linear, 0)
        for letter, depth in zip(letters, depths, strict=True)
    ]


def plan_blocks(
    attn_type: str, depths: Sequence[int], *, drop_path_rate: float, attn_drop_rate: float
) -> list[list[tuple[str, float]]]:
    """Attention type, ``L`` or ``S``, and stochastic-depth rate of every block, by stage.

    Raises:
        ValueError: an invalid ``attn_type`` or ``drop_path_rate``, or an ``attn_drop_rate`` above 0 without softmax blocks.
    """
    if not 0 <= drop_path_rate <= 1:
        raise ValueError(f"drop_path_rate={drop_path_rate}: give a number from 0 to 1")
    letters, rates = parse_attention_types(attn_type, depths), drop_path_rates(drop_path_rate, depths)
    if attn_drop_rate and "S" not in "".join(letters):
        raise ValueError(
            f"attn_drop_rate={attn_drop_rate} has no effect, because all blocks use linear attention, which has no attention "
            "matrix; use 0.0"
        )
    return [list(zip(*stage, strict=True)) for stage in zip(letters, rates, strict=True)]


def check_image_size(height: int, width: int, minimum: int) -> None:
    """Raise ``ValueError`` if a side is smaller than ``minimum`` pixels."""
    if height < minimum or width < minimum:
        raise ValueError(
            f"images of {height} x {width} pixels are too small for this model; "
            f"the smallest size is {minimum} x {minimum}, so resize or pad them"
        )


@register_notrace_function  # FX cannot trace the comparison of sizes
def check_images(images: Tensor, minimum: int) -> None:
    """Raise ``ValueError`` if ``images`` is not (B, C, H, W), or a side is smaller than ``minimum`` pixels."""
    if images.ndim != 4:
        hint = "; add the batch dimension with images.unsqueeze(0)" if images.ndim == 3 else ""
        raise ValueError(f"images have shape {tuple(images.shape)}, but (batch, channels, height, width) is required{hint}")
    check_image_size(images.shape[-2], images.shape[-1], minimum)


def create_classifier(num_features: int, num_classes: int, **factory) -> nn.Module:
    """Create the linear head, or the identity for 0 classes.

    Raises:
        ValueError: ``num_classes`` is not an integer of at least 0.
    """
    if not hasattr(num_classes, "__index__") or num_classes < 0:
        raise ValueError(f"num_classes={num_classes!r}: give the number of classes, or 0 for a model without head")
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(num_features, num_classes, **factory)
    init_weights(head)
    return head


def run_block(block: nn.Module, *inputs, recompute: bool) -> Tensor:
    """Call a block; with ``recompute``, its activations are recomputed in the backward pass instead of stored."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class Stage(nn.Sequential):
    """The blocks of one stage, with optional activation checkpointing of every block."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = run_block(block, x, recompute=self.grad_checkpointing)
        return x


@register_notrace_module  # FX cannot trace control flow that depends on the size of the map
class Block(nn.Module):
    """Attention and MLP, each pre-norm with a residual connection: (B, ..., C) -> (B, ..., C).

    Args:
        attention: maps the normalised tokens, and the further inputs of the block, to an update of the tokens.
        drop_path: stochastic-depth rate.
        eps: of the norms.
        factory: device and dtype of the parameters of the norms.
    """

    def __init__(self, dim: int, attention: nn.Module, mlp: nn.Module, drop_path: float, *, eps: float = 1e-5, **factory):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps, **factory)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=eps, **factory)
        self.mlp = mlp

    def attend(self, x: Tensor, *inputs) -> Tensor:
        return self.attn(x, *inputs)

    def forward(self, x: Tensor, *inputs) -> Tensor:
        x = x + self.drop_path(self.attend(self.norm1(x), *inputs))
        return x + self.drop_path(self.mlp(self.norm2(x)))
