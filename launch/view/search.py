"""Find samples: by what the index says of them, and by words, which are read from the tars as far as time allows.

A query is words and `name:value` filters in any order; all of them have to hold:

    bird "on a branch" modality:audio language:fr corpus:tuxpaint split:test id:stamps

    modality:NAME  has a part of it      corpus:NAME  is of it      id:TEXT  has it in its id or key, any case
    LABEL:VALUE    has the label with exactly this value, any case  word     in its texts and alt texts, any case

A search looks at samples in order until it has a page of them or its time is up, and says where it stopped: nothing is
loaded as a whole, and the next call goes on from there.
"""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from triweave.launch.errors import ViewError
from triweave.launch.view.shard_folder import ShardFolder

LONGEST_QUERY = 1000
FACET_VALUES = 200
"""Most values of a facet that are told apart and listed."""
_FILTER_COLUMNS = ("id", "key", "corpus", "labels", "part_modality")
_FACET_COLUMNS = ("corpus", "labels", "part_modality")
_LONGEST_VALUE = 80


@dataclass(frozen=True, kw_only=True)
class Query:
    """words: casefolded, each somewhere in the texts. Filters by their name; labels: (name, casefolded value)."""

    words: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    corpora: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def reads_index(self) -> bool:
        """Whether there is a filter."""
        return bool(self.modalities or self.corpora or self.ids or self.labels)


def parse_query(text: str) -> Query:
    """Return the query of a line. Raises ViewError where it is too long or a quotation mark is not closed."""
    if len(text) > LONGEST_QUERY:
        raise ViewError(f"the query has {len(text)} characters: at most {LONGEST_QUERY} are allowed")
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split, lexer.commenters, lexer.quotes, lexer.escape = True, "", '"', ""
    try:
        terms = list(lexer)
    except ValueError:
        raise ViewError('the query has a quotation mark (") that is not closed') from None
    found: dict[str, list[Any]] = {"words": [], "modality": [], "corpus": [], "id": [], "labels": []}
    for term in terms:
        name, colon, value = term.partition(":")
        if not (colon and name and value):
            found["words"].append(term.casefold())
        elif name in ("modality", "corpus", "id"):
            found[name].append(value)
        else:
            found["labels"].append((name, value.casefold()))
    return Query(
        words=tuple(found["words"]),
        modalities=tuple(found["modality"]),
        corpora=tuple(found["corpus"]),
        ids=tuple(found["id"]),
        labels=tuple(found["labels"]),
    )


@dataclass(frozen=True, kw_only=True)
class Found:
    """numbers: samples that fit. next: the sample to go on from, None at the end. unreadable: samples passed over."""

    numbers: list[int]
    next: int | None
    unreadable: int = 0


def search(folder: ShardFolder, query: Query, *, start: int, limit: int, seconds: float) -> Found:
    """Look at samples from `start` on until `limit` fit or `seconds` have passed since the first index was read.

    Every call goes on by at least one sample, however slow the storage is.

    Raises DataError where an index is missing or damaged.
    """
    deadline: float | None = None
    numbers: list[int] = []
    unreadable = looked_at = 0
    while start < folder.samples:
        shard, place = folder.place(start)
        first = int(folder.first_samples[shard])
        places = np.arange(place, folder.manifest.shards[shard].samples)
        if query.reads_index:
            places = places[_fits(folder.columns(shard, _FILTER_COLUMNS).slice(place), query)]
        deadline = deadline or time.monotonic() + seconds
        texts = folder.texts(shard, places) if query.words else repeat("")
        for number, text in zip((first + places).tolist(), texts, strict=False):
            if len(numbers) == limit or (looked_at and time.monotonic() > deadline):
                return Found(numbers=numbers, next=number, unreadable=unreadable)
            looked_at += 1
            if text is None:
                unreadable += 1
            elif has_words(text, query.words):
                numbers.append(number)
        start = int(folder.first_samples[shard + 1])
        if time.monotonic() > deadline:
            break
    return Found(numbers=numbers, next=start if start < folder.samples else None, unreadable=unreadable)


def has_words(text: str, words: tuple[str, ...]) -> bool:
    """Return whether every word, casefolded, is somewhere in a text."""
    folded = text.casefold()
    return all(word in folded for word in words)


def _fits(index: pa.Table, query: Query) -> npt.NDArray[np.bool_]:
    """Return bool [n], which rows of an index pass the filters."""
    fits = np.ones(index.num_rows, bool)
    for corpus in query.corpora:
        fits &= _numpy(pc.equal(index["corpus"], corpus))
    for name in query.modalities:
        fits &= has_modality(index["part_modality"], name)
    for text in query.ids:
        either = (_numpy(pc.match_substring(index[column], text, ignore_case=True)) for column in ("id", "key"))
        fits &= np.logical_or(*either)
    for name, value in query.labels:
        fits &= _has_label(index["labels"], fits, name, value)
    return fits


def _has_label(column: pa.ChunkedArray, among: npt.NDArray[np.bool_], name: str, value: str) -> npt.NDArray[np.bool_]:
    """Return bool [n], which rows of `among` have a label; only rows that hold its letters are parsed."""
    possible = among & _numpy(pc.match_substring(column, json.dumps(name, ensure_ascii=False)))
    if value.isascii() and json.dumps(value)[1:-1] == value:  # otherwise JSON or another case may spell it differently
        possible &= _numpy(pc.match_substring(column, value, ignore_case=True))
    result = np.zeros(len(column), bool)
    places = np.flatnonzero(possible)
    for place, text in zip(places.tolist(), column.take(places).to_pylist(), strict=True):
        labels = parse_labels(text)
        result[place] = name in labels and label_text(labels[name]).casefold() == value
    return result


def has_modality(column: pa.ChunkedArray, name: str) -> npt.NDArray[np.bool_]:
    """Return bool [n], which rows of a `part_modality` column have a part of a modality."""
    combined = column.combine_chunks()
    owners = pc.list_parent_indices(combined).to_numpy(zero_copy_only=False)
    of_modality = _numpy(pc.equal(combined.flatten(), name))
    result = np.zeros(len(column), bool)
    result[owners[of_modality]] = True
    return result


def _numpy(column: pa.ChunkedArray | pa.Array) -> npt.NDArray[np.bool_]:
    result: npt.NDArray[np.bool_] = pc.fill_null(column, False).to_numpy(zero_copy_only=False)
    return result


def parse_labels(text: str | None) -> dict[str, Any]:
    """Return the labels of an index row; none where a hostile index holds something else."""
    try:
        labels = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return labels if isinstance(labels, dict) else {}


def label_text(value: Any) -> str:
    """Return a label's value as it is shown and searched: texts as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(kw_only=True)
class Facets:
    """How many samples have each corpus, modality and language, counted a little at each call.

    shards: counted so far. Beyond FACET_VALUES values, which come first counts.
    """

    shards: int = 0
    samples: int = 0
    counts: dict[str, Counter[str]] = field(
        default_factory=lambda: {name: Counter() for name in ("corpus", "modality", "language")}
    )

    def advance(self, folder: ShardFolder, seconds: float) -> None:
        """Count the next shards for `seconds`, at least one of them. Raises DataError."""
        deadline = time.monotonic() + seconds
        while self.shards < len(folder.manifest.shards):
            index = folder.columns(self.shards, _FACET_COLUMNS)
            for name, values in _facet_values(index):
                self._add(name, values)
            self.samples += index.num_rows
            self.shards += 1
            if time.monotonic() > deadline:
                return

    def _add(self, name: str, values: Counter[str]) -> None:
        known = self.counts[name]
        for value, count in values.most_common():
            if value in known or len(known) < FACET_VALUES:
                known[value] += count


def _facet_values(index: pa.Table) -> Iterator[tuple[str, Counter[str]]]:
    yield "corpus", Counter(_value_counts(index["corpus"]))
    modalities = pc.unique(index["part_modality"].combine_chunks().flatten().drop_null()).to_pylist()[:FACET_VALUES]
    yield "modality", Counter({name: int(has_modality(index["part_modality"], name).sum()) for name in modalities})
    languages: Counter[str] = Counter()
    for text, count in _value_counts(index["labels"]).items():
        if '"language"' in text and "language" in (labels := parse_labels(text)):
            languages[label_text(labels["language"])[:_LONGEST_VALUE]] += count
    yield "language", languages


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {str(item["values"]): int(item["counts"]) for item in pc.value_counts(column).to_pylist()}
