"""The part of a PackedBatch that the model sees, as torch tensors on the rank's device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triweave.data_pipeline.batch import PackedBatch
from triweave.kernels.tiles import attention_tables

ATTENTION_TILES = "attention_tiles"
"""Key of PackedBatch.extra under which `kernel_tables` leaves the self-attention's tile tables."""


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
    tiles: tile tables of the self-attention, on the CPU; None where the batch came without (`kernel_tables`).
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


def kernel_tables(batch: PackedBatch) -> dict[str, Any]:
    """Return what the kernels want of a batch, once for all layers: the loader's `post_pack`, run in its workers."""
    return {ATTENTION_TILES: attention_tables(batch.kv_lo, batch.kv_hi)}


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
        tiles=None if tables is None else {name: _move(table, torch.device("cpu")) for name, table in tables.items()},
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


def _move(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
