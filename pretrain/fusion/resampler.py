"""PerceiverResampler: a fixed number of learnt latents reads each medium, whatever its length.

    latents <- latents + attention(latents; [media tokens of the item, latents of the item]);  latents <- latents + ffn

Source: Alayrac et al. 2022, Flamingo, section 2.1 (keys are media and latents together), after Jaegle et al. 2021.
B rows, T media tokens, N items, r latents an item, L = N r latents of a row, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from triweave.kernels.attention import attention
from triweave.kernels.attention_inputs import Tables
from triweave.pretrain.fusion.arrangement import MediaAxis
from triweave.pretrain.fusion.projections import AttentionProjections
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.layers import FeedForward, RMSNorm


class PerceiverResampler(nn.Module):
    """r latents for each item of a row, the same weights for every modality."""

    def __init__(self, config: ModelConfig, latents: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(latents, config.d_model))
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.fusion.resampler_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, media: Tensor, axis: MediaAxis[Tensor], tiles: Tables | None) -> Tensor:
        """Return the latents [B, L, D] of media [B, T, D]; what stands behind a row's last item is seen by nobody."""
        rows, length = axis.latent_lo.shape
        x = self.latents.to(media.dtype).repeat(rows, length // len(self.latents), 1)
        for layer in self.layers:
            x = layer(x, media, axis, tiles)
        normalised: Tensor = self.norm(x)
        return normalised


class ResamplerLayer(nn.Module):
    """One look of the latents at their item and at each other, then a feed-forward net."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.media_norm = RMSNorm(config.d_model, config.norm_eps)
        self.latent_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = ItemAttention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, media: Tensor, axis: MediaAxis[Tensor], tiles: Tables | None) -> Tensor:
        """Map latents x [B, L, D] to [B, L, D]."""
        queries = self.latent_norm(x)
        line = torch.cat([self.media_norm(media), queries], dim=1)
        joint = line.flatten(0, 1).index_select(0, axis.joint).view_as(line)
        x = x + self.attention(queries, joint, axis, tiles)
        added: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return added


class ItemAttention(AttentionProjections):
    """Attention of each latent to the places of the joint axis that are its item's."""

    def forward(self, queries: Tensor, joint: Tensor, axis: MediaAxis[Tensor], tiles: Tables | None) -> Tensor:
        """Return [B, L, D] of queries [B, L, D] over joint [B, T + L, D]."""
        q, (k, v) = self.queries(queries), self.keys_and_values(joint)
        mixed, _ = attention(q, k, v, axis.latent_lo, axis.latent_hi, tiles=tiles, impl=self.config.attention)
        return self.projected(mixed)
