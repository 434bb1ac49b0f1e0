"""What a key-interval mask costs and which parts of it are alive: strips for the CPU path, tile tables for the kernels.

The mask of query row i is the half-open key interval [kv_lo[i], kv_hi[i]); an interval with hi <= lo is empty.
Everything here is numpy on two int32 arrays [B, S], made to run in a loader worker, and never allocates S x S. T is the
number of keys (S in self-attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from triweave.kernels.errors import KernelInputError

STRIP_COLUMNS = ("batch_row", "row_start", "row_end", "key_start", "key_end", "open_end")
"""Columns of the table that `segments` returns."""
STRIP_COST_PAIRS = 1_500
"""What one more strip costs however small, in query-key pairs: launching torch's fused attention twice."""
KEY_COST_PAIRS = 24
"""What one more key in a strip costs however few its rows, in query-key pairs: adding to dk and dv."""
ATOM_ROWS = 16
"""Rows whose interval moves by at most one key per row are first taken together in pieces of this many."""
MASKED_PAIRS = 1 << 23
"""Most query-key pairs a strip made of several pieces may have (its mask may be a tensor of that many numbers)."""
OPEN_PAIRS = 1 << 15
"""Fewest query-key pairs for which a separate call without a mask pays: a mask costs about a fifth."""

REFERENCE_LOG_MEAN = 6.7
REFERENCE_LOG_DEVIATION = 1.0
"""Document lengths in tokens of the reference distribution: exp of a normal with this mean and deviation."""

Intervals = npt.NDArray[np.int32]


def mask_area(kv_lo: Intervals, kv_hi: Intervals) -> int:
    """Return the exact number of live query-key pairs, sum of max(hi - lo, 0)."""
    return int(np.maximum(kv_hi.astype(np.int64) - kv_lo, 0).sum())


# Strips


def segments(kv_lo: Intervals, kv_hi: Intervals) -> npt.NDArray[np.int32]:
    """Cut the mask into strips: consecutive query rows that share one window of keys.

    Returns int32 [M, 6] with STRIP_COLUMNS: rows [row_start, row_end) of batch_row visit keys [key_start, key_end).
    Every row sees all keys before open_end; the mask decides about the others, of which every row sees at least one.
    open_end = key_end means no mask at all, open_end = key_start one mask for the whole window.
    Rows with an empty interval are in no strip, every other row is in exactly one. Rows whose windows do not overlap
    never share a strip, so no arithmetic of one packed document touches another's numbers, and a document's strips are
    the same wherever it lies in the pack.

    Strips are joined as long as that lowers rows * keys + KEY_COST_PAIRS * keys + STRIP_COST_PAIRS.
    """
    strips = np.array(_joined(_atoms(kv_lo, kv_hi)), dtype=np.int32).reshape(-1, 5)
    return np.concatenate([strips, _open_end(kv_lo, kv_hi, strips)[:, None]], axis=1)


def attention_tables(kv_lo: Intervals, kv_hi: Intervals) -> dict[str, npt.NDArray[np.int32]]:
    """Return the per-pack tables that `attention(tiles=...)` takes; for `post_pack` in a loader worker."""
    return {"segments": segments(kv_lo, kv_hi)}


def _open_end(kv_lo: Intervals, kv_hi: Intervals, strips: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return where each strip's keys begin to need a mask."""
    if strips.size == 0:
        return np.zeros(0, dtype=np.int32)
    batch_row, row_start, row_end, key_start, key_end = strips.T
    bounds = np.stack([row_start, row_end], axis=1) + batch_row[:, None] * kv_lo.shape[1]
    # One more element, because reduceat takes no bound equal to the length; every second result is a strip's.
    lo, hi = np.append(kv_lo.reshape(-1), 0), np.append(kv_hi.reshape(-1), 0)
    highest_lo = np.maximum.reduceat(lo, bounds.reshape(-1))[::2]
    lowest_hi = np.minimum.reduceat(hi, bounds.reshape(-1))[::2]
    one_start = highest_lo == key_start
    unmasked = one_start & (lowest_hi == key_end)
    worth = one_start & ((row_end - row_start).astype(np.int64) * (lowest_hi - 1 - key_start) >= OPEN_PAIRS)
    return np.where(unmasked, key_end, np.where(worth, lowest_hi - 1, key_start)).astype(np.int32)


def _atoms(kv_lo: Intervals, kv_hi: Intervals) -> list[tuple[int, ...]]:
    """Return the smallest strips: runs of one interval, short runs of a moving one, single rows of anything else."""
    rows = kv_lo.shape[1]
    lo, hi = kv_lo.reshape(-1).astype(np.int64), kv_hi.reshape(-1).astype(np.int64)
    if lo.size == 0:
        return []
    live = hi > lo
    index = np.arange(lo.size)
    lo_step, hi_step = np.diff(lo, prepend=lo[0]), np.diff(hi, prepend=hi[0])
    follows = live & np.roll(live, 1) & (index % rows != 0)
    constant = follows & (lo_step == 0) & (hi_step == 0)
    in_constant = constant | np.append(constant[1:], False)
    moving = follows & (np.abs(lo_step) <= 1) & (np.abs(hi_step) <= 1) & ~in_constant & ~np.roll(in_constant, 1)
    moving &= (lo < np.roll(hi, 1)) & (np.roll(lo, 1) < hi)
    start = ~(constant | moving)
    run_start = np.maximum.accumulate(np.where(start, index, 0))
    start |= ~in_constant & ((index - run_start) % ATOM_ROWS == 0)
    first = np.flatnonzero(start)
    last = np.append(first[1:], lo.size)
    low, high = np.minimum.reduceat(lo, first), np.maximum.reduceat(hi, first)
    batch_row = first // rows
    columns = (batch_row, first - batch_row * rows, last - batch_row * rows, low, high)
    return list(zip(*(column[live[first]].tolist() for column in columns), strict=True))


def _joined(atoms: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Join neighbours where one strip is cheaper than two: first equals with equals, then what is left in order.

    Only growing by equals comes near the optimum: an atom alone is dear, so one strip would swallow atom after atom.
    """
    balanced: list[tuple[int, ...]] = []
    for atom in atoms:
        balanced.append(atom)
        while len(balanced) > 1 and _row_count(balanced[-1]) >= _row_count(balanced[-2]):
            union = _union(balanced[-2], balanced[-1])
            if union is None:
                break
            balanced[-2:] = [union]
    strips: list[tuple[int, ...]] = []
    for strip in balanced:
        union = _union(strips[-1], strip) if strips else None
        if union is None:
            strips.append(strip)
        else:
            strips[-1] = union
    return strips


def _row_count(strip: tuple[int, ...]) -> int:
    return strip[2] - strip[1]


def _union(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the strip that does both, or None if they must stay or are cheaper apart."""
    batch_row, row_start, row_end, first_low, first_high = first
    next_batch_row, next_row, next_end, second_low, second_high = second
    if next_batch_row != batch_row or next_row != row_end:
        return None
    low, high = min(first_low, second_low), max(first_high, second_high)
    keys, first_keys, second_keys = high - low, first_high - first_low, second_high - second_low
    shared_keys = first_keys + second_keys - keys
    pairs = (next_end - row_start) * keys
    extra_pairs = pairs - (row_end - row_start) * first_keys - (next_end - next_row) * second_keys
    if shared_keys <= 0 or pairs > MASKED_PAIRS or extra_pairs > STRIP_COST_PAIRS + KEY_COST_PAIRS * shared_keys:
        return None
    return batch_row, row_start, next_end, low, high


# Tile tables


@dataclass(frozen=True, kw_only=True)
class TileTable:
    """For each query tile the key tiles it visits, and the transpose of that; compressed sparse rows.

    Tile (b, i) holds query rows [i * query_tile, (i + 1) * query_tile) of batch row b; its entries are
    key_tiles[query_offsets[n] : query_offsets[n + 1]] with n = b * query_tiles + i, ascending, and `query_full` of the
    same extent is 1 where all its rows see the whole key tile, so that no mask arithmetic is needed. The transposed
    lists serve dk and dv: query_tiles_of_key[key_offsets[n] : ...] with n = b * key_tiles_per_row + j, and `key_full`.
    """

    query_tile: int
    key_tile: int
    query_tiles_per_row: int
    key_tiles_per_row: int
    query_offsets: npt.NDArray[np.int32]
    key_tiles: npt.NDArray[np.int32]
    query_full: npt.NDArray[np.int8]
    key_offsets: npt.NDArray[np.int32]
    query_tiles_of_key: npt.NDArray[np.int32]
    key_full: npt.NDArray[np.int8]

    @property
    def live_tiles(self) -> int:
        """Number of (query tile, key tile) pairs that hold at least one live query-key pair."""
        return int(self.key_tiles.size)

    @property
    def full_tiles(self) -> int:
        """Number of live tiles that need no mask arithmetic."""
        return int(self.query_full.sum())

    @property
    def live_area(self) -> int:
        """Query-key pairs of the live tiles: the work a kernel does, against mask_area's least possible."""
        return self.live_tiles * self.query_tile * self.key_tile


def tile_table(kv_lo: Intervals, kv_hi: Intervals, *, keys: int, query_tile: int, key_tile: int) -> TileTable:
    """Return the table of live tiles; `keys` is T. Takes O(B (S + tiles^2)) time and memory.

    A key tile that reaches beyond T is never full: its bound needs the mask. Query rows beyond S count for nothing.
    """
    batch, rows = kv_lo.shape
    query_tiles, key_tiles = -(-rows // query_tile), -(-keys // key_tile)
    lo, hi = kv_lo.astype(np.int64), kv_hi.astype(np.int64)
    live_rows = hi > lo
    tile_of_row = np.broadcast_to(np.arange(rows) // query_tile, lo.shape)
    row_tile = np.arange(batch)[:, None] * query_tiles + tile_of_row
    shape = (batch * query_tiles, key_tiles)
    live = _coverage(row_tile[live_rows], lo[live_rows] // key_tile, (hi[live_rows] - 1) // key_tile + 1, shape) > 0
    whole_from, whole_to = -(-lo // key_tile), hi // key_tile
    whole = live_rows & (whole_to > whole_from)
    covered = _coverage(row_tile[whole], whole_from[whole], whole_to[whole], shape)
    rows_in_tile = np.minimum(query_tile, rows - np.arange(query_tiles) * query_tile)
    full = live & (covered == np.tile(rows_in_tile, batch)[:, None])
    query_of, key_of = np.nonzero(live)
    by_key = live.reshape(batch, query_tiles, key_tiles).transpose(0, 2, 1)
    full_by_key = full.reshape(batch, query_tiles, key_tiles).transpose(0, 2, 1)
    return TileTable(
        query_tile=query_tile,
        key_tile=key_tile,
        query_tiles_per_row=query_tiles,
        key_tiles_per_row=key_tiles,
        query_offsets=_offsets(live),
        key_tiles=key_of.astype(np.int32),
        query_full=full[query_of, key_of].astype(np.int8),
        key_offsets=_offsets(by_key.reshape(-1, query_tiles)),
        query_tiles_of_key=np.nonzero(by_key)[2].astype(np.int32),
        key_full=full_by_key[by_key].astype(np.int8),
    )


def _coverage(
    tile: npt.NDArray[np.int64], first: npt.NDArray[np.int64], end: npt.NDArray[np.int64], shape: tuple[int, int]
) -> npt.NDArray[np.int64]:
    """Count, for each (query tile, key tile), the rows whose range [first, end) of key tiles holds it."""
    width = shape[1] + 1
    steps = np.bincount(tile * width + first, minlength=shape[0] * width).astype(np.int64)
    steps -= np.bincount(tile * width + end, minlength=shape[0] * width)
    return np.cumsum(steps.reshape(shape[0], width), axis=1)[:, :-1]


def _offsets(live: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(live.sum(axis=1))]).astype(np.int32)


# The masks that figures are quoted for


def lognormal_packs(
    packs: int,
    sequence_length: int,
    *,
    log_mean: float = REFERENCE_LOG_MEAN,
    log_deviation: float = REFERENCE_LOG_DEVIATION,
    seed: int = 0,
) -> list[npt.NDArray[np.int64]]:
    """Return the document lengths of each of `packs` full packs: a lognormal stream of documents, cut at pack ends.

    The defaults are the reference distribution: median 812 tokens, mean 1339 before lengths are clipped to a pack's.
    """
    generator = np.random.default_rng(seed)
    total = packs * sequence_length
    ends = np.zeros(1, dtype=np.int64)
    while ends[-1] < total:
        drawn = np.rint(generator.lognormal(log_mean, log_deviation, size=1024))
        lengths = np.clip(drawn, 1, sequence_length).astype(np.int64)
        ends = np.concatenate([ends, ends[-1] + np.cumsum(lengths)])
    pack_ends = np.arange(1, packs + 1) * sequence_length
    cuts = np.union1d(ends[(ends > 0) & (ends < total)], pack_ends)
    return np.split(np.diff(cuts, prepend=0), np.searchsorted(cuts, pack_ends[:-1]) + 1)


def document_intervals(
    lengths: npt.NDArray[np.int64], *, span_tokens: int = 0, span_every_tokens: int = 0
) -> tuple[Intervals, Intervals]:
    """Return (kv_lo, kv_hi) [1, sum(lengths)] of packed causal documents with bidirectional spans at even distances.

    In each document the last `span_tokens` of every `span_every_tokens` are one span; 0 tokens mean no spans.
    """
    ends = np.cumsum(lengths)
    starts = np.repeat(ends - lengths, lengths)
    index = np.arange(starts.size)
    hi = index + 1
    if span_tokens:
        offset = index - starts
        span_end = starts + (offset // span_every_tokens + 1) * span_every_tokens
        in_span = (offset % span_every_tokens >= span_every_tokens - span_tokens) & (
            span_end <= np.repeat(ends, lengths)
        )
        hi = np.where(in_span, span_end, hi)
    return starts[None].astype(np.int32), hi[None].astype(np.int32)


# Media intervals


def media_intervals(
    document_ids: npt.NDArray[np.integer],
    span_ids: npt.NDArray[np.integer],
    *,
    seen: Literal["immediate", "preceding"],
    keys_per_span: int | None = None,
) -> tuple[Intervals, Intervals]:
    """Return (media_lo, media_hi) int32 [B, S]: the keys on the media axis that each token of packed documents sees.

                 tokens         A1  image  A2  image  A3  B1  image  B2     A1, A2, A3 and B1, B2: text of two documents
        immediate  sees  nothing    0-1   0-1   2-3  2-3   nothing  4-5  4-5
        preceding  sees  nothing    0-1   0-1   2-3  0-3   nothing  4-5  4-5

    document_ids: [B, S], each document one run; negative at padding. span_ids: [B, S], negative at text; each run of
    one number in one document is a media span. seen: the latest span of the document, or all of its spans so far; a
    media token sees its own whole span either way. Without a span before it in its document it sees nothing, (0, 0).
    keys_per_span: None if the axis holds the media tokens of the pack themselves, in order; else every span has that
    many keys on it, as the latents of a resampler.

    (Both public Flamingo implementations, in their mode of all preceding media, mask every key of text before the first
    medium, where softmax turns equal scores into equal weights on all later media; neither knows packed documents.)

    Raises KernelInputError.
    """
    _check_media(document_ids, span_ids, seen, keys_per_span)
    rows, length = document_ids.shape
    row = np.repeat(np.arange(rows), length)
    document, span = document_ids.reshape(-1), span_ids.reshape(-1)
    is_media = (span >= 0) & (document >= 0)
    changes = np.ones((3, row.size), dtype=bool)
    for change, column in zip(changes, (row, document, span), strict=True):
        change[1:] = column[1:] != column[:-1]
    starts = is_media & changes.any(axis=0)
    first_token = np.flatnonzero(starts)
    if first_token.size == 0:
        return np.zeros((2, rows, length), dtype=np.int32)[0], np.zeros((rows, length), dtype=np.int32)
    latest = np.cumsum(starts) - 1  # number of the latest span that has begun, -1 where none has
    keys = np.bincount(latest[is_media]) if keys_per_span is None else np.full(first_token.size, keys_per_span)
    ends = np.cumsum(keys)
    row_of_span, document_of_span = row[first_token], document[first_token]
    other_document = np.diff(document_of_span, prepend=-1) != 0
    other_row = np.diff(row_of_span, prepend=-1) != 0
    begins = ends - keys
    begins_row = np.maximum.accumulate(np.where(other_row, begins, 0))
    begins_document = np.maximum.accumulate(np.where(other_row | other_document, begins, 0))
    sees = (latest >= 0) & (row_of_span[latest] == row) & (document_of_span[latest] == document)
    first_key = np.where(is_media, begins[latest], (begins if seen == "immediate" else begins_document)[latest])
    lo, hi = (np.where(sees, key - begins_row[latest], 0) for key in (first_key, ends[latest]))
    return lo.reshape(rows, length).astype(np.int32), hi.reshape(rows, length).astype(np.int32)


def _check_media(
    document_ids: npt.NDArray[np.integer], span_ids: npt.NDArray[np.integer], seen: str, keys_per_span: int | None
) -> None:
    if document_ids.ndim != 2 or document_ids.shape != span_ids.shape:
        raise KernelInputError(
            f"media_intervals: document_ids {document_ids.shape} and span_ids {span_ids.shape} must both be [B, S]"
        )
    if seen not in ("immediate", "preceding"):
        raise KernelInputError(f"media_intervals: seen={seen!r} is not a choice; use 'immediate' or 'preceding'")
    if keys_per_span is not None and keys_per_span < 1:
        raise KernelInputError(f"media_intervals: keys_per_span={keys_per_span} must be at least 1, or None")
