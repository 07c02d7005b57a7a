"""Attention maps of one image, and an HTML page that shows them. The page is one file and needs no network.

Shapes: Q chosen queries, H heads, kh x kw token map of the keys.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from analysis.maps import FORMS, Attention, attention_modules, capture, token_positions

MAX_QUERIES = 14  # per side of the token map; on larger maps, queries are sampled
MAX_KEYS = 28  # per side of a map on the page; larger maps are average-pooled
HIDDEN = -128  # step of a key outside the window or stripe of the query
Point = tuple[float, float]  # (y, x) as fractions of the image's height and width
TEMPLATE = Path(__file__).parent / "page.html"
CONVOLUTION, SUM = "convolution", "attention + convolution"
# Why the model's own attention differs from the same form of attention computed from its queries and keys.
NOTE = (
    "The model's own attention and the forms with the same q and k are different computations. Focused linear attention adds a "
    "learned positional encoding to the keys, divides queries and keys by a learned scale, and applies the focused function to "
    "all heads together; the model's softmax attention adds a relative position bias and masks. The forms with the same q and "
    "k have none of these: they treat each head separately, and focused has focusing factor 3."
)


@dataclass(frozen=True, eq=False)
class BlockMaps:
    """Attention maps of one module for one image.

    Args:
        name: name of the module.
        queries: (Q, 2) row and column of the chosen queries on the block's token map.
        grid: height and width of the block's token map.
        maps: name of a form of attention -> weights (H, Q, kh, kw). The forms are the model's own attention, other attention
            functions of the same queries and keys (such as ``softmax, same q and k``), the depthwise convolution (averaged
            over channels, with one head), and the sum of the model's attention and its convolution.
        visible: (Q, kh, kw), False for keys outside the query's window or stripe, whose weight is 0 in every map; None if every
            query attends to all keys.
    """

    name: str
    queries: Tensor
    grid: tuple[int, int]
    maps: dict[str, Tensor]
    visible: Tensor | None = None

    def query_at(self, point: Point) -> int:
        """Index of the chosen query that is nearest to a point of the image."""
        centres = (self.queries + 0.5) / torch.tensor(self.grid)
        return int((centres - torch.tensor(point)).square().sum(dim=-1).argmin())

    def centre(self, query: int) -> Point:
        """Centre of the token of a chosen query."""
        y, x = ((self.queries[query] + 0.5) / torch.tensor(self.grid)).tolist()
        return y, x


def trace(
    model: nn.Module,
    image: Tensor,
    names: Sequence[str] | None = None,
    *,
    points: Sequence[Point] = (),
    forms: Sequence[str] = FORMS,
) -> list[BlockMaps]:
    """Attention maps of one image, for each chosen module.

    Args:
        model: in evaluation mode.
        image: (3, height, width), normalised, on the model's device.
        names: names of attention modules; all by default.
        points: points of the image; the queries at these points are always included.
        forms: forms of attention to compute from the same queries and keys, among ``analysis.maps.FORMS``.
    """
    with torch.no_grad(), capture(model, names) as attentions:
        model(image.unsqueeze(0))
    return [_trace_module(model, attention, points, forms) for attention in attentions]


def _trace_module(model: nn.Module, attention: Attention, points: Sequence[Point], forms: Sequence[str]) -> BlockMaps:
    grid = attention.map_grid
    positions = token_positions(model, attention)  # (windows, N)
    queries = sample_queries(grid, points)
    map_indices = queries[:, 0] * grid[1] + queries[:, 1]
    flat_indices = (positions.unsqueeze(0) == map_indices[:, None, None]).flatten(1).int().argmax(dim=1)
    windows, tokens = flat_indices // positions.shape[1], flat_indices % positions.shape[1] + attention.num_prefix_tokens
    matrix = attention.matrix()
    own = "model's linear attention" if attention.is_linear else "model's softmax attention"
    maps = {own: matrix[windows, :, tokens].transpose(0, 1)}  # (H, Q, M)
    for form in forms:
        maps[f"{form}, same q and k"] = attention.weights_of(form)[windows, :, tokens].transpose(0, 1)
    if (convolution := attention.convolution(tokens.tolist(), mean=True)) is not None:
        maps[CONVOLUTION] = convolution
        maps[SUM] = maps[own] + maps[CONVOLUTION]
    placed_maps = {form: place_keys(weights, attention, positions[windows], grid) for form, weights in maps.items()}
    ones = torch.ones(1, len(queries), matrix.shape[-1])
    visible = place_keys(ones, attention, positions[windows], grid)[0] > 0
    return BlockMaps(attention.name, queries, grid, placed_maps, None if visible.all() else visible)


def sample_queries(grid: tuple[int, int], points: Sequence[Point] = ()) -> Tensor:
    """Choose up to ``MAX_QUERIES`` evenly spaced rows and columns, and the rows and columns of the points.

    Returns:
        (Q, 2) rows and columns: every pair of a chosen row and a chosen column.
    """
    chosen = [token_at(point, grid) for point in points]
    axes = []
    for axis, side in enumerate(grid):
        evenly_spaced = torch.linspace(0, side - 1, min(side, MAX_QUERIES)).round().long()
        axes.append(torch.cat([evenly_spaced, torch.tensor([token[axis] for token in chosen], dtype=torch.long)]).unique())
    return torch.cartesian_prod(*axes)


def token_at(point: Point, grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the token that covers a point of the image."""
    row, column = (min(int(coordinate * side), side - 1) for coordinate, side in zip(point, grid, strict=True))
    return row, column


def place_keys(weights: Tensor, attention: Attention, positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Arrange weights (H, Q, M) as maps of the keys, (H, Q, kh, kw). Keys outside the query's window get zero.

    Args:
        positions: (Q, N) indices of the tokens of each query's window in the flattened map, -1 for padding.
        grid: height and width of the block's token map.
    """
    weights = weights[..., attention.num_prefix_tokens :]
    if attention.key_grid != attention.grid:  # spatially reduced keys have their own map
        return weights.unflatten(-1, attention.key_grid)
    canvas = weights.new_zeros(*weights.shape[:2], grid[0] * grid[1] + 1)
    # Padding is written to an extra last cell, which is dropped.
    index = torch.where(positions < 0, grid[0] * grid[1], positions).to(weights.device)
    canvas.scatter_(-1, index.expand(weights.shape[0], -1, -1), weights)
    return canvas[..., :-1].unflatten(-1, grid)


# --- The page


def encode_maps(maps: Tensor, visible: Tensor | None = None) -> dict:
    """Encode maps (H, Q, kh, kw) as int8 in base64. One step is 1/127 of a map's largest absolute weight.

    The largest absolute weights are stored too. Maps with more than ``MAX_KEYS`` keys per side are average-pooled first.

    Args:
        visible: see ``BlockMaps``. Keys that are not visible are encoded as ``HIDDEN``.
    """
    size = [min(side, MAX_KEYS) for side in maps.shape[-2:]]
    if list(maps.shape[-2:]) != size:
        maps = F.adaptive_avg_pool2d(maps, size)
    largest = maps.abs().amax(dim=(-2, -1)).clamp(min=1e-30)
    steps = (maps / largest[..., None, None] * 127).round().to(torch.int8)
    if visible is not None:
        steps.masked_fill_(F.adaptive_avg_pool2d(visible.float().to(maps.device), size) == 0, HIDDEN)
    return {
        "heads": len(maps),
        "size": list(maps.shape[-2:]),
        "steps": _base64(steps.cpu().numpy().tobytes()),
        "largest": _base64(largest.float().cpu().numpy().tobytes()),
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def write_page(path: Path, image: Image.Image, blocks: list[BlockMaps], title: str) -> None:
    """Write an HTML page that shows the maps of one image.

    Args:
        image: preprocessed image, before normalisation.
        title: heading of the page.
    """
    png = io.BytesIO()
    image.save(png, "PNG")
    content = {
        "title": title,
        "note": NOTE,
        "image": f"data:image/png;base64,{_base64(png.getvalue())}",
        "blocks": [
            {
                "name": block.name,
                "grid": list(block.grid),
                "queries": block.queries.tolist(),
                "maps": {form: encode_maps(maps, block.visible) for form, maps in block.maps.items()},
            }
            for block in blocks
        ],
    }
    text = json.dumps(content).replace("<", "\\u003c")  # in a script element, HTML gives a meaning to </script> and <!--
    path.write_text(TEMPLATE.read_text(encoding="utf-8").replace("/*CONTENT*/null", text), encoding="utf-8")


def module_names(model: nn.Module, blocks: list[str] | None) -> list[str]:
    """Names of the attention modules that start with one of ``blocks``; all names if ``blocks`` is empty or None.

    Raises:
        ValueError: there is no module whose name starts with an entry of ``blocks``.
    """
    names = list(attention_modules(model))
    if not blocks:
        return names
    for block in blocks:
        if not any(name.startswith(block) for name in names):
            raise ValueError(f"{block}: not the name or prefix of an attention module; choose among {', '.join(names)}")
    return [name for name in names if name.startswith(tuple(blocks))]
