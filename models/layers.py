"""What two backbones or more share.

Shapes: B images, N tokens, C channels, H x W a token map.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def to_pair(size: int | Iterable[int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or two."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def resize_grid(table: Tensor, old: tuple[int, int], new: tuple[int, int], num_prefix_tokens: int = 0) -> Tensor:
    """Resample a table of one row per token to another map (bicubic), prefix tokens kept aside.

    Args:
        table: (1, num_prefix_tokens + old height * old width, C).

    Returns:
        (1, num_prefix_tokens + new height * new width, C); ``table`` itself when nothing changes.
    """
    if old == new:
        return table
    prefix, grid = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    grid = grid.unflatten(1, old).permute(0, 3, 1, 2)  # (1, C, H, W)
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False).to(table.dtype)
    return torch.cat([prefix, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def square_side(num_tokens: int) -> int | None:
    """Side of a square map of ``num_tokens`` tokens, None where there is no such square."""
    side = math.isqrt(num_tokens)
    return side if side * side == num_tokens else None


def init_weights(module: nn.Module) -> None:
    """Linear layers from a normal distribution of deviation 0.02, cut off at 2; their biases and norms neutral."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def drop_path_rates(rate: float, depths: Iterable[int]) -> list[list[float]]:
    """Stochastic-depth rate of every block, growing linearly from 0 to ``rate`` over the whole network."""
    depths = list(depths)
    rates = iter(torch.linspace(0, rate, sum(depths)).tolist())
    return [[next(rates) for _ in range(depth)] for depth in depths]


def parse_attention_types(attn_type: str, depths: Iterable[int]) -> list[str]:
    """A letter for every block of every stage: ``L`` linear, ``S`` softmax.

    Args:
        attn_type: a letter a stage; ``M`` makes the first n blocks of its stage ``L`` and the rest ``S``, with n the
            number after the letters: ``LLMS3`` at depths (2, 2, 6, 2) gives LL, LL, LLLSSS, SS.

    Raises:
        ValueError: another letter, another number of letters, ``M`` without a number or a number without ``M``.
    """
    depths = list(depths)
    letters, digits = attn_type[: len(depths)], attn_type[len(depths) :]
    if len(letters) != len(depths) or set(letters) - set("LSM"):
        raise ValueError(f"attention type {attn_type!r}: give one of L, S, M for each of the {len(depths)} stages")
    if ("M" in letters) != digits.isdigit() or (digits and not digits.isdigit()):
        raise ValueError(f"attention type {attn_type!r}: a number follows the letters where M is among them, as in LLMS3")
    num_linear = int(digits or 0)
    return [
        letter * depth if letter != "M" else "L" * min(num_linear, depth) + "S" * max(depth - num_linear, 0)
        for letter, depth in zip(letters, depths, strict=True)
    ]


class PositionTable(NamedTuple):
    """A parameter of one row per position, that another input size resizes: see ``Backbone.resize_position_tables``."""

    name: str
    grid: tuple[int, int]
    num_prefix_tokens: int = 0


class Backbone(nn.Module):
    """A classifier as timm's models are: features, then a head; a family adds its stages.

    A family sets ``num_classes``, ``num_features`` (channels of the last map) and ``head``, builds ``forward_features``
    and lists in ``feature_info`` what each stage gives (``num_chs``, ``reduction``, ``module``).
    """

    num_classes: int
    num_features: int
    head: nn.Module
    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> the last stage's tokens, normed; channels last."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the tokens, then the classifier. (B, ..., C) -> (B, num_classes), or (B, C) with ``pre_logits``."""
        x = x.flatten(1, -2).mean(dim=1)
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for another number of classes; 0 for none, so that the model gives pooled features."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool={global_pool!r}: tokens are averaged here; use 'avg'")
        reference = next(self.parameters())
        self.num_classes = num_classes
        self.head = create_classifier(self.num_features, num_classes).to(reference.device, reference.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters to train without weight decay: norms, biases and relative-position tables."""
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim <= 1 or name.endswith((".bias", "relative_position_bias_table"))
        }

    def resize_position_tables(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Position tables of a checkpoint, resized (bicubic) where it was trained at another input size.

        The checkpoint's maps are taken as square, as released files' are.

        Returns:
            Name to resized table, of those tables alone that had another size.

        Raises:
            ValueError: a table of another size that is no square map.
        """
        resized = {}
        for prefix, module in self.named_modules():
            for table in getattr(module, "position_tables", list)():
                name = f"{prefix}.{table.name}" if prefix else table.name
                own, stored = self.get_parameter(name), state_dict.get(name)
                if stored is None or stored.shape == own.shape or stored.shape[-1] != own.shape[-1]:
                    continue  # other channels are another model's: for the caller to refuse
                rows = stored.flatten(0, -2)  # (prefix + tokens, C)
                side = square_side(rows.shape[0] - table.num_prefix_tokens)
                if side is None:
                    raise ValueError(
                        f"{name}: cannot resize {tuple(stored.shape)} to {tuple(own.shape)}; "
                        "the checkpoint is of another model, or of an input that is not square"
                    )
                new = resize_grid(rows.unsqueeze(0), (side, side), table.grid, table.num_prefix_tokens)
                resized[name] = new.reshape(own.shape)
        return resized


def create_classifier(num_features: int, num_classes: int) -> nn.Module:
    """The linear head; no classes, no head."""
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(num_features, num_classes)
    init_weights(head)
    return head
