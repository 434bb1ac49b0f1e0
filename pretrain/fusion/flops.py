"""Exact matrix FLOPs of gated cross-attention and its resampler on one batch; padding counts nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.batch import PADDING_ID, PackedBatch
from triweave.pretrain.fusion.arrangement import MediaAxis
from triweave.pretrain.model.config import ModelConfig


def cross_flops(batch: PackedBatch, axis: MediaAxis[npt.NDArray[Any]], config: ModelConfig) -> int:
    """Return the forward FLOPs of a batch arranged for cross-attention, R text positions and M keys that are real.

    layer      2 R (2 D H K + 3 D F) + 2 M 2 D G K + 4 H K sum (media_hi - media_lo)
    resampler  2 L (2 D H K + 3 D F) + 2 (T + L) 2 D G K + 4 H K sum (latent_hi - latent_lo)  a layer, L = M latents
    """
    D, H, G, K = config.d_model, config.heads, config.kv_heads, config.head_width
    a_query, a_key, a_pair = 2 * (2 * D * H * K + 3 * D * config.ffn_width), 4 * D * G * K, 4 * H * K
    text = int(np.count_nonzero(batch.modality_ids != PADDING_ID))
    tokens = sum(len(payload.token_index) for payload in batch.payloads.values())
    latents, pairs = _area(axis.latent_lo, axis.latent_hi)
    _, looks = _area(batch.media_lo, batch.media_hi)
    layers = config.cross_layers * (text * a_query + (latents or tokens) * a_key + looks * a_pair)
    return (
        layers
        + config.fusion.resampler_layers * (latents * a_query + pairs * a_pair)
        + (config.fusion.resampler_layers * (tokens + latents) * a_key if latents else 0)
    )


def _area(lo: npt.NDArray[Any], hi: npt.NDArray[Any]) -> tuple[int, int]:
    """Return how many intervals are not empty, and how many keys they have in all."""
    sizes = hi.astype(np.int64) - lo
    return int(np.count_nonzero(sizes)), int(sizes.sum())
