"""The part of a PackedBatch that the model sees, as torch tensors on the rank's device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triweave.data_pipeline.batch import PackedBatch
from triweave.kernels import attention_tiles, mmca_tiles, tiles
from triweave.kernels.backends import choose
from triweave.kernels.tuning import pinned
from triweave.pretrain.encoders.tables import ItemTables, heads_config, readers
from triweave.pretrain.fusion.arrangement import MediaAxis, for_cross, for_mmca
from triweave.pretrain.fusion.config import FusionConfig
from triweave.pretrain.model.config import LayoutConfig, ModelConfig
from triweave.pretrain.objectives.losses import loss_slots

ENCODER_TILES = "encoder_tiles"
"""Key of PackedBatch.extra under which `KernelTables` leaves those of the encoders, by modality and reader."""
ATTENTION_TILES = "attention_tiles"
"""Key of PackedBatch.extra under which `KernelTables` leaves the self-attention's tables."""
MEDIA_TILES = "media_tiles"
"""Key of PackedBatch.extra with the cross-attention's tables."""
LATENT_TILES = "latent_tiles"
"""Key of PackedBatch.extra with the resampler's tables."""
ARRANGED = "arranged"
"""Key of PackedBatch.extra with an `Arranged`, where the model reads the batch otherwise than it was packed."""
OBJECTIVE_ROWS = "objective_rows"
"""Key of PackedBatch.extra with the tables of `objectives.rows`: objective -> ObjectiveRows."""
MASKED_INDEX = "masked_index"
"""Key of PackedBatch.extra: int64 [M] flat positions, as the model reads the batch, that are hidden from it."""
ON_CPU = frozenset({"segments", "mmca_segments"})
"""Tables that are read on the host; kernels on a device read the others there."""


@dataclass(frozen=True, kw_only=True)
class DevicePayload:
    """The media items of one modality; fields and shapes as in `data_pipeline.batch.Payload`."""

    values: Tensor
    lengths: Tensor
    grids: Tensor
    token_index: Tensor
    tiles: dict[str, dict[str, Tensor]] | None = None
    """Tables of the attentions within its encoder (`ItemTables`), by who reads them; none where it came without."""
    here: Tensor | None = None
    """int64 [L] which tokens have a place in this rank's slice of the rows, those of token_index; None: all."""


@dataclass(frozen=True, kw_only=True)
class Arranged:
    """A batch as a model of another layout or fusion reads it.

    batch: arranged, its payloads without values. axis: the media axis of cross-attention, else None.
    layout, arrangement: what it was made for.
    """

    batch: PackedBatch
    axis: MediaAxis[npt.NDArray[Any]] | None
    layout: LayoutConfig
    arrangement: tuple[str | int | None, ...]


@dataclass(frozen=True, kw_only=True)
class DeviceRows:
    """The C rows of one objective; fields and shapes as in `objectives.rows.ObjectiveRows`."""

    index: Tensor
    lengths: Tensor
    targets: Tensor
    weights: Tensor
    parts: Tensor


@dataclass(frozen=True, kw_only=True)
class DeviceBatch:
    """One micro-batch on a device; fields, shapes and sentinels as in `data_pipeline.batch.PackedBatch`.

    For cross-attention the fields are those of the text and its tags (`fusion.arrangement`): R takes the place of S.
    Of a rank's slice of the rows (`engine.slices`) kv_lo, kv_hi and tiles are those of the whole rows.
    payloads keeps the order of PackedBatch; the model goes through its own towers in their fixed order.
    tiles: tables of the self-attention, each where it is read; None where the batch came without (`KernelTables`).
    layout, arrangement: what the fields follow; the model refuses others than its own.
    media_lo, media_hi: int32 [B, R] what each position sees of `axis`, with their tables; None without cross-attention.
    latent_tiles: tables of the resampler.
    cached_modality: int [B, T] modality of the keys, where they are not the batch's own: while decoding with mmca.
    segment_index: int64 [L] flat positions in B * S of the C one-span segments, one segment after the other.
    segment_lengths, segment_modality: int64 [C] positions and modality of each; their lengths sum to L.
    row_slot: int64 [N] where each supervised position is counted (`objectives.losses.loss_slots`) among `sources`.
    objectives: what `objectives.rows` has made for the heads beside those two. masked_index: int64 [M] flat positions
        that the model must not see.
    """

    tokens: Tensor
    modality_ids: Tensor
    positions: Tensor
    kv_lo: Tensor
    kv_hi: Tensor
    row_index: Tensor
    targets: Tensor
    row_weight: Tensor
    row_slot: Tensor
    contrastive_group: Tensor
    segment_index: Tensor
    segment_lengths: Tensor
    segment_modality: Tensor
    payloads: dict[str, DevicePayload] = field(default_factory=dict)
    tiles: dict[str, Tensor] | None = None
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    arrangement: tuple[str | int | None, ...] = ()
    axis: MediaAxis[Tensor] | None = None
    media_lo: Tensor | None = None
    media_hi: Tensor | None = None
    media_tiles: dict[str, Tensor] | None = None
    latent_tiles: dict[str, Tensor] | None = None
    cached_modality: Tensor | None = None
    objectives: dict[str, DeviceRows] = field(default_factory=dict)
    masked_index: Tensor | None = None
    sources: int = 1

    def rows_of(self, objective: str, features: int | None = None) -> DeviceRows:
        """Return an objective's rows, none where the batch came without; features: numbers of one of its targets."""
        if objective in self.objectives:
            return self.objectives[objective]
        nothing = self.segment_lengths[:0]
        empty = nothing.float()
        return DeviceRows(
            index=nothing,
            lengths=nothing,
            targets=empty if features is None else empty.view(0, features),
            weights=empty,
            parts=nothing.view(0, 2),
        )


@dataclass(frozen=True, kw_only=True)
class KernelTables:
    """Make what the kernels want of a batch, once for all layers: the loader's `post_pack`, run in its workers.

    head_width, number_bytes: K and the bytes of one of q's numbers. strips: make what `reference` and `sdpa` read.
    tile_lists: make what `triton` reads. architecture: that of the device, on which the sizes of the tiles depend.
    media_strips, media_tile_lists: the same for the op of the fusion, cross_attention or mmca.
    encoders: modality -> the tables of its encoder's attentions.
    """

    head_width: int
    number_bytes: int
    strips: bool
    tile_lists: bool
    architecture: str | None = None
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    media_strips: bool = False
    media_tile_lists: bool = False
    encoders: dict[str, ItemTables] = field(default_factory=dict)

    def __call__(self, batch: PackedBatch) -> dict[str, Any]:
        """Return the entries of `PackedBatch.extra`."""
        arranged, axis = read_by(batch, self.layout, self.fusion)
        extra: dict[str, Any] = {ATTENTION_TILES: self.of(arranged.kv_lo, arranged.kv_hi, arranged.modality_ids)}
        if arranged is not batch:
            extra[ARRANGED] = Arranged(
                batch=_without_values(arranged), axis=axis, layout=self.layout, arrangement=self.fusion.arrangement
            )
        if axis is not None:
            extra[LATENT_TILES] = self.of_latents(axis.latent_lo, axis.latent_hi, axis.joint)
            extra[MEDIA_TILES] = self.of_media(arranged.media_lo, arranged.media_hi, axis.keys)
        held = [name for name in batch.payloads if name in self.encoders]
        extra[ENCODER_TILES] = {name: self.encoders[name](batch.payloads[name].lengths) for name in held}
        return extra

    def of(
        self,
        kv_lo: npt.NDArray[np.int32],
        kv_hi: npt.NDArray[np.int32],
        key_modality: npt.NDArray[np.integer[Any]],
        query_modality: npt.NDArray[np.integer[Any]] | None = None,
    ) -> dict[str, npt.NDArray[np.int32]]:
        """Return the self-attention's tables for queries that see kv_lo <= j < kv_hi of their row, int32 [B, S].

        key_modality: int [B, T], whose width counts for every kind of fusion and whose values count for mmca.
        query_modality: int [B, S], the keys' where it is left out.
        """
        if self.fusion.kind != "mmca":
            return self._intervals(kv_lo, kv_hi, key_modality.shape[1])
        mask = (kv_lo, kv_hi, key_modality, key_modality if query_modality is None else query_modality)
        tables = mmca_tiles.strip_tables(*mask) if self.media_strips else {}
        if self.media_tile_lists:
            pinned.use(self.architecture)
            tables |= mmca_tiles.triton_tables(*mask, width=self.head_width, number_bytes=self.number_bytes)
        return tables

    def of_media(
        self, media_lo: npt.NDArray[np.int32], media_hi: npt.NDArray[np.int32], keys: int
    ) -> dict[str, npt.NDArray[np.int32]]:
        """Return the cross-attention's tables for text that sees media_lo <= j < media_hi, int32 [B, R]."""
        own = replace(self, strips=self.media_strips, tile_lists=self.media_tile_lists)
        return own._intervals(media_lo, media_hi, keys)

    def of_latents(
        self, latent_lo: npt.NDArray[Any], latent_hi: npt.NDArray[Any], joint: npt.NDArray[Any]
    ) -> dict[str, npt.NDArray[np.int32]]:
        """Return the resampler's tables, for latents [B, L] that see intervals of the joint axis [B * (T + L)]."""
        if not latent_lo.shape[1]:
            return {}
        return self._intervals(latent_lo, latent_hi, len(joint) // max(1, len(latent_lo)))

    def _intervals(
        self, lo: npt.NDArray[np.int32], hi: npt.NDArray[np.int32], keys: int
    ) -> dict[str, npt.NDArray[np.int32]]:
        """Return the tables of an attention over the intervals [lo, hi), int32 [B, S], of `keys` keys a row."""
        tables = tiles.attention_tables(lo, hi) if self.strips else {}
        if self.tile_lists:
            pinned.use(self.architecture)
            tables |= attention_tiles.attention_tables(
                lo, hi, keys=keys, width=self.head_width, number_bytes=self.number_bytes
            )
        return tables


def kernel_tables(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> KernelTables:
    """Return the maker of the tables that a model on `device` with activations in `dtype` reads.

    Which those are follows from the implementation that serves: `model.attention`, or TRIWEAVE_KERNELS. On a GPU it is
    decided here, self-check included, and kept for the run. Raises KernelUnavailableError where the one asked for
    cannot serve.
    """
    chosen = choose("attention", config.attention, device.type, dtype, config.head_width)
    of_fusion = {"cross": "cross_attention", "mmca": "mmca"}.get(config.fusion.kind)
    of_media = choose(of_fusion, config.attention, device.type, dtype, config.head_width) if of_fusion else ""
    listed = config.head_width <= attention_tiles.WIDEST_HEAD and dtype.itemsize <= 4
    return KernelTables(
        head_width=config.head_width,
        number_bytes=dtype.itemsize,
        strips=chosen in ("reference", "sdpa"),
        tile_lists=chosen == "triton" and listed,
        architecture=pinned.architecture_of(device),
        layout=config.layout,
        fusion=config.fusion,
        media_strips=of_media in ("reference", "sdpa"),
        media_tile_lists=of_media == "triton" and listed,
        encoders={
            modality: ItemTables(
                kernels=kernel_tables(heads_config(settings, config), device, dtype),
                positions=settings.positions_per_token(modality),
                queries=readers(modality, settings),
            )
            for modality, settings in config.encoders.items()
            if readers(modality, settings)
        },
    )


def read_by(
    batch: PackedBatch, layout: LayoutConfig, fusion: FusionConfig
) -> tuple[PackedBatch, MediaAxis[npt.NDArray[Any]] | None]:
    """Return a packed batch as a model of that layout and fusion reads it, and the media axis of cross-attention."""
    arranged = arrange(batch, layout)
    if fusion.kind == "cross":
        return for_cross(arranged, fusion)
    return (for_mmca(arranged) if fusion.kind == "mmca" else arranged), None


def as_read(batch: PackedBatch) -> PackedBatch:
    """Return the batch as the model reads it, where `KernelTables` arranged it; payloads are then without values."""
    arranged: Arranged | None = batch.extra.get(ARRANGED)
    return batch if arranged is None else arranged.batch


def arrange(batch: PackedBatch, layout: LayoutConfig) -> PackedBatch:
    """Return the batch with the positions and the reach of its media tokens that a layout asks for.

    sequential  positions (i, i, i) for the i-th token of its document
    causal      kv_hi = own position + 1, except in one-span segments

    It returns a batch in the data pipeline's own layout (grid, item) itself; arranging twice changes nothing.
    """
    if layout == LayoutConfig():
        return batch
    B, S = batch.tokens.shape
    place = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    filled = batch.kv_hi > batch.kv_lo
    positions, kv_hi = batch.positions, batch.kv_hi
    if layout.positions == "sequential":
        since_start = np.where(filled, place - batch.kv_lo, 0).astype(np.int32)
        positions = np.repeat(since_start[:, :, None], 3, axis=2)
    if layout.media_attention == "causal":
        alone = np.zeros(B * S, bool)
        for first, length in zip(batch.segments.first.tolist(), batch.segments.lengths.tolist(), strict=True):
            alone[first : first + length] = True
        kv_hi = np.where(filled & ~alone.reshape(B, S), np.minimum(kv_hi, place + 1), kv_hi).astype(np.int32)
    return replace(batch, positions=positions, kv_hi=kv_hi)


def to_device(batch: PackedBatch, device: torch.device | str, *, sources: int = 1) -> DeviceBatch:
    """Copy a micro-batch to a device. sources: of the run, whose losses are told apart where there are several.

    On CUDA the copy goes through pinned memory and overlaps with the host; on CPU tensors share the arrays' memory
    where those are writeable and contiguous, so the arrays must not be changed afterwards.
    """
    target = torch.device(device)
    read, arranged = as_read(batch), batch.extra.get(ARRANGED)
    payloads = {
        name: DevicePayload(
            values=_move(payload.values, target),
            lengths=_move(payload.lengths, target),
            grids=_move(payload.grids, target),
            **_places(read.payloads[name].token_index, target),
            tiles={
                reader: move_tables(tables, target)
                for reader, tables in batch.extra.get(ENCODER_TILES, {}).get(name, {}).items()
            },
        )
        for name, payload in batch.payloads.items()
    }
    segments = read.segments
    spans = [first + np.arange(length) for first, length in zip(segments.first, segments.lengths, strict=True)]
    device_batch = DeviceBatch(
        tiles=_moved(batch, ATTENTION_TILES, target),
        tokens=_move(read.tokens, target),
        modality_ids=_move(read.modality_ids, target),
        positions=_move(read.positions, target),
        kv_lo=_move(read.kv_lo, target),
        kv_hi=_move(read.kv_hi, target),
        row_index=_move(read.row_index, target),
        targets=_move(batch.targets, target),
        row_weight=_move(batch.row_weight, target),
        row_slot=_move(loss_slots(batch, sources), target),
        sources=sources,
        contrastive_group=_move(batch.contrastive_group, target),
        segment_index=_move(np.concatenate([np.empty(0, np.int64), *spans]), target),
        segment_lengths=_move(segments.lengths.astype(np.int64), target),
        segment_modality=_move(segments.modality.astype(np.int64), target),
        payloads=payloads,
        objectives={
            name: DeviceRows(**{item.name: _move(getattr(rows, item.name), target) for item in fields(DeviceRows)})
            for name, rows in batch.extra.get(OBJECTIVE_ROWS, {}).items()
        },
        masked_index=_move(batch.extra.get(MASKED_INDEX, np.empty(0, np.int64)), target),
    )
    if arranged is None:
        return device_batch
    device_batch = replace(device_batch, layout=arranged.layout, arrangement=arranged.arrangement)
    if arranged.axis is None:
        return device_batch
    axis = {item.name: _move(getattr(arranged.axis, item.name), target) for item in fields(MediaAxis)}
    return replace(
        device_batch,
        axis=MediaAxis(**axis),
        media_lo=_move(read.media_lo, target),
        media_hi=_move(read.media_hi, target),
        media_tiles=_moved(batch, MEDIA_TILES, target),
        latent_tiles=_moved(batch, LATENT_TILES, target),
    )


def move_tables(tables: Mapping[str, npt.NDArray[np.int32]], device: torch.device) -> dict[str, Tensor]:
    """Return the attention's tables as tensors where they are read."""
    return {name: _move(table, torch.device("cpu") if name in ON_CPU else device) for name, table in tables.items()}


def _places(token_index: npt.NDArray[np.int64], device: torch.device) -> dict[str, Tensor]:
    """Return `token_index` of the tokens that have a place, and `here`, which they are, unless all have one."""
    if (token_index >= 0).all():
        return {"token_index": _move(token_index, device)}
    here = np.flatnonzero(token_index >= 0)
    return {"token_index": _move(token_index[here], device), "here": _move(here, device)}


def _moved(batch: PackedBatch, key: str, device: torch.device) -> dict[str, Tensor] | None:
    """Return the tables that the loader left under a key, where they are read; None where it made none."""
    tables = batch.extra.get(key)
    return None if tables is None else move_tables(tables, device)


def _without_values(batch: PackedBatch) -> PackedBatch:
    """Return the batch without the payloads' values, which would travel from the worker twice."""
    payloads = {name: replace(payload, values=payload.values[:0]) for name, payload in batch.payloads.items()}
    return replace(batch, payloads=payloads)


def _move(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
