"""MMCA with queries and keys in the order of their class, text before media, and what that mask costs. numpy only.

A text query sees the text keys and the media keys of its interval in two separate softmaxes. Each class taken alone, in
its own order, what an interval holds of it is an interval again. So MMCA is two attentions over intervals, which the
strips and tile lists of attention serve; tiles hold queries and keys of one class only, but for one of each in a pack.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from triweave.kernels.attention_tiles import tile_lists
from triweave.kernels.tiles import Intervals, segments

TEXT = 0
"""Modality of text; every other one is media."""
CLASSES = 2
"""Text, then media."""
Modalities = npt.NDArray[np.integer]


def layout(
    kv_lo: Intervals, kv_hi: Intervals, key_modality: Modalities, query_modality: Modalities
) -> npt.NDArray[np.int32]:
    """Return int32 [B, T + 5 S]: the order of the keys, that of the queries, and the queries' intervals.

    Position n holds key keys[b, n] and query queries[b, n]: those of text as they come, then those of media. There
    follow text_lo, text_hi, media_lo and media_hi [B, S], by positions: of the keys that the query at position n sees.
    A media query's text interval is empty. Intervals are clipped to [0, T].
    """
    key_count = key_modality.shape[1]
    text_keys, text_queries = key_modality == TEXT, query_modality == TEXT
    queries = np.argsort(~text_queries, axis=1, kind="stable")
    lo, hi = (np.take_along_axis(np.clip(x, 0, key_count), queries, axis=1) for x in (kv_lo, kv_hi))
    text_before = np.pad(np.cumsum(text_keys, axis=1), ((0, 0), (1, 0)))
    text_lo, text_hi = (np.take_along_axis(text_before, x, axis=1) for x in (lo, hi))
    first_media = text_before[:, -1:]
    sees_text = np.take_along_axis(text_queries, queries, axis=1)
    pieces = (
        np.argsort(~text_keys, axis=1, kind="stable"),
        queries,
        text_lo * sees_text,
        text_hi * sees_text,
        first_media + lo - text_lo,
        first_media + hi - text_hi,
    )
    return np.concatenate(pieces, axis=1).astype(np.int32)


def own_spans(kv_lo: Intervals, span_ids: npt.NDArray[np.integer]) -> Intervals:
    """Return kv_lo of self-attention raised, at media queries, to the first token of their own span.

    span_ids: [B, S], negative at text; each run of one number is a span. kv_hi stays as it is: the end of the span, or
    i + 1 where a span is causal.
    """
    changes = np.ones(span_ids.shape, dtype=bool)
    changes[:, 1:] = span_ids[:, 1:] != span_ids[:, :-1]
    first = np.maximum.accumulate(np.where(changes, np.arange(span_ids.shape[1]), 0), axis=1)
    return np.where(span_ids < 0, kv_lo, np.maximum(kv_lo, first)).astype(np.int32)


def class_intervals(made: npt.NDArray[np.int32], keys: int) -> tuple[Intervals, Intervals]:
    """Return (lo, hi) of a layout, int32 [2 B, S]: the batch rows' text intervals, then their media intervals."""
    batch, columns = made.shape
    bounds = made[:, columns - 4 * ((columns - keys) // 5) :].reshape(batch, CLASSES, 2, -1).transpose(2, 1, 0, 3)
    lo, hi = bounds.reshape(2, CLASSES * batch, -1)
    return lo, hi


def strip_tables(
    kv_lo: Intervals, kv_hi: Intervals, key_modality: Modalities, query_modality: Modalities
) -> dict[str, npt.NDArray[np.int32]]:
    """Return the per-pack tables that `mmca(tiles=...)` takes on the CPU path; for `post_pack` in a loader worker."""
    made = layout(kv_lo, kv_hi, key_modality, query_modality)
    return {"mmca_layout": made, "mmca_segments": segments(*class_intervals(made, key_modality.shape[1]))}


def triton_tables(
    kv_lo: Intervals,
    kv_hi: Intervals,
    key_modality: Modalities,
    query_modality: Modalities,
    *,
    width: int,
    number_bytes: int,
) -> dict[str, npt.NDArray[np.int32]]:
    """Return the per-pack tables that `mmca(tiles=..., impl="triton")` takes; for `post_pack` in a loader worker."""
    made = layout(kv_lo, kv_hi, key_modality, query_modality)
    keys = key_modality.shape[1]
    intervals = class_intervals(made, keys)
    lists = tile_lists(*intervals, keys=keys, width=width, number_bytes=number_bytes, parts=CLASSES)
    return {"mmca_layout": made, "mmca_tile_lists": lists}
