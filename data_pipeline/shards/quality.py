"""What the documents of finished shards are like: figures of texts, pictures and clips, and how evenly they are spread.

Figures come from documents drawn by the hash of their keys, the same ones at every call; those that need pixels or
samples from fewer still, because they decode.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import xxhash

from triweave.data_pipeline.errors import MediaError
from triweave.data_pipeline.filters import media_rules
from triweave.data_pipeline.filters.figures import audio_figures, image_figures, text_figures
from triweave.data_pipeline.shards.index import IndexRow, read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.schema import Document, MediaPart
from triweave.data_pipeline.shards.stored_documents import stored_document
from triweave.data_pipeline.stream.reader import CorruptSampleError, ShardReader

DOCUMENTS = 20_000
MEDIA_DOCUMENTS = 1_000
UNKNOWN = "(not stated)"
_KEY_BITS = 64
_ALWAYS = ("min_words", "min_words_per_image")
_ALWAYS_DECODED = ("image_min_sharpness", "audio_max_silence_share", "audio_max_clipped_share")
_ALIASES = {
    "max_words": "min_words",
    "max_words_per_image": "min_words_per_image",
    "max_mean_word_letters": "min_mean_word_letters",
    "audio_max_ms": "audio_min_ms",
}
"""Rule -> the rule that compares the same figure."""


@dataclass(kw_only=True)
class ShardQuality:
    """What was looked at and found.

    documents: documents read; decoded: those whose media were decoded; damaged: samples or media that could not be.
    figures: name of a rule (`filters.options`, the lower one of a pair), or of `width_px`, `height_px` and `level_db`
        -> one value for each document, picture or clip.
    origins: `licence` and `site` (host of the document's URL) -> value -> documents.
    thresholds: rule -> threshold that the build asked for.
    """

    documents: int = 0
    decoded: int = 0
    damaged: int = 0
    figures: dict[str, list[float]] = field(default_factory=dict)
    origins: dict[str, Counter[str]] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)

    def limits(self, figure: str) -> dict[str, float]:
        """Return the thresholds that a figure was compared with."""
        return {rule: limit for rule, limit in self.thresholds.items() if _ALIASES.get(rule, rule) == figure}


def effective_number(counts: Mapping[str, int]) -> float:
    """Return exp(-sum(p ln p)) of the shares p: how many equally frequent values would be as even; 0 for none.

    Hill's number of order 1 (Hill 1973).
    """
    total = sum(counts.values())
    shares = [count / total for count in counts.values() if count]
    return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0


def shard_quality(
    folder: Path,
    *,
    documents: int = DOCUMENTS,
    media_documents: int = MEDIA_DOCUMENTS,
    on_progress: Callable[[int], None] | None = None,
) -> ShardQuality:
    """Look at about `documents` documents of a finished shard folder and decode the media of `media_documents`.

    on_progress is called with the number of index rows that were passed. Memory: one sample, the index of one shard and
    a few hundred bytes a document. Raises DataError.
    """
    manifest = Manifest.load(folder)
    asked = manifest.build.get("filters", {})
    quality = ShardQuality(thresholds={name: value for name, value in asked.items() if _is_number(value)})
    wanted = {*_ALWAYS, *(_ALIASES.get(name, name) for name in quality.thresholds)}
    shares = [most / max(1, manifest.samples) for most in (documents, media_documents)]
    for row, document in _drawn(manifest, shares[0], quality, on_progress):
        quality.documents += 1
        _count_origin(quality, document)
        _measure_text(quality, document, wanted)
        decode = _place(row.key) < shares[1]
        quality.decoded += decode
        for part in document.parts:
            if isinstance(part, MediaPart):
                _measure_medium(quality, part, wanted, decode=decode)
    return quality


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _place(key: str) -> float:
    """Return a number in [0, 1) that depends on the key alone."""
    return xxhash.xxh3_64_intdigest(key.encode(), 1) / 2**_KEY_BITS


def _drawn(
    manifest: Manifest, share: float, quality: ShardQuality, on_progress: Callable[[int], None] | None
) -> Iterator[tuple[IndexRow, Document]]:
    reader = ShardReader()
    for number in range(len(manifest.shards)):
        index = read_index(manifest, number)
        for position, key in enumerate(index["key"].to_pylist()):
            if _place(key) >= share:
                continue
            row = IndexRow(**index.slice(position, 1).to_pylist()[0])
            try:
                sample = reader.read(str(manifest.tar_path(number)), row.offset, row.size, row.xxh3)
            except CorruptSampleError:
                quality.damaged += 1
                continue
            yield row, stored_document(sample, row)
        if on_progress is not None:
            on_progress(len(index))


def _count_origin(quality: ShardQuality, document: Document) -> None:
    site = urlsplit(str(document.source.get("url") or "")).hostname
    for name, value in (("licence", document.source.get("license")), ("site", site)):
        quality.origins.setdefault(name, Counter())[str(value or UNKNOWN)] += 1


def _measure_text(quality: ShardQuality, document: Document, wanted: set[str]) -> None:
    figures = text_figures(document)
    for name in wanted & figures.keys():
        _add(quality, name, figures[name]())


def _measure_medium(quality: ShardQuality, part: MediaPart, wanted: set[str], *, decode: bool) -> None:
    assert part.data is not None
    names: set[str] = wanted | ({*_ALWAYS_DECODED} if decode else set())
    figures = {}
    if part.modality == "image":
        figures = image_figures(part)
        names |= {"image_min_side_px", "image_max_aspect"}
        _add(quality, "width_px", part.info.width)
        _add(quality, "height_px", part.info.height)
    elif part.modality == "audio":
        figures = audio_figures(part)
        names |= {"audio_min_ms"}
    if not decode:
        names -= {*_ALWAYS_DECODED}
    try:
        values = {name: figures[name]() for name in names & figures.keys()}
        if part.modality == "audio" and decode:
            values["level_db"] = media_rules.level_db(part.data, part.info)
    except MediaError:
        quality.damaged += 1
        return
    for name, value in values.items():
        _add(quality, name, value)


def _add(quality: ShardQuality, name: str, value: float) -> None:
    quality.figures.setdefault(name, []).append(float(value))
