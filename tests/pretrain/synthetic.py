"""Synthetic PackedBatch objects straight from numpy: random interleaved documents, deterministic by seed.

Loaded by path (`tests` is no package): from conftest.py as the fixture `make_batch`, from spawned rank processes with
`importlib.util.spec_from_file_location`. The layout is the one every producer follows:

    [bos] then per part: text tokens | start marker + t*h*w placeholders (one bidirectional span); [eos]

A document that is `alone` becomes one-span segments, one for each of its parts, each `[bos] part [eos]`: all positions
see the whole segment, nothing is supervised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.batch import PADDING_ID, TEXT_ID, PackedBatch, Payload, Segments

VOCAB_SIZE = 64
PAD, BOS, EOS = 0, 1, 2
FIRST_TEXT_TOKEN = 16
MODALITY_IDS = {"image": 1, "audio": 2, "sensor": 3}
FEATURES = {"image": 12, "audio": 10}
"""Numbers per media token; pass `features={"image": 12, "audio": 12}` for towers of equal size."""


@dataclass(frozen=True, kw_only=True)
class Media:
    """One media item: its token grid and its features, [t * h * w, features]."""

    modality: str
    grid: tuple[int, int, int]
    values: npt.NDArray[np.generic]


Part = list[int] | Media


@dataclass(frozen=True, kw_only=True)
class Document:
    """Parts in order; weight is the loss weight of its targets (0 as in a filler).

    alone: its parts are one-span segments. group_key: of all its segments. content_keys: of its parts, None: hashes.
    labels: of the document.
    """

    parts: list[Part]
    weight: float = 1.0
    alone: bool = False
    group_key: int = 0
    content_keys: list[int] | None = None
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of the document in a pack."""
        ends = 2 * (len(self.parts) if self.alone else 1)
        return ends + sum(len(part) if isinstance(part, list) else 1 + int(np.prod(part.grid)) for part in self.parts)


@dataclass
class _Row:
    """One pack being filled."""

    tokens: list[int] = field(default_factory=list)
    modality: list[int] = field(default_factory=list)
    document: list[int] = field(default_factory=list)
    span: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    kv: list[tuple[int, int]] = field(default_factory=list)
    media: list[tuple[int, int]] = field(default_factory=list)
    spans: list[tuple[Media, int]] = field(default_factory=list)
    supervised: list[tuple[int, int, float, int]] = field(default_factory=list)
    segments: list[dict[str, Any]] = field(default_factory=list)
    alone: set[int] = field(default_factory=set)
    labels: list[dict[str, Any]] = field(default_factory=list)


def random_document(
    generator: np.random.Generator, modalities: Sequence[str], features: dict[str, int], *, text_tokens: int = 6
) -> Document:
    """Return text, then for each modality in the given order one media item followed by text."""
    parts: list[Part] = [_text(generator, text_tokens)]
    for name in modalities:
        parts += [random_media(generator, name, features[name]), _text(generator, text_tokens)]
    return Document(parts=parts)


def random_media(generator: np.random.Generator, modality: str, features: int) -> Media:
    """Return an item of 2 to 6 tokens: uint8 for images, float32 otherwise."""
    high, wide = (int(side) for side in generator.integers(1, 3, 2))
    grid = (1, high, wide + 1) if modality == "image" else (int(generator.integers(2, 7)), 1, 1)
    shape = (int(np.prod(grid)), features)
    if modality == "image":
        return Media(modality=modality, grid=grid, values=generator.integers(0, 256, shape).astype(np.uint8))
    return Media(modality=modality, grid=grid, values=generator.normal(size=shape).astype(np.float32))


def make_rows(
    rows: Sequence[Sequence[str] | None], *, length: int, seed: int, features: dict[str, int]
) -> list[list[Document]]:
    """Return documents per row that fit `length` tokens; every modality named for a row is in its first document."""
    generator = np.random.default_rng(seed)
    packs: list[list[Document]] = []
    for modalities in rows:
        documents: list[Document] = []
        if modalities is not None:
            space = length
            chosen = list(modalities)
            document = random_document(generator, chosen, features)
            if document.length > length:
                raise ValueError(f"length {length} is too short for {chosen}: {document.length} tokens")
            while document.length <= space:
                documents.append(document)
                space -= document.length
                chosen = [name for name in modalities if generator.random() < 0.5]
                document = random_document(generator, chosen, features, text_tokens=int(generator.integers(2, 7)))
        packs.append(documents)
    return packs


def make_batch(
    rows: Sequence[Sequence[str] | None] = (("image", "audio"), ("image", "audio")),
    *,
    length: int = 64,
    seed: int = 0,
    features: dict[str, int] = FEATURES,
    first_plan_row: int = 0,
) -> PackedBatch:
    """Return a micro-batch: per row the modalities its documents may hold (empty: text only), None a zero-loss row."""
    return pack(make_rows(rows, length=length, seed=seed, features=features), length, first_plan_row=first_plan_row)


def pack(
    rows: Sequence[Sequence[Document]], length: int, *, first_plan_row: int = 0, group_rows: int = 64
) -> PackedBatch:
    """Lay documents out, row by row; a row without documents is a zero-loss row."""
    packs = [_fill(documents) for documents in rows]
    B, T = len(packs), max((len(row.media) for row in packs), default=0)
    tokens = np.full((B, length), PAD, np.int32)
    modality_ids = np.full((B, length), PADDING_ID, np.int8)
    document_ids, span_ids = np.full((B, length), -1, np.int32), np.full((B, length), -1, np.int32)
    positions = np.zeros((B, length, 3), np.int32)
    kv = np.zeros((B, length, 2), np.int32)
    media_bounds = np.zeros((B, length, 2), np.int32)
    media_index = np.full((B, T), -1, np.int64)
    key_modality = np.full((B, T), PADDING_ID, np.int8)
    for number, row in enumerate(packs):
        filled = len(row.tokens)
        tokens[number, :filled] = row.tokens
        modality_ids[number, :filled] = row.modality
        document_ids[number, :filled] = row.document
        span_ids[number, :filled] = row.span
        if filled:
            positions[number, :filled], kv[number, :filled] = row.positions, row.kv
        for axis, (where, modality) in enumerate(row.media):
            media_index[number, axis], key_modality[number, axis] = where, modality
        media_bounds[number, :filled] = _media_bounds(row)
    supervised = [(number * length + i, *rest) for number, row in enumerate(packs) for i, *rest in row.supervised]
    return PackedBatch(
        tokens=tokens,
        modality_ids=modality_ids,
        document_ids=document_ids,
        span_ids=span_ids,
        positions=positions,
        kv_lo=np.ascontiguousarray(kv[..., 0]),
        kv_hi=np.ascontiguousarray(kv[..., 1]),
        media_index=media_index,
        media_lo=np.ascontiguousarray(media_bounds[..., 0]),
        media_hi=np.ascontiguousarray(media_bounds[..., 1]),
        key_modality=key_modality,
        row_index=np.array([entry[0] for entry in supervised], np.int64),
        targets=np.array([entry[1] for entry in supervised], np.int64),
        row_weight=np.array([entry[2] for entry in supervised], np.float32),
        row_modality=np.array([entry[3] for entry in supervised], np.int8),
        row_source=np.zeros(len(supervised), np.int16),
        contrastive_group=np.array(
            [(first_plan_row + number) // group_rows if row.tokens else -1 for number, row in enumerate(packs)],
            np.int32,
        ),
        payloads=_payloads(packs, length),
        planned_tokens=_counts(packs),
        actual_tokens=_counts(packs),
        plan_rows=np.array([first_plan_row + number if row.tokens else -1 for number, row in enumerate(packs)]),
        sample_ids=[
            [
                f"synthetic:{number}-{document}:0:{1 + max(row.document.count(document) - 1, 0)}"
                + ":alone" * (document in row.alone)
                for document in range(max(row.document, default=-1) + 1)
            ]
            for number, row in enumerate(packs)
        ],
        sample_hashes=[list(range(max(row.document, default=-1) + 1)) for row in packs],
        segments=_segments(packs, length),
        labels=[row.labels for row in packs],
    )


def alone(document: Document) -> PackedBatch:
    """Return the document in a pack of its own, without padding."""
    return pack([[document]], document.length)


def changed(document: Document, part: int) -> Document:
    """Return the document with every token or feature of one part replaced."""
    parts = list(document.parts)
    old = parts[part]
    if isinstance(old, Media):
        parts[part] = Media(modality=old.modality, grid=old.grid, values=old.values[::-1] // 2 + 3)
    else:
        span = VOCAB_SIZE - FIRST_TEXT_TOKEN
        parts[part] = [FIRST_TEXT_TOKEN + (token - FIRST_TEXT_TOKEN + 5) % span for token in old]
    return Document(parts=parts)


def with_weight(documents: Sequence[Document], weight: float) -> list[Document]:
    """Return the documents with another loss weight."""
    return [replace(document, weight=weight) for document in documents]


def _text(generator: np.random.Generator, count: int) -> list[int]:
    return [int(token) for token in generator.integers(FIRST_TEXT_TOKEN, VOCAB_SIZE, count)]


def _fill(documents: Sequence[Document]) -> _Row:
    row = _Row()
    for item, document in enumerate(documents):
        if document.alone:
            _add_segments(row, document, item)
            continue
        number = max(row.document, default=-1) + 1
        row.labels.append(document.labels)
        start, clock, latest = len(row.tokens), 0, TEXT_ID
        parts: list[Part] = [[BOS], *document.parts, [EOS]]
        for part in parts:
            for token in part if isinstance(part, list) else [2 * MODALITY_IDS[part.modality] + 1]:
                if len(row.tokens) > start:
                    row.supervised.append((len(row.tokens) - 1, token, document.weight, latest))
                row.kv.append((start, len(row.tokens) + 1))
                row.positions.append((clock, clock, clock))
                _append(row, token, TEXT_ID, number, -1)
                clock += 1
            if not isinstance(part, list):
                latest = MODALITY_IDS[part.modality]
                clock = _add_media(row, part, number, start, clock)
    return row


def _add_segments(row: _Row, document: Document, item: int) -> None:
    keys = document.content_keys or [_content_key(part) for part in document.parts]
    for part, key in zip(document.parts, keys, strict=True):
        number, start = max(row.document, default=-1) + 1, len(row.tokens)
        shown: list[Part] = [[BOS], part, [EOS]]
        row.alone.add(number)
        row.labels.append(document.labels)
        clock = 0
        for piece in shown:
            for token in piece if isinstance(piece, list) else [2 * MODALITY_IDS[piece.modality] + 1]:
                row.positions.append((clock, clock, clock))
                row.kv.append((start, start))
                _append(row, token, TEXT_ID, number, -1)
                clock += 1
            if not isinstance(piece, list):
                clock = _add_media(row, piece, number, start, clock)
        row.kv[start:] = [(start, len(row.tokens))] * (len(row.tokens) - start)
        row.segments.append({
            "first": start, "length": len(row.tokens) - start, "item": item, "content_key": key,
            "modality": TEXT_ID if isinstance(part, list) else MODALITY_IDS[part.modality],
            "group_key": document.group_key, "weight": document.weight,
        })  # fmt: skip


def _content_key(part: Part) -> int:
    content = repr(part).encode() if isinstance(part, list) else part.values.tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _segments(packs: Sequence[_Row], length: int) -> Segments:
    found = sorted(
        ((number, segment) for number, row in enumerate(packs) for segment in row.segments),
        key=lambda entry: (entry[0], entry[1]["item"], entry[1]["modality"]),
    )

    def column(name: str, dtype: Any) -> npt.NDArray[Any]:
        return np.array([segment[name] for _, segment in found], dtype)

    rows = np.array([number for number, _ in found], np.int32)
    return Segments(
        first=rows.astype(np.int64) * length + column("first", np.int64),
        lengths=column("length", np.int32),
        modality=column("modality", np.int8),
        rows=rows,
        items=column("item", np.int32),
        content_keys=column("content_key", np.uint64),
        group_keys=column("group_key", np.uint64),
        weights=column("weight", np.float32),
    )


def _add_media(row: _Row, media: Media, document: int, start: int, clock: int) -> int:
    modality, first, count = MODALITY_IDS[media.modality], len(row.tokens), int(np.prod(media.grid))
    span = len(row.spans)
    row.spans.append((media, first))
    for t, h, w in np.ndindex(media.grid):
        row.positions.append(
            (clock + t, clock + h, clock + w) if media.modality == "image" else (clock + t, clock, clock)
        )
        row.kv.append((start, first + count))
        row.media.append((len(row.tokens), modality))
        _append(row, 2 * modality + 2, modality, document, span)
    return 1 + max(max(position) for position in row.positions[first:])


def _append(row: _Row, token: int, modality: int, document: int, span: int) -> None:
    row.tokens.append(token)
    row.modality.append(modality)
    row.document.append(document)
    row.span.append(span)


def _media_bounds(row: _Row) -> npt.NDArray[np.int32]:
    """Return [tokens, 2] on the media axis: the document's media tokens before a query, a media query's own span."""
    bounds = np.zeros((len(row.tokens), 2), np.int32)
    for query, (document, span) in enumerate(zip(row.document, row.span, strict=True)):
        keys = [
            axis
            for axis, (where, _) in enumerate(row.media)
            if (
                row.span[where] == span
                if span >= 0
                else row.document[where] == document and (where < query or document in row.alone)
            )
        ]
        if keys:
            bounds[query] = keys[0], keys[-1] + 1
    return bounds


def _payloads(packs: Sequence[_Row], length: int) -> dict[str, Payload]:
    payloads = {}
    for name in MODALITY_IDS:
        items = [(number, *span) for number, row in enumerate(packs) for span in row.spans if span[0].modality == name]
        if items:
            counts = [len(media.values) for _, media, _ in items]
            payloads[name] = Payload(
                values=np.concatenate([media.values for _, media, _ in items]),
                lengths=np.array(counts, np.int32),
                grids=np.array([media.grid for _, media, _ in items], np.int32),
                token_index=np.concatenate(
                    [number * length + first + np.arange(len(media.values)) for number, media, first in items]
                ).astype(np.int64),
                item_rows=np.array([number for number, _, _ in items], np.int32),
            )
    return payloads


def _counts(packs: Sequence[_Row]) -> dict[str, int]:
    names = {TEXT_ID: "text", **{number: name for name, number in MODALITY_IDS.items()}}
    present = [modality for row in packs for modality in row.modality]
    return {names[modality]: present.count(modality) for modality in sorted(set(present))}
