"""Mel-frequency cepstral coefficients: what speech recognisers read before they learnt their own features.

    c_k  = sqrt(2 / B) sum_b y_b cos(pi k (b + 1/2) / B),  c_0 / sqrt(2)       the orthonormal DCT-II of the log-mel y
    d_t  = (c_{t+1} - c_{t-1} + 2 (c_{t+2} - c_{t-2})) / 10                    the slope over five frames; beyond an
    dd_t = the same of d                                                       item's ends its end frame counts on

Davis and Mermelstein 1980; the regression is HTK's (The HTK Book, 5.9). y is normalised as for the other encoders.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from triweave.pretrain.encoders.config import EncoderConfig
from triweave.pretrain.encoders.tower import EncoderTiles, Items, LogMel
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.connectors import project

DERIVATIVES = 3
"""The coefficients, their slope, and the slope of the slope."""
SLOPE_SCALE = 10.0


class CepstralEmbedder(LogMel):
    """project(c, d, dd of all frames of a token): no weights but the connector's."""

    def __init__(self, features: int, settings: EncoderConfig, config: ModelConfig) -> None:
        """Make it for tokens of frames of `settings.mel_bins` log-mel numbers."""
        super().__init__(features, settings, config)
        settings.check("audio", features)
        self.frames = features // settings.mel_bins
        self.register_buffer("cosines", cosines(settings.mel_bins, settings.coefficients), persistent=False)
        self.project = project(self.frames * DERIVATIVES * settings.coefficients, settings, config)

    def forward(self, values: Tensor, lengths: Tensor, grids: Tensor, tiles: EncoderTiles = None) -> Tensor:  # noqa: ARG002
        """Return the embeddings [N, D] of payload rows `values` [N, features]; lengths [M], grids [M, 3]."""
        items = Items.of(lengths, grids, len(values))
        starts, ends = items.edges(self.frames)
        frames = self.normalise(values).reshape(len(values) * self.frames, -1)
        cepstra = frames @ self.get_buffer("cosines").to(frames.dtype)
        slopes = _slope(cepstra, starts, ends)
        stacked = torch.cat([cepstra, slopes, _slope(slopes, starts, ends)], dim=1)
        embedded: Tensor = self.project(stacked.view(len(values), -1))
        return embedded


def cosines(bins: int, coefficients: int) -> Tensor:
    """Return the orthonormal DCT-II, fp32 [bins, coefficients]."""
    centres = torch.arange(bins, dtype=torch.float64) + 0.5
    orders = torch.arange(coefficients, dtype=torch.float64)
    table = torch.cos(math.pi / bins * centres.unsqueeze(1) * orders) * math.sqrt(2 / bins)
    table[:, 0] /= math.sqrt(2)
    return table.float()


def _slope(x: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Return d of the module's formula, [P, C]; starts, ends: bool [P], first and last frames of the items."""
    place = torch.arange(len(x), device=x.device)
    before = torch.where(starts, place, place - 1)
    after = torch.where(ends, place, place + 1)
    return (x[after] - x[before] + 2 * (x[after[after]] - x[before[before]])) / SLOPE_SCALE
