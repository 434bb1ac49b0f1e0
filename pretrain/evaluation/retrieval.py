"""Retrieval figures of a model beside its floors, its control and chance, with intervals over concepts.

Every pool is scored once by the model, by each floor, and by the control where there is one; `symbols` are then taken
out, and taken alone, from the same scores. Figures pool the queries of all pools (languages, folds) of a task.

The best floor is the one with the highest recall on these very queries, for R@1 and for R@10 each: choosing it so
favours the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.shards.schema import TEXT
from triweave.pretrain.evaluation.bootstrap import bootstrap
from triweave.pretrain.evaluation.documents import EvaluationDocument
from triweave.pretrain.evaluation.embed import PartEncoder
from triweave.pretrain.evaluation.floors import SimpleFeatures, length_scores, ridge_scores
from triweave.pretrain.evaluation.metrics import Ranks, best_ranks, chance_hits, figures, hits
from triweave.pretrain.evaluation.tasks import AUDIO, LEAST_POOL, SYMBOLS, Pool, Relation, Task, relation

Scores = npt.NDArray[np.float64]
MODEL, CONTROL = "model", "control"
KEEP: dict[str, Callable[[EvaluationDocument], bool]] = {
    "all": lambda _: True,
    "without_symbols": lambda document: document.category != SYMBOLS,
    "symbols": lambda document: document.category == SYMBOLS,
}
"""Name of a part of the held-out documents -> whether a document is in it."""


@dataclass(frozen=True, kw_only=True)
class PoolRanks:
    """The ranks of one pool's queries.

    language: of the pool. groups: [Q] concept of each query. candidates: P.
    ranks: `model`, `control` or the name of a floor -> [Q].
    chance: k -> [Q] probability of a hit in a random order.
    """

    language: str
    groups: list[str]
    candidates: int
    ranks: dict[str, Ranks]
    chance: dict[int, npt.NDArray[np.float64]]


def rank_pool(
    task: Task, pool: Pool, *, model: PartEncoder, control: PartEncoder | None, features: SimpleFeatures, seed: int
) -> dict[str, PoolRanks]:
    """Return the ranks of a pool, for each part of its documents in KEEP that has any."""
    whole = relation(pool.held_out, task.source, task.target)
    scores = {MODEL: model_scores(model, task, whole)}
    scores |= floor_scores(task, pool, whole, features)
    if control is not None:
        scores[CONTROL] = model_scores(control, task, whole)
    rows = {document.key(task.source): number for number, document in enumerate(whole.queries)}
    columns = {document.key(task.target): number for number, document in enumerate(whole.candidates)}
    found = {}
    for name, keep in KEEP.items():
        part = relation([document for document in pool.held_out if keep(document)], task.source, task.target)
        if part.queries:
            chosen = np.ix_(
                [rows[document.key(task.source)] for document in part.queries],
                [columns[document.key(task.target)] for document in part.candidates],
            )
            found[name] = PoolRanks(
                language=pool.language,
                groups=[document.group for document in part.queries],
                candidates=len(part.candidates),
                ranks={who: best_ranks(values[chosen], part.correct, seed=seed) for who, values in scores.items()},
                chance={k: chance_hits(part.correct, k) for k in (1, 10)},
            )
    return found


def model_scores(encoder: PartEncoder, task: Task, asked: Relation) -> Scores:
    """Return the cosines [Q, P] between the embeddings of queries and candidates."""
    queries = encoder.embeddings(asked.queries, task.source)
    candidates = encoder.embeddings(asked.candidates, task.target)
    return np.asarray(queries @ candidates.T, np.float64)


def floor_scores(task: Task, pool: Pool, asked: Relation, features: SimpleFeatures) -> dict[str, Scores]:
    """Return floor name -> scores [Q, P]; `length` only between speech and text."""
    sides = {"source": task.source, "target": task.target}
    found = {"ridge": ridge_scores(pool.training, asked.queries, asked.candidates, features=features, **sides)}
    if {task.source, task.target} == {AUDIO, TEXT}:
        found["length"] = length_scores(pool.training, asked.queries, asked.candidates, **sides)
    return found


def summarise(task: Task, pools: Sequence[Mapping[str, PoolRanks]], *, seed: int) -> dict[str, Any]:
    """Return the task's entry of evaluation.json from the ranks of its pools."""
    parts = {name: [pool[name] for pool in pools if name in pool] for name in KEEP}
    entry = {
        "corpus": task.corpus,
        "language": task.language,
        "source": task.source,
        "target": task.target,
        **_figures(parts["all"], seed=seed),
    }
    languages = sorted({pool.language for pool in parts["all"]})
    if len(languages) > 1:
        entry["languages"] = {
            language: _brief([pool for pool in parts["all"] if pool.language == language]) for language in languages
        }
    split = any(parts["symbols"])
    for name in ("without_symbols", "symbols"):
        groups = [group for pool in parts[name] for group in pool.groups]
        enough = len(groups) >= LEAST_POOL and len(set(groups)) > 1  # one concept has no interval
        entry[name] = _figures(parts[name], seed=seed) if split and enough else None
    return entry


def _figures(pools: Sequence[PoolRanks], *, seed: int) -> dict[str, Any]:
    ranks = joined(pools)
    groups = [group for pool in pools for group in pool.groups]
    mine = figures(ranks[MODEL])
    floors = {name: figures(values) for name, values in ranks.items() if name not in (MODEL, CONTROL)}
    best = {
        1: max(floors, key=lambda name: (floors[name].r1, floors[name].r10, name)),
        10: max(floors, key=lambda name: (floors[name].r10, floors[name].r1, name)),
    }
    chance = {k: float(np.concatenate([pool.chance[k] for pool in pools]).mean()) for k in (1, 10)}

    def interval(values: npt.NDArray[np.float64]) -> list[float]:
        return bootstrap(values, groups, seed=seed).interval

    def difference(k: int) -> dict[str, Any]:
        estimate = bootstrap(hits(ranks[MODEL], k) - hits(ranks[best[k]], k), groups, seed=seed, signed=True)
        return {"floor": best[k], "mean": estimate.mean, "ci": estimate.interval}

    control = None
    if CONTROL in ranks:
        control = {
            "r1": figures(ranks[CONTROL]).r1,
            "r10": figures(ranks[CONTROL]).r10,
            "ci": {f"r{k}": interval(hits(ranks[CONTROL], k)) for k in (1, 10)},
        }
    return {
        **_brief(pools),
        "concepts": len(set(groups)),
        "ci": {f"r{k}": interval(hits(ranks[MODEL], k)) for k in (1, 10)},
        "chance": {f"r{k}": chance[k] for k in (1, 10)},
        "floors": {name: {"r1": value.r1, "r10": value.r10} for name, value in floors.items()},
        "difference": {"floor": best[10], "r1": difference(1), "r10": difference(10)},
        "control": control,
        "median_rank": mine.median_rank,
        "mrr": mine.mrr,
    }


def _brief(pools: Sequence[PoolRanks]) -> dict[str, Any]:
    """Return n, the mean number of candidates a query is ranked among, and the recalls."""
    ranks = joined(pools)[MODEL]
    mine = figures(ranks)
    candidates = sum(pool.candidates * len(pool.groups) for pool in pools) / len(ranks)
    return {"n": len(ranks), "pool": round(candidates, 1), "r1": mine.r1, "r10": mine.r10}


def joined(pools: Sequence[PoolRanks]) -> dict[str, Ranks]:
    """Return who -> ranks of the queries of all pools."""
    return {name: np.concatenate([pool.ranks[name] for pool in pools]) for name in pools[0].ranks}
