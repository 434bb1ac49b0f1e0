"""The work of the ops over media, on the reference distribution: which keys text and media tokens of a pack see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from triweave.kernels import tiles
from triweave.kernels.roofline import work
from triweave.kernels.roofline.tile_figures import mask_intervals
from triweave.kernels.roofline.work import AttentionShape, Work


@dataclass(frozen=True, kw_only=True)
class MediaPack:
    """Reference packs with their media: all arrays [B, S]."""

    kv_lo: npt.NDArray[np.int32]
    kv_hi: npt.NDArray[np.int32]
    document_ids: npt.NDArray[np.int64]
    span_ids: npt.NDArray[np.int64]
    """-1 at text."""


def media_pack(batch: int, sequence_length: int, *, seed: int = 0) -> MediaPack:
    """Return `batch` packs of the reference distribution; its bidirectional spans are the media."""
    lo, hi = mask_intervals("interleaved", batch, sequence_length, seed=seed)
    same_as_next = np.zeros(hi.shape, dtype=bool)
    same_as_next[:, :-1] = hi[:, :-1] == hi[:, 1:]
    in_span = same_as_next.copy()
    in_span[:, 1:] |= same_as_next[:, :-1]
    first_of_document = lo == np.arange(sequence_length)
    begins = in_span & ~np.roll(same_as_next, 1, axis=1)
    return MediaPack(
        kv_lo=lo,
        kv_hi=hi,
        document_ids=np.cumsum(first_of_document, axis=1) - 1,
        span_ids=np.where(in_span, np.cumsum(begins, axis=1) - 1, -1),
    )


def cross_attention(
    direction: str, *, batch: int, sequence_length: int, heads: int, key_heads: int, width: int, number_bytes: int = 2
) -> Work:
    """Return the work where each token of the reference packs sees the latest medium of its document."""
    pack = media_pack(batch, sequence_length)
    lo, hi = tiles.media_intervals(pack.document_ids, pack.span_ids, seen="immediate")
    shape = AttentionShape(
        batch=batch,
        rows=sequence_length,
        keys=int((pack.span_ids >= 0).sum(axis=1).max()),
        heads=heads,
        key_heads=key_heads,
        width=width,
        pairs=tiles.mask_area(lo, hi),
        number_bytes=number_bytes,
    )
    return work.attention(direction, shape)


def mmca(
    direction: str, *, batch: int, sequence_length: int, heads: int, key_heads: int, width: int, number_bytes: int = 2
) -> Work:
    """Return the work where text sees its interval, in two classes, and media see the media of theirs."""
    pack = media_pack(batch, sequence_length)
    is_media = pack.span_ids >= 0
    media_before = np.concatenate([np.zeros((batch, 1), np.int64), np.cumsum(is_media, axis=1)], axis=1)
    row = np.arange(batch)[:, None]
    media_seen = media_before[row, pack.kv_hi] - media_before[row, pack.kv_lo]
    pairs = np.where(is_media, media_seen, pack.kv_hi - pack.kv_lo)
    shape = AttentionShape(
        batch=batch,
        rows=sequence_length,
        keys=sequence_length,
        heads=heads,
        key_heads=key_heads,
        width=width,
        pairs=int(pairs.sum()),
        number_bytes=number_bytes,
    )
    return work.attention(direction, shape)
