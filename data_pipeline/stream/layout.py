"""How planned pieces are laid out as tokens, from metadata alone: a span of a document, or its one-span segments."""

from __future__ import annotations

from typing import NamedTuple

from triweave.data_pipeline.stream.catalog import SEGMENT_OVERHEAD_TOKENS, ShardCatalog
from triweave.data_pipeline.stream.plan import DOCUMENT, BlockPlan

Run = tuple[int, int, int, int, int]
"""Consecutive tokens of one kind: modality id, tokens, and their (t, h, w) grid; text has (tokens, 1, 1)."""


class PiecePlan(NamedTuple):
    """One piece of a row. source, epoch, shard and sample are numbers; [first, end) is its span of document tokens.

    kind: DOCUMENT, or ALONE for the one-span segments of a document; of these first is 0 and end their tokens.
    item: number of the piece in its row.
    """

    source: int
    epoch: int
    shard: int
    sample: int
    first: int
    end: int
    kind: int = DOCUMENT
    item: int = 0


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
    """What metadata alone says about a stretch of tokens: a piece of a document, or one of its one-span segments.

    runs, parts: its tokens by kind and its parts, in order.
    has_bos, has_eos: whether bos is its first token and eos its last one.
    first, end: its span of document tokens, without bos and eos for a segment.
    tokens: its length.
    alone: whether it is a segment.
    """

    runs: list[Run]
    parts: list[PartSpan]
    has_bos: bool
    has_eos: bool
    first: int
    end: int
    tokens: int
    alone: bool = False


def row_pieces(plan: BlockPlan, row: int) -> list[PiecePlan]:
    """Return the pieces of one row of a block, in order."""
    span = slice(int(plan.row_starts[row]), int(plan.row_starts[row + 1]))
    columns = (plan.sources, plan.epochs, plan.shards, plan.samples, plan.first_tokens, plan.end_tokens, plan.kinds)
    pieces = zip(*(column[span].tolist() for column in columns), range(span.stop - span.start), strict=True)
    return list(map(PiecePlan._make, pieces))


def piece_layouts(catalog: ShardCatalog, piece: PiecePlan) -> list[PieceLayout]:
    """Lay out a piece: a document's span is one stretch of tokens, an ALONE piece one for each of its segments."""
    return [piece_layout(catalog, piece)] if piece.kind == DOCUMENT else _segment_layouts(catalog, piece.sample)


def _segment_layouts(catalog: ShardCatalog, sample: int) -> list[PieceLayout]:
    """Lay out `[bos] part [eos]` for the first part of each modality, in the order of the modalities."""
    base = catalog.part_starts.item(sample)
    layouts = []
    for place in catalog.alone_parts[sample].tolist():
        if place < 0:
            continue
        kind, tokens = catalog.part_kinds.item(place), catalog.part_tokens.item(place)
        length = catalog.part_lengths.item(place)
        total = length + SEGMENT_OVERHEAD_TOKENS
        runs: list[Run] = [(0, total, total, 1, 1)]
        if kind:
            t, h, w = catalog.part_grids[place].tolist()
            runs = [(0, 2, 2, 1, 1), (kind, tokens, t, h, w), (0, 1, 1, 1, 1)]
        first = 1 + int(catalog.part_lengths[base:place].sum())
        parts = [PartSpan(place - base, place, kind, 0, tokens, 1)]
        layouts.append(PieceLayout(runs, parts, True, True, first, first + length, total, alone=True))
    return layouts


def piece_layout(catalog: ShardCatalog, piece: PiecePlan) -> PieceLayout:
    """Lay out the tokens [first, end) of a document."""
    base, after = catalog.part_starts.item(piece.sample), catalog.part_starts.item(piece.sample + 1)
    first, end = piece.first, piece.end
    runs: list[Run] = []
    parts: list[PartSpan] = []
    text = int(first == 0)
    position = 1
    for number, (kind, length, t, h, w) in enumerate(catalog.layout_columns[base:after].tolist()):
        lo, hi = max(first - position, 0), min(end - position, length)
        at = position + lo - first
        position += length
        if lo >= hi:
            continue
        if kind == 0:
            text += hi - lo
            parts.append(PartSpan(number, base + number, 0, lo, hi, at))
        else:
            runs += [(0, text + 1, text + 1, 1, 1), (kind, length - 1, t, h, w)]
            parts.append(PartSpan(number, base + number, kind, 0, length - 1, at))
            text = 0
    has_eos = end > position
    text += has_eos
    if text:
        runs.append((0, text, text, 1, 1))
    return PieceLayout(runs, parts, first == 0, has_eos, first, end, end - first)
