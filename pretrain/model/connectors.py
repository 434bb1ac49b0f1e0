"""Connectors: one vector of the model's width D of the c positions, W wide, that an encoder computes for a token.

    linear         W1 x                                        c = 1
    mlp            W2 gelu(W1 x)                               c = 1; LLaVA-1.5 (Liu et al. 2023)
    pixel_shuffle  W2 gelu(W1 norm(concatenation of c x))      InternVL (Chen et al. 2023), patch merger of Qwen2-VL
    perceiver      one query per token over all positions of its item; Perceiver resampler (Alayrac et al. 2022)

N tokens, P = N c positions, W the encoder's width, D the model's, H heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from triweave.kernels.attention import attention
from triweave.kernels.qk_norm_rope import qk_norm_rope
from triweave.pretrain.encoders.config import EncoderConfig
from triweave.pretrain.encoders.transformer_config import transformer_config
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.layers import FeedForward, RMSNorm


class Mlp(nn.Module):
    """second(gelu(first(x))), the exact GELU."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        """Make it from `width` over `hidden` to `out`."""
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [N, width] to [N, out]."""
        mapped: Tensor = self.second(functional.gelu(self.first(x)))
        return mapped


class PixelShuffle(nn.Module):
    """The c positions of a token side by side, normalised, through an MLP: space (or time) becomes depth."""

    def __init__(self, width: int, positions: int, hidden: int, out: int, eps: float) -> None:
        """Make it for c = `positions` a token, each `width` wide."""
        super().__init__()
        self.joined = positions * width
        self.norm = RMSNorm(self.joined, eps)
        self.mlp = Mlp(self.joined, hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [N c, W], the positions of a token next to each other, to [N, out]."""
        mapped: Tensor = self.mlp(self.norm(x.reshape(-1, self.joined)))
        return mapped


class Perceiver(nn.Module):
    """Latents, one per token, that attend to all positions of their item, `connector_layers` times, then a product.

    All latents start as the same learnt vector; where a token is in its item comes in by rotating queries and keys by
    their places. So the plan's count of tokens is the count of latents, whatever the size of the item.
    """

    def __init__(self, settings: EncoderConfig, config: ModelConfig, modality_sections: list[int]) -> None:
        """Make it for an encoder of `settings.width`; sections of the rotary pairs as in the encoder."""
        super().__init__()
        self.latent = nn.Parameter(torch.empty(1, settings.width))
        self.norm = RMSNorm(settings.width, config.norm_eps)
        own = transformer_config(settings, config, modality_sections, layers=settings.connector_layers)
        self.layers = nn.ModuleList(PerceiverLayer(own) for _ in range(settings.connector_layers))
        self.out = nn.Linear(settings.width, config.d_model)

    def forward(
        self,
        states: Tensor,
        token_places: Tensor,
        places: Tensor,
        intervals: tuple[Tensor, Tensor],
        tiles: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Map states [1, P, W] to [N, D].

        token_places: int [1, N, 3] place of each token's first position. places: int [1, P, 3]. intervals: int32
        [1, N] each, the positions of each token's item; tiles: their tables.
        """
        keys = self.norm(states)
        latents = self.latent.expand(1, token_places.shape[1], -1)
        for layer in self.layers:
            latents = layer(latents, keys, token_places, places, intervals, tiles)
        mapped: Tensor = self.out(latents.squeeze(0))
        return mapped


class PerceiverLayer(nn.Module):
    """x + attention(norm(x), keys), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        H, K = config.heads, config.head_width
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.query = nn.Linear(config.d_model, H * K, bias=False)
        self.key_value = nn.Linear(config.d_model, 2 * H * K, bias=False)
        self.out = nn.Linear(H * K, config.d_model, bias=False)
        self.q_norm = nn.Parameter(torch.ones(K))
        self.k_norm = nn.Parameter(torch.ones(K))
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        token_places: Tensor,
        places: Tensor,
        intervals: tuple[Tensor, Tensor],
        tiles: dict[str, Tensor] | None,
    ) -> Tensor:
        """Map x [1, N, W] to [1, N, W]; keys [1, P, W], others as in `Perceiver.forward`."""
        config = self.config
        H, K = config.heads, config.head_width
        q = self.query(self.attention_norm(x)).unflatten(-1, (H, K))
        k, v = self.key_value(keys).unflatten(-1, (2 * H, K)).split((H, H), dim=2)
        q, k = self._turned(q, token_places, self.q_norm), self._turned(k, places, self.k_norm)
        mixed, _ = attention(q, k, v, *intervals, tiles=tiles, impl=config.attention)
        x = x + self.out(mixed.flatten(2))
        added: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return added

    def _turned(self, heads: Tensor, places: Tensor, weight: Tensor) -> Tensor:
        """Return heads [1, n, H, K] normalised and rotated; the op takes a pair, so one head goes in twice."""
        turned, _ = qk_norm_rope(
            heads,
            heads[:, :, :1],
            places,
            q_weight=weight,
            k_weight=weight,
            sections=self.config.sections,
            interleaved=False,
            theta=self.config.rope_theta,
            eps=self.config.norm_eps,
        )
        return turned


def project(width: int, settings: EncoderConfig, config: ModelConfig, positions: int = 1) -> nn.Module:
    """Return the connector linear, mlp or pixel_shuffle of `settings`, from `positions` x `width` to the model's D."""
    hidden = settings.connector_width or config.d_model
    if settings.connector == "linear":
        return nn.Linear(width, config.d_model)
    if settings.connector == "mlp":
        return Mlp(width, hidden, config.d_model)
    return PixelShuffle(width, positions, hidden, config.d_model, config.norm_eps)
