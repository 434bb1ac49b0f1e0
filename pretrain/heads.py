"""Heads: what turns hidden states into a loss sum. A new objective is a class and an entry in HEADS."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from triweave.kernels.linear_cross_entropy import linear_cross_entropy
from triweave.pretrain.batch import DeviceBatch
from triweave.pretrain.losses import MODALITY_SLOTS, HeadSums
from triweave.pretrain.model_config import ModelConfig


class LanguageModelHead(nn.Module):
    """Next-token cross-entropy and z-loss over the supervised rows.

        sum_n w_n (CE(W h_n, y_n) + z_loss * logsumexp(W h_n)^2)

    The head owns the matrix and the product happens inside its forward: under ZeRO-3 a matrix is only whole there.
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int) -> None:
        super().__init__()
        self.z_loss = config.z_loss
        self.softcap = config.softcap
        self.weight = nn.Parameter(torch.empty(vocab_size, config.d_model))

    def forward(self, hidden: Tensor, batch: DeviceBatch) -> HeadSums:
        """Return the sums over the N supervised positions of hidden [B, S, D]; N = 0 gives 0 and zero gradients."""
        total, per_modality, lse = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.weight,
            batch.targets,
            batch.row_index,
            batch.row_weight,
            batch.row_modality,
            z_loss=self.z_loss,
            softcap=self.softcap,
            modalities=MODALITY_SLOTS,
        )
        return HeadSums(total=total, per_modality=per_modality, lse=lse)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] of hidden [..., D]; for inspection and decoding with whole (ungathered) weights."""
        logits = hidden @ self.weight.t()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


HEADS: dict[str, type[LanguageModelHead]] = {
    "language_model": LanguageModelHead,
}
"""Objective name -> head class."""
