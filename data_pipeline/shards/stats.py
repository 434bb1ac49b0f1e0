"""Count what a shard folder holds, from its indices and its ledger alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.ledger import read_ledger, reason_counts
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.storage.files import file_size

LABEL_VALUES = 100
"""A label with more distinct values than this is reported by their number alone."""
_COLUMNS = ("corpus", "labels", "size", "part_modality", "part_size", "part_width", "part_height", "part_samples",
            "part_rate")  # fmt: skip


@dataclass(kw_only=True)
class ModalityStats:
    """Parts of one modality: how many, in how many documents, bytes, and pixels or milliseconds where they apply."""

    parts: int = 0
    documents: int = 0
    part_bytes: int = 0
    pixels: int = 0
    ms: int = 0


@dataclass(frozen=True, kw_only=True)
class ShardStats:
    """What a shard folder holds.

    combinations: modalities of a document in order of first appearance, joined by `+` -> documents.
    labels: label -> value -> documents, at most LABEL_VALUES values each, most frequent first.
    label_values: label -> number of distinct values.
    """

    shards: int
    samples: int
    tar_bytes: int
    sample_bytes_max: int
    corpora: dict[str, int]
    modalities: dict[str, ModalityStats]
    combinations: dict[str, int]
    labels: dict[str, dict[str, int]]
    label_values: dict[str, int]
    rows: dict[str, int]
    reasons: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return the statistics as JSON values."""
        return vars(self) | {"modalities": {name: vars(stats) for name, stats in self.modalities.items()}}


@dataclass(kw_only=True)
class _Counts:
    corpora: Counter[str] = field(default_factory=Counter)
    combinations: Counter[str] = field(default_factory=Counter)
    labels: dict[str, Counter[str]] = field(default_factory=dict)
    modalities: dict[str, ModalityStats] = field(default_factory=dict)
    sample_bytes_max: int = 0


def shard_stats(folder: Path) -> ShardStats:
    """Return the statistics of a finished shard folder; a shard at a time. Raises DataError."""
    manifest = Manifest.load(folder)
    counts = _Counts()
    for number in range(len(manifest.shards)):
        _count_shard(counts, read_index(manifest, number, _COLUMNS))
    ledger = read_ledger(manifest.ledger_path) if file_size(manifest.ledger_path) is not None else None
    return ShardStats(
        shards=len(manifest.shards),
        samples=manifest.samples,
        tar_bytes=sum(shard.tar_bytes for shard in manifest.shards),
        sample_bytes_max=counts.sample_bytes_max,
        corpora=dict(counts.corpora.most_common()),
        modalities=dict(sorted(counts.modalities.items())),
        combinations=dict(counts.combinations.most_common()),
        labels={name: _top(values) for name, values in sorted(counts.labels.items())},
        label_values={name: len(values) for name, values in sorted(counts.labels.items())},
        rows=manifest.rows,
        reasons=reason_counts(ledger) if ledger is not None else [],
    )


def _count_shard(counts: _Counts, index: pa.Table) -> None:
    counts.corpora.update(index["corpus"].to_pylist())
    counts.sample_bytes_max = max(counts.sample_bytes_max, int(np.max(index["size"].to_numpy(), initial=0)))
    for text in index["labels"].to_pylist():
        for name, value in json.loads(text).items():
            counts.labels.setdefault(name, Counter())[value if isinstance(value, str) else json.dumps(value)] += 1
    for modalities in index["part_modality"].to_pylist():
        distinct = dict.fromkeys(modalities)
        counts.combinations["+".join(distinct)] += 1
        for name in distinct:
            counts.modalities.setdefault(name, ModalityStats()).documents += 1
    _count_parts(counts, index)


def _count_parts(counts: _Counts, index: pa.Table) -> None:
    column = {
        name: index[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        for name in _COLUMNS
        if name.startswith("part_")
    }
    for name in np.unique(column["part_modality"]):
        of_modality = column["part_modality"] == name
        stats = counts.modalities[str(name)]
        stats.parts += int(of_modality.sum())
        stats.part_bytes += int(column["part_size"][of_modality].sum())
        width, height = (column[f"part_{side}"][of_modality].astype(np.int64) for side in ("width", "height"))
        stats.pixels += int((width * height).sum())
        rate = np.maximum(column["part_rate"][of_modality].astype(np.int64), 1)
        stats.ms += int((column["part_samples"][of_modality] * 1000 // rate).sum())


def _top(values: Counter[str]) -> dict[str, int]:
    if len(values) > LABEL_VALUES:
        return {}
    return dict(sorted(values.items(), key=lambda item: (-item[1], item[0])))
