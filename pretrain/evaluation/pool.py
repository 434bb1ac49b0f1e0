"""Runs that differ in their seed, asked the same questions: means over seeds, intervals over concepts and seeds.

    figure    mean over seeds and queries (nats: sum over seeds and documents / tokens)
    resample  draw the concepts and the seeds with replacement, independently; take the same figure
    interval  quantiles of the resampled figures

Floors, chance and the control are the same for every seed. With three seeds the drawn spread between seeds is smaller
than the true one, so the intervals cover little of what another training would give; the figures of single seeds
stand beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from triweave.pretrain.errors import PretrainError
from triweave.pretrain.evaluation import caption_nll, classification, retrieval
from triweave.pretrain.evaluation.bootstrap import LEVEL, RESAMPLES, Estimate, bootstrap, cluster_sums
from triweave.pretrain.evaluation.caption_nll import CaptionNlls
from triweave.pretrain.evaluation.classification import ClassifiedPictures
from triweave.pretrain.evaluation.evaluate import Evaluation
from triweave.pretrain.evaluation.metrics import accuracy, figures, hits
from triweave.pretrain.evaluation.retrieval import CONTROL, MODEL, PoolRanks, joined
from triweave.pretrain.evaluation.tasks import Task

Floats = npt.NDArray[np.float64]
Pools = Sequence[Mapping[str, PoolRanks]]
"""What the evaluation of one run keeps of a task: part -> ranks, for every pool."""


def bootstrap_seeds(
    values: npt.ArrayLike,
    clusters: Sequence[Hashable],
    *,
    weights: npt.ArrayLike | None = None,
    seed: int,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    signed: bool = False,
) -> Estimate:
    """Return sum(values) / (R sum(weights)) and its interval over resampled clusters and rows.

    values: [R, n] numerators, a row for each of R trained seeds.
    clusters, weights: [n] as for `bootstrap`, the same for every row; signed: as there.

    Raises PretrainError where there are no values.
    """
    numerators = np.atleast_2d(np.asarray(values, np.float64))
    mean_row = numerators.mean(axis=0)
    whole = bootstrap(mean_row, clusters, weights=weights, seed=seed, level=level, resamples=resamples, signed=signed)
    denominators = np.ones_like(mean_row) if weights is None else np.asarray(weights, np.float64)
    R = len(numerators)
    sums = [cluster_sums(row, denominators, clusters) for row in numerators]
    top, bottom = np.stack([numerator for numerator, _ in sums]), sums[0][1]
    if R == 1 or len(bottom) == 1 or np.all(mean_row == 0) or np.all(mean_row == denominators):
        return whole
    random = np.random.default_rng(seed)
    cluster_counts = random.multinomial(len(bottom), np.full(len(bottom), 1 / len(bottom)), resamples)
    seed_counts = random.multinomial(R, np.full(R, 1 / R), resamples)
    draws = ((seed_counts @ top) * cluster_counts).sum(axis=1) / (R * (cluster_counts @ bottom))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(whole.mean, float(low), float(high))


def pool_seeds(runs: Sequence[Evaluation], control: Evaluation | None, *, seed: int) -> dict[str, Any]:
    """Return `retrieval`, `classification` and `caption_nll` as in evaluation.json, over all seeds.

    runs: evaluations of the seeds, each with the control's ranks beside its own where there is a control.
    control: the evaluation of the control as a run of its own.

    Every entry has `seeds`, the figures of single seeds in order. Raises PretrainError where the runs were not asked
    about the same documents.
    """
    first = runs[0]
    nlls = {} if control is None else control.nlls
    pictures = {} if control is None else control.pictures
    return {
        "retrieval": {
            name: pool_retrieval(first.tasks[name], [run.ranks[name] for run in runs], seed=seed)
            for name in first.ranks
        },
        "classification": {
            name: pool_classification([run.pictures[name][0] for run in runs], pictures.get(name), seed=seed)
            for name in first.pictures
        },
        "caption_nll": {
            name: pool_caption_nll([run.nlls[name][0] for run in runs], nlls.get(name), seed=seed)
            for name in first.nlls
        },
    }


def pool_retrieval(task: Task, by_seed: Sequence[Pools], *, seed: int) -> dict[str, Any]:
    """Return a task's entry over seeds: that of the first seed with the figures of the model pooled."""
    entry = retrieval.summarise(task, by_seed[0], seed=seed)
    entry.pop("languages", None)
    entry |= _pooled_ranks(by_seed, "all", entry, seed=seed)
    for part in ("without_symbols", "symbols"):
        if entry[part] is not None:
            entry[part] |= _pooled_ranks(by_seed, part, entry[part], seed=seed)
    return entry


def _pooled_ranks(by_seed: Sequence[Pools], part: str, entry: dict[str, Any], *, seed: int) -> dict[str, Any]:
    """Return what changes in the first seed's entry of a part."""
    pools = [[pool[part] for pool in own if part in pool] for own in by_seed]
    groups = [[group for pool in own for group in pool.groups] for own in pools]
    _require_same(groups)
    ranks = [joined(own) for own in pools]
    floors = {k: str(entry["difference"][f"r{k}"]["floor"]) for k in (1, 10)}

    def recalls(k: int) -> Floats:
        return np.stack([hits(own[MODEL], k) for own in ranks])

    def difference(k: int, name: str) -> dict[str, Any]:
        own = bootstrap_seeds(recalls(k) - hits(ranks[0][name], k), groups[0], seed=seed, signed=True)
        return {"mean": own.mean, "ci": own.interval}

    to_floors = {f"r{k}": {"floor": name, **difference(k, name)} for k, name in floors.items()}
    to_control = {f"r{k}": difference(k, CONTROL) for k in (1, 10)} if CONTROL in ranks[0] else None

    singles = [figures(own[MODEL]) for own in ranks]
    means = np.mean(np.asarray(singles, np.float64), axis=0).tolist()
    return {
        **dict(zip(singles[0]._fields, means, strict=True)),
        "ci": {f"r{k}": bootstrap_seeds(recalls(k), groups[0], seed=seed).interval for k in (1, 10)},
        "difference": {"floor": floors[10], **to_floors},
        "control_difference": to_control,
        "seeds": {"r1": [own.r1 for own in singles], "r10": [own.r10 for own in singles]},
    }


def pool_classification(
    by_seed: Sequence[ClassifiedPictures], control: Sequence[ClassifiedPictures] | None, *, seed: int
) -> dict[str, Any]:
    """Return a label's entry over seeds; `control`: way -> accuracy of the control."""
    first = by_seed[0]
    _require_same([own.groups for own in by_seed])
    entry = classification.summarise([first], seed=seed)
    beside = None if control is None else classification.summarise(control, seed=seed)
    entry["control"] = None if beside is None else {}
    for way in ("prompt", "probe", "probe_hidden"):
        if entry[way] is None:
            continue
        right = np.stack([accuracy(own.predicted[way], own.categories) for own in by_seed])
        pooled = bootstrap_seeds(right, first.groups, seed=seed)
        singles = right.mean(axis=1).tolist()
        entry[way] = {"accuracy": pooled.mean, "ci": pooled.interval, "seeds": singles}
        if beside is not None:
            entry["control"][way] = beside[way]
    return entry


def pool_caption_nll(
    by_seed: Sequence[CaptionNlls], control: Sequence[CaptionNlls] | None, *, seed: int
) -> dict[str, Any]:
    """Return a modality's entry over seeds, whole and per corpus; `control`: the figures of the control."""
    first = by_seed[0]
    _require_same([[document.id for document in own.documents] for own in by_seed])
    entry = caption_nll.summarise([first], seed=seed)
    entry.pop("languages", None)

    def changed(belongs: Callable[[str], bool]) -> dict[str, Any]:
        chosen = np.asarray([belongs(document.corpus) for document in first.documents])
        groups = [document.group for document, is_in in zip(first.documents, chosen, strict=True) if is_in]
        tokens = first.tokens[chosen]
        sums = {name: np.stack([getattr(own, name)[chosen] for own in by_seed]) for name in caption_nll.FIGURES}
        gaps = sums["shuffled"] - sums["true"]
        pooled = bootstrap_seeds(gaps, groups, weights=tokens, seed=seed, signed=True)
        means = {
            words: float(sums[name].sum() / (len(by_seed) * tokens.sum()))
            for name, words in caption_nll.FIGURES.items()
        }
        return {**means, "gap": pooled.mean, "ci": pooled.interval, "seeds": (gaps.sum(1) / tokens.sum()).tolist()}

    entry |= changed(lambda _: True)
    for corpus in entry["corpora"]:
        entry["corpora"][corpus] |= changed(lambda name, corpus=corpus: name == corpus)  # type: ignore[misc]
    entry["control"] = None
    if control is not None:
        whole = caption_nll.summarise(control, seed=seed)
        entry["control"] = {name: whole[name] for name in (*caption_nll.FIGURES.values(), "gap", "ci")}
    return entry


def _require_same(lists: Sequence[Sequence[str]]) -> None:
    """Raise PretrainError where the seeds were asked about different documents."""
    if any(list(other) != list(lists[0]) for other in lists[1:]):
        raise PretrainError("the runs hold out different documents; pool runs of the same shards and splits")
