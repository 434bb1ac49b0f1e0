"""From planned pieces to their tokens and decoded media, or to the filler that stands in for a damaged sample."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from triweave.data_pipeline.media.geometry import MediaGeometry, MediaInfo
from triweave.data_pipeline.media.modalities import MODALITIES, Modality
from triweave.data_pipeline.stream.catalog import ShardCatalog
from triweave.data_pipeline.stream.plan import BlockPlan, Planner
from triweave.data_pipeline.stream.reader import CorruptSampleError, ShardReader

Run = tuple[int, int, int, int, int]
"""Consecutive tokens of one kind: modality id, tokens, and their (t, h, w) grid; text has (tokens, 1, 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FillerEvent:
    """A damaged sample and the row it left a filler in. offset: byte of its tar where the sample begins."""

    source: str
    shard: str
    key: str
    offset: int
    plan_row: int
    reason: str


class PiecePlan(NamedTuple):
    """One piece of a row. source, epoch, shard and sample are numbers; [first, end) is its span of document tokens."""

    source: int
    epoch: int
    shard: int
    sample: int
    first: int
    end: int


class PartSpan(NamedTuple):
    """The share of one part in a piece.

    part: its number in the document. place: its row in the part columns of the catalog. kind: its modality id.
    first, end: text tokens [first, end) of the part; for media 0 and its placeholders.
    at: where the text tokens, or the start marker, begin in the piece.
    """

    part: int
    place: int
    kind: int
    first: int
    end: int
    at: int


class PieceLayout(NamedTuple):
    """What metadata alone says about a piece: its tokens by kind and its parts, in order, and whether it begins (bos)
    and ends (eos) its document."""

    runs: list[Run]
    parts: list[PartSpan]
    has_bos: bool
    has_eos: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A piece ready to be packed; its media lie in the micro-batch's MediaBuffers.

    tokens: int32 [n].
    runs: see PieceLayout.
    weight: 1, or 0 for a filler.
    """

    tokens: npt.NDArray[np.int32]
    runs: list[Run]
    weight: float
    sample_id: str
    sample_hash: int


class MediaBuffers:
    """The decoded media of a micro-batch: modality id -> [tokens, features], filled in order of appearance.

    Items are copied in while they are in the processor's cache and their own memory is used again for the next, which
    is cheaper than keeping hundreds of them and joining them at the end.
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

    def add(self, kind: int, item: npt.NDArray[Any]) -> None:
        """Append one decoded item, [tokens, features]."""
        start = self.filled[kind]
        self.values[kind][start : start + len(item)] = item
        self.filled[kind] = start + len(item)

    def add_zeros(self, kind: int, tokens: int) -> None:
        """Append an item of zeros."""
        start = self.filled[kind]
        self.values[kind][start : start + tokens] = 0
        self.filled[kind] = start + tokens


def row_pieces(plan: BlockPlan, row: int) -> list[PiecePlan]:
    """Return the pieces of one row of a block, in order."""
    span = slice(int(plan.row_starts[row]), int(plan.row_starts[row + 1]))
    columns = (plan.sources, plan.epochs, plan.shards, plan.samples, plan.first_tokens, plan.end_tokens)
    return [PiecePlan(*piece) for piece in zip(*(column[span].tolist() for column in columns), strict=True)]


def piece_layout(catalog: ShardCatalog, piece: PiecePlan) -> PieceLayout:
    """Lay out the tokens [first, end) of a document."""
    base, after = catalog.part_starts.item(piece.sample), catalog.part_starts.item(piece.sample + 1)
    kinds, lengths = catalog.part_kinds[base:after].tolist(), catalog.part_lengths[base:after].tolist()
    runs: list[Run] = []
    parts: list[PartSpan] = []
    text = int(piece.first == 0)
    position = 1
    for number, (kind, length) in enumerate(zip(kinds, lengths, strict=True)):
        lo, hi = max(piece.first - position, 0), min(piece.end - position, length)
        at = position + lo - piece.first
        position += length
        if lo >= hi:
            continue
        if kind == 0:
            text += hi - lo
            parts.append(PartSpan(number, base + number, 0, lo, hi, at))
        else:
            t, h, w = catalog.part_grids[base + number].tolist()
            runs += [(0, text + 1, text + 1, 1, 1), (kind, length - 1, t, h, w)]
            parts.append(PartSpan(number, base + number, kind, 0, length - 1, at))
            text = 0
    has_eos = piece.end > position
    text += has_eos
    if text:
        runs.append((0, text, text, 1, 1))
    return PieceLayout(runs, parts, piece.first == 0, has_eos)


class PieceMaker:
    """Reads and decodes pieces of a planner's blocks."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.reader = ShardReader()
        self.names = [source.name for source in planner.config.sources]
        self.modalities: dict[int, Modality] = {modality.id: modality for modality in MODALITIES.values()}

    def fetch(self, piece: PiecePlan) -> memoryview:
        """Return the verified bytes of the sample a piece is from. Raises CorruptSampleError."""
        catalog = self.planner.catalog(piece.source, piece.shard)
        sample = piece.sample
        return self.reader.read(
            catalog.tar, catalog.offsets.item(sample), catalog.sizes.item(sample), catalog.hashes.item(sample)
        )

    def layout(self, piece: PiecePlan) -> PieceLayout:
        """Return the layout of a piece."""
        return piece_layout(self.planner.catalog(piece.source, piece.shard), piece)

    def decode(self, piece: PiecePlan, layout: PieceLayout, sample: memoryview, buffers: MediaBuffers) -> Piece:
        """Tokenise and decode a piece, its media into `buffers`.

        Raises CorruptSampleError, with `buffers` as before, where the result is not what the plan counted.
        """
        tokens = self._skeleton(layout, piece.end - piece.first)
        before = dict(buffers.filled)
        try:
            self._fill(tokens, piece, layout, sample, buffers)
        except Exception as error:
            buffers.filled = before
            if isinstance(error, CorruptSampleError):
                raise
            # Codecs raise what they like on hostile bytes; every such sample must become a filler, and a bug in
            # decoding shows as the reason in the corruption budget's error.
            raise CorruptSampleError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
        return self._piece(piece, layout, tokens, weight=1.0)

    def filler(self, piece: PiecePlan, layout: PieceLayout, buffers: MediaBuffers) -> Piece:
        """Return the stand-in of a damaged piece: same layout and payload shapes, zeros, no loss."""
        for kind, length, *_ in layout.runs:
            if kind:
                buffers.add_zeros(kind, length)
        return self._piece(piece, layout, self._skeleton(layout, piece.end - piece.first), weight=0.0)

    def event(self, piece: PiecePlan, plan_row: int, error: CorruptSampleError) -> FillerEvent:
        """Describe a damaged piece."""
        catalog = self.planner.catalog(piece.source, piece.shard)
        return FillerEvent(
            source=self.names[piece.source],
            shard=catalog.tar,
            key=catalog.key_list[piece.sample],
            offset=int(catalog.offsets[piece.sample]),
            plan_row=plan_row,
            reason=str(error),
        )

    def _piece(self, piece: PiecePlan, layout: PieceLayout, tokens: npt.NDArray[np.int32], *, weight: float) -> Piece:
        key = self.planner.catalog(piece.source, piece.shard).key_list[piece.sample]
        ending = "" if weight else ":filler"
        return Piece(
            tokens=tokens,
            runs=layout.runs,
            weight=weight,
            sample_id=f"{self.names[piece.source]}:{piece.epoch}:{key}:{piece.first}:{piece.end}{ending}",
            sample_hash=xxhash.xxh3_64_intdigest(tokens.data),
        )

    def _skeleton(self, layout: PieceLayout, count: int) -> npt.NDArray[np.int32]:
        """Return the tokens that metadata alone determines, pad ids where text goes, int32 [count]."""
        tokenizer = self.planner.tokenizer
        tokens = np.full(count, tokenizer.pad_id, np.int32)
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

    def _fill(
        self,
        tokens: npt.NDArray[np.int32],
        piece: PiecePlan,
        layout: PieceLayout,
        sample: memoryview,
        buffers: MediaBuffers,
    ) -> None:
        """Write the text tokens into `tokens` and the media into `buffers`."""
        tokenizer, geometry = self.planner.tokenizer, self.planner.config.geometry
        catalog = self.planner.catalog(piece.source, piece.shard)
        start = catalog.offsets.item(piece.sample)
        json_start = catalog.json_offsets.item(piece.sample) - start
        json_end = json_start + catalog.json_sizes.item(piece.sample)
        parts = json.loads(str(sample[json_start:json_end], "utf-8"))["parts"]
        for part, place, kind, first, end, at in layout.parts:
            if kind == 0:
                encoded = tokenizer.encode(parts[part]["text"])
                if len(encoded) != catalog.part_tokens.item(place):
                    raise CorruptSampleError("its text has another number of tokens than the sidecar says")
                tokens[at : at + end - first] = encoded[first:end]
                continue
            modality = self.modalities[kind]
            offset = catalog.part_offsets.item(place) - start
            width, height, samples, rate = catalog.part_infos[place].tolist()
            info = MediaInfo(width=width, height=height, samples=samples, rate=rate)
            content = bytes(sample[offset : offset + catalog.part_sizes.item(place)])
            values = modality.decode(content, info, geometry)
            if len(values) != end:
                raise CorruptSampleError(f"its {modality.name} decodes to {len(values)} tokens, planned {end}")
            buffers.add(kind, values)
