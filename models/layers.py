"""What two backbones or more share.

Shapes: B images, N tokens, C channels, H x W a token map.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NO_OPTIONS: Mapping = MappingProxyType({})


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
    steps = max(sum(depths) - 1, 1)
    rates = (rate * block / steps for block in range(sum(depths)))
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
    letters = attn_type.rstrip("0123456789")
    digits = attn_type[len(letters) :]
    if len(letters) != len(depths) or set(letters) - set("LSM"):
        raise ValueError(f"attention type {attn_type!r}: give one of L, S, M for each of the {len(depths)} stages")
    if ("M" in letters) != bool(digits):
        raise ValueError(f"attention type {attn_type!r}: a number follows the letters where M is among them, as in LLMS3")
    num_linear = int(digits or 0)
    return [
        letter * depth if letter != "M" else "L" * min(num_linear, depth) + "S" * max(depth - num_linear, 0)
        for letter, depth in zip(letters, depths, strict=True)
    ]


def partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B * nW, h * w, C)."""
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def merge(x: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(B * nW, h * w, C) -> (B, H, W, C): the inverse of ``partition``."""
    rows, columns = grid[0] // window[0], grid[1] // window[1]
    x = x.unflatten(1, window).unflatten(0, (-1, rows, columns)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


PADDING = -1


def window_regions(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], padded: tuple[int, int]
) -> Tensor | None:
    """Which part of the map each token of each window comes from; softmax blocks attend within one part.

    A cyclic shift brings opposite edges into one window, and padding is a part of its own.

    Returns:
        (nW, h * w) ids, ``PADDING`` for padding; None where every window is of one part.
    """
    if padded == grid and not any(shift):
        return None
    region = torch.zeros(padded, dtype=torch.long)
    for axis in (0, 1):
        if shift[axis]:  # what the roll brings around to the far edge
            region.narrow(axis, 0, shift[axis]).add_(1 + axis)
    region[grid[0] :] = PADDING
    region[:, grid[1] :] = PADDING
    region = region.roll((-shift[0], -shift[1]), dims=(0, 1))
    return partition(region[None, :, :, None], window).squeeze(-1)


class PositionTable(NamedTuple):
    """A parameter of one row per position, that another input size resizes: see ``Backbone.resize_position_tables``."""

    name: str
    grid: tuple[int, int]
    num_prefix_tokens: int = 0


class Backbone(nn.Module):
    """A classifier as timm's models are: features, then a head; a family adds its stages.

    A family sets ``num_classes``, ``num_features`` (channels of the last map), ``norm`` and ``head``, gives its maps in
    ``forward_stages``, and lists them in ``feature_info`` (``num_chs``, ``reduction``, ``module``).
    """

    num_classes: int
    num_features: int
    feature_info: list[dict]
    norm: nn.Module
    head: nn.Module
    grad_checkpointing = False
    features_frozen = False

    @property
    def head_hidden_size(self) -> int:
        return self.num_features

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """(B, 3, H, W) -> each stage's map, (B, h, w, C), before the final norm."""
        raise NotImplementedError

    def drop_stages(self, num_kept: int) -> None:
        """Give up the stages behind the first ``num_kept``."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> the last stage's map, normed: (B, h, w, C)."""
        *_, x = self.forward_stages(x)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of chosen stages, as timm's models give them.

        Args:
            indices: of ``feature_info``; a number for the last so many, None for all.
            norm: apply the final norm to the last one.
            stop_early: compute no further than the last one asked for.
            output_fmt: NCHW or NHWC.
            intermediates_only: leave out the final features.

        Returns:
            The final features (of the last stage that was computed) and the maps, or the maps alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r}: choose NCHW or NHWC")
        taken = self.take_indices(indices)
        maps = []
        for index, features in enumerate(self.forward_stages(x)):
            last = index == len(self.feature_info) - 1
            if index in taken:
                features_map = self.to_map(self.norm(features) if norm and last else features, x.shape[-2:])
                maps.append(features_map if output_fmt == "NHWC" else features_map.permute(0, 3, 1, 2).contiguous())
            if stop_early and index == max(taken):
                break
        if intermediates_only:
            return maps
        return (self.norm(features) if last else features), maps

    def take_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Positive indices into ``feature_info``.

        Raises:
            ValueError: an index beyond the stages.
        """
        count = len(self.feature_info)
        if indices is None or isinstance(indices, int):
            indices = range(count - (count if indices is None else indices), count)
        taken = [count + index if index < 0 else index for index in indices]
        if not taken or min(taken) < 0 or max(taken) >= count:
            raise ValueError(f"indices {list(indices)}: the model has {count} feature maps, 0 to {count - 1}")
        return taken

    def to_map(self, features: Tensor, image_size: Sequence[int]) -> Tensor:
        """A stage's features as (B, h, w, C)."""
        return features

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Give up what the chosen maps do not need, so that every parameter left is used."""
        taken = self.take_indices(indices)
        cut = max(taken) + 1 < len(self.feature_info)
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.drop_stages(max(taken) + 1)
            self.feature_info = self.feature_info[: max(taken) + 1]
            self.num_features = self.feature_info[-1]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0)
        return taken

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

    def freeze_features(self) -> None:
        """Train the head alone: everything before it keeps its weights, and runs as in evaluation."""
        self.features_frozen = True
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for parameter in self.head.parameters():
            parameter.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode and not self.features_frozen)
        self.training = mode
        self.head.train(mode)
        return self

    def run_block(self, block: nn.Module, *inputs) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

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

    def nearest_model(self, state_dict: Mapping[str, Tensor]) -> str:
        """The end of a message about weights that do not fit: which model of the zoo they fit best."""
        from models.registry import nearest_model  # which imports every family

        return nearest_model(state_dict)


def create_classifier(num_features: int, num_classes: int) -> nn.Module:
    """The linear head; no classes, no head."""
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(num_features, num_classes)
    init_weights(head)
    return head
