"""What one rank of a sequence-parallel group holds of a micro-batch: a run of positions of every row.

    a row of S = 7 on 3 ranks    0 1 2 | 3 4 | 5 6
    tokens, positions, loss      of the run
    key intervals and tables     of the whole rows, which attention sees (`sequence_parallel`)
    media                        whole items that have a token in the run, encoded by every rank that holds a part of
                                 one; with cross-attention all of them, whose keys every rank has for itself

A slice is a micro-batch like any other: its loss sums, its modalities and its gradients are announced, guarded and
added up as those of ranks with rows of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import xxhash
from torch import nn

from triweave.data_pipeline.batch import PADDING_ID, PackedBatch, Payload, Segments
from triweave.pretrain.batch import (
    ARRANGED,
    ATTENTION_TILES,
    ENCODER_TILES,
    MEDIA_TILES,
    Arranged,
    KernelTables,
    as_read,
    kernel_tables,
)
from triweave.pretrain.engine.participation import name_samples
from triweave.pretrain.engine.sequence_parallel import SequenceGroup, shares
from triweave.pretrain.engine.world import World
from triweave.pretrain.errors import ParticipationError
from triweave.pretrain.model.decoder import Decoder

if TYPE_CHECKING:
    from triweave.pretrain.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Slicer:
    """Cuts micro-batches for the rank at `place` of a group of `ranks`; tables: the maker of what the kernels read."""

    place: int
    ranks: int
    tables: KernelTables

    def window(self, micro_batches: Sequence[PackedBatch], world: World, *, step: int) -> list[PackedBatch]:
        """Return the slices of a step's micro-batches; collective.

        Raises ParticipationError on all ranks where ranks that share rows hold other samples, a filler for one.
        """
        held = [(batch.plan_rows.tolist(), batch.sample_ids, batch.sample_hashes) for batch in micro_batches]
        key = xxhash.xxh3_64_intdigest(repr(held).encode()) >> 12  # as many bits as a float64 holds
        keys, first = world.gather([key])[:, 0], world.rank - self.place
        error = None
        if keys[world.rank] != keys[first]:
            error = ParticipationError(
                f"rank {world.rank} shares its rows with rank {first} but holds other samples at step {step}: "
                f"{'; '.join(name_samples(batch) for batch in micro_batches)}; run `triweave verify` on the shards "
                "that each of them reads"
            )
        if (keys != np.repeat(keys[:: self.ranks], self.ranks)).any():
            world.agree(error)
        return [self(batch) for batch in micro_batches]

    def __call__(self, batch: PackedBatch) -> PackedBatch:
        """Return this rank's slice; what is not a matter of positions, such as sample ids, stays as it is.

        kv_lo, kv_hi and the tables of self-attention stay those of the whole rows, for mmca the modalities, too.
        row_index counts positions of the slice as the model reads it, with its targets. Tokens of an item that are in
        another slice have token_index -1. Rows of fewer positions than ranks are padded. One-span segments are left
        out: nothing that can be trained here reads them.
        """
        whole = as_read(batch)
        if whole.tokens.shape[1] < self.ranks:
            whole = _widened(whole, self.ranks)
        first, end = self._run(whole.tokens.shape[1])
        read = _supervised(_positions(whole, first, end), whole, first, end)
        kind = self.tables.fusion.kind
        if kind == "mmca":  # whose attention goes by the modality of every key and query of the whole rows
            read = replace(read, modality_ids=whole.modality_ids)
        cross = kind == "cross"
        payloads = batch.payloads if cross else _items_in(batch, first, end)
        part = read
        if ARRANGED in batch.extra:
            part = _supervised(_positions(batch, *self._run(batch.tokens.shape[1])), whole, first, end)
        extra = batch.extra | self._tables(batch, whole, read, payloads, cross=cross)
        return replace(part, payloads=payloads, segments=Segments.none(), extra=extra)

    def _run(self, length: int) -> tuple[int, int]:
        """Return the first position of this rank's slice of rows of `length`, and the one behind its last."""
        lengths = shares(length, self.ranks)
        first = sum(lengths[: self.place])
        return first, first + lengths[self.place]

    def _tables(
        self, batch: PackedBatch, whole: PackedBatch, read: PackedBatch, payloads: dict[str, Payload], *, cross: bool
    ) -> dict[str, Any]:
        """Return the entries of `PackedBatch.extra` that are others for the slice than for the whole."""
        extra: dict[str, Any] = {}
        if whole is not as_read(batch):  # the loader's tables are of the rows before they were widened
            extra[ATTENTION_TILES] = self.tables.of(whole.kv_lo, whole.kv_hi, whole.modality_ids)
        arranged: Arranged | None = batch.extra.get(ARRANGED)
        if arranged is not None:
            kept = arranged.batch.payloads if cross else {n: _without_values(own) for n, own in payloads.items()}
            part = replace(read, payloads=kept, segments=Segments.none())
            extra[ARRANGED] = replace(arranged, batch=part)
            if arranged.axis is not None:
                extra[MEDIA_TILES] = self.tables.of_media(read.media_lo, read.media_hi, arranged.axis.keys)
        if ENCODER_TILES in batch.extra and not cross:
            held = [name for name in payloads if name in self.tables.encoders]
            extra[ENCODER_TILES] = {name: self.tables.encoders[name](payloads[name].lengths) for name in held}
        return extra


def slice_rows(model: nn.Module, config: RunConfig, world: World) -> Slicer | None:
    """Let the ranks of each group share their rows as `train.sequence_parallel` asks for; None where it is 1.

    Collective. Returns what cuts a micro-batch for this rank.
    """
    size = config.train.sequence_parallel
    if size == 1:
        return None
    group = SequenceGroup.of(world, size)
    cast(Decoder, model.get_submodule("decoder")).share_rows(group)
    tables = kernel_tables(config.model, world.device, config.train.dtype)
    return Slicer(place=group.place, ranks=size, tables=tables)


def _positions(batch: PackedBatch, first: int, end: int) -> PackedBatch:
    """Return the batch with positions `first` to `end` of every row; its key intervals stay."""
    return replace(
        batch,
        tokens=batch.tokens[:, first:end],
        modality_ids=batch.modality_ids[:, first:end],
        document_ids=batch.document_ids[:, first:end],
        span_ids=batch.span_ids[:, first:end],
        positions=batch.positions[:, first:end],
        media_lo=np.ascontiguousarray(batch.media_lo[:, first:end]),
        media_hi=np.ascontiguousarray(batch.media_hi[:, first:end]),
    )


def _supervised(part: PackedBatch, whole: PackedBatch, first: int, end: int) -> PackedBatch:
    """Return `part` with those supervised positions of `whole` that lie in positions `first` to `end` of its rows."""
    row, column = np.divmod(whole.row_index, whole.tokens.shape[1])
    here = (first <= column) & (column < end)
    return replace(
        part,
        row_index=(row * (end - first) + column - first)[here],
        targets=part.targets[here],
        row_weight=part.row_weight[here],
        row_modality=part.row_modality[here],
        row_source=part.row_source[here],
    )


def _items_in(batch: PackedBatch, first: int, end: int) -> dict[str, Payload]:
    """Return the items with a token in positions `first` to `end` of their row; a modality without is left out."""
    found = {}
    for name, payload in batch.payloads.items():
        row, column = np.divmod(payload.token_index, batch.tokens.shape[1])
        here = (first <= column) & (column < end)
        item = np.repeat(np.arange(len(payload.lengths)), payload.lengths)
        touched = np.bincount(item, weights=here, minlength=len(payload.lengths)) > 0
        if touched.any():
            place = np.where(here, row * (end - first) + column - first, -1)
            found[name] = Payload(
                values=payload.values[touched[item]],
                lengths=payload.lengths[touched],
                grids=payload.grids[touched],
                token_index=place[touched[item]],
                item_rows=payload.item_rows[touched],
            )
    return found


def _without_values(payload: Payload) -> Payload:
    return replace(payload, values=payload.values[:0])


def _widened(batch: PackedBatch, length: int) -> PackedBatch:
    """Return the batch with rows of `length` positions, padded at the end, so that no rank is without one."""
    short = batch.tokens.shape[1]

    def pad(values: npt.NDArray[Any], empty: int) -> npt.NDArray[Any]:
        ends = [(0, 0), (0, length - short), *[(0, 0)] * (values.ndim - 2)]
        return np.pad(values, ends, constant_values=empty)

    row, column = np.divmod(batch.row_index, short)
    return replace(
        batch,
        tokens=pad(batch.tokens, 0),
        modality_ids=pad(batch.modality_ids, PADDING_ID),
        document_ids=pad(batch.document_ids, -1),
        span_ids=pad(batch.span_ids, -1),
        positions=pad(batch.positions, 0),
        kv_lo=pad(batch.kv_lo, 0),
        kv_hi=pad(batch.kv_hi, 0),
        media_lo=pad(batch.media_lo, 0),
        media_hi=pad(batch.media_hi, 0),
        row_index=row * length + column,
    )
