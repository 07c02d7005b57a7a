"""Measures of attention matrices equal hand calculations."""

import math

import pytest
import torch

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

UNIFORM = torch.full((3, 4), 0.25)
ONE_HOT = torch.eye(4)[:3]
SKEWED = torch.tensor([[0.1, 0.2, 0.3, 0.4]])


def test_entropy_gini_and_top_mass_of_uniform_and_one_hot_weights():
    for measure, uniform, one_hot in ((entropy, 1, 0), (gini, 0, 0.75)):
        torch.testing.assert_close(measure(UNIFORM), torch.full((3,), float(uniform)))
        torch.testing.assert_close(measure(ONE_HOT), torch.full((3,), float(one_hot)))
    assert top_mass(UNIFORM, 0.5).tolist() == [0.5] * 3
    assert top_mass(ONE_HOT, 0.01).tolist() == [1] * 3


def test_measures_of_skewed_weights_equal_hand_calculations():
    expected = -sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4)) / math.log(4)
    assert entropy(SKEWED).item() == pytest.approx(expected)
    assert top_mass(SKEWED, 0.5).item() == pytest.approx(0.7)
    assert gini(SKEWED).item() == pytest.approx(0.25)  # mean absolute difference over twice the mean: 0.125 / (2 * 0.25)
    assert entropy(SKEWED[:, [3, 1, 0, 2]]).item() == pytest.approx(expected)
    assert gini(-2 * SKEWED).item() == pytest.approx(0.25)


def test_distances_are_measured_in_tokens_of_the_query_map():
    assert attention_distance(torch.eye(6), (2, 3), (2, 3)).tolist() == [0] * 6
    far = torch.zeros(6, 6)
    far[:, 5] = 1
    assert attention_distance(far, (2, 3), (2, 3))[0].item() == pytest.approx(math.hypot(1, 2))
    # In units of query tokens, the keys (2 x 2 map) have their centres at 1 and 3, and the first query has its centre at 0.5.
    reduced = torch.ones(16, 4) / 4
    expected = sum(math.hypot(y - 0.5, x - 0.5) for y in (1, 3) for x in (1, 3)) / 4
    assert attention_distance(reduced, (4, 4), (2, 2))[0].item() == pytest.approx(expected)


def test_ranks_of_known_matrices_are_correct():
    assert numerical_rank(singular_values(torch.eye(5))) == 5
    assert effective_rank(singular_values(torch.eye(5))).item() == pytest.approx(5)
    low_rank = torch.randn(20, 3) @ torch.randn(3, 20)
    assert numerical_rank(singular_values(low_rank)) == 3
    assert effective_rank(singular_values(low_rank)) < 3
    assert effective_rank(singular_values(torch.ones(6, 6))).item() == pytest.approx(1, abs=1e-3)


def test_row_similarity_is_the_mean_cosine_similarity_of_pairs_of_rows():
    assert row_similarity(UNIFORM).item() == pytest.approx(1)
    assert row_similarity(ONE_HOT).item() == pytest.approx(0)
    rows = torch.randn(7, 5)
    pairs = [torch.cosine_similarity(rows[i], rows[j], dim=0) for i in range(7) for j in range(7) if i != j]
    assert row_similarity(rows).item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)


def test_negative_share_and_mass_share_equal_hand_calculations():
    assert negative_share(torch.tensor([[1.0, -1.0], [2.0, 0.0]])).item() == pytest.approx(0.25)
    assert mass_share(torch.tensor([[1.0, -2.0]]), torch.tensor([[4.0, 5.0]])).item() == pytest.approx(0.25)
