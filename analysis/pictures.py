"""Pictures of attention maps, with matplotlib."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from analysis.pages import CONVOLUTION, BlockMaps, Point

# The pictures show the queries at these points by default.
POINTS: tuple[Point, ...] = ((0.25, 0.25), (0.25, 0.75), (0.5, 0.5), (0.75, 0.5))
SIGNS = ListedColormap(["#2060ff", "#ff2020"])  # colours of negative and positive weights; opacity shows their magnitude


def draw_forms(image: Image.Image, block: BlockMaps, points: Sequence[Point] = POINTS) -> Figure:
    """Draw all maps of a block side by side: one row per query, one column per form of attention.

    The forms are the model's own attention, other attention functions of the same queries and keys, the depthwise convolution,
    and the sum of the model's attention and its convolution.

    Args:
        image: preprocessed image, before normalisation.
        points: for each point, the nearest query of ``block.queries`` is shown.
    """
    figure, rows = _grid(len(points), list(block.maps))
    for cells, point in zip(rows, points, strict=True):
        query = block.query_at(point)
        _draw_query(cells[0], image, block, query)
        for cell, maps in zip(cells[1:], block.maps.values(), strict=True):
            weights = maps[:, query].mean(dim=0).cpu()
            cell.imshow(weights, cmap="RdBu_r", vmin=-_largest(weights), vmax=_largest(weights))
            cell.set_xlabel(f"largest |weight| {_largest(weights):.2g}", fontsize=7)
    figure.suptitle(f"{block.name}: mean over heads; red: positive weights, blue: negative weights", fontsize=9)
    return figure


def draw_overlays(image: Image.Image, block: BlockMaps, points: Sequence[Point] = POINTS) -> Figure:
    """Draw a block's attention and its depthwise convolution over the image, as in the paper's figure of focused attention.

    There is one row per query. The convolution column shows the kernel at the query, averaged over channels; it is absent for
    blocks without a convolution.

    Args:
        image: preprocessed image, before normalisation.
        points: for each point, the nearest query of ``block.queries`` is shown.
    """
    own = next(iter(block.maps))  # the first map shows the attention that the module computes
    forms = [form for form in (own, CONVOLUTION) if form in block.maps]
    figure, rows = _grid(len(points), forms)
    for cells, point in zip(rows, points, strict=True):
        query = block.query_at(point)
        _draw_query(cells[0], image, block, query)
        for cell, form in zip(cells[1:], forms, strict=True):
            weights = block.maps[form][:, query].mean(dim=0).cpu()
            largest = _largest(weights)
            cell.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255)
            cell.imshow(
                weights,
                cmap=SIGNS,
                vmin=-largest,
                vmax=largest,
                alpha=(0.75 * weights.abs() / largest).numpy(),
                extent=(-0.5, image.width - 0.5, image.height - 0.5, -0.5),
            )
            cell.set_xlabel(f"largest |weight| {largest:.2g}", fontsize=7)
    figure.suptitle(f"{block.name}: mean over heads; red: positive, blue: negative", fontsize=9)
    return figure


def _grid(num_rows: int, forms: Sequence[str]) -> tuple[Figure, list[list[Axes]]]:
    """Create a figure with a column for the image and one per form. Returns the figure and its axes by row."""
    num_columns = 1 + len(forms)
    figure = Figure(figsize=(2 * num_columns, 2.25 * num_rows + 0.4), layout="constrained", dpi=110)
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], ["query", *forms], strict=True):
        axis.set_title(title, fontsize=8)
    return figure, [list(row) for row in axes]


def _draw_query(axis: Axes, image: Image.Image, block: BlockMaps, query: int) -> None:
    y, x = block.centre(query)
    axis.imshow(image)
    axis.plot(x * image.width - 0.5, y * image.height - 0.5, "o", color="lime", markeredgecolor="black")
    row, column = block.queries[query].tolist()
    axis.set_xlabel(f"row {row}, column {column} of {block.grid[0]} x {block.grid[1]}", fontsize=7)


def _largest(weights: Tensor) -> float:
    """Largest absolute weight; positive even if all weights are zero, because ``draw_overlays`` divides by it."""
    return max(weights.abs().max().item(), 1e-30)
