"""From planned pieces to their tokens and decoded media, or to the filler that stands in for a damaged sample."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from triweave.data_pipeline.batch import Label
from triweave.data_pipeline.media.geometry import MediaGeometry, MediaInfo
from triweave.data_pipeline.media.modalities import MODALITIES, Modality
from triweave.data_pipeline.splits import normalise_text
from triweave.data_pipeline.stream.catalog import ShardCatalog
from triweave.data_pipeline.stream.layout import PieceLayout, PiecePlan, Run, piece_layouts
from triweave.data_pipeline.stream.plan import Planner
from triweave.data_pipeline.stream.reader import CorruptSampleError, ShardReader

TEXT_ID = 0
"""Modality id of text."""
SampleBytes = dict[int, memoryview]
"""Number of a sample in its shard -> its verified bytes."""
Rooms = tuple[npt.NDArray[np.int32], list[npt.NDArray[Any]]]
"""Where a stretch of tokens goes: its tokens, and the [tokens, features] of each of its media."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FillerEvent:
    """A damaged sample and the row it left a filler in. offset: byte of its tar where the sample begins."""

    source: str
    shard: str
    key: str
    offset: int
    plan_row: int
    reason: str


class AloneSpan(NamedTuple):
    """What a one-span segment holds.

    item: number of its document's ALONE piece in its row. modality: modality id of its part, 0 text.
    content_key: equal for equal content: xxh3_64 of a medium's bytes, or of the normalised words of a text.
    group_key: xxh3_64 of the document's `labels.group`, 0 without one. Both are 0 in fillers.
    """

    item: int
    modality: int
    content_key: int
    group_key: int


class Piece(NamedTuple):
    """A piece ready to be packed; its media lie in the micro-batch's PieceBuffers.

    tokens: int32 [n], a view of them.
    runs: see PieceLayout.
    weight: 1, or 0 for a filler.
    alone: set where the piece is a one-span segment.
    labels: those of its document that `data.labels` names; none in a filler.
    source: number of its source in `data.sources`, in every segment of the plan.
    """

    tokens: npt.NDArray[np.int32]
    runs: list[Run]
    weight: float
    sample_id: str
    sample_hash: int
    alone: AloneSpan | None = None
    labels: dict[str, Label] = {}  # noqa: RUF012 - never changed
    source: int = 0


class Made(NamedTuple):
    """What a piece became: one Piece per layout. error: why they are fillers, None where they are not."""

    pieces: list[Piece]
    error: CorruptSampleError | None


class PieceBuffers:
    """What the pieces of a micro-batch become, in order of appearance.

    tokens: int32 [tokens of all pieces].
    media: modality id -> [tokens of it, features].

    Pieces are written in place, or copied in while they are in the processor's cache, which is cheaper than keeping
    hundreds of arrays and joining them at the end.
    """

    def __init__(self, layouts: Iterable[PieceLayout], geometry: MediaGeometry) -> None:
        """Make room for what `layouts` plan."""
        counts: Counter[int] = Counter()
        for layout in layouts:
            for kind, length, *_ in layout.runs:
                counts[kind] += length
        self.tokens = np.empty(counts.total(), np.int32)
        self.media: dict[int, npt.NDArray[Any]] = {
            modality.id: np.empty((counts[modality.id], modality.features(geometry)), modality.dtype)
            for modality in MODALITIES.values()
            if counts[modality.id]
        }
        self._by_kind = {TEXT_ID: self.tokens, **self.media}
        self._taken = dict.fromkeys(self._by_kind, 0)

    def rooms(self, layout: PieceLayout) -> Rooms:
        """Return where the next layout goes: its tokens, and the rows of each of its media."""
        return self._next(TEXT_ID, layout.tokens), [self._next(run[0], run[1]) for run in layout.runs if run[0]]

    def _next(self, kind: int, tokens: int) -> npt.NDArray[Any]:
        start = self._taken[kind]
        self._taken[kind] = end = start + tokens
        return self._by_kind[kind][start:end]


class _Draft:
    """A piece on its way: what it is made from, where it goes, and what was found.

    keys: content key of each layout that is a one-span segment. group: group key of the document.
    """

    __slots__ = ("catalog", "error", "group", "keys", "labels", "layouts", "piece", "rooms", "samples")

    def __init__(self, piece: PiecePlan, catalog: ShardCatalog, samples: SampleBytes | CorruptSampleError) -> None:
        self.piece = piece
        self.catalog = catalog
        self.layouts = piece_layouts(catalog, piece)
        self.error = samples if isinstance(samples, CorruptSampleError) else None
        self.samples: SampleBytes = {} if isinstance(samples, CorruptSampleError) else samples
        self.rooms: list[Rooms] = []
        self.labels: dict[str, Label] = {}
        self.keys = [0] * len(self.layouts)
        self.group = 0


class PieceMaker:
    """Reads and decodes pieces of the blocks of `planner`, which is exchanged where the next plan segment begins."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.reader = ShardReader()
        self.tokenise_s = 0.0
        """Time spent in the tokenizer so far."""
        self.modalities: dict[int, Modality] = {modality.id: modality for modality in MODALITIES.values()}

    def fetch(self, piece: PiecePlan) -> SampleBytes:
        """Return the verified bytes of the sample a piece is from, and of those its media were exchanged with.

        Raises CorruptSampleError.
        """
        catalog = self.planner.catalog(piece.source, piece.shard)
        sample = piece.sample
        own = self._read(catalog, sample)
        return {sample: own} if catalog.part_owners is None else self._partners(catalog, piece) | {sample: own}

    def ask(self, pieces: Iterable[PiecePlan]) -> None:
        """Send for the samples that `fetch` of these pieces reads, where they are in an object store."""
        ranges = []
        for piece in pieces:
            catalog = self.planner.catalog(piece.source, piece.shard)
            ranges.append((catalog.tar, catalog.offsets.item(piece.sample), catalog.sizes.item(piece.sample)))
        self.reader.ask(ranges)

    def _read(self, catalog: ShardCatalog, sample: int) -> memoryview:
        offset, size, xxh3 = catalog.offsets.item(sample), catalog.sizes.item(sample), catalog.hashes.item(sample)
        return self.reader.read(catalog.tar, offset, size, xxh3)

    def _partners(self, catalog: ShardCatalog, piece: PiecePlan) -> SampleBytes:
        """Return the samples that the exchanged media of a piece are in."""
        assert catalog.part_owners is not None
        places = [part.place for layout in piece_layouts(catalog, piece) for part in layout.parts if part.kind]
        samples: SampleBytes = {}
        for owner in sorted(set(catalog.part_owners[places].tolist())):
            try:
                samples[owner] = self._read(catalog, owner)
            except CorruptSampleError as error:
                raise CorruptSampleError(str(error), owner) from None
        return samples

    def decode(
        self, rows: Sequence[tuple[Sequence[PiecePlan], Sequence[SampleBytes | CorruptSampleError]]]
    ) -> tuple[list[list[Made]], dict[int, npt.NDArray[Any]]]:
        """Tokenise and decode rows of pieces with what `fetch` returned or raised of each.

        Return by row what each piece became, and the decoded media of all of them, as in PieceBuffers. In passes over
        all pieces, one for the text and one for each modality: decoding a medium drives other code out of the
        processor's caches, which costs more than running that code.
        """
        drafts = [
            [
                _Draft(piece, self.planner.catalog(piece.source, piece.shard), own)
                for piece, own in zip(*row, strict=True)
            ]
            for row in rows
        ]
        every = list(chain.from_iterable(drafts))
        layouts = chain.from_iterable(draft.layouts for draft in every)
        buffers = PieceBuffers(layouts, self.planner.config.geometry)
        for draft in every:
            draft.rooms = [buffers.rooms(layout) for layout in draft.layouts]
        passes: list[Callable[[_Draft], None]] = [self._write_text]
        passes += (partial(self._write_media, kind) for kind in self.modalities if kind in buffers.media)
        for write in passes:
            for draft in every:
                if draft.error is None:
                    try:
                        write(draft)
                    except Exception as error:
                        draft.error = _as_corrupt(error)
        return [[Made(self._pieces(draft), draft.error) for draft in row] for row in drafts], buffers.media

    def event(self, piece: PiecePlan, plan_row: int, error: CorruptSampleError) -> FillerEvent:
        """Describe a damaged piece."""
        catalog = self.planner.catalog(piece.source, piece.shard)
        sample = piece.sample if error.sample is None else error.sample
        return FillerEvent(
            source=self.planner.source_name(piece.source),
            shard=catalog.tar,
            key=catalog.key_list[sample],
            offset=int(catalog.offsets[sample]),
            plan_row=plan_row,
            reason=str(error),
        )

    def _pieces(self, draft: _Draft) -> list[Piece]:
        """Return what a draft became, or its stand-in: same layouts and payload shapes, zeros and pad ids, no loss."""
        piece, config = draft.piece, self.planner.config
        source = piece.source % len(config.sources)
        name = f"{config.sources[source].name}:{piece.epoch}:{draft.catalog.key_list[piece.sample]}"
        damaged = draft.error is not None
        made = []
        for number, (layout, (tokens, media)) in enumerate(zip(draft.layouts, draft.rooms, strict=True)):
            alone = None
            if damaged:
                tokens[...] = self.planner.tokenizer.pad_id
                self._mark(layout, tokens)
                for values in media:
                    values[...] = 0
            if layout.alone:
                keys = (0, 0) if damaged else (draft.keys[number], draft.group)
                alone = AloneSpan(piece.item, layout.parts[0].kind, *keys)
            ending = (":alone" if layout.alone else "") + (":filler" if damaged else "")
            made.append(
                Piece(
                    tokens,
                    layout.runs,
                    0.0 if damaged else 1.0,
                    f"{name}:{layout.first}:{layout.end}{ending}",
                    xxhash.xxh3_64_intdigest(tokens.data),
                    alone,
                    {} if damaged else draft.labels,
                    source,
                )
            )
        return made

    def _mark(self, layout: PieceLayout, tokens: npt.NDArray[np.int32]) -> None:
        """Write the tokens of a stretch that metadata alone determines: all but those of its text."""
        tokenizer = self.planner.tokenizer
        for _, _, kind, _, end, at in layout.parts:
            if kind:
                markers = tokenizer.media[self.modalities[kind].name]
                tokens[at] = markers.start_id
                tokens[at + 1 : at + 1 + end] = markers.placeholder_id
        if layout.has_bos:
            tokens[0] = tokenizer.bos_id
        if layout.has_eos:
            tokens[-1] = tokenizer.eos_id

    def _write_text(self, draft: _Draft) -> None:
        """Parse a draft's document, write all of its tokens and take what else it says."""
        catalog, sample = draft.catalog, draft.piece.sample
        start = catalog.json_offsets.item(sample) - catalog.offsets.item(sample)
        document = orjson.loads(draft.samples[sample][start : start + catalog.json_sizes.item(sample)])
        draft.labels = chosen_labels(document["labels"], self.planner.config.labels)
        if any(layout.alone for layout in draft.layouts):
            draft.group = _group_key(document)
        for number, (layout, (tokens, _)) in enumerate(zip(draft.layouts, draft.rooms, strict=True)):
            self._mark(layout, tokens)
            for part, place, kind, first, end, at in layout.parts:
                if kind:
                    continue
                text = document["parts"][part]["text"]
                began = time.perf_counter()
                encoded = self.planner.tokenizer.encode(text)
                self.tokenise_s += time.perf_counter() - began
                if len(encoded) != catalog.part_tokens.item(place):
                    raise CorruptSampleError("its text has another number of tokens than the sidecar says")
                tokens[at : at + end - first] = encoded[first:end]
                if layout.alone:
                    draft.keys[number] = text_key(text)

    def _write_media(self, modality: int, draft: _Draft) -> None:
        """Decode the media of one modality of a draft."""
        for number, (layout, (_, rooms)) in enumerate(zip(draft.layouts, draft.rooms, strict=True)):
            media = (part for part in layout.parts if part.kind)
            for part, room in zip(media, rooms, strict=True):
                if part.kind == modality:
                    medium = self._decoded(draft, part.place, room)
                    if layout.alone:
                        draft.keys[number] = xxhash.xxh3_64_intdigest(medium)

    def _decoded(self, draft: _Draft, place: int, out: npt.NDArray[Any]) -> bytes:
        """Decode a media part into `out` and return its encoded bytes.

        Raises CorruptSampleError with the sample its bytes are from.
        """
        catalog = draft.catalog
        modality = self.modalities[catalog.part_kinds.item(place)]
        owner = draft.piece.sample if catalog.part_owners is None else catalog.part_owners.item(place)
        start = catalog.part_offsets.item(place) - catalog.offsets.item(owner)
        medium = bytes(draft.samples[owner][start : start + catalog.part_sizes.item(place)])
        info = MediaInfo._make(catalog.part_infos[place].tolist())
        try:
            if modality.decode_into is not None:
                modality.decode_into(medium, info, self.planner.config.geometry, out)
                return medium
            values = modality.decode(medium, info, self.planner.config.geometry)
        except Exception as error:
            raise _as_corrupt(error, owner) from error
        if len(values) != len(out):
            raise CorruptSampleError(f"its {modality.name} decodes to {len(values)} tokens, planned {len(out)}", owner)
        out[...] = values
        return medium


def chosen_labels(labels: dict[str, Any], names: Sequence[str]) -> dict[str, Label]:
    """Return the labels `names` of a document, those it has as a text, a number or a truth value.

    >>> chosen_labels({"category": "animals", "stars": 4, "tags": ["a"]}, ["category", "tags", "author"])
    {'category': 'animals'}
    """
    return {name: value for name in names if isinstance(value := labels.get(name), str | int | float)}


def text_key(text: str) -> int:
    """Return the content key of a text: equal for equal words, whatever their case and punctuation."""
    return xxhash.xxh3_64_intdigest(normalise_text(text).encode("utf-8", "surrogatepass"))


def _as_corrupt(error: Exception, sample: int | None = None) -> CorruptSampleError:
    """Return what makes a filler of a sample that cannot be decoded.

    Codecs raise what they like on hostile bytes; every such sample must become a filler, and a bug in decoding shows as
    the reason in the corruption budget's error.
    """
    if isinstance(error, CorruptSampleError):
        return error
    return CorruptSampleError(f"{type(error).__name__}: {' '.join(str(error).split())}", sample)


def _group_key(document: dict[str, Any]) -> int:
    group = document["labels"].get("group")
    return xxhash.xxh3_64_intdigest(group.encode("utf-8", "surrogatepass")) if isinstance(group, str) else 0
