"""Pictures of attention maps, of measures and of singular values, with matplotlib."""

import itertools
import math
import textwrap
from collections.abc import Callable, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from analysis.maps import block_name, capture
from analysis.measures import singular_values
from analysis.pages import CONVOLUTION, NOTE, BlockMaps, Point
from analysis.summary import OWN, WITH_CONVOLUTION, Row, evenly_spaced, matrices, mean_over_heads

# The pictures show the queries at these points by default.
POINTS: tuple[Point, ...] = ((0.25, 0.25), (0.25, 0.75), (0.5, 0.5), (0.75, 0.5))
SIGNS = ListedColormap(["#2060ff", "#ff2020"])  # colours of negative and positive weights; opacity shows their magnitude
SIGNED_WEIGHTS = LinearSegmentedColormap.from_list("signed weights", ["#053061", "#4393c3", "white", "#d6604d", "#67001f"])
GREY = "0.75"  # of keys that a query cannot attend to
# Measures in ``draw_measures``, with the labels of their axes.
PLOTTED_MEASURES = {
    "entropy": "entropy / maximum (1: uniform weights)",
    "top 5 %": "weight on the largest 5 % of keys",
    "distance": "mean distance of query and key (tokens)",
    "effective rank": "effective rank (1 to the number of keys)",
}
MARKERS = "osD^vx"  # of the forms, in their order: curves may lie on each other


def draw_forms(image: Image.Image, block: BlockMaps, points: Sequence[Point] = POINTS) -> Figure:
    """Draw all maps of a block side by side: one row per query, one column per form of attention.

    The forms are the model's own attention, other attention functions of the same queries and keys, the depthwise convolution,
    and the sum of the model's attention and its convolution.

    Args:
        image: preprocessed image, before normalisation.
        points: for each point, the nearest query of ``block.queries`` is shown.
    """

    def draw_map(axis: Axes, weights: Tensor, visible: Tensor, largest: float) -> None:
        axis.set_facecolor(GREY)  # where the map is not drawn
        axis.imshow(weights.where(visible, math.nan), cmap=SIGNED_WEIGHTS, vmin=-largest, vmax=largest)

    colors = "white: 0" if block.visible is None else "white: 0, grey: keys outside the window of the query"
    return _draw_rows(image, block, points, list(block.maps), draw_map, colors)


def draw_overlays(image: Image.Image, block: BlockMaps, points: Sequence[Point] = POINTS) -> Figure:
    """Draw a block's attention and its depthwise convolution over the image, as in the paper's figure of focused attention.

    There is one row per query. The convolution column shows the kernel at the query, averaged over channels; it is absent for
    blocks without a convolution.

    Args:
        image: preprocessed image, before normalisation.
        points: for each point, the nearest query of ``block.queries`` is shown.
    """

    def draw_overlay(axis: Axes, weights: Tensor, _visible: Tensor, largest: float) -> None:
        extent = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
        alpha = (0.75 * weights.abs() / largest).numpy()
        axis.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255)
        axis.imshow(weights, cmap=SIGNS, vmin=-largest, vmax=largest, alpha=alpha, extent=extent)

    own = next(iter(block.maps))  # the first map shows the attention that the module computes
    forms = [form for form in (own, CONVOLUTION) if form in block.maps]
    return _draw_rows(image, block, points, forms, draw_overlay, "uncoloured: 0")


def _draw_rows(
    image: Image.Image,
    block: BlockMaps,
    points: Sequence[Point],
    forms: Sequence[str],
    draw: Callable[[Axes, Tensor, Tensor, float], None],
    colors: str,
) -> Figure:
    """Create a figure with one row per query: the image with the query, and one map per form.

    Args:
        draw: draws the weights of a form, (kh, kw), given which keys are visible, and the largest absolute weight.
        colors: how ``draw`` shows weights that are neither positive nor negative, for the title.
    """
    num_columns = 1 + len(forms)
    figure = Figure(figsize=(2 * num_columns, 2.25 * len(points) + 0.4), layout="constrained", dpi=110)
    axes = figure.subplots(len(points), num_columns, squeeze=False)
    for axis, title in zip(axes[0], ["query", *forms], strict=True):
        axis.set_title(title, fontsize=8)
    for cells, point in zip(axes, points, strict=True):
        query = block.query_at(point)
        (y, x), (row, column) = block.centre(query), block.queries[query].tolist()
        cells[0].imshow(image)
        cells[0].plot(x * image.width - 0.5, y * image.height - 0.5, "o", color="lime", markeredgecolor="black")
        cells[0].set_xlabel(f"row {row}, column {column} of {block.grid[0]} x {block.grid[1]}", fontsize=7)
        for cell, form in zip(cells[1:], forms, strict=True):
            weights = block.maps[form][:, query].mean(dim=0).cpu()
            largest = max(weights.abs().max().item(), 1e-30)  # positive even if all weights are zero
            visible = torch.ones_like(weights, dtype=torch.bool) if block.visible is None else block.visible[query].cpu()
            draw(cell, weights, visible, largest)
            cell.set_xlabel(f"largest |weight| {largest:.2g}", fontsize=7)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    title = f"{block.name}: mean over heads; red: positive weights, blue: negative weights, {colors}"
    figure.suptitle(textwrap.fill(title, 32 * num_columns), fontsize=9)
    if any(form.startswith("focused") for form in forms):
        figure.supxlabel(textwrap.fill(NOTE, 30 * num_columns), fontsize=7)
    return figure


def draw_measures(rows: Sequence[Row]) -> Figure:
    """Plot ``PLOTTED_MEASURES`` per block, with one line per form of attention."""
    blocks, forms = list(dict.fromkeys(row.block for row in rows)), list(dict.fromkeys(row.form for row in rows))
    figure = Figure(figsize=(12, 8), layout="constrained", dpi=110)
    axes = figure.subplots(2, 2)
    for axis, (name, label) in zip(axes.flat, PLOTTED_MEASURES.items(), strict=True):
        for form, marker in zip(forms, itertools.cycle(MARKERS), strict=False):
            values = [mean_over_heads(rows, block, form, name) for block in blocks]
            values = [math.nan if value is None else value for value in values]
            axis.plot(values, marker=marker, label=form, markersize=5, alpha=0.8, linewidth=2 if form.startswith(OWN) else 1)
        axis.set(title=name, ylabel=label, yscale="log" if name == "effective rank" else "linear")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
        axis.set_xticks(range(len(blocks)), map(block_name, blocks), rotation=60, ha="right", fontsize=7)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(forms))
    return figure


def draw_ranks(model: nn.Module, image: Tensor, names: Sequence[str]) -> Figure:
    """Plot the singular values of one attention matrix per block, relative to the largest, with and without the convolution.

    The matrix is from the first head and, in blocks with windows or stripes, from the first window or stripe.

    Args:
        model: in evaluation mode.
        image: (3, height, width), normalised.
        names: names of attention modules.
    """
    with torch.no_grad(), capture(model, names) as attentions:
        model(image.unsqueeze(0))
    columns = min(4, len(attentions))
    rows = math.ceil(len(attentions) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained", dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(attentions) :]:
        axis.axis("off")
    for axis, attention in zip(axes.flat, attentions, strict=False):
        weights = matrices(attention)
        for form in (OWN, WITH_CONVOLUTION):
            if form in weights:
                matrix = weights[form][0, 0]
                values = singular_values(matrix[evenly_spaced(len(matrix))][:, evenly_spaced(matrix.shape[1])])
                axis.semilogy(range(1, len(values) + 1), (values / values[0]).clamp(min=1e-9), label=form)
        if attention.is_linear:
            axis.axvline(attention.q.shape[-1], color="grey", linewidth=0.8, linestyle="--", label="head dimension")
        axis.set_title(attention.name, fontsize=7)
    axes[0, 0].legend(fontsize=6)
    figure.supylabel("singular value over the largest", fontsize=8)
    figure.supxlabel("number of the singular value", fontsize=8)
    return figure
