"""The one structure that leaves the data pipeline: PackedBatch, plain numpy, and the step window that groups them.

Dimensions: B rows (packs) of the micro-batch, S packed sequence length, T media keys of the longest row, N supervised
positions, M media items of one modality, C one-span segments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

TEXT_ID = 0
"""Modality id of text; media modalities take their ids from the registry, padding is -1."""
PADDING_ID = -1
Label = str | int | float
"""What a document label can be to reach a batch; truth values are numbers."""


@dataclass(frozen=True, kw_only=True)
class Payload:
    """The media items of one modality in a micro-batch, ragged, in row-major order of appearance.

    values: [sum(lengths), features] one payload row per media token (image: uint8 pixels of one patch in h, w, c order;
        audio: float32 log-mel of `frames_per_token` frames, frame-major, or their samples).
    lengths: int32 [M] tokens of each item.
    grids: int32 [M, 3] (t, h, w) token grid of each item; their product is the length.
    token_index: int64 [sum(lengths)] flat position in B * S where each token's embedding goes.
    item_rows: int32 [M] row of the micro-batch that holds the item.
    """

    values: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    grids: npt.NDArray[np.int32]
    token_index: npt.NDArray[np.int64]
    item_rows: npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Segments:
    """The C one-span segments of a micro-batch, for contrastive losses; by row, then item, then modality.

    A segment is one part of a document on its own: `[bos] part [eos]`. An item is the segments of one document.

    first: int64 [C] flat position in B * S of each segment's bos.
    lengths: int32 [C] tokens of the segment.
    modality: int8 [C] modality of its part, TEXT_ID for text.
    rows: int32 [C] row of the micro-batch. items: int32 [C] number of the item within its row.
    content_keys: uint64 [C] equal for equal content: xxh3 of a medium's bytes, of the normalised words of a text.
    group_keys: uint64 [C] equal within a concept (`labels.group`); 0 where the corpus names none.
    weights: float32 [C] 1; 0 for every segment of an item with a filler.
    """

    first: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int32]
    modality: npt.NDArray[np.int8]
    rows: npt.NDArray[np.int32]
    items: npt.NDArray[np.int32]
    content_keys: npt.NDArray[np.uint64]
    group_keys: npt.NDArray[np.uint64]
    weights: npt.NDArray[np.float32]

    @classmethod
    def none(cls) -> Segments:
        """Return the table of a batch without segments."""
        return cls(
            first=np.empty(0, np.int64),
            lengths=np.empty(0, np.int32),
            modality=np.empty(0, np.int8),
            rows=np.empty(0, np.int32),
            items=np.empty(0, np.int32),
            content_keys=np.empty(0, np.uint64),
            group_keys=np.empty(0, np.uint64),
            weights=np.empty(0, np.float32),
        )

    def __len__(self) -> int:
        """Return C."""
        return len(self.first)


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """B packed rows, everything a forward pass and its loss need.

    tokens: int32 [B, S] token ids; placeholders at media positions, pad id at padding.
    modality_ids: int8 [B, S] modality of each position, PADDING_ID at padding.
    document_ids: int32 [B, S] document piece within the row, -1 at padding.
    span_ids: int32 [B, S] media item within the row (all modalities counted together), -1 elsewhere.
    positions: int32 [B, S, 3] (t, h, w), starting at 0 for every document piece.
    kv_lo, kv_hi: int32 [B, S] half-open key interval of each query within its row; empty (0, 0) at padding.
    media_index: int64 [B, T] position within the row of each media token, in order; -1 beyond a row's last.
    media_lo, media_hi: int32 [B, S] interval on the T axis: the media tokens of the same document before the query
        (its own whole span for a media query; all media of its segment for a query in a one-span segment).
    key_modality: int8 [B, T] modality of each media key, PADDING_ID beyond a row's last.
    row_index: int64 [N] flat positions in B * S whose next token is supervised.
    targets: int64 [N] the token each should predict.
    row_weight: float32 [N] loss weight; 0 in fillers.
    row_modality: int8 [N] what the target follows: the modality of the latest media item before it in its document,
        TEXT_ID when there is none.
    row_source: int16 [N] the source of its document, numbered as in `data.sources`.
    contrastive_group: int32 [B] group of plan rows whose spans are each other's negatives; -1 for zero-loss rows.
    payloads: modality name -> Payload; a modality that no row holds is absent.
    planned_tokens, actual_tokens: modality name -> tokens planned for, and really filled in (fillers are zero).
    plan_rows: int64 [B] absolute plan row of each row; -1 for a zero-loss row that only evens out the ranks.
    segments: the one-span segments among the pieces; none unless `packing.contrastive_share` is above 0.
    sample_ids: per row, one `source:epoch:key:first_token:end_token` per document piece, with `:alone` behind it for
        one-span segments; fillers end in `:filler`.
    sample_hashes: per row, the xxh3 of each piece's tokens, in the order of sample_ids.
    labels: per row, the labels of each piece's document that `data.labels` names and it has; a filler has none. The
        piece `document_ids` numbers k in row b is labels[b][k]. Empty for a batch made without.
    extra: whatever `post_pack` adds (tile tables).
    """

    tokens: npt.NDArray[np.int32]
    modality_ids: npt.NDArray[np.int8]
    document_ids: npt.NDArray[np.int32]
    span_ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    kv_lo: npt.NDArray[np.int32]
    kv_hi: npt.NDArray[np.int32]
    media_index: npt.NDArray[np.int64]
    media_lo: npt.NDArray[np.int32]
    media_hi: npt.NDArray[np.int32]
    key_modality: npt.NDArray[np.int8]
    row_index: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    row_weight: npt.NDArray[np.float32]
    row_modality: npt.NDArray[np.int8]
    row_source: npt.NDArray[np.int16]
    contrastive_group: npt.NDArray[np.int32]
    payloads: dict[str, Payload]
    planned_tokens: dict[str, int]
    actual_tokens: dict[str, int]
    plan_rows: npt.NDArray[np.int64]
    sample_ids: list[list[str]]
    sample_hashes: list[list[int]]
    segments: Segments = field(default_factory=Segments.none)
    labels: list[list[dict[str, Label]]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def supervised_tokens(self) -> float:
        """Sum of the loss weights, this rank's share of the global normaliser."""
        return float(self.row_weight.sum())
