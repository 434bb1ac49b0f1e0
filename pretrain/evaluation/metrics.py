"""Retrieval figures: the rank of the best correct candidate, recall at k, and what chance gives.

    rank_q   = 1 + candidates that score above the best correct one
    R@k      = mean over queries of [rank <= k]
    MRR      = mean over queries of 1 / rank
    chance   R@k of a random order = mean over queries of 1 - C(P - m, k) / C(P, k)      m correct among P candidates

Candidates that score the same as the best correct one are ordered by one seeded draw, so that a model that gives every
candidate the same score lands at chance, neither first nor last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ranks = npt.NDArray[np.int64]
KS = (1, 10)
"""The k of the recalls that are reported."""


class RetrievalFigures(NamedTuple):
    """Figures of one set of ranks; `median_rank` is the mean of the two middle ones for an even number."""

    r1: float
    r10: float
    median_rank: float
    mrr: float


def best_ranks(scores: npt.ArrayLike, correct: npt.NDArray[np.bool_], *, seed: int) -> Ranks:
    """Return the rank [Q] of each query's best correct candidate, from 1 on.

    scores: [Q, P], higher is better; NaN counts as the lowest.
    correct: [Q, P], at least one in each row.

    Raises ValueError for a query without a correct candidate.
    """
    values = np.asarray(scores, np.float64)
    values = np.where(np.isnan(values), -np.inf, values)
    if not correct.any(axis=1).all():
        raise ValueError("a query has no correct candidate")
    order = np.random.default_rng(seed).permutation(values.shape[1])
    best = np.where(correct, values, -np.inf).max(axis=1, keepdims=True)
    tied = values == best
    first_correct = np.where(tied & correct, order, values.shape[1]).min(axis=1, keepdims=True)
    ahead = (values > best) | (tied & ~correct & (order < first_correct))
    ranks: Ranks = 1 + ahead.sum(axis=1)
    return ranks


def hits(ranks: Ranks, k: int) -> npt.NDArray[np.float64]:
    """Return 1 where the rank is at most k, else 0."""
    return (ranks <= k).astype(np.float64)


def figures(ranks: Ranks) -> RetrievalFigures:
    """Return the figures of some ranks [Q], Q at least 1."""
    return RetrievalFigures(
        r1=float(hits(ranks, 1).mean()),
        r10=float(hits(ranks, 10).mean()),
        median_rank=float(np.median(ranks)),
        mrr=float((1.0 / ranks).mean()),
    )


def chance_hits(correct: npt.NDArray[np.bool_], k: int) -> npt.NDArray[np.float64]:
    """Return [Q] the probability that a random order of the P candidates has a correct one among the first k.

    correct: [Q, P].
    """
    candidates = correct.shape[1]
    wrong = candidates - correct.sum(axis=1)
    drawn = np.arange(min(k, candidates))
    # factors below 0 come after one that is 0: fewer wrong candidates than places
    missed = np.clip((wrong[:, None] - drawn) / (candidates - drawn), 0.0, None).prod(axis=1)
    return np.asarray(1.0 - missed, np.float64)


def accuracy(predicted: npt.ArrayLike, true: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return 1 where the predicted class is the true one, else 0."""
    return np.asarray(np.asarray(predicted, dtype=Any) == np.asarray(true, dtype=Any), np.float64)
