"""Which documents a report shows: held-out ones where there are any, drawn by hash, evenly over categories."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from triweave.data_pipeline.config import SourceConfig
from triweave.data_pipeline.errors import DataError, MediaError
from triweave.data_pipeline.media import audio, images
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.schema import document_from_json
from triweave.data_pipeline.splits import fold_of
from triweave.data_pipeline.storage.files import read_range
from triweave.launch.report.wording import readable

IMAGE_SIDE_PX = 160
AUDIO_RATE_HZ = 16_000
LONGEST_AUDIO_S = 6.0
LARGEST_MEDIUM_BYTES = 200_000
"""Larger ones, after re-encoding, are passed over: a page of 18 samples stays below some megabytes."""
ROWS_LOOKED_AT = 50_000
"""Rows of a source's indices that samples are drawn from, from its first shard on."""
TEST_SPLIT = "test"
_COLUMNS = (
    *("key", "corpus", "labels", "json_offset", "json_size"),
    *("part_modality", "part_offset", "part_size", "part_samples", "part_rate", "part_xxh3"),
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A document's first medium of one modality. group: samples are dealt evenly over groups; order: within one."""

    modality: str
    tar: Path
    row: dict[str, Any]
    labels: dict[str, Any]
    part: int
    held_out: bool
    group: tuple[str, ...]
    order: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class ChosenSample:
    """A document to caption. content: the medium as stored; shown, mime: re-encoded for the page; truth: its text."""

    key: str
    modality: str
    content: bytes
    shown: bytes
    mime: str
    truth: str
    about: str
    held_out: bool


def choose_samples(
    sources: Sequence[SourceConfig], counts: dict[str, int], *, locate: Callable[[str], Path] = Path
) -> list[ChosenSample]:
    """Return up to counts[modality] samples of each modality from the shards of a run's sources.

    locate: where a path of the config is now.

    The same shards give the same samples. Raises DataError where a shard folder is missing or damaged.
    """
    found: dict[str, list[Candidate]] = defaultdict(list)
    for source in sources:
        for candidate in _candidates(source, locate(source.shards), counts):
            found[candidate.modality].append(candidate)
    chosen: list[ChosenSample] = []
    for modality, count in counts.items():
        own = found[modality]
        held_out = [candidate for candidate in own if candidate.held_out]
        chosen += _read_first(_dealt(held_out or own), count)
    return chosen


def _candidates(source: SourceConfig, shards: Path, counts: dict[str, int]) -> Iterable[Candidate]:
    manifest = Manifest.load(shards)
    looked_at = 0
    for number in range(len(manifest.shards)):
        if looked_at >= ROWS_LOOKED_AT:
            return
        rows = read_index(manifest, number, _COLUMNS).to_pylist()
        looked_at += len(rows)
        for row in rows:
            modalities = row["part_modality"]
            if "text" not in modalities:
                continue
            for modality in counts:
                if modality in modalities:
                    part = modalities.index(modality)
                    if _fits(row, part):
                        yield _candidate(source, manifest.tar_path(number), row, modality, part)


def _candidate(source: SourceConfig, tar: Path, row: dict[str, Any], modality: str, part: int) -> Candidate:
    labels = json.loads(row["labels"] or "{}")
    kinds = len(set(row["part_modality"]))
    foreign = labels.get("language") not in (None, "en")  # the page is in English; most readers read that
    spread = labels.get("category") if modality == "image" else labels.get("kind")
    return Candidate(
        modality=modality,
        tar=tar,
        row=row,
        labels=labels,
        part=part,
        held_out=_is_held_out(source, labels),
        group=(str(row["corpus"]), str(spread)),
        order=(foreign, kinds, xxhash.xxh3_64_intdigest(f"report {row['key']}".encode())),
    )


def _is_held_out(source: SourceConfig, labels: dict[str, Any]) -> bool:
    """Return whether the run's own config keeps a document with these labels out of its training."""
    if source.fold is not None:
        fold, folds = source.fold
        return "group" in labels and fold_of(str(labels["group"]), folds) == fold
    return source.split == "train" and labels.get("split") == TEST_SPLIT


def _fits(row: dict[str, Any], part: int) -> bool:
    rate = row["part_rate"][part]
    return not rate or row["part_samples"][part] / rate <= LONGEST_AUDIO_S


def _dealt(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates group by group in turn; a medium that several documents share comes once."""
    groups: dict[tuple[str, ...], list[Candidate]] = defaultdict(list)
    seen = set()
    for candidate in sorted(candidates, key=lambda item: item.order):
        medium = candidate.row["part_xxh3"][candidate.part]
        if medium not in seen:
            seen.add(medium)
            groups[candidate.group].append(candidate)
    turns = [(turn, group) for group in sorted(groups) for turn in range(len(groups[group]))]
    return [groups[group][turn] for turn, group in sorted(turns)]


def _read_first(candidates: Iterable[Candidate], count: int) -> list[ChosenSample]:
    chosen: list[ChosenSample] = []
    for candidate in candidates:
        if len(chosen) == count:
            break
        if (sample := _read(candidate)) is not None:
            chosen.append(sample)
    return chosen


def _read(candidate: Candidate) -> ChosenSample | None:
    """Return the sample, None where its bytes are damaged or too large to show."""
    row, part = candidate.row, candidate.part
    try:
        document = document_from_json(bytes(read_range(candidate.tar, row["json_offset"], row["json_size"])))
        content = bytes(read_range(candidate.tar, row["part_offset"][part], row["part_size"][part]))
    except OSError as error:
        raise DataError(f"{candidate.tar}: cannot be read ({error})") from None
    if xxhash.xxh3_64_intdigest(content) != row["part_xxh3"][part]:
        return None
    try:
        if candidate.modality == "image":
            shown, _, mime = images.reencode(content, IMAGE_SIDE_PX)
        else:
            shown, mime = audio.reencode_flac(content, AUDIO_RATE_HZ), "audio/flac"
    except MediaError:
        return None
    if len(shown) > LARGEST_MEDIUM_BYTES:
        return None
    texts = [item.text for item in document.parts if item.modality == "text" and hasattr(item, "text")]
    words = (candidate.labels.get(name) for name in ("category", "kind", "language"))
    return ChosenSample(
        key=row["key"],
        modality=candidate.modality,
        content=content,
        shown=shown,
        mime=mime,
        truth=readable(" ".join(texts)),
        about=readable(", ".join([str(row["corpus"]), *(str(word) for word in words if word)]), 120),
        held_out=candidate.held_out,
    )
