"""Measures of attention matrices: concentration on few keys, distance, rank, and similarity between queries.

Shapes: N queries, M keys, K singular values; leading dimensions (images, heads) are kept. Weights that include a convolution
may be negative. Measures that need a distribution use the absolute weights, normalised per query.
"""

import math

import torch
from torch import Tensor


def distribution(weights: Tensor) -> Tensor:
    """Absolute weights, normalised per query. (..., N, M) -> (..., N, M)."""
    absolute = weights.abs()
    return absolute / absolute.sum(dim=-1, keepdim=True)


def entropy(weights: Tensor) -> Tensor:
    """Shannon entropy per query, divided by log M: 0 if one key has all the weight, 1 for uniform weights.

    It is NaN for M = 1. (..., N, M) -> (..., N).
    """
    return torch.special.entr(distribution(weights)).sum(dim=-1) / math.log(weights.shape[-1])


def top_mass(weights: Tensor, fraction: float) -> Tensor:
    """Sum of the normalised weights on the keys with the largest weights, per query. (..., N, M) -> (..., N), in [0, 1].

    Args:
        fraction: fraction of the keys to include; at least one key is included.
    """
    count = max(1, round(fraction * weights.shape[-1]))
    return distribution(weights).topk(count, dim=-1).values.sum(dim=-1)


def gini(weights: Tensor) -> Tensor:
    """Gini index per query (https://arxiv.org/abs/0811.4706), in [0, 1 - 1 / M].

    It is 0 for uniform weights, and 1 - 1 / M if one key has all the weight. (..., N, M) -> (..., N).
    """
    num_keys = weights.shape[-1]
    ordered = distribution(weights).sort(dim=-1).values
    ranks = torch.arange(1, num_keys + 1, dtype=ordered.dtype, device=ordered.device)
    return 1 - 2 * (ordered * (num_keys - ranks + 0.5)).sum(dim=-1) / num_keys


def token_centres(grid: tuple[int, int], query_grid: tuple[int, int]) -> Tensor:
    """Centres (y, x) of the tokens of a map of size ``grid``, in units of one token of ``query_grid``: (height * width, 2)."""
    axes = [(torch.arange(side) + 0.5) * (queries / side) for side, queries in zip(grid, query_grid, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def attention_distance(weights: Tensor, grid: tuple[int, int], key_grid: tuple[int, int]) -> Tensor:
    """Mean distance from a query to the keys, weighted by attention (https://arxiv.org/abs/2010.11929, figure 7).

    The unit is one token of the query map.

    Args:
        weights: (..., N, M), without prefix tokens.
        grid, key_grid: height and width of the token maps of queries and keys.

    Returns:
        (..., N).
    """
    distances = torch.cdist(token_centres(grid, grid), token_centres(key_grid, grid)).to(weights)  # (N, M)
    return (distribution(weights) * distances).sum(dim=-1)


def singular_values(weights: Tensor) -> Tensor:
    """Singular values in descending order, in double precision. (..., N, M) -> (..., min(N, M))."""
    return torch.linalg.svdvals(weights.double())


def numerical_rank(values: Tensor, tolerance: float = 1e-5) -> Tensor:
    """Number of singular values above ``tolerance`` times the largest. values: (..., K), descending. Returns (...)."""
    return (values > tolerance * values[..., :1]).sum(dim=-1)


def effective_rank(values: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007). (..., K) -> (...)."""
    return torch.special.entr(values / values.sum(dim=-1, keepdim=True)).sum(dim=-1).exp()


def row_similarity(weights: Tensor) -> Tensor:
    """Mean cosine similarity between the rows of different queries; 1 if all rows are equal. (..., N, M) -> (...)."""
    rows = torch.nn.functional.normalize(weights, dim=-1)
    num_queries = rows.shape[-2]
    total = rows.sum(dim=-2).square().sum(dim=-1)  # over all pairs, including each row with itself
    return (total - rows.square().sum(dim=(-2, -1))) / (num_queries * (num_queries - 1))


def negative_share(weights: Tensor) -> Tensor:
    """Absolute sum of the negative weights as a fraction of the sum of all absolute weights. (..., N, M) -> (...)."""
    return weights.clamp(max=0).abs().sum(dim=(-2, -1)) / weights.abs().sum(dim=(-2, -1))


def mass_share(part: Tensor, other: Tensor) -> Tensor:
    """Sum of the absolute weights of ``part``, such as the convolution, as a fraction of the sum over both matrices.

    (..., N, M) and (..., N, M) -> (...).
    """
    part, other = (matrix.abs().sum(dim=(-2, -1)) for matrix in (part, other))
    return part / (part + other)
