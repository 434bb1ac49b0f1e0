"""Confidence intervals by resampling clusters: queries about one concept are not independent, concepts are.

    estimate  = sum_i y_i / sum_i w_i                      w = 1 gives a mean, w = tokens gives nats per token
    resample  = draw G of the G clusters with replacement, take the same ratio of their sums
    percentile: the quantiles (1 -+ level) / 2 of the resampled ratios
    bca:        quantiles moved by the bias of the resamples and the skewness of the leave-one-cluster-out ratios
                (Efron 1987; the acceleration is that of `scipy.stats.bootstrap`)

Where all y / w are the same 0 or the same 1, resampling sees no spread and would call the figure exact; the interval is
then the exact binomial one of Clopper and Pearson over the clusters; for differences that are all 0, the same to both
sides.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from triweave.pretrain.errors import PretrainError

Method = Literal["percentile", "bca"]
Floats = npt.NDArray[np.float64]
LEVEL = 0.95
RESAMPLES = 2000


class Estimate(NamedTuple):
    """A figure and its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def interval(self) -> list[float]:
        """Return [low, high], as JSON has it."""
        return [self.low, self.high]


def bootstrap(
    values: npt.ArrayLike,
    clusters: Sequence[Hashable],
    *,
    weights: npt.ArrayLike | None = None,
    seed: int,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    method: Method = "percentile",
    signed: bool = False,
) -> Estimate:
    """Return sum(values) / sum(weights) and its interval over resampled clusters.

    values: [n] numerators; for a paired comparison, the differences.
    clusters: [n] what each value belongs to; equal ones are drawn together.
    weights: [n] denominators above 0; None: 1 each.
    signed: whether values / weights may lie below 0, as differences do.
    resamples: draws; 2000 keep the ends of a 95 % interval within about 2 % of its width.

    Raises PretrainError where there are no values.
    """
    numerators = np.asarray(values, np.float64)
    denominators = np.ones_like(numerators) if weights is None else np.asarray(weights, np.float64)
    if not len(numerators):
        raise PretrainError("there are no values to bootstrap; evaluate on more documents")
    top, bottom = cluster_sums(numerators, denominators, clusters)
    mean = float(top.sum() / bottom.sum())
    if mean in (0.0, 1.0) and np.all(numerators == mean * denominators):
        exact = stats.binomtest(round(mean) * len(top), len(top)).proportion_ci(level)
        low = -float(exact.high) if signed and mean == 0 else float(exact.low)
        return Estimate(mean, low, float(exact.high))
    if len(top) == 1:
        return Estimate(mean, float("-inf"), float("inf"))
    counts = np.random.default_rng(seed).multinomial(len(top), np.full(len(top), 1 / len(top)), resamples)
    draws = (counts @ top) / (counts @ bottom)
    ends = np.asarray([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        ends = _bca_levels(ends, draws, mean, top, bottom)
    low, high = np.quantile(draws, ends)
    return Estimate(mean, float(low), float(high))


def cluster_sums(numerators: Floats, denominators: Floats, clusters: Sequence[Hashable]) -> tuple[Floats, Floats]:
    """Return the sums of both per cluster, [G] each, clusters in order of appearance."""
    numbers: dict[Hashable, int] = {}
    of_value = np.asarray([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], np.int64)
    if len(of_value) != len(numerators):
        raise ValueError(f"{len(numerators)} values but {len(of_value)} clusters")
    groups = len(numbers)
    top, bottom = (np.bincount(of_value, sums, groups).astype(np.float64) for sums in (numerators, denominators))
    return top, bottom


def _bca_levels(ends: Floats, draws: Floats, mean: float, top: Floats, bottom: Floats) -> Floats:
    """Return the quantiles to take instead of `ends`."""
    below = (np.count_nonzero(draws < mean) + np.count_nonzero(draws == mean) / 2) / len(draws)
    bias = stats.norm.ppf(np.clip(below, 0.5 / len(draws), 1 - 0.5 / len(draws)))
    left_out = (top.sum() - top) / (bottom.sum() - bottom)
    spread = left_out.mean() - left_out
    squares = float((spread**2).sum())
    acceleration = float((spread**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0
    moved = bias + stats.norm.ppf(ends)
    levels: Floats = stats.norm.cdf(bias + moved / (1 - acceleration * moved))
    return levels
