"""Pieces to PackedBatch: every per-token array in one vectorised pass over the runs of the whole micro-batch.

A piece is a list of runs, text and media in turn. With o the offset of a token in its run:

    position   text and one-dimensional media: t0 + o on all three axes
               other media, grid (t, h, w):    (t0 + o // (h w), t0 + o // w mod h, t0 + o mod w)
               t0 of the next run is one past the largest coordinate; every piece starts at 0
    kv interval   text: [piece start, own position + 1)     media: [piece start, end of its run)
    supervised    the next token is in the same piece and is no placeholder

In a one-span segment (a piece with `alone`) every token sees the whole segment and all its media, and none is
supervised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.batch import PADDING_ID, PackedBatch, Payload, Segments
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.stream.catalog import modality_names
from triweave.data_pipeline.stream.content import Piece

Int = npt.NDArray[np.int64]


class Row(NamedTuple):
    """One row to collate: its absolute plan row (-1: a zero-loss row, which has no pieces) and its pieces."""

    plan_row: int
    pieces: Sequence[Piece]


class _Runs(NamedTuple):
    """The runs of a micro-batch as columns [R]; `piece` counts through all rows, `span` the media runs of one row."""

    modality: Int
    length: Int
    grid: Int
    row: Int
    piece: Int
    piece_first: Int
    first: Int
    t0: Int
    span: Int


def collate(
    rows: Sequence[Row],
    media: Mapping[int, npt.NDArray[Any]],
    *,
    sequence_length: int,
    pad_id: int,
    contrastive_group_rows: int = 64,
) -> PackedBatch:
    """Pack B rows into one PackedBatch (without timings and extra).

    media: modality id -> the decoded items of all rows one after another, [tokens, features]; not copied.

    Raises ValueError where a row's pieces are longer than `sequence_length`.
    """
    B, S = len(rows), sequence_length
    pieces = [piece for row in rows for piece in row.pieces]
    row_of_piece = np.repeat(np.arange(B), [len(row.pieces) for row in rows])
    runs = _columns(pieces, row_of_piece, B)
    run, row_first = _compact(runs, B, S)
    # Compact order: the tokens of all rows one after another; `flat` is where each goes in B * S.
    token = np.arange(len(run))
    row = runs.row[run]
    place = token - row_first[row]
    flat = row * S + place
    modality = runs.modality[run]
    is_media = modality > 0
    in_segment = np.asarray([piece.alone is not None for piece in pieces], bool)[runs.piece[run]]
    kv_lo, kv_hi = _sees(runs, run, place, row_first[row], is_media, in_segment)
    tokens = np.concatenate([piece.tokens for piece in pieces]) if pieces else np.empty(0, np.int32)
    scatter = partial(_scatter, flat, B, S)
    media_axis = _media_axis(runs, run, row, place, is_media, modality, in_segment, B)
    piece_of_row = runs.piece - np.searchsorted(row_of_piece, np.arange(B))[runs.row]
    supervised = _supervised(runs, run, is_media | in_segment)
    weight = np.asarray([piece.weight for piece in pieces], np.float32)
    plan_rows = np.asarray([row.plan_row for row in rows], np.int64)
    return PackedBatch(
        tokens=scatter(tokens, pad_id, np.int32),
        modality_ids=scatter(modality, PADDING_ID, np.int8),
        document_ids=scatter(piece_of_row[run], -1, np.int32),
        span_ids=scatter(np.where(is_media, runs.span[run], -1), -1, np.int32),
        positions=scatter(_positions(runs, run, token), 0, np.int32),
        kv_lo=scatter(kv_lo, 0, np.int32),
        kv_hi=scatter(kv_hi, 0, np.int32),
        media_index=media_axis.positions,
        media_lo=scatter(media_axis.lo, 0, np.int32),
        media_hi=scatter(media_axis.hi, 0, np.int32),
        key_modality=media_axis.key_modality,
        row_index=flat[supervised],
        targets=tokens[supervised + 1].astype(np.int64),
        row_weight=weight[runs.piece[run[supervised]]],
        row_modality=_followed(runs)[run[supervised]].astype(np.int8),
        row_source=np.asarray([piece.source for piece in pieces], np.int16)[runs.piece[run[supervised]]],
        contrastive_group=np.where(plan_rows < 0, -1, plan_rows // contrastive_group_rows % 2**31).astype(np.int32),
        payloads=_payloads(media, runs, flat, modality),
        planned_tokens=_by_name(modality),
        actual_tokens=_by_name(modality[weight[runs.piece[run]] > 0]),
        plan_rows=plan_rows,
        segments=_segments(pieces, row_of_piece, row_first, S) if in_segment.any() else Segments.none(),
        sample_ids=[[piece.sample_id for piece in row.pieces] for row in rows],
        sample_hashes=[[piece.sample_hash for piece in row.pieces] for row in rows],
        labels=[[piece.labels for piece in row.pieces] for row in rows],
    )


def _scatter(flat: Int, B: int, S: int, values: npt.NDArray[Any], empty: int, dtype: Any) -> npt.NDArray[Any]:
    """Return [B, S, ...] with `values` [count, ...] at the places `flat` of B * S, and `empty` elsewhere."""
    result = np.full((B * S, *values.shape[1:]), empty, dtype)
    result[flat] = values
    return result.reshape(B, S, *values.shape[1:])


def _compact(runs: _Runs, B: int, S: int) -> tuple[Int, Int]:
    """Return the run of each token of all rows, [count], and where each row begins among them, [B]."""
    row_tokens = np.bincount(runs.row, runs.length, B).astype(np.int64)
    if (row_tokens > S).any():
        raise ValueError(f"a row of {row_tokens.max()} tokens does not fit into sequence_length={S}")
    return np.repeat(np.arange(len(runs.length)), runs.length), np.cumsum(row_tokens) - row_tokens


def _columns(pieces: list[Piece], row_of_piece: Int, B: int) -> _Runs:
    numbers = chain.from_iterable(chain.from_iterable(piece.runs for piece in pieces))
    table = np.fromiter(numbers, np.int64).reshape(-1, 5)
    piece = np.repeat(np.arange(len(pieces)), [len(piece.runs) for piece in pieces])
    modality, length, grid = table[:, 0], table[:, 1], table[:, 2:]
    piece_first = np.searchsorted(piece, np.arange(len(pieces)))[piece] if len(pieces) else piece
    flat_media = (grid[:, 1] == 1) & (grid[:, 2] == 1)
    advance = np.where(flat_media, length, grid.max(axis=1, initial=0))
    before = np.cumsum(advance) - advance
    row = row_of_piece[piece]
    spans = np.cumsum(modality > 0)
    spans_before_row = np.r_[0, spans][np.searchsorted(row, np.arange(B))][row]
    return _Runs(
        modality=modality,
        length=length,
        grid=grid,
        row=row,
        piece=piece,
        piece_first=piece_first,
        first=np.cumsum(length) - length,
        t0=before - before[piece_first],
        span=spans - 1 - spans_before_row,
    )


def _positions(runs: _Runs, run: Int, token: Int) -> Int:
    """Return (t, h, w) of each token, [count, 3]."""
    offset = token - runs.first[run]
    positions = np.repeat((runs.t0[run] + offset)[:, None], 3, axis=1)
    on_grid = np.flatnonzero(((runs.grid[:, 1] > 1) | (runs.grid[:, 2] > 1))[run])
    if len(on_grid):
        chosen, inside = run[on_grid], offset[on_grid]
        h, w = runs.grid[chosen, 1], runs.grid[chosen, 2]
        frame, in_frame = np.divmod(inside, h * w)
        y, x = np.divmod(in_frame, w)
        positions[on_grid] = runs.t0[chosen][:, None] + np.stack([frame, y, x], axis=1)
    return positions


def _sees(
    runs: _Runs,
    run: Int,
    place: Int,
    row_first: Int,
    is_media: npt.NDArray[np.bool_],
    in_segment: npt.NDArray[np.bool_],
) -> tuple[Int, Int]:
    """Return the interval of keys of each token; `row_first`: where the row of each begins in compact order."""
    run_end = runs.first[run] + runs.length[run] - row_first
    hi = np.where(is_media, run_end, place + 1)
    if in_segment.any():
        piece_end = np.cumsum(np.bincount(runs.piece, runs.length)).astype(np.int64)[runs.piece[run]] - row_first
        hi = np.where(in_segment, piece_end, hi)
    return runs.first[runs.piece_first[run]] - row_first, hi


def _supervised(runs: _Runs, run: Int, no_target: npt.NDArray[np.bool_]) -> Int:
    """Return the compact positions whose next token is in the same piece and may be a target."""
    piece = runs.piece[run]
    return np.flatnonzero((piece[1:] == piece[:-1]) & ~no_target[1:])


def _segments(pieces: list[Piece], row_of_piece: Int, row_first: Int, S: int) -> Segments:
    """Return the table of the one-span segments among the pieces, which come by row and, in it, by item."""
    lengths = np.asarray([len(piece.tokens) for piece in pieces])
    first = np.cumsum(lengths) - lengths
    chosen = [(number, piece, piece.alone) for number, piece in enumerate(pieces) if piece.alone is not None]
    number = np.asarray([number for number, *_ in chosen])
    row = row_of_piece[number]
    items = np.asarray([span.item for *_, span in chosen], np.int32)
    _, item = np.unique(np.stack([row, items]), axis=1, return_inverse=True)
    weights = np.ones(len(chosen), np.float32)
    np.minimum.at(weights, item.reshape(-1), [piece.weight for _, piece, _ in chosen])
    return Segments(
        first=row * S + first[number] - row_first[row],
        lengths=lengths[number].astype(np.int32),
        modality=np.asarray([span.modality for *_, span in chosen], np.int8),
        rows=row.astype(np.int32),
        items=items,
        content_keys=np.asarray([span.content_key for *_, span in chosen], np.uint64),
        group_keys=np.asarray([span.group_key for *_, span in chosen], np.uint64),
        weights=weights[item.reshape(-1)],
    )


def _followed(runs: _Runs) -> Int:
    """Return the modality of the latest media run at or before each run in its piece, 0 without one, [R]."""
    latest = np.maximum.accumulate(np.where(runs.modality > 0, np.arange(len(runs.modality)), -1))
    return np.where(latest >= runs.piece_first, runs.modality[latest], 0)


class _MediaAxis(NamedTuple):
    positions: Int
    key_modality: npt.NDArray[np.int8]
    lo: Int
    hi: Int


def _media_axis(
    runs: _Runs,
    run: Int,
    row: Int,
    place: Int,
    is_media: npt.NDArray[np.bool_],
    modality: Int,
    in_segment: npt.NDArray[np.bool_],
    B: int,
) -> _MediaAxis:
    """Number the media tokens of each row: T is the largest number of a row."""
    through = np.cumsum(is_media)
    before: Int = through - is_media
    row_total = np.bincount(row[is_media], minlength=B)
    row_base = np.cumsum(row_total) - row_total
    before_in_row = before - row_base[row]
    T = int(row_total.max(initial=0))
    positions = np.full((B, T), -1, np.int64)
    key_modality = np.full((B, T), PADDING_ID, np.int8)
    slots = (row[is_media], before_in_row[is_media])
    positions[slots] = place[is_media]
    key_modality[slots] = modality[is_media]
    run_before = before_in_row[runs.first] if len(runs.first) else runs.first
    own_lo, document_lo = run_before[run], run_before[runs.piece_first[run]]
    lo = np.where(is_media, own_lo, document_lo)
    hi = np.where(is_media, own_lo + runs.length[run], before_in_row)
    if in_segment.any():
        piece = runs.piece[run]
        held = np.bincount(piece, is_media, int(piece[-1]) + 1).astype(np.int64)[piece]
        lo, hi = np.where(in_segment, document_lo, lo), np.where(in_segment, document_lo + held, hi)
    return _MediaAxis(positions=positions, key_modality=key_modality, lo=lo, hi=hi)


def _payloads(media: Mapping[int, npt.NDArray[Any]], runs: _Runs, flat: Int, modality: Int) -> dict[str, Payload]:
    payloads = {}
    for name, entry in MODALITIES.items():
        if entry.id in media:
            items = runs.modality == entry.id
            payloads[name] = Payload(
                values=media[entry.id],
                lengths=runs.length[items].astype(np.int32),
                grids=runs.grid[items].astype(np.int32),
                token_index=flat[modality == entry.id],
                item_rows=runs.row[items].astype(np.int32),
            )
    return payloads


def _by_name(modality: Int) -> dict[str, int]:
    """Return modality name -> tokens of it, for text and every registered modality."""
    counts = np.bincount(modality, minlength=128)
    ids = {"text": 0} | {name: entry.id for name, entry in MODALITIES.items()}
    return {name: int(counts[ids[name]]) for name in modality_names()}
