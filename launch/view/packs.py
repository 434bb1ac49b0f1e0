"""The packs of a run's config, from the plan alone: which pieces a pack holds, and what each token attends to.

No sample is read: a pack's layout and its attention intervals are a function of metadata. The intervals come from the
loader's own `collate`, as stretches of tokens that are alike:

    causal   token i of the stretch sees [lo, i + 1)         text
    block    every token of the stretch sees [lo, hi)        media, one-span segments
"""

from __future__ import annotations

import math
import threading
import time
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
from triweave.data_pipeline.stream.windows import StepWalk
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
    """The blocks and packs of each plan segment of a config; usable from several threads.

    A later segment begins with what the one before leaves over, so the steps before it are walked, with plans alone.
    """

    def __init__(self, config: DataConfig, global_batch_rows: int | None = None) -> None:
        """Read what planning needs; global_batch_rows: rows of a step, which later segments depend on.

        Raises DataError.
        """
        self._planners = [Planner(config)]
        self._config = config
        self._step_rows = global_batch_rows
        self._walk: StepWalk | None = None
        self._lock = threading.Lock()

    def segments(self) -> list[dict[str, Any]]:
        """Return the steps of each segment, first and last, counted from 1; the last one of all has no end."""
        ends = [entry.after_step for entry in self._config.schedule]
        return [
            {"first_step": first + 1, "last_step": last, "sequence_length": config.sequence_length}
            for first, last, config in zip([0, *ends], [*ends, None], self._config.segments, strict=True)
        ]

    def reach(self, segment: int, seconds: float = math.inf) -> dict[str, Any]:
        """Walk towards a segment for `seconds`, a step at least.

        Returns whether it is there, the steps walked and those to be walked.
        Raises ViewError where there is no such segment, or the rows of a step are not known.
        """
        if not 0 <= segment < len(self._config.segments):
            raise ViewError(f"segment {segment}: the config has the segments 0 to {len(self._config.segments) - 1}")
        with self._lock:
            deadline = time.monotonic() + seconds
            while len(self._planners) <= segment:
                self._take_step()
                if time.monotonic() >= deadline:
                    break
            walked = self._walk.steps if self._walk else 0
        steps = self._config.schedule[segment - 1].after_step if segment else 0
        return {"segment": segment, "there": len(self._planners) > segment, "step": min(walked, steps), "steps": steps}

    def block(self, block: int, *, segment: int = 0) -> dict[str, Any]:
        """Return the rows of a block of a segment, counted from its start, and how full they are.

        end: the first (block, row) that the next segment takes over from, where that is known; else None.
        Raises ViewError and DataError.
        """
        planner = self._planner(segment)
        if not 0 <= block < 1 << 40:
            raise ViewError(f"block {block}: must be a whole number from 0 on")
        with self._lock:
            plan = planner.block(block)
            cut = self._planners[segment + 1].after if segment + 1 < len(self._planners) else None
        return {
            "segment": segment,
            "block": block,
            "rows": plan.rows,
            "sequence_length": planner.config.sequence_length,
            "row_tokens": plan.row_tokens[:SHOWN_ROWS].tolist(),
            "tokens": plan.modality_tokens,
            "samples": plan.drawn_samples,
            "left_out": plan.left_out,
            "end": [cut.block, cut.row] if cut else None,
        }

    def pack(self, block: int, row: int, *, segment: int = 0) -> dict[str, Any]:
        """Return one pack: its pieces, and its stretches with their attention intervals.

        Raises ViewError for a row that the block does not have.
        """
        planner, rows = self._planner(segment), self.block(block, segment=segment)["rows"]
        with self._lock:
            plan = planner.block(block)
            if not 0 <= row < rows:
                raise ViewError(f"row {row}: block {block} has the rows 0 to {rows - 1}")
            planned = row_pieces(plan, row)
            pieces = [made for piece in planned for made in _pieces(planner, piece)]
            batch = collate(
                [Row(0, pieces)],
                {},
                sequence_length=planner.config.sequence_length,
                pad_id=planner.tokenizer.pad_id,
            )
            return {
                "segment": segment,
                "block": block,
                "row": row,
                "rows": rows,
                "sequence_length": planner.config.sequence_length,
                "tokens": int(plan.row_tokens[row]),
                "pieces": [_described(planner, piece) for piece in planned for _ in _layouts(planner, piece)],
                "stretches": [stretch._asdict() for stretch in stretches(batch)],
            }

    def rows_of(self, block: int, source: str, shard: int, sample: int, *, segment: int = 0) -> list[int]:
        """Return the rows of a block that hold pieces of a sample, which is a number in its shard.

        None of them where the block draws it not, or leaves it out.
        """
        planner = self._planner(segment)
        names = [entry.name for entry in planner.config.sources]
        if source not in names:
            return []
        with self._lock:
            plan = planner.block(block)
        own = (plan.sources % len(names) == names.index(source)) & (plan.shards == shard) & (plan.samples == sample)
        rows = np.searchsorted(plan.row_starts, np.flatnonzero(own), side="right") - 1
        found: list[int] = np.unique(rows).tolist()
        return found

    def _planner(self, segment: int) -> Planner:
        self.reach(segment)
        return self._planners[segment]

    def _take_step(self) -> None:
        """Walk one step, and keep the planner of the segment that it is the first of."""
        if self._step_rows is None:
            raise ViewError(
                "later plan segments begin where the steps before them end: name the rows of a step with "
                "train.global_batch_rows=N"
            )
        first = self._planners[0]
        self._walk = self._walk or StepWalk(first, first.start())
        self._walk.step(self._step_rows)
        if self._walk.planner.segment == len(self._planners):
            self._planners.append(self._walk.planner)


def _layouts(planner: Planner, piece: PiecePlan) -> list[Any]:
    return piece_layouts(planner.catalog(piece.source, piece.shard), piece)


def _pieces(planner: Planner, piece: PiecePlan) -> list[Piece]:
    """Return the Pieces of a planned one with pad ids for tokens."""
    return [
        Piece(
            tokens=np.full(layout.tokens, planner.tokenizer.pad_id, np.int32),
            runs=layout.runs,
            weight=1.0,
            sample_id="",
            sample_hash=0,
            alone=AloneSpan(piece.item, layout.parts[0].kind, 0, 0) if layout.alone else None,
        )
        for layout in _layouts(planner, piece)
    ]


def _described(planner: Planner, piece: PiecePlan) -> dict[str, Any]:
    """Name a piece; `carried` is one that the segment before left over."""
    carried, source = divmod(piece.source, len(planner.manifests))
    first = sum(shard.samples for shard in planner.manifests[source].shards[: piece.shard])
    return {
        "source": planner.source_name(piece.source),
        "sample": first + piece.sample,
        "key": planner.catalog(piece.source, piece.shard).keys[piece.sample].as_py(),
        "epoch": piece.epoch,
        "first": piece.first,
        "end": piece.end,
        "alone": piece.kind == ALONE,
        "carried": carried > 0,
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
