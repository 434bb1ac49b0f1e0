"""The part of a PackedBatch that the model sees, as torch tensors on the rank's device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triweave.data_pipeline.batch import PackedBatch
from triweave.kernels import attention_tiles, tiles
from triweave.kernels.backends import choose
from triweave.kernels.tuning import pinned
from triweave.pretrain.model_config import ModelConfig

ATTENTION_TILES = "attention_tiles"
"""Key of PackedBatch.extra under which `KernelTables` leaves the self-attention's tables."""
ON_CPU = frozenset({"segments"})
"""Tables that are read on the host; kernels on a device read the others there."""


@dataclass(frozen=True, kw_only=True)
class DevicePayload:
    """The media items of one modality; fields and shapes as in `data_pipeline.batch.Payload`."""

    values: Tensor
    lengths: Tensor
    grids: Tensor
    token_index: Tensor


@dataclass(frozen=True, kw_only=True)
class DeviceBatch:
    """One micro-batch on a device; fields, shapes and sentinels as in `data_pipeline.batch.PackedBatch`.

    payloads keeps the order of PackedBatch; the model goes through its own towers in their fixed order.
    tiles: tables of the self-attention, each where it is read; None where the batch came without (`KernelTables`).
    segment_index: int64 [L] flat positions in B * S of the C one-span segments, one segment after the other.
    segment_lengths, segment_modality: int64 [C] positions and modality of each; their lengths sum to L.
    """

    tokens: Tensor
    modality_ids: Tensor
    positions: Tensor
    kv_lo: Tensor
    kv_hi: Tensor
    row_index: Tensor
    targets: Tensor
    row_weight: Tensor
    row_modality: Tensor
    contrastive_group: Tensor
    segment_index: Tensor
    segment_lengths: Tensor
    segment_modality: Tensor
    payloads: dict[str, DevicePayload] = field(default_factory=dict)
    tiles: dict[str, Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class KernelTables:
    """Make what the kernels want of a batch, once for all layers: the loader's `post_pack`, run in its workers.

    head_width, number_bytes: K and the bytes of one of q's numbers. strips: make what `reference` and `sdpa` read.
    tile_lists: make what `triton` reads. architecture: that of the device, on which the sizes of the tiles depend.
    """

    head_width: int
    number_bytes: int
    strips: bool
    tile_lists: bool
    architecture: str | None = None

    def __call__(self, batch: PackedBatch) -> dict[str, Any]:
        """Return the entries of `PackedBatch.extra`."""
        return {ATTENTION_TILES: self.of(batch.kv_lo, batch.kv_hi, keys=batch.kv_lo.shape[1])}

    def of(
        self, kv_lo: npt.NDArray[np.int32], kv_hi: npt.NDArray[np.int32], *, keys: int
    ) -> dict[str, npt.NDArray[np.int32]]:
        """Return `attention`'s tables for queries that see kv_lo <= j < kv_hi, int32 [B, S], of `keys` keys a row."""
        tables = tiles.attention_tables(kv_lo, kv_hi) if self.strips else {}
        if self.tile_lists:
            pinned.use(self.architecture)
            tables |= attention_tiles.attention_tables(
                kv_lo, kv_hi, keys=keys, width=self.head_width, number_bytes=self.number_bytes
            )
        return tables


def kernel_tables(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> KernelTables:
    """Return the maker of the tables that a model on `device` with activations in `dtype` reads.

    Which those are follows from the implementation that serves: `model.attention`, or TRIWEAVE_KERNELS. On a GPU it is
    decided here, self-check included, and kept for the run. Raises KernelUnavailableError where the one asked for
    cannot serve.
    """
    chosen = choose("attention", config.attention, device.type, dtype, config.head_width)
    return KernelTables(
        head_width=config.head_width,
        number_bytes=dtype.itemsize,
        strips=chosen in ("reference", "sdpa"),
        tile_lists=chosen == "triton" and config.head_width <= attention_tiles.WIDEST_HEAD and dtype.itemsize <= 4,
        architecture=pinned.architecture_of(device),
    )


def to_device(batch: PackedBatch, device: torch.device | str) -> DeviceBatch:
    """Copy a micro-batch to a device.

    On CUDA the copy goes through pinned memory and overlaps with the host; on CPU tensors share the arrays' memory
    where those are writeable and contiguous, so the arrays must not be changed afterwards.
    """
    target = torch.device(device)
    payloads = {
        name: DevicePayload(
            values=_move(payload.values, target),
            lengths=_move(payload.lengths, target),
            grids=_move(payload.grids, target),
            token_index=_move(payload.token_index, target),
        )
        for name, payload in batch.payloads.items()
    }
    tables = batch.extra.get(ATTENTION_TILES)
    segments = batch.segments
    spans = [first + np.arange(length) for first, length in zip(segments.first, segments.lengths, strict=True)]
    return DeviceBatch(
        tiles=None if tables is None else move_tables(tables, target),
        tokens=_move(batch.tokens, target),
        modality_ids=_move(batch.modality_ids, target),
        positions=_move(batch.positions, target),
        kv_lo=_move(batch.kv_lo, target),
        kv_hi=_move(batch.kv_hi, target),
        row_index=_move(batch.row_index, target),
        targets=_move(batch.targets, target),
        row_weight=_move(batch.row_weight, target),
        row_modality=_move(batch.row_modality, target),
        contrastive_group=_move(batch.contrastive_group, target),
        segment_index=_move(np.concatenate([np.empty(0, np.int64), *spans]), target),
        segment_lengths=_move(segments.lengths.astype(np.int64), target),
        segment_modality=_move(segments.modality.astype(np.int64), target),
        payloads=payloads,
    )


def move_tables(tables: Mapping[str, npt.NDArray[np.int32]], device: torch.device) -> dict[str, Tensor]:
    """Return the attention's tables as tensors where they are read."""
    return {name: _move(table, torch.device("cpu") if name in ON_CPU else device) for name, table in tables.items()}


def _move(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
