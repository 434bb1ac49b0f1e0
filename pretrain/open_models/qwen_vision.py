"""Qwen2.5-VL's vision tower (Bai et al. 2025): windows of attention, two-dimensional rotation, a merger.

A token is merge x merge positions of patch_px pixels. Tokens are computed in the order of their windows, so that a
window is one interval of keys; some blocks attend to the whole item. The merger puts the positions of a token side by
side. A picture is two equal frames, whose products are added.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from triweave.pretrain.encoders.tower import EncoderTiles, Items
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.layers import RMSNorm
from triweave.pretrain.open_models.config import COLOURS, OpenEncoderConfig
from triweave.pretrain.open_models.vision import ACTIVATIONS, Angles, ItemAttention, OpenVisionTower, through

THETA = 10000.0
"""Base of the rotary frequencies, in positions."""


class QwenVisionBlock(nn.Module):
    """x + attention(norm(x)), then x + down(activation(gate) * up); biases throughout."""

    def __init__(self, settings: OpenEncoderConfig, implementation: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(settings.width, settings.norm_eps)
        self.attention = ItemAttention(settings, implementation)
        self.feed_forward_norm = RMSNorm(settings.width, settings.norm_eps)
        self.gate_up = nn.Linear(settings.width, 2 * settings.ffn_width)
        self.down = nn.Linear(settings.ffn_width, settings.width)
        self.activation = ACTIVATIONS[settings.activation]

    def forward(self, x: Tensor, kv_lo: Tensor, kv_hi: Tensor, angles: Angles) -> Tensor:
        """Map x [1, P, W] to [1, P, W]; kv_lo, kv_hi int32 [1, P]."""
        x = x + self.attention(self.attention_norm(x), kv_lo, kv_hi, angles)
        gate, up = self.gate_up(self.feed_forward_norm(x)).chunk(2, dim=-1)
        added: Tensor = x + self.down(self.activation(gate) * up)
        return added


class QwenVisionEncoder(nn.Module):
    """Squares and blocks. `embed` has one matrix per frame, one beside the other."""

    def __init__(self, settings: OpenEncoderConfig, implementation: str, *, recompute: bool) -> None:
        super().__init__()
        self.settings, self.recompute = settings, recompute
        self.embed = nn.Linear(settings.frames * settings.patch_px**2 * COLOURS, settings.width, bias=False)
        self.blocks = nn.ModuleList(QwenVisionBlock(settings, implementation) for _ in range(settings.layers))

    def forward(self, values: Tensor, items: Items) -> tuple[Tensor, Tensor]:
        """Return the states [N, merge merge, W] of tokens [N, features] by windows, and the token at each place."""
        settings, count = self.settings, self.settings.merge**2
        windows = _windows(items, settings.window)
        places = items.coordinates(settings.merge, settings.merge).view(len(values), count, 3)[windows.order]
        angles = _angles(places.flatten(0, 1), settings.width // settings.heads)
        inner = torch.stack([windows.lo, windows.hi]).repeat_interleave(count, dim=1) * count
        whole = torch.stack(_frames(items)).repeat_interleave(count, dim=1).int() * count
        squares = self._squares(values[windows.order]).repeat(1, 1, settings.frames)

        def arguments(number: int) -> tuple[object, ...]:
            seen = whole if number in settings.full_attention else inner
            return seen[:1], seen[1:], angles

        states = through(self.blocks, self.embed(squares), arguments, recompute=self.recompute)
        return states.view(len(values), count, -1), windows.order

    def _squares(self, values: Tensor) -> Tensor:
        """Return the positions [1, N merge merge, patch patch 3] of tokens [N, features], token by token."""
        m, p = self.settings.merge, self.settings.patch_px
        return values.view(-1, m, p, m, p * COLOURS).transpose(2, 3).reshape(1, -1, p * p * COLOURS)


class Windows(NamedTuple):
    """Tokens in the order of their windows.

    order: int64 [N] the token at each place. lo, hi: int32 [N] places of the window of the token at each place.
    """

    order: Tensor
    lo: Tensor
    hi: Tensor


class QwenVisionTower(OpenVisionTower):
    """The merger's output for every token."""

    def __init__(self, features: int, settings: OpenEncoderConfig, config: ModelConfig) -> None:
        """Make a tower of `settings` for a model of `config`."""
        super().__init__(features, settings, config)
        joined = settings.merge**2 * settings.width
        self.encoder = QwenVisionEncoder(settings, config.attention, recompute=config.activation_checkpointing)
        self.merger_norm = RMSNorm(settings.width, settings.norm_eps)
        self.up = nn.Linear(joined, joined)
        self.down = nn.Linear(joined, config.d_model)
        self.activation = ACTIVATIONS[settings.projector_activation]

    def forward(self, values: Tensor, lengths: Tensor, grids: Tensor, tiles: EncoderTiles = None) -> Tensor:  # noqa: ARG002
        """Return the embeddings [N, D] of payload rows `values` [N, features]; lengths [M], grids [M, 3]."""
        states, order = self.encoder(self.normalise(values), Items.of(lengths, grids, len(values)))
        merged = self.down(self.activation(self.up(self.merger_norm(states).flatten(1))))
        return torch.empty_like(merged).index_copy(0, order, merged)


def _frames(items: Items) -> tuple[Tensor, Tensor]:
    """Return (lo, hi) int64 [N]: the tokens of each token's frame, which is all of a picture."""
    size = (items.grids[:, 1] * items.grids[:, 2]).long()[items.item]
    lo = items.first[items.item] + items.within // size * size
    return lo, lo + size


def _windows(items: Items, side: int) -> Windows:
    """Return the tokens by frame, then by window of `side` x `side` tokens, windows and tokens in raster order."""
    high, wide = (items.grids[:, axis].long()[items.item] for axis in (1, 2))
    frame, _ = _frames(items)
    y, x = items.within // wide % high, items.within % wide
    columns = (wide + side - 1) // side
    number = (y // side) * columns + x // side  # below the frame's number of tokens, so frames do not mix
    keys, order = torch.sort(frame + number, stable=True)
    keys = keys.contiguous()
    lo, hi = torch.searchsorted(keys, keys), torch.searchsorted(keys, keys, right=True)
    return Windows(order, lo.int(), hi.int())


def _angles(places: Tensor, head_width: int) -> Angles:
    """Return (cos, sin) [1, P, 1, K/2]: the first half of the pairs turns with height, the second with width.

    places: int [P, 3]. Both halves have the frequencies theta^(-4 j / K), j < K/4.
    """
    exponents = torch.arange(0, head_width // 2, 2, device=places.device).float() / (head_width // 2)
    angles = places[:, 1:, None].float() / THETA**exponents
    angles = angles.flatten(1)[None, :, None]
    return angles.cos(), angles.sin()
