"""The packs of a run's config, from the plan alone: which pieces a pack holds, and what each token attends to.

No sample is read: a pack's layout and its attention intervals are a function of metadata. The intervals come from the
loader's own `collate`, as stretches of tokens that are alike:

    causal   token i of the stretch sees [lo, i + 1)         text
    block    every token of the stretch sees [lo, hi)        media, one-span segments
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.config import DataConfig
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.stream.collate import Row, collate
from triweave.data_pipeline.stream.content import AloneSpan, Piece
from triweave.data_pipeline.stream.layout import PiecePlan, piece_layouts, row_pieces
from triweave.data_pipeline.stream.plan import ALONE, Planner
from triweave.launch.errors import ViewError

SHOWN_ROWS = 4096
"""Rows of a block whose fill is sent to the page."""


class Stretch(NamedTuple):
    """Tokens [start, end) of a pack, of one modality and one piece. piece: number of it in the row."""

    start: int
    end: int
    lo: int
    hi: int
    causal: bool
    modality: str
    piece: int


class PackBook:
    """The blocks and packs of a config; usable from several threads."""

    def __init__(self, config: DataConfig) -> None:
        """Read what planning needs. Raises DataError."""
        self._planner = Planner(config)
        self._lock = threading.Lock()

    def block(self, block: int) -> dict[str, Any]:
        """Return the rows of a block and how full they are. Raises ViewError and DataError."""
        if not 0 <= block < 1 << 40:
            raise ViewError(f"block {block}: must be a whole number from 0 on")
        with self._lock:
            plan = self._planner.block(block)
        return {
            "block": block,
            "rows": plan.rows,
            "sequence_length": self._planner.config.sequence_length,
            "row_tokens": plan.row_tokens[:SHOWN_ROWS].tolist(),
            "tokens": plan.modality_tokens,
            "samples": plan.drawn_samples,
            "left_out": plan.left_out,
        }

    def pack(self, block: int, row: int) -> dict[str, Any]:
        """Return one pack: its pieces, and its stretches with their attention intervals.

        Raises ViewError for a row that the block does not have.
        """
        rows = self.block(block)["rows"]
        with self._lock:
            plan = self._planner.block(block)
            if not 0 <= row < rows:
                raise ViewError(f"row {row}: block {block} has the rows 0 to {rows - 1}")
            planned = row_pieces(plan, row)
            pieces = [made for piece in planned for made in self._pieces(piece)]
            batch = collate(
                [Row(0, pieces)],
                {},
                sequence_length=self._planner.config.sequence_length,
                pad_id=self._planner.tokenizer.pad_id,
            )
            return {
                "block": block,
                "row": row,
                "rows": rows,
                "sequence_length": self._planner.config.sequence_length,
                "tokens": int(plan.row_tokens[row]),
                "pieces": [self._described(piece) for piece in planned for _ in self._layouts(piece)],
                "stretches": [stretch._asdict() for stretch in stretches(batch)],
            }

    def rows_of(self, block: int, source: str, shard: int, sample: int) -> list[int]:
        """Return the rows of a block that hold pieces of a sample, which is a number in its shard.

        None of them where the block draws it not, or leaves it out.
        """
        names = [entry.name for entry in self._planner.config.sources]
        if source not in names:
            return []
        with self._lock:
            plan = self._planner.block(block)
        own = (plan.sources == names.index(source)) & (plan.shards == shard) & (plan.samples == sample)
        rows = np.searchsorted(plan.row_starts, np.flatnonzero(own), side="right") - 1
        found: list[int] = np.unique(rows).tolist()
        return found

    def _layouts(self, piece: PiecePlan) -> list[Any]:
        return piece_layouts(self._planner.catalog(piece.source, piece.shard), piece)

    def _pieces(self, piece: PiecePlan) -> list[Piece]:
        """Return the Pieces of a planned one with pad ids for tokens."""
        return [
            Piece(
                tokens=np.full(layout.tokens, self._planner.tokenizer.pad_id, np.int32),
                runs=layout.runs,
                weight=1.0,
                sample_id="",
                sample_hash=0,
                alone=AloneSpan(piece.item, layout.parts[0].kind, 0, 0) if layout.alone else None,
            )
            for layout in self._layouts(piece)
        ]

    def _described(self, piece: PiecePlan) -> dict[str, Any]:
        manifest = self._planner.manifests[piece.source]
        first = sum(shard.samples for shard in manifest.shards[: piece.shard])
        return {
            "source": self._planner.source_name(piece.source),
            "sample": first + piece.sample,
            "key": self._planner.catalog(piece.source, piece.shard).keys[piece.sample].as_py(),
            "epoch": piece.epoch,
            "first": piece.first,
            "end": piece.end,
            "alone": piece.kind == ALONE,
        }


def stretches(batch: PackedBatch) -> list[Stretch]:
    """Return the stretches of the first row of a batch, from left to right; padding has none."""
    used = np.flatnonzero(batch.document_ids[0] >= 0)
    lo, hi = (column[0, used].astype(np.int64) for column in (batch.kv_lo, batch.kv_hi))
    modality, piece = (column[0, used] for column in (batch.modality_ids, batch.document_ids))
    same = np.ones(len(used), bool)
    same[:1] = False
    for column in (modality, piece):
        same[1:] &= column[1:] == column[:-1]
    causal = hi == used + 1
    # A block's last token ends where a causal one does, so what it continues decides.
    same[1:] &= (hi[1:] == hi[:-1]) | (causal[1:] & causal[:-1])
    starts = np.flatnonzero(~same)
    ends = np.append(starts[1:], len(used))[: len(starts)]
    names = {0: "text"} | {entry.id: name for name, entry in MODALITIES.items()}
    return [
        Stretch(
            start=int(used[start]),
            end=int(used[end - 1]) + 1,
            lo=int(lo[start]),
            hi=int(hi[end - 1]),
            causal=_is_causal(hi[start:end], int(used[start])),
            modality=names[int(modality[start])],
            piece=int(piece[start]),
        )
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]


def _is_causal(hi: npt.NDArray[np.int64], start: int) -> bool:
    return len(hi) == 1 or int(hi[0]) == start + 1
