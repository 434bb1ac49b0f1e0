"""Retrieval tasks: which held-out documents are ranked among each other, and which answers are right.

    tuxpaint image->caption en     one document per picture and language; all other languages are pooled in `other`
    tuxpaint speech->caption       documents with spoken captions, of the languages with most of them
    tuxpaint speech->image
    asterisk speech->transcript en documents of sound and text alone, one task a language

and the reverse of each. Queries and candidates are distinct contents: equal pictures, clips or normalised texts are one
entry, and every candidate that stands in a document with the query's content is right. A query is ranked among the
candidates of its own language only, so that telling languages apart earns nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.shards.schema import TEXT
from triweave.pretrain.evaluation.documents import EFFECT, SPEECH, EvaluationDocument, EvaluationDocuments

IMAGE, AUDIO = "image", "audio"
LEAST_POOL = 20
"""Fewer distinct queries or candidates of a language make no pool: ten guesses of twenty are half of it."""
LEAST_TRAINING = 20
"""Fewer training documents of a language fit no floor, so it makes no pool either."""
MOST_TRAINING = 600
"""Training documents a floor is fitted on, per pool; Tux Paint has about 600 a language."""
POOLED_LANGUAGES = 4
"""Languages in a pooled task, those with most documents: their floors are what costs time."""
ENGLISH = "en"
SYMBOLS = "symbols"
"""Tux Paint's category of letters and digits; apart, because single characters inflate the figures."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Held-out documents that are ranked among each other, and the training documents its floors are fitted on."""

    language: str
    held_out: tuple[EvaluationDocument, ...]
    training: tuple[EvaluationDocument, ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One direction of retrieval; `language` is `other` or `all` where several pools are taken together."""

    name: str
    corpus: str
    language: str
    source: str
    target: str
    pools: tuple[Pool, ...]


@dataclass(frozen=True, kw_only=True)
class Relation:
    """What is asked and what is right within a pool.

    queries: Q documents, the first with each distinct source content.
    candidates: P documents, the first with each distinct target content.
    correct: bool [Q, P].
    """

    queries: tuple[EvaluationDocument, ...]
    candidates: tuple[EvaluationDocument, ...]
    correct: npt.NDArray[np.bool_]


def relation(documents: Sequence[EvaluationDocument], source: str, target: str) -> Relation:
    """Return queries, candidates and right answers of documents that have parts of both modalities."""
    queries: dict[str, EvaluationDocument] = {}
    candidates: dict[str, EvaluationDocument] = {}
    for document in documents:
        queries.setdefault(document.key(source), document)
        candidates.setdefault(document.key(target), document)
    rows = {key: number for number, key in enumerate(queries)}
    columns = {key: number for number, key in enumerate(candidates)}
    correct = np.zeros((len(rows), len(columns)), np.bool_)
    for document in documents:
        correct[rows[document.key(source)], columns[document.key(target)]] = True
    return Relation(queries=tuple(queries.values()), candidates=tuple(candidates.values()), correct=correct)


def retrieval_tasks(documents: EvaluationDocuments) -> list[Task]:
    """Return the tasks that the held-out documents allow, both directions of each, corpora in order of name."""
    tasks: list[Task] = []
    for corpus in sorted({document.corpus for document in documents.held_out}):
        held_out = [document for document in documents.held_out if document.corpus == corpus]
        training = [document for document in documents.training if document.corpus == corpus]
        pools = _pools(held_out, training, _is_captioned, (IMAGE, TEXT))
        tasks += _both(corpus, "image", "caption", ENGLISH, [pool for pool in pools if pool.language == ENGLISH])
        others = [pool for pool in pools if pool.language != ENGLISH][:POOLED_LANGUAGES]
        tasks += _both(corpus, "image", "caption", "other", others)
        pools = _pools(held_out, training, _is_spoken_picture, (AUDIO, IMAGE))[:POOLED_LANGUAGES]
        tasks += _both(corpus, "speech", "caption", "all", pools)
        tasks += _both(corpus, "speech", "image", "all", pools)
        for pool in _pools(held_out, training, _is_spoken_text, (AUDIO, TEXT)):
            tasks += _both(corpus, "speech", "transcript", pool.language, [pool])
    return tasks


_MODALITY = {"image": IMAGE, "speech": AUDIO, "caption": TEXT, "transcript": TEXT}


def _both(corpus: str, source: str, target: str, language: str, pools: Sequence[Pool]) -> list[Task]:
    """Return both directions of a task; none without pools."""
    if not pools:
        return []
    ending = "" if language == "all" else f" {language}"
    return [
        Task(
            name=f"{corpus} {one}->{other}{ending}",
            corpus=corpus,
            language=language,
            source=_MODALITY[one],
            target=_MODALITY[other],
            pools=tuple(pools),
        )
        for one, other in ((source, target), (target, source))
    ]


def _pools(
    held_out: Sequence[EvaluationDocument],
    training: Sequence[EvaluationDocument],
    belongs: Callable[[EvaluationDocument], bool],
    modalities: tuple[str, str],
) -> list[Pool]:
    """Return a pool per language that has enough documents, those with most held-out and training documents first."""
    held_out = [document for document in held_out if belongs(document)]
    training = [document for document in training if belongs(document)]
    counts = Counter(document.language for document in (*held_out, *training))
    pools = []
    for language in sorted(counts, key=lambda name: (-counts[name], name)):
        mine = _one_each(held_out, language)
        seen = _one_each(training, language)
        distinct = min((len({document.key(name) for document in mine}) for name in modalities), default=0)
        if distinct >= LEAST_POOL and len(seen) >= LEAST_TRAINING:
            pools.append(Pool(language=language, held_out=mine, training=_spread(seen, MOST_TRAINING)))
    return pools


def _one_each(documents: Sequence[EvaluationDocument], language: str) -> tuple[EvaluationDocument, ...]:
    """Return the documents of a language, the first of those that have the same contents."""
    distinct: dict[tuple[str, ...], EvaluationDocument] = {}
    for document in documents:
        if document.language == language:
            contents = (document.key(TEXT), *(f"{name}:{document.key(name)}" for name in sorted(document.media)))
            distinct.setdefault(contents, document)
    return tuple(distinct.values())


def _spread(documents: tuple[EvaluationDocument, ...], most: int) -> tuple[EvaluationDocument, ...]:
    """Return at most `most` documents, evenly spread over their order."""
    if len(documents) <= most:
        return documents
    return tuple(documents[number * len(documents) // most] for number in range(most))


def _is_captioned(document: EvaluationDocument) -> bool:
    return document.kind != EFFECT and document.has(IMAGE, TEXT)


def _is_spoken_picture(document: EvaluationDocument) -> bool:
    return document.kind == SPEECH and document.has(AUDIO, IMAGE, TEXT)


def _is_spoken_text(document: EvaluationDocument) -> bool:
    return document.kind == SPEECH and document.has(AUDIO, TEXT) and IMAGE not in document.media
