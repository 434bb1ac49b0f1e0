"""What a source's `split`, `hold_out` and `shuffle_pairs` make of a shard: samples outside, media exchanged.

Only sources that set one of them pay for it: the labels and part hashes of a shard are not read otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from triweave.data_pipeline.config import SourceConfig
from triweave.data_pipeline.errors import DataError
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.splits import fold_of, group_rows

Int = npt.NDArray[np.int64]


class Selected(NamedTuple):
    """What a source's split, held-out fold and exchange of media make of its shards; None: as built.

    taken: [P] the part whose medium each part takes. owners: [P] the sample that it is from.
    outside: [n] samples left out, for `reason`.
    """

    taken: npt.NDArray[np.int64] | None = None
    owners: npt.NDArray[np.int64] | None = None
    outside: npt.NDArray[np.bool_] | None = None
    reason: str = ""


def selecting_columns(source: SourceConfig) -> list[str]:
    """Return the columns of the index that `select` needs beside those of every plan."""
    labels = ["labels"] if _selects(source) or source.shuffle_pairs is not None else []
    return [*labels, "part_xxh3"] if source.shuffle_pairs is not None else labels


def select(
    source: SourceConfig,
    manifest: Manifest,
    shards: Sequence[int],
    indices: Sequence[pa.Table],
    kinds: npt.NDArray[np.int8],
    part_starts: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
) -> Selected:
    """Return what `source` selects of shards.

    indices: their tables, with `selecting_columns`. kinds: [P] modality ids of all their parts. part_starts: [n + 1]
    where each sample's parts begin. first: where each shard's samples begin, and where the last one's end.

    Raises DataError where a sample has no label to select by.
    """
    if not _selects(source) and source.shuffle_pairs is None:
        return Selected()
    owner = np.repeat(np.arange(first[-1]), np.diff(part_starts))
    outside, taken, reason = np.zeros(first[-1], bool), np.arange(len(kinds)), ""
    for shard, index, start, end in zip(shards, indices, first[:-1], first[1:], strict=True):
        labels = [json.loads(entry) for entry in index["labels"].to_pylist()]
        outside[start:end], reason = outside_of(source, manifest, shard, labels)
        if source.shuffle_pairs is not None:
            parts = slice(part_starts[start], part_starts[end])
            taken[parts] = part_starts[start] + exchanged_media(
                source,
                shard,
                kinds=kinds[parts],
                owners=owner[parts] - start,
                hashes=pc.list_flatten(index["part_xxh3"]).to_numpy(),
                labels=labels,
                outside=outside[start:end],
            )
    exchanged = source.shuffle_pairs is not None
    return Selected(
        taken if exchanged else None,
        owner[taken] if exchanged else None,
        outside if _selects(source) else None,
        reason,
    )


def outside_of(
    source: SourceConfig, manifest: Manifest, shard: int, labels: Sequence[dict[str, Any]]
) -> tuple[npt.NDArray[np.bool_], str]:
    """Return which samples of a shard the source's split or held-out fold leaves out, bool [n], and the reason.

    Raises DataError where a sample has no such label.
    """
    fold = source.fold
    if source.split is not None:
        values = _labels_of("split", f"split={source.split}", source, manifest, shard, labels)
        return np.asarray([value != source.split for value in values], bool), f"sample outside of split {source.split}"
    if fold is not None:
        values = _labels_of("group", f"hold_out={source.hold_out}", source, manifest, shard, labels)
        held_out = [fold_of(value, fold[1]) == fold[0] for value in values]
        return np.asarray(held_out, bool), f"sample in held-out fold {source.hold_out}"
    return np.zeros(len(labels), bool), ""


def _labels_of(
    name: str,
    asked: str,
    source: SourceConfig,
    manifest: Manifest,
    shard: int,
    labels: Sequence[dict[str, Any]],
) -> list[str]:
    values = []
    for number, entry in enumerate(labels):
        value = entry.get(name)
        if not isinstance(value, str):
            raise DataError(
                f"{manifest.location}: data.sources.{source.name}.{asked} needs a `{name}` label on every sample, and "
                f"sample {number} of {manifest.shards[shard].name} has none; build it again with `triweave build`, "
                "from a source that gives one"
            )
        values.append(value)
    return values


def exchanged_media(
    source: SourceConfig,
    shard: int,
    *,
    kinds: npt.NDArray[np.int8],
    owners: Int,
    hashes: npt.NDArray[np.uint64],
    labels: Sequence[dict[str, Any]],
    outside: npt.NDArray[np.bool_],
) -> Int:
    """Return for each part of a shard the part whose medium takes its place, int64 [P]; text keeps its own.

    kinds: [P] modality ids. owners: [P] number of each part's sample. hashes: [P] xxh3 of its bytes.
    labels: of each sample. outside: bool [n]; the media of these stay where they are.

    A keyed permutation of each modality, in which as few media as can be come to a concept of their own: samples that
    share a `group` label or a medium's bytes, directly or through others, are one concept.
    """
    keys: list[list[str]] = [[f"sample {number}"] for number in range(len(labels))]
    for number, entry in enumerate(labels):
        if isinstance(group := entry.get("group"), str):
            keys[number].append(f"group {group}")
    for place in np.flatnonzero(kinds > 0).tolist():
        keys[int(owners[place])].append(f"medium {hashes[place]}")
    concepts = np.unique(np.asarray(group_rows(keys), str), return_inverse=True)[1] if keys else owners[:0]
    taken = np.arange(len(kinds))
    for kind in np.unique(kinds[kinds > 0]).tolist():
        places = np.flatnonzero((kinds == kind) & ~outside[owners])
        digest = xxhash.xxh3_128_intdigest(
            "\x1f".join(map(str, (source.shuffle_pairs, "shuffle_pairs", source.name, shard, kind))).encode()
        )
        draws = np.random.Philox(key=digest).random_raw(len(places))
        order = np.argsort(draws, kind="stable")
        for classes in (concepts[owners[places]], owners[places]):
            order = _without_fixed(order, classes, draws)
        taken[places] = places[order]
    return taken


def _without_fixed(order: Int, classes: Int, draws: npt.NDArray[np.uint64]) -> Int:
    """Return a permutation in which as few items as can be go to an item of their own class.

    Each that does is swapped with one drawn from all that end the conflict and make no other; with a class of at most
    half of the items there is always one.
    """
    order = order.copy()
    stuck: set[int] = set()
    for item in np.flatnonzero(classes[order] == classes).tolist():
        own = int(classes[item])
        if own in stuck or classes[order[item]] != own:
            continue
        others = np.flatnonzero((classes != own) & (classes[order] != own))
        if not len(others):
            stuck.add(own)
            continue
        other = int(others[int(draws[item]) % len(others)])
        order[item], order[other] = order[other], order[item]
    return order


def _selects(source: SourceConfig) -> bool:
    return source.split is not None or source.hold_out is not None
