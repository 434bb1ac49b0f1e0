"""What the attentions to media have in common: their projections, with queries and keys RMS-normalised a head.

B rows, S queries, T keys, D width, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from triweave.kernels.rms_norm import rms_norm
from triweave.pretrain.model.config import ModelConfig


class AttentionProjections(nn.Module):
    """Queries from one sequence, keys and values from another; a subclass attends in between."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        H, G, K = config.heads, config.kv_heads, config.head_width
        self.q = nn.Linear(config.d_model, H * K, bias=False)
        self.kv = nn.Linear(config.d_model, 2 * G * K, bias=False)
        self.out = nn.Linear(H * K, config.d_model, bias=False)
        self.q_norm = nn.Parameter(torch.ones(K))
        self.k_norm = nn.Parameter(torch.ones(K))

    def queries(self, x: Tensor) -> Tensor:
        """Return [B, S, H, K] of x [B, S, D]."""
        q = self.q(x).unflatten(-1, (self.config.heads, self.config.head_width))
        return rms_norm(q, self.q_norm, eps=self.config.norm_eps)

    def keys_and_values(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, each [B, T, G, K], of media [B, T, D]."""
        k, v = self.kv(media).unflatten(-1, (2 * self.config.kv_heads, self.config.head_width)).chunk(2, dim=2)
        return rms_norm(k, self.k_norm, eps=self.config.norm_eps), v

    def projected(self, mixed: Tensor) -> Tensor:
        """Return [B, S, D] of the heads' results [B, S, H, K]."""
        result: Tensor = self.out(mixed.flatten(2))
        return result
