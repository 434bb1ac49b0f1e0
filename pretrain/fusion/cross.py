"""Gated cross-attention of a text-only trunk to media tokens, beside the trunk's own blocks.

    x <- x + out(tanh(g) A(norm(x), media))        g: one gate a head, 0 at the start
    x <- x + tanh(g') feed_forward(norm(x))        g': one gate a channel, 0 at the start

So a model begins as the text-only one that its trunk is, exactly. Source: Alayrac et al. 2022, Flamingo, section 2.2
(GATED XATTN-DENSE), with a gate for each head and channel instead of one a layer, and RMS norms.

B rows, R positions of text and tags, T media tokens of a row, M keys that the text sees (T, or the latents of a
resampler), D width, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from triweave.kernels.attention_inputs import Tables
from triweave.kernels.cross_attention import cross_attention
from triweave.pretrain.fusion.arrangement import MediaAxis
from triweave.pretrain.fusion.projections import AttentionProjections
from triweave.pretrain.fusion.resampler import PerceiverResampler
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.kv_cache import MediaCache
from triweave.pretrain.model.layers import FeedForward, RMSNorm

SLOWEST_WAVELENGTH = 10000.0
"""Ratio of the slowest to the fastest frequency of the media's positions, as in Vaswani et al. 2017."""
AXES = 3


class Media(NamedTuple):
    """What the text looks at; a named tuple so that ZeRO-3 can look inside.

    keys: [B, M, D]; None while decoding, when the cross-attentions have theirs stored.
    lo, hi: int32 [B, R] the keys that each position sees. tiles: their tables, None lets the kernel make them.
    """

    keys: Tensor | None
    lo: Tensor
    hi: Tensor
    tiles: Tables | None


class MediaKeys(nn.Module):
    """norm(media) + sin-cos(t, h, w), resampled where the config asks for it.

    Cross-attention has no order of its own, and the embedders leave positions to the trunk: so each media token is told
    its place within its item.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if config.fusion.resampler_latents is not None:
            self.resampler = PerceiverResampler(config, config.fusion.resampler_latents)

    def forward(self, media: Tensor, axis: MediaAxis[Tensor], tiles: Tables | None) -> Tensor:
        """Return the keys [B, M, D] of media [B, T, D], zero where a row has no further media."""
        keys: Tensor = self.norm(media) + place_vectors(axis.positions, media.shape[-1]).to(media.dtype)
        return self.resampler(keys, axis, tiles) if hasattr(self, "resampler") else keys


class CrossAttention(AttentionProjections):
    """out(tanh(gate_h) softmax(q k^T / sqrt(K)) v) over the media that a position sees; q and k are RMS-normalised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(config.heads))

    def forward(self, x: Tensor, media: Media, cache: MediaCache | None = None) -> Tensor:
        """Map x [B, R, D] to [B, R, D], 0 where a position sees no media.

        cache: keeps the keys and values of media.keys, or has those of an earlier call where that is None.
        """
        q = self.queries(x)
        if media.keys is None:
            assert cache is not None, "media without keys are for decoding"
            k, v = cache.held()
        else:
            k, v = self.keys_and_values(media.keys)
            if cache is not None:
                cache.hold(k, v)
        tiles, implementation = media.tiles, self.config.attention
        return self.projected(cross_attention(q, k, v, media.lo, media.hi, self.gate, tiles=tiles, impl=implementation))


class CrossBlock(nn.Module):
    """The gated layer that stands before a block of the trunk."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = CrossAttention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_gate = nn.Parameter(torch.zeros(config.d_model))

    def forward(self, x: Tensor, media: Media, cache: MediaCache | None = None) -> Tensor:
        """Map x [B, R, D] to [B, R, D]."""
        x = x + self.attention(self.attention_norm(x), media, cache)
        added: Tensor = x + torch.tanh(self.feed_forward_gate) * self.feed_forward(self.feed_forward_norm(x))
        return added


def place_vectors(positions: Tensor, width: int) -> Tensor:
    """Return fp32 [B, T, width] of positions int [B, T, 3]: for each axis n = width // 6 sines, then n cosines.

    Frequency i of an axis is SLOWEST_WAVELENGTH^(-i / n); the last width - 6 n numbers are 0.
    """
    count = width // (2 * AXES)
    steps = torch.arange(count, device=positions.device, dtype=torch.float32)
    frequencies = SLOWEST_WAVELENGTH ** (-steps / max(count, 1))
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    vectors = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
    return nn.functional.pad(vectors, (0, width - vectors.shape[-1]))
