"""Measures of how focused a model's attention is on a set of images, per block, head and form of attention.

The forms of attention are ways to compute attention weights from the same queries and keys, see ``matrices``.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from analysis.maps import FORMS, Attention, capture
from analysis.measures import (
    attention_distance,
    effective_rank,
    entropy,
    gini,
    mass_share,
    negative_share,
    numerical_rank,
    row_similarity,
    singular_values,
    top_mass,
)
from utils.text import markdown_table

OWN, WITH_CONVOLUTION = "own", "own + convolution"
MAX_TOKENS_FOR_RANK = 784  # maximum number of queries and keys for singular values; larger matrices are sampled evenly
MEASURES = (
    "entropy",
    "top 1 %",
    "top 5 %",
    "top 10 %",
    "gini",
    "distance",
    "rank",
    "effective rank",
    "row similarity",
    "negative share",
    "convolution share",
)
HEADER = ["block", "attention", "form", "head", "head_dim", "num_keys", *MEASURES]


@dataclass
class Row:
    """Measures of one form of attention in one head of one block.

    Args:
        values: measure -> one value per image.
    """

    block: str
    is_linear: bool
    form: str
    head: int
    head_dim: int
    num_keys: int
    values: dict[str, list[float]] = field(default_factory=dict)

    def mean(self, measure: str) -> float:
        values = self.values[measure]
        return sum(values) / len(values)


def matrices(attention: Attention, forms: Sequence[str] = FORMS) -> dict[str, Tensor]:
    """Weights (G, H, N, M) by form, without prefix tokens.

    ``own`` is the module's own attention. ``own + convolution`` adds the convolution, averaged over channels. ``forms`` are
    computed from the same queries and keys.
    """
    prefix = attention.num_prefix_tokens
    weights = {OWN: attention.matrix()[..., prefix:, prefix:]}
    if (convolution := attention.convolution(mean=True)) is not None:
        weights[WITH_CONVOLUTION] = weights[OWN] + convolution[0, prefix:, prefix:]
    return weights | {form: attention.weights_of(form)[..., prefix:, prefix:] for form in forms}


def measure(weights: Tensor, own: Tensor, attention: Attention) -> dict[str, Tensor]:
    """Compute each of ``MEASURES`` for weights (G, H, N, M), as a mean over groups and queries.

    Args:
        own: (G, H, N, M) weights without the convolution; equal to ``weights`` for a form without a convolution.

    Returns:
        A dictionary from measure to one value per head, (H,).
    """
    spectrum = singular_values(weights[..., evenly_spaced(weights.shape[-2]), :][..., evenly_spaced(weights.shape[-1])])
    per_query = {
        "entropy": entropy(weights),
        "top 1 %": top_mass(weights, 0.01),
        "top 5 %": top_mass(weights, 0.05),
        "top 10 %": top_mass(weights, 0.1),
        "gini": gini(weights),
        "distance": attention_distance(weights, attention.grid, attention.key_grid),
    }
    per_matrix = {
        "rank": numerical_rank(spectrum),
        "effective rank": effective_rank(spectrum),
        "row similarity": row_similarity(weights),
        "negative share": negative_share(weights),
        "convolution share": mass_share(weights - own, own),
    }
    return {name: values.mean(dim=(0, 2)) for name, values in per_query.items()} | {
        name: values.double().mean(dim=0) for name, values in per_matrix.items()
    }


def evenly_spaced(count: int) -> Tensor:
    """At most ``MAX_TOKENS_FOR_RANK`` evenly spaced indices from 0 to ``count - 1``."""
    return torch.linspace(0, count - 1, min(count, MAX_TOKENS_FOR_RANK)).round().long()


def summarise(
    model: nn.Module, images: Iterable[Tensor], names: Sequence[str] | None = None, forms: Sequence[str] = FORMS
) -> list[Row]:
    """Measure every chosen attention module of a model on every image.

    Args:
        model: in evaluation mode.
        images: each (3, height, width), normalised.
        names: names of attention modules; all by default.
        forms: see ``matrices``.
    """
    rows: dict[tuple[str, str, int], Row] = {}
    for image in images:
        with torch.no_grad(), capture(model, names) as attentions:
            model(image.unsqueeze(0))
        for attention in attentions:
            weights = matrices(attention, forms)
            for form, matrix in weights.items():
                values = measure(matrix, weights[OWN] if form == WITH_CONVOLUTION else matrix, attention)
                for head in range(matrix.shape[1]):
                    row = rows.setdefault(
                        (attention.name, form, head),
                        Row(attention.name, attention.is_linear, form, head, attention.q.shape[-1], matrix.shape[-1]),
                    )
                    for name in MEASURES:
                        row.values.setdefault(name, []).append(values[name][head].item())
    return list(rows.values())


def mean_over_heads(rows: Sequence[Row], block: str, form: str, name: str) -> float | None:
    """Mean of the measure ``name`` over heads and images; None if the block has no rows of this form."""
    values = [row.mean(name) for row in rows if row.block == block and row.form == form]
    return sum(values) / len(values) if values else None


def csv_rows(rows: Sequence[Row]) -> Iterator[list]:
    """Rows of a table with the columns ``HEADER``, one per block, form and head: the mean of each measure over the images."""
    for row in rows:
        kind = "linear" if row.is_linear else "softmax"
        means = [f"{row.mean(name):.6g}" for name in MEASURES]
        yield [row.block, kind, row.form, row.head, row.head_dim, row.num_keys, *means]


def report(rows: Sequence[Row], about: dict) -> str:
    """Markdown report: the metadata ``about``, and one table per measure with means over heads and images.

    Rows are blocks, and columns are forms.
    """
    blocks = {row.block: "linear" if row.is_linear else "softmax" for row in rows}
    forms = list(dict.fromkeys(row.form for row in rows))
    parts = ["# Focus of attention", "\n".join(f"- {name}: {value}" for name, value in about.items())]
    for name in MEASURES:
        cells = []
        for block, kind in blocks.items():
            values = [mean_over_heads(rows, block, form, name) for form in forms]
            cells.append([f"`{block}`", kind, *("" if value is None else f"{value:.3g}" for value in values)])
        parts += [f"## {name}", markdown_table(["block", "attention", *forms], cells)]
    return "\n\n".join(parts) + "\n"
