"""Layers that the trunk, the fusions and the encoders share.

B rows, S positions, D width, F feed-forward width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from triweave.kernels.rms_norm import rms_norm
from triweave.kernels.swiglu import swiglu
from triweave.pretrain.model.config import ModelConfig


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised; same shape and dtype."""
        normalised: Tensor = rms_norm(x, self.weight, eps=self.eps)
        return normalised


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, S, D] to [B, S, D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        projected: Tensor = self.down(swiglu(gate, up))
        return projected
