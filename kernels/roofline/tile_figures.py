"""The masks that figures are quoted for, and what a tile size costs on them: live-tile work against exact mask area.

Documents come from a lognormal stream that is cut where a pack ends. The three distributions: the reference; shorter
documents; and tiny ones, like the demo's Tux Paint documents (its training config plans pieces of median 23, 5 % below
10 and 5 % above 63 tokens). The first two have bidirectional spans of 64 tokens, one in every 256.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from triweave.kernels import tiles
from triweave.kernels.errors import KernelInputError
from triweave.kernels.tiles import Intervals

SPAN_TOKENS = 64
SPAN_EVERY_TOKENS = 256
PACKS = 64
"""Packs that tile figures are taken over: one pack alone differs from another by a tenth."""


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Lengths of documents in tokens, exp of a normal, and their spans."""

    median_tokens: float
    log_deviation: float
    span_tokens: int = 0
    span_every_tokens: int = 0


DISTRIBUTIONS: dict[str, Distribution] = {
    "reference": Distribution(
        median_tokens=math.exp(tiles.REFERENCE_LOG_MEAN),
        log_deviation=tiles.REFERENCE_LOG_DEVIATION,
        span_tokens=SPAN_TOKENS,
        span_every_tokens=SPAN_EVERY_TOKENS,
    ),
    "short": Distribution(
        median_tokens=400, log_deviation=1.0, span_tokens=SPAN_TOKENS, span_every_tokens=SPAN_EVERY_TOKENS
    ),
    "tiny": Distribution(median_tokens=23, log_deviation=0.6, span_tokens=4, span_every_tokens=16),
}
"""Name -> lengths: the design's reference, its median of 400 tokens, and the demo's Tux Paint."""

MASKS = ("interleaved", "causal", "documents", "full")
"""Masks of roofline and benchmark: reference packs with and without spans, one causal document, every key."""


def packs(distribution: Distribution, count: int, sequence_length: int, *, seed: int = 0) -> Iterator[Intervals]:
    """Yield (kv_lo, kv_hi) stacked, int32 [2, 1, S], of each of `count` full packs."""
    lengths = tiles.lognormal_packs(
        count,
        sequence_length,
        log_mean=math.log(distribution.median_tokens),
        log_deviation=distribution.log_deviation,
        seed=seed,
    )
    for pack in lengths:
        yield np.stack(
            tiles.document_intervals(
                pack, span_tokens=distribution.span_tokens, span_every_tokens=distribution.span_every_tokens
            )
        )


def mask_intervals(
    mask: str, batch: int, sequence_length: int, *, lengths: npt.NDArray[np.int64] | None = None, seed: int = 0
) -> tuple[Intervals, Intervals]:
    """Return (kv_lo, kv_hi) [B, S] of one of MASKS; `lengths` are the documents of `documents`, else the reference's.

    Raises KernelInputError for another mask.
    """
    index = np.broadcast_to(np.arange(sequence_length, dtype=np.int32), (batch, sequence_length))
    if mask == "full":
        return np.zeros_like(index), np.full_like(index, sequence_length)
    if mask == "causal":
        return np.zeros_like(index), index + 1
    if mask == "documents" and lengths is not None:
        lo, hi = tiles.document_intervals(_cut(lengths, batch * sequence_length, sequence_length))
        starts = np.repeat(np.arange(batch, dtype=np.int32) * sequence_length, sequence_length)
        shape = (batch, sequence_length)
        return (lo[0] - starts).reshape(shape), (hi[0] - starts).reshape(shape)
    if mask not in MASKS:
        raise KernelInputError(f"kernels: there is no mask {mask!r}; known are {', '.join(MASKS)}")
    reference = DISTRIBUTIONS["reference"]
    if mask == "documents":
        reference = Distribution(median_tokens=reference.median_tokens, log_deviation=reference.log_deviation)
    lo, hi = np.concatenate(list(packs(reference, batch, sequence_length, seed=seed)), axis=1)
    return lo, hi


def _cut(lengths: npt.NDArray[np.int64], total: int, sequence_length: int) -> npt.NDArray[np.int64]:
    """Return `lengths`, repeated until they fill `total` tokens and cut at the ends of packs."""
    ends = np.cumsum(np.tile(lengths, -(-total // int(lengths.sum()))))
    pack_ends = np.arange(sequence_length, total + 1, sequence_length)
    return np.diff(np.union1d(ends[ends < total], pack_ends), prepend=0).astype(np.int64)


def read_lengths(path: Path) -> npt.NDArray[np.int64]:
    """Return the document lengths of a file, one positive integer a line. Raises KernelInputError."""
    try:
        lengths = np.array([int(line) for line in path.read_text(encoding="utf-8").split()], dtype=np.int64)
    except (OSError, ValueError) as error:
        raise KernelInputError(
            f"{path}: cannot be read as document lengths ({error}); write one number a line"
        ) from error
    if lengths.size == 0 or lengths.min() < 1:
        raise KernelInputError(f"{path}: document lengths are positive, one a line; this file has none or others")
    return lengths


@dataclass(frozen=True, kw_only=True)
class TileFigures:
    """What tiles of one size cost on some masks."""

    work_to_area: float
    """Query-key pairs of the live tiles to those of the mask."""
    full_share: float
    """Share of live tiles that need no mask arithmetic."""
    live_tiles: int


def tile_figures(masks: Iterator[Intervals], *, query_tile: int, key_tile: int) -> TileFigures:
    """Return the figures over all `masks`, each (kv_lo, kv_hi) stacked [2, B, S] with S keys."""
    area = work = live = full = 0
    for lo, hi in masks:
        table = tiles.tile_table(lo, hi, keys=lo.shape[1], query_tile=query_tile, key_tile=key_tile)
        area += tiles.mask_area(lo, hi)
        work += table.live_area
        live += table.live_tiles
        full += table.full_tiles
    return TileFigures(work_to_area=work / area, full_share=full / live, live_tiles=live)
