"""Position tables: parameters with one row per token or relative position, which are resized for other input sizes.

Shapes: C channels, P prefix tokens (such as a class token), H x W the token map of a table.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

GRIDS_KEY = "position_grids"  # key of a state dict's metadata, see ``stored_grids``


@register_notrace_function  # FX cannot trace the comparison of sizes
def resize_grid(table: Tensor, old: tuple[int, int], new: tuple[int, int], num_prefix_tokens: int = 0) -> Tensor:
    """Resize a table with one row per token to another map size by bicubic interpolation; prefix rows stay unchanged.

    Args:
        table: (1, num_prefix_tokens + old height * old width, C).
        old, new: height and width of the token map before and after.

    Returns:
        (1, num_prefix_tokens + new height * new width, C); ``table`` itself if ``old`` equals ``new``.
    """
    if old == new:
        return table
    prefix, grid = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    grid = grid.unflatten(1, old).permute(0, 3, 1, 2)  # (1, C, H, W)
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False).to(table.dtype)
    return torch.cat([prefix, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def resized_parameter(
    table: nn.Parameter, old: tuple[int, int], new: tuple[int, int], num_prefix_tokens: int = 0
) -> nn.Parameter:
    """Copy of a parameter (..., rows, C), resized with ``resize_grid``; ``table`` itself if ``old`` equals ``new``."""
    if old == new:
        return table
    rows = resize_grid(table.detach().flatten(0, -2).unsqueeze(0), old, new, num_prefix_tokens)
    return nn.Parameter(rows.view(*table.shape[:-2], *rows.shape[1:]), requires_grad=table.requires_grad)


def stored_grids(state_dict: Mapping[str, Tensor]) -> Mapping[str, object]:
    """Height and width of each position table in a state dict, by name relative to the model; {} if unknown.

    ``Backbone.state_dict`` records them in the metadata of the state dict, which ``torch.save`` keeps. safetensors files and
    copies to a plain dictionary have no metadata.
    """
    metadata = getattr(state_dict, "_metadata", None)
    entries = metadata.values() if isinstance(metadata, Mapping) else ()
    found = (entry[GRIDS_KEY] for entry in entries if isinstance(entry, Mapping) and GRIDS_KEY in entry)
    return next((grids for grids in found if isinstance(grids, Mapping)), {})


class PositionTable(NamedTuple):
    """Describes a parameter with one row per token or relative position, which is resized for other input sizes.

    Attributes:
        name: parameter name, relative to the module whose ``position_tables`` returns this object.
        grid: height and width of the table at the model's native size.
        source_grid: function that returns the height and width of the table in a checkpoint, or None if no size matches the
            number of positions. Arguments: height and width of the stage's token map at the checkpoint's image size, and
            number of positions in the table.
        num_prefix_tokens: number of leading rows for tokens without a position, such as the class token.
        assume_square: if the image size of a checkpoint is unknown and the number of positions is a square number, assume
            that the table is square.
    """

    name: str
    grid: tuple[int, int]
    source_grid: Callable[[tuple[int, int], int], tuple[int, int] | None]
    num_prefix_tokens: int = 0
    assume_square: bool = True


def whole_map(grid: tuple[int, int], num_positions: int) -> tuple[int, int]:
    """``PositionTable.source_grid`` of a table with one row per token of its stage."""
    return grid


def recorded_grid(recorded: object, num_positions: int) -> tuple[int, int] | None:
    """An entry of ``stored_grids``; None if it is missing, or if the table was replaced since."""
    if not isinstance(recorded, (list, tuple)) or len(recorded) != 2 or not all(type(side) is int for side in recorded):
        return None
    height, width = recorded
    return (height, width) if min(height, width) > 0 and height * width == num_positions else None


def grid_at(table: PositionTable, num_positions: int, size: tuple[int, int], stage_map: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a position table in a checkpoint for images of ``size`` pixels, whose token map is ``stage_map``.

    Raises:
        ValueError: the number of positions does not match the size.
    """
    grid = table.source_grid(stage_map, num_positions)
    if grid is None or math.prod(grid) != num_positions:
        raise ValueError(
            f"{table.name}: {num_positions} positions in the checkpoint do not match images of "
            f"{size[0]} x {size[1]} pixels; give the img_size at which the checkpoint was trained"
        )
    return grid


def square_grid(table: PositionTable, num_positions: int) -> tuple[int, int]:
    """Height and width of a position table in a checkpoint whose image size is unknown.

    Raises:
        ValueError: the number of positions does not determine the height and width.
    """
    side = math.isqrt(num_positions)
    if not table.assume_square or side * side != num_positions:
        raise ValueError(
            f"{table.name}: the checkpoint's {num_positions} positions do not determine the height and width of the table; "
            "use a checkpoint that contains its config, or give the img_size at which the checkpoint was trained"
        )
    return side, side
