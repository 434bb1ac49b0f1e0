"""The bootstrap: coverage on simulated data, clusters, ratios, scipy's figures."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from triweave.pretrain.errors import PretrainError
from triweave.pretrain.evaluation.bootstrap import Method, bootstrap

SIMULATIONS = 200
"""A coverage of 95 % is then seen within 1.5 points, one standard deviation; the draws are always the same."""


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_a_95_percent_interval_of_a_share_covers_it_about_95_times_in_100(method: Method) -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for seed in range(SIMULATIONS):
        values = (draw.random(100) < 0.3).astype(float)
        found = bootstrap(values, range(100), seed=seed, resamples=600, method=method)
        covered += found.low <= 0.3 <= found.high
    assert 0.92 <= covered / SIMULATIONS <= 0.975


def test_resampling_clusters_covers_where_resampling_values_does_not() -> None:
    draw = np.random.default_rng(1)
    clusters = np.repeat(np.arange(60), 5)
    covered = {"clusters": 0, "values": 0}
    for seed in range(SIMULATIONS):
        values = np.repeat(draw.normal(size=60), 5) + 0.3 * draw.normal(size=300)
        for name, units in (("clusters", clusters), ("values", np.arange(300))):
            found = bootstrap(values, units.tolist(), seed=seed, resamples=500)
            covered[name] += found.low <= 0 <= found.high
    assert 0.92 <= covered["clusters"] / SIMULATIONS <= 0.975
    assert covered["values"] / SIMULATIONS < 0.75


def test_a_ratio_of_sums_covers_what_it_estimates() -> None:
    """Nats per token: long captions weigh more."""
    draw = np.random.default_rng(2)
    covered = 0
    for seed in range(SIMULATIONS):
        tokens = draw.integers(3, 20, 100).astype(float)
        nats = tokens * 2.0 + draw.normal(size=100) * np.sqrt(tokens)
        found = bootstrap(nats, range(100), weights=tokens, seed=seed, resamples=500)
        covered += found.low <= 2.0 <= found.high
    assert 0.92 <= covered / SIMULATIONS <= 0.975


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_it_agrees_with_scipy_where_every_value_is_a_cluster(method: Method) -> None:
    values = np.random.default_rng(3).exponential(size=80)
    found = bootstrap(values, range(80), seed=0, resamples=20_000, method=method)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method=method.replace("bca", "BCa"), rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_a_paired_difference_is_tighter_than_two_intervals() -> None:
    draw = np.random.default_rng(4)
    shared = draw.normal(size=100)
    first, second = shared + 0.2, shared + 0.1 * draw.normal(size=100)
    paired = bootstrap(first - second, range(100), seed=0)
    assert paired.low > 0.15
    assert bootstrap(first, range(100), seed=0).low < bootstrap(second, range(100), seed=0).high


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, 0.0, 0.0362), (1.0, 0.9638, 1.0)])
def test_no_hit_and_all_hits_get_the_exact_interval(value: float, low: float, high: float) -> None:
    found = bootstrap([value] * 200, [number // 2 for number in range(200)], seed=0)
    assert tuple(found) == pytest.approx((value, low, high), abs=1e-4)  # 1 - 0.025^(1/100), for 100 clusters


def test_the_seed_decides() -> None:
    values = np.random.default_rng(5).normal(size=50)
    assert bootstrap(values, range(50), seed=1) == bootstrap(values, range(50), seed=1)
    assert bootstrap(values, range(50), seed=1) != bootstrap(values, range(50), seed=2)


def test_nothing_to_bootstrap_is_refused_in_one_line() -> None:
    with pytest.raises(PretrainError, match="no values"):
        bootstrap([], [], seed=0)


def test_differences_that_are_all_0_may_be_off_to_either_side() -> None:
    share, difference = (bootstrap(np.zeros(40), range(40), seed=0, signed=signed) for signed in (False, True))
    assert share.interval == pytest.approx([0, 0.0881], abs=1e-4)
    assert difference.interval == [-share.high, share.high]
