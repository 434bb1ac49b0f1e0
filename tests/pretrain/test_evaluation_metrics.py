"""Retrieval figures against hand-computed ones and scikit-learn's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import label_ranking_average_precision_score, top_k_accuracy_score

from triweave.pretrain.evaluation.metrics import accuracy, best_ranks, chance_hits, figures, hits


def test_ranks_and_figures_of_a_case_done_by_hand() -> None:
    scores = np.asarray([[0.9, 0.1, 0.5, 0.2], [0.1, 0.2, 0.3, 0.4], [0.5, 0.4, 0.3, 0.2]])
    correct = np.asarray([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]], bool)
    ranks = best_ranks(scores, correct, seed=0)
    assert ranks.tolist() == [1, 3, 3]  # with two right answers the better one counts
    assert figures(ranks) == pytest.approx((1 / 3, 1.0, 3.0, (1 + 1 / 3 + 1 / 3) / 3))
    assert hits(ranks, 2).tolist() == [1, 0, 0]


def test_recall_and_mrr_equal_those_of_scikit_learn() -> None:
    scores = np.random.default_rng(1).normal(size=(60, 25))
    correct = np.eye(25, dtype=bool)[np.random.default_rng(2).integers(0, 25, 60)]
    ranks = best_ranks(scores, correct, seed=0)
    for k in (1, 10):
        expected = top_k_accuracy_score(correct.argmax(axis=1), scores, k=k, labels=range(25))
        assert hits(ranks, k).mean() == pytest.approx(expected)
    assert figures(ranks).mrr == pytest.approx(label_ranking_average_precision_score(correct, scores))


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_a_model_that_scores_all_alike_lands_at_chance(value: float) -> None:
    ranks = best_ranks(np.full((40, 40), value), np.eye(40, dtype=bool), seed=3)
    assert sorted(ranks) == list(range(1, 41))


def test_a_tie_is_not_always_won() -> None:
    correct = np.asarray([[True, False]])
    ranks = {int(best_ranks([[1.0, 1.0]], correct, seed=seed)[0]) for seed in range(20)}
    assert ranks == {1, 2}


def test_nan_never_beats_a_number() -> None:
    assert best_ranks([[np.nan, -5.0, 3.0]], np.asarray([[False, True, False]]), seed=0).tolist() == [2]


def test_a_query_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="no correct candidate"):
        best_ranks([[1.0, 2.0]], np.zeros((1, 2), bool), seed=0)


@pytest.mark.parametrize("right", [1, 2, 4])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_chance_equals_an_enumeration_of_all_orders(right: int, k: int) -> None:
    correct = np.asarray([[place < right for place in range(5)]])
    orders = list(itertools.permutations(range(5)))
    found = sum(any(place < right for place in order[:k]) for order in orders) / len(orders)
    assert chance_hits(correct, k).tolist() == pytest.approx([found])


def test_chance_of_a_pool_smaller_than_k_is_certain() -> None:
    assert chance_hits(np.eye(4, dtype=bool), 10).tolist() == [1, 1, 1, 1]


def test_accuracy_marks_what_is_right() -> None:
    assert accuracy(["a", "b", "c"], ["a", "c", "c"]).tolist() == [1, 0, 1]
