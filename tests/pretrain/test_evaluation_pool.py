"""Pooling over seeds: means, intervals that know both concepts and seeds, and a refusal of runs that do not match."""

from __future__ import annotations

import numpy as np
import pytest

from triweave.pretrain.errors import PretrainError
from triweave.pretrain.evaluation.bootstrap import bootstrap
from triweave.pretrain.evaluation.caption_nll import CaptionNlls
from triweave.pretrain.evaluation.classification import ClassifiedPictures
from triweave.pretrain.evaluation.documents import EvaluationDocument
from triweave.pretrain.evaluation.pool import bootstrap_seeds, pool_caption_nll, pool_classification, pool_retrieval
from triweave.pretrain.evaluation.retrieval import CONTROL, MODEL, PoolRanks
from triweave.pretrain.evaluation.tasks import Task

TASK = Task(name="birds image->caption en", corpus="birds", language="en", source="image", target="text", pools=())


def ranks(model: list[int], *, groups: list[str] | None = None) -> list[dict[str, PoolRanks]]:
    """Return one pool of a run, whose floor finds the even queries first and whose control finds none."""
    n = len(model)
    pool = PoolRanks(
        language="en",
        groups=groups or [f"group-{number}" for number in range(n)],
        candidates=100,
        ranks={
            MODEL: np.asarray(model),
            "ridge": np.asarray([1 if number % 2 == 0 else 50 for number in range(n)]),
            CONTROL: np.full(n, 90),
        },
        chance={1: np.full(n, 0.01), 10: np.full(n, 0.1)},
    )
    return [{"all": pool}]


def test_one_seed_is_the_plain_bootstrap() -> None:
    values = np.random.default_rng(0).random(40)
    clusters = [number // 2 for number in range(40)]
    assert bootstrap_seeds(values[None], clusters, seed=3) == bootstrap(values, clusters, seed=3)


def test_what_seeds_disagree_about_widens_the_interval() -> None:
    random = np.random.default_rng(1)
    values = random.random(200)
    clusters = list(range(200))
    same = bootstrap_seeds(np.stack([values] * 3), clusters, seed=0)
    apart = bootstrap_seeds(np.stack([values - 0.3, values, values + 0.3]), clusters, seed=0)
    plain = bootstrap(values, clusters, seed=0)
    assert same.mean == pytest.approx(apart.mean) == pytest.approx(plain.mean)
    assert same.high - same.low == pytest.approx(plain.high - plain.low, rel=0.1)
    assert apart.high - apart.low > 3 * (same.high - same.low)


def test_the_interval_covers_the_truth_where_queries_and_seeds_vary() -> None:
    random = np.random.default_rng(2)
    covered = 0
    trials = 150
    for trial in range(trials):
        seeds = random.normal(0.0, 0.05, (8, 1))
        values = 0.4 + seeds + random.normal(0.0, 0.3, (1, 60)) + random.normal(0.0, 0.1, (8, 60))
        estimate = bootstrap_seeds(values, list(range(60)), seed=trial, resamples=400)
        covered += estimate.low <= 0.4 <= estimate.high
    assert 0.88 <= covered / trials <= 1.0


def test_weights_make_a_ratio() -> None:
    values = np.asarray([[2.0, 8.0], [4.0, 6.0]])
    found = bootstrap_seeds(values, ["a", "b"], weights=[1.0, 4.0], seed=0)
    assert found.mean == pytest.approx(20 / (2 * 5))
    assert 2.0 * 0.75 <= found.low <= found.mean <= found.high <= 4.0


def test_a_figure_that_never_varies_is_not_called_exact() -> None:
    found = bootstrap_seeds(np.ones((3, 20)), list(range(20)), seed=0)
    assert found.mean == found.high == 1.0
    assert 0.7 < found.low < 0.95


def test_retrieval_is_the_mean_over_seeds_and_queries() -> None:
    seeds = [ranks([1, 1, 20, 5]), ranks([1, 20, 20, 20])]
    entry = pool_retrieval(TASK, seeds, seed=0)
    assert entry["n"] == 4
    assert entry["r1"] == pytest.approx((2 + 1) / 8)
    assert entry["r10"] == pytest.approx((3 + 1) / 8)
    assert entry["seeds"] == {"r1": [0.5, 0.25], "r10": [0.75, 0.25]}
    assert entry["floors"]["ridge"]["r10"] == 0.5
    assert entry["difference"]["r10"]["mean"] == pytest.approx(0.5 - 0.5)
    assert entry["control"]["r10"] == 0.0
    assert entry["control_difference"]["r10"]["mean"] == pytest.approx(0.5)
    assert entry["ci"]["r10"][0] <= 0.5 <= entry["ci"]["r10"][1]
    assert entry["without_symbols"] is None


def test_runs_with_other_documents_are_refused() -> None:
    with pytest.raises(PretrainError, match="different documents"):
        pool_retrieval(TASK, [ranks([1, 2]), ranks([1, 2], groups=["x", "y"])], seed=0)


def document(number: int, corpus: str) -> EvaluationDocument:
    return EvaluationDocument(
        id=f"{number}",
        corpus=corpus,
        kind="caption",
        language="en",
        category="",
        group=f"group-{number}",
        text="a bird",
    )


def test_caption_gaps_are_those_of_all_seeds_and_of_each_corpus() -> None:
    documents = [document(number, "birds" if number < 3 else "bells") for number in range(6)]
    tokens = np.full(6, 2.0)

    def nlls(gap: float) -> CaptionNlls:
        true = np.full(6, 6.0)
        shuffled = true + gap * tokens * np.asarray([1, 1, 1, 0, 0, 0])
        return CaptionNlls(documents=documents, tokens=tokens, true=true, shuffled=shuffled, none=true)

    entry = pool_caption_nll([nlls(0.2), nlls(0.4)], [nlls(0.0)], seed=0)
    assert entry["true"] == pytest.approx(3.0)
    assert entry["gap"] == pytest.approx(0.15)
    assert entry["language_only"] == pytest.approx(3.0)
    assert entry["seeds"] == pytest.approx([0.1, 0.2])
    assert entry["corpora"]["birds"]["gap"] == pytest.approx(0.3)
    assert entry["corpora"]["bells"]["gap"] == pytest.approx(0.0)
    assert entry["control"]["gap"] == pytest.approx(0.0)
    assert entry["ci"][0] < 0.15 < entry["ci"][1]


def test_accuracies_are_those_of_all_seeds() -> None:
    categories = ["bird", "bell", "bird", "bell"]

    def seen(predicted: list[str]) -> ClassifiedPictures:
        ways = {"probe_hidden": predicted, "pixels": ["bird"] * 4, "majority": ["bird"] * 4}
        return ClassifiedPictures(categories=categories, groups=list("abcd"), predicted=ways)

    right = seen(categories)
    half = seen(["bird"] * 4)
    entry = pool_classification([right, half], [half], seed=0)
    assert entry["probe_hidden"]["accuracy"] == pytest.approx(0.75)
    assert entry["probe_hidden"]["seeds"] == [1.0, 0.5]
    assert entry["probe"] is None
    assert entry["floors"]["pixels"] == 0.5
    assert entry["control"]["probe_hidden"]["accuracy"] == 0.5
