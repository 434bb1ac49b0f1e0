"""From planned pieces to their tokens and decoded media, or to the filler that stands in for a damaged sample."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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

SampleBytes = dict[int, memoryview]
"""Number of a sample in its shard -> its verified bytes."""


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
    """A piece ready to be packed; its media lie in the micro-batch's MediaBuffers.

    tokens: int32 [n].
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


class MediaBuffers:
    """The decoded media of a micro-batch: modality id -> [tokens, features], filled in order of appearance.

    Items are decoded in place, or copied in while they are in the processor's cache, which is cheaper than keeping
    hundreds of them and joining them at the end.
    """

    def __init__(self, layouts: Iterable[PieceLayout], geometry: MediaGeometry) -> None:
        """Make room for what `layouts` plan."""
        counts: Counter[int] = Counter()
        for layout in layouts:
            for kind, length, *_ in layout.runs:
                counts[kind] += length
        self.values: dict[int, npt.NDArray[Any]] = {
            modality.id: np.empty((counts[modality.id], modality.features(geometry)), modality.dtype)
            for modality in MODALITIES.values()
            if counts[modality.id]
        }
        self.filled = dict.fromkeys(self.values, 0)

    def add(self, kind: int, tokens: int) -> npt.NDArray[Any]:
        """Append an item and return its [tokens, features], which the caller fills."""
        start = self.filled[kind]
        self.filled[kind] = start + tokens
        return self.values[kind][start : start + tokens]

    def add_zeros(self, kind: int, tokens: int) -> None:
        """Append an item of zeros."""
        self.add(kind, tokens)[...] = 0


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
        own = self.reader.read(
            catalog.tar, catalog.offsets.item(sample), catalog.sizes.item(sample), catalog.hashes.item(sample)
        )
        return {sample: own} if catalog.part_owners is None else self._partners(catalog, piece) | {sample: own}

    def ask(self, pieces: Iterable[PiecePlan]) -> None:
        """Send for the samples that `fetch` of these pieces reads, where they are in an object store."""
        ranges = []
        for piece in pieces:
            catalog = self.planner.catalog(piece.source, piece.shard)
            ranges.append((catalog.tar, catalog.offsets.item(piece.sample), catalog.sizes.item(piece.sample)))
        self.reader.ask(ranges)

    def _partners(self, catalog: ShardCatalog, piece: PiecePlan) -> SampleBytes:
        """Return the samples that the exchanged media of a piece are in."""
        assert catalog.part_owners is not None
        places = [part.place for layout in piece_layouts(catalog, piece) for part in layout.parts if part.kind]
        samples: SampleBytes = {}
        for owner in sorted(set(catalog.part_owners[places].tolist())):
            try:
                samples[owner] = self.reader.read(
                    catalog.tar, catalog.offsets.item(owner), catalog.sizes.item(owner), catalog.hashes.item(owner)
                )
            except CorruptSampleError as error:
                raise CorruptSampleError(str(error), owner) from None
        return samples

    def layouts(self, piece: PiecePlan) -> list[PieceLayout]:
        """Return the layouts of a piece, one for each of the Pieces it becomes."""
        return piece_layouts(self.planner.catalog(piece.source, piece.shard), piece)

    def decode(
        self, piece: PiecePlan, layouts: list[PieceLayout], samples: SampleBytes, buffers: MediaBuffers
    ) -> list[Piece]:
        """Tokenise and decode a piece, its media into `buffers`: one Piece per layout.

        Raises CorruptSampleError, with `buffers` as before, where the result is not what the plan counted.
        """
        before = dict(buffers.filled)
        try:
            document = self._document(piece, samples)
            return [self._filled(piece, layout, document, samples, buffers) for layout in layouts]
        except Exception as error:
            buffers.filled = before
            raise _as_corrupt(error) from error

    def filler(self, piece: PiecePlan, layouts: list[PieceLayout], buffers: MediaBuffers) -> list[Piece]:
        """Return the stand-in of a damaged piece: same layouts and payload shapes, zeros, no loss."""
        for layout in layouts:
            for kind, length, *_ in layout.runs:
                if kind:
                    buffers.add_zeros(kind, length)
        kinds = [layout.parts[0].kind if layout.alone else 0 for layout in layouts]
        return [
            self._piece(piece, layout, self._skeleton(layout), (kind, 0, 0), weight=0.0)
            for layout, kind in zip(layouts, kinds, strict=True)
        ]

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

    def _piece(
        self,
        piece: PiecePlan,
        layout: PieceLayout,
        tokens: npt.NDArray[np.int32],
        content: tuple[int, int, int],
        *,
        weight: float,
        labels: dict[str, Label] | None = None,
    ) -> Piece:
        """Return a stretch of tokens as a Piece; content: modality, content key and group key of its segment."""
        key = self.planner.catalog(piece.source, piece.shard).key_list[piece.sample]
        name = self.planner.source_name(piece.source)
        ending = (":alone" if layout.alone else "") + ("" if weight else ":filler")
        return Piece(
            tokens=tokens,
            runs=layout.runs,
            weight=weight,
            sample_id=f"{name}:{piece.epoch}:{key}:{layout.first}:{layout.end}{ending}",
            sample_hash=xxhash.xxh3_64_intdigest(tokens.data),
            alone=AloneSpan(piece.item, *content) if layout.alone else None,
            labels=labels or {},
            source=piece.source % len(self.planner.config.sources),
        )

    def _skeleton(self, layout: PieceLayout) -> npt.NDArray[np.int32]:
        """Return the tokens that metadata alone determines, pad ids where text goes, int32 [layout.tokens]."""
        tokenizer = self.planner.tokenizer
        tokens = np.full(layout.tokens, tokenizer.pad_id, np.int32)
        for _, _, kind, _, end, at in layout.parts:
            if kind:
                markers = tokenizer.media[self.modalities[kind].name]
                tokens[at] = markers.start_id
                tokens[at + 1 : at + 1 + end] = markers.placeholder_id
        if layout.has_bos:
            tokens[0] = tokenizer.bos_id
        if layout.has_eos:
            tokens[-1] = tokenizer.eos_id
        return tokens

    def _document(self, piece: PiecePlan, samples: SampleBytes) -> dict[str, Any]:
        """Return the JSON of a piece's document."""
        catalog = self.planner.catalog(piece.source, piece.shard)
        start = catalog.json_offsets.item(piece.sample) - catalog.offsets.item(piece.sample)
        end = start + catalog.json_sizes.item(piece.sample)
        document: dict[str, Any] = orjson.loads(samples[piece.sample][start:end])
        return document

    def _filled(
        self,
        piece: PiecePlan,
        layout: PieceLayout,
        document: dict[str, Any],
        samples: SampleBytes,
        buffers: MediaBuffers,
    ) -> Piece:
        """Return a stretch of tokens with its text, its media in `buffers`."""
        tokenizer = self.planner.tokenizer
        catalog = self.planner.catalog(piece.source, piece.shard)
        tokens = self._skeleton(layout)
        content = (0, 0, 0)
        for part, place, kind, first, end, at in layout.parts:
            if kind:
                medium = self._medium(catalog, piece.sample, place, samples)
                self._decode_medium(catalog, piece.sample, place, medium, buffers.add(kind, end))
                if layout.alone:
                    content = (kind, xxhash.xxh3_64_intdigest(medium), _group_key(document))
                continue
            text = document["parts"][part]["text"]
            began = time.perf_counter()
            encoded = tokenizer.encode(text)
            self.tokenise_s += time.perf_counter() - began
            if len(encoded) != catalog.part_tokens.item(place):
                raise CorruptSampleError("its text has another number of tokens than the sidecar says")
            tokens[at : at + end - first] = encoded[first:end]
            if layout.alone:
                content = (kind, text_key(text), _group_key(document))
        labels = chosen_labels(document["labels"], self.planner.config.labels)
        return self._piece(piece, layout, tokens, content, weight=1.0, labels=labels)

    def _medium(self, catalog: ShardCatalog, sample: int, place: int, samples: SampleBytes) -> bytes:
        """Return the encoded bytes of a media part."""
        owner = sample if catalog.part_owners is None else catalog.part_owners.item(place)
        offset = catalog.part_offsets.item(place) - catalog.offsets.item(owner)
        return bytes(samples[owner][offset : offset + catalog.part_sizes.item(place)])

    def _decode_medium(
        self, catalog: ShardCatalog, sample: int, place: int, medium: bytes, out: npt.NDArray[Any]
    ) -> None:
        """Decode a media part into `out`. Raises CorruptSampleError with the sample its bytes are from."""
        modality = self.modalities[catalog.part_kinds.item(place)]
        width, height, samples, rate = catalog.part_infos[place].tolist()
        info = MediaInfo(width=width, height=height, samples=samples, rate=rate)
        owner = sample if catalog.part_owners is None else catalog.part_owners.item(place)
        try:
            if modality.decode_into is not None:
                modality.decode_into(medium, info, self.planner.config.geometry, out)
                return
            values = modality.decode(medium, info, self.planner.config.geometry)
        except Exception as error:
            raise _as_corrupt(error, owner) from error
        if len(values) != len(out):
            raise CorruptSampleError(f"its {modality.name} decodes to {len(values)} tokens, planned {len(out)}", owner)
        out[...] = values


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
