"""Prompts that grow token by token: the logits of what comes next, with cached keys or by recomputing every position.

B rows, one prompt each, padded on the right; V vocabulary. A new token is text: it stands one beyond the largest
coordinate of its row on all three axes and sees its whole row, exactly as `data_pipeline.stream.collate` would have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triweave.data_pipeline.batch import TEXT_ID, PackedBatch
from triweave.pretrain.batch import (
    DeviceBatch,
    DevicePayload,
    KernelTables,
    as_read,
    kernel_tables,
    move_tables,
    to_device,
)
from triweave.pretrain.fusion.arrangement import MediaAxis
from triweave.pretrain.model.heads import LanguageModelHead
from triweave.pretrain.model.kv_cache import KeyValueCache
from triweave.pretrain.model.model import MultimodalTransformer


class Continuation:
    """Rows of tokens to which tokens are appended.

    logits: fp32 [B, V], of each row's next token. lengths: int64 [B] on the CPU, tokens of each row so far as the
    model reads them: with cross-attention a medium is one.
    """

    def __init__(self, model: MultimodalTransformer, prompts: PackedBatch, *, cache: bool = True) -> None:
        """Read the prompts, one piece a row (`prompt_batch`); `cache=False` recomputes all positions at every token."""
        self._model = model
        layers = model.config.layers, len(prompts.tokens), model.config.cross_layers
        self._cache = KeyValueCache(*layers) if cache else None
        weight = model.token_embedding.weight
        self._tables = kernel_tables(model.config, weight.device, weight.dtype)
        prompts = replace(prompts, extra=self._tables(prompts))
        self._batch = to_device(prompts, weight.device)
        read = as_read(prompts)
        self.lengths = torch.from_numpy((read.kv_hi > read.kv_lo).sum(1))
        self._next_position = torch.from_numpy(read.positions.max(axis=(1, 2)).astype(np.int64) + 1)
        self._modality = np.maximum(read.modality_ids, TEXT_ID)
        last = np.arange(len(read.tokens)), self.lengths.numpy() - 1
        self._media = read.media_lo[last], read.media_hi[last]
        self._keys = 0 if self._batch.axis is None else self._batch.axis.keys
        self.logits = self._read(self._batch, self.lengths - 1)

    def append(self, tokens: Tensor) -> None:
        """Append one token, int64 [B], to each row and find the logits after it."""
        new = self._new_column(tokens)
        if self._cache is None:
            self._batch = _with_column(self._batch, new, self.lengths, self._tables)
            last = self.lengths
        else:
            self._batch, last = new, torch.zeros_like(self.lengths)
        self.lengths = self.lengths + 1
        self._next_position = self._next_position + 1
        self.logits = self._read(self._batch, last)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these; their order stays."""
        chosen = torch.tensor(rows, dtype=torch.int64)
        self.lengths, self._next_position = self.lengths[chosen], self._next_position[chosen]
        lo, hi = self._media
        self._modality, self._media = self._modality[rows], (lo[rows], hi[rows])
        if self._cache is None:
            self._batch = _with_rows(self._batch, chosen, self._tables)
        else:
            self._cache.keep(chosen)
        self.logits = self.logits[chosen.to(self.logits.device)]

    def _read(self, batch: DeviceBatch, last: Tensor) -> Tensor:
        """Return the logits [B, V] at place `last` of each row of a batch."""
        hidden = self._model.hidden(batch, cache=self._cache)
        rows = torch.arange(len(last), device=hidden.device)
        head = cast(LanguageModelHead, self._model.heads["language_model"])
        return head.logits(hidden[rows, last.to(hidden.device)]).float()

    def _new_column(self, tokens: Tensor) -> DeviceBatch:
        """Return the new tokens as a batch of one position a row."""
        device = self._batch.tokens.device
        kv_hi = (self.lengths + 1).to(torch.int32).unsqueeze(1)
        kv_lo = torch.zeros_like(kv_hi)
        modality = np.zeros((len(kv_hi), int(kv_hi.max())), self._modality.dtype)
        prompt = min(modality.shape[1], self._modality.shape[1])
        modality[:, :prompt] = self._modality[:, :prompt]
        tables = replace(self._tables, strips=False).of(
            kv_lo.numpy(), kv_hi.numpy(), modality, np.full(kv_hi.shape, TEXT_ID)
        )
        if self._tables.strips and self._tables.fusion.kind != "mmca":
            tables["segments"] = _one_query_strips(self.lengths + 1)
        new = replace(
            self._batch,
            tokens=tokens.to(device, self._batch.tokens.dtype).unsqueeze(1),
            modality_ids=torch.zeros_like(kv_lo, device=device),
            cached_modality=torch.from_numpy(modality).to(device),
            positions=self._next_position.to(device, torch.int32).view(-1, 1, 1).expand(-1, -1, 3),
            kv_lo=kv_lo.to(device),
            kv_hi=kv_hi.to(device),
            payloads={},
            tiles=move_tables(tables, device),
        )
        return new if self._batch.media_lo is None else self._looking(new)

    def _looking(self, new: DeviceBatch) -> DeviceBatch:
        """Return a new column that sees the media which the end of its prompt saw, whose keys the cache holds."""
        device = new.tokens.device
        lo, hi = (torch.from_numpy(bound).unsqueeze(1).to(device) for bound in self._media)
        return replace(
            new, axis=None, media_lo=lo, media_hi=hi, media_tiles=_media_tiles(self._tables, lo, hi, self._keys)
        )


def _one_query_strips(keys: Tensor) -> npt.NDArray[np.int32]:
    """Return the strips of `kernels.tiles.segments` for one query a row that sees keys [0, keys[b]); int32 [B, 6]."""
    strips = np.zeros((len(keys), 6), dtype=np.int32)
    strips[:, 0] = np.arange(len(keys))
    strips[:, 2] = 1
    strips[:, 4] = keys.numpy()
    strips[:, 5] = keys.numpy()
    return strips


def _with_column(batch: DeviceBatch, new: DeviceBatch, lengths: Tensor, tables: KernelTables) -> DeviceBatch:
    """Return the batch with the new position of each row right behind its own last one."""
    rows, width = batch.tokens.shape
    place = lengths.to(batch.tokens.device)
    row = torch.arange(rows, device=place.device)
    wider = int(lengths.max()) >= width

    def put(old: Tensor, column: Tensor) -> Tensor:
        grown = torch.cat([old, torch.zeros_like(column)], dim=1) if wider else old.clone()
        grown[row, place] = column[:, 0]
        return grown

    kv_lo, kv_hi = put(batch.kv_lo, new.kv_lo), put(batch.kv_hi, new.kv_hi)
    modality_ids = put(batch.modality_ids, new.modality_ids.to(batch.modality_ids.dtype))
    grown = replace(
        batch,
        tokens=put(batch.tokens, new.tokens),
        modality_ids=modality_ids,
        positions=put(batch.positions, new.positions),
        kv_lo=kv_lo,
        kv_hi=kv_hi,
        tiles=_tiles(tables, kv_lo, kv_hi, modality_ids),
    )
    if batch.axis is not None:
        assert batch.media_lo is not None
        assert batch.media_hi is not None
        assert new.media_lo is not None
        assert new.media_hi is not None
        lo, hi = put(batch.media_lo, new.media_lo), put(batch.media_hi, new.media_hi)
        return replace(grown, media_lo=lo, media_hi=hi, media_tiles=_media_tiles(tables, lo, hi, batch.axis.keys))
    if not wider:
        return grown
    payloads = {
        name: replace(payload, token_index=payload.token_index + payload.token_index // width)
        for name, payload in batch.payloads.items()
    }
    return replace(grown, payloads=payloads)


def _with_rows(batch: DeviceBatch, rows: Tensor, tables: KernelTables) -> DeviceBatch:
    """Return the batch with only these rows and their media."""
    width = batch.tokens.shape[1] if batch.axis is None else batch.axis.positions.shape[1]
    chosen = rows.to(batch.tokens.device)
    payloads = {}
    for name, payload in batch.payloads.items():
        row = payload.token_index // width
        kept = torch.isin(row, chosen)
        first_tokens = payload.lengths.cumsum(0) - payload.lengths
        items = kept[first_tokens.long()]
        renumbered = torch.searchsorted(chosen, row[kept])
        if items.any():
            payloads[name] = DevicePayload(
                values=payload.values[kept],
                lengths=payload.lengths[items],
                grids=payload.grids[items],
                token_index=renumbered * width + payload.token_index[kept] % width,
            )
    kv_lo, kv_hi, modality_ids = batch.kv_lo[chosen], batch.kv_hi[chosen], batch.modality_ids[chosen]
    kept_rows = replace(
        batch,
        tokens=batch.tokens[chosen],
        modality_ids=modality_ids,
        positions=batch.positions[chosen],
        kv_lo=kv_lo,
        kv_hi=kv_hi,
        payloads=payloads,
        tiles=_tiles(tables, kv_lo, kv_hi, modality_ids),
    )
    if batch.axis is None:
        return kept_rows
    assert batch.media_lo is not None
    assert batch.media_hi is not None
    lo, hi, axis = batch.media_lo[chosen], batch.media_hi[chosen], _axis_rows(batch.axis, chosen)
    latents = tables.of_latents(*(part.cpu().numpy() for part in (axis.latent_lo, axis.latent_hi, axis.joint)))
    return replace(
        kept_rows,
        axis=axis,
        media_lo=lo,
        media_hi=hi,
        media_tiles=_media_tiles(tables, lo, hi, axis.keys),
        latent_tiles=move_tables(latents, lo.device),
    )


def _axis_rows(axis: MediaAxis[Tensor], rows: Tensor) -> MediaAxis[Tensor]:
    """Return the media axis of these rows."""
    joint = axis.joint.view(len(axis.positions), -1)
    width = joint.shape[1]
    first = torch.arange(len(rows), device=rows.device) * width
    own = joint[rows] - rows.unsqueeze(1) * width + first.unsqueeze(1)
    return MediaAxis(
        positions=axis.positions[rows],
        latent_lo=axis.latent_lo[rows],
        latent_hi=axis.latent_hi[rows],
        joint=own.flatten(),
    )


def _tiles(tables: KernelTables, kv_lo: Tensor, kv_hi: Tensor, modality_ids: Tensor) -> dict[str, Tensor]:
    made = tables.of(*(part.cpu().numpy() for part in (kv_lo, kv_hi, modality_ids)))
    return move_tables(made, kv_lo.device)


def _media_tiles(tables: KernelTables, lo: Tensor, hi: Tensor, keys: int) -> dict[str, Tensor]:
    return move_tables(tables.of_media(lo.cpu().numpy(), hi.cpu().numpy(), keys), lo.device)
