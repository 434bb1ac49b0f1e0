"""Heads: what turns hidden states into a loss sum. A new objective is a Head and an entry in HEADS."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.kernels.linear_cross_entropy import linear_cross_entropy
from triweave.pretrain.batch import DeviceBatch
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.objectives.head import Head, mean_states
from triweave.pretrain.objectives.heads import (
    ClassificationHead,
    MaskedMediaHead,
    MaskedTokensHead,
    MatchingHead,
    RegressionHead,
)
from triweave.pretrain.objectives.losses import MODALITY_SLOTS, HeadSums


class LanguageModelHead(Head):
    """Next-token cross-entropy and z-loss over the supervised rows.

        sum_n w_n (CE(W h_n, y_n) + z_loss * logsumexp(W h_n)^2)

    The head owns the matrix and the product happens inside its forward: under ZeRO-3 a matrix is only whole there.
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int, **_: Any) -> None:
        super().__init__()
        self.z_loss = config.z_loss
        self.softcap = config.softcap
        self.weight = nn.Parameter(torch.empty(vocab_size, config.d_model))

    def sums(self, hidden: Tensor, batch: DeviceBatch) -> HeadSums:
        """Return the sums over the N supervised positions of hidden [B, S, D]; N = 0 gives 0 and zero gradients."""
        total, by_slot, lse = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.weight,
            batch.targets,
            batch.row_index,
            batch.row_weight,
            batch.row_slot,
            z_loss=self.z_loss,
            softcap=self.softcap,
            modalities=batch.sources * MODALITY_SLOTS,
        )
        return HeadSums(total=total, by_slot=by_slot, lse=lse)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] of hidden [..., D]; for inspection and decoding with whole (ungathered) weights."""
        logits = hidden @ self.weight.t()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class ContrastiveHead(Head):
    """One embedding per one-span segment: u / sqrt(|u|^2 + 1e-12),  u = mean of the segment's hidden states @ W[m].

    It returns the embeddings and no loss: that is a sum over pairs of the whole step, of all ranks and micro-batches.
    All modalities' matrices are one parameter, so that a rank without sounds still takes part in its reduction; a
    micro-batch without segments gives it, and all below, gradients of exactly 0.
    """

    def __init__(self, config: ModelConfig, **_: Any) -> None:
        super().__init__()
        settings = config.contrastive
        modalities = 1 + max(modality.id for modality in MODALITIES.values())
        self.weight = nn.Parameter(torch.empty(modalities, config.d_model, settings.width))
        self.log_scale = nn.Parameter(torch.tensor([math.log(settings.initial_scale)]))
        self.offset = nn.Parameter(torch.tensor([settings.initial_bias]))  # not called bias: those start at 0

    def sums(self, hidden: Tensor, batch: DeviceBatch) -> HeadSums:
        """Return embeddings [C, E] and calibration [2] = (scale, bias) of hidden [B, S, D], both fp32; total is 0."""
        embeddings = self.embed(hidden, batch)
        calibration = torch.cat([self.log_scale.float().exp(), self.offset.float()])
        nothing = embeddings.new_empty(0)
        return HeadSums(
            total=embeddings.new_zeros(()),
            by_slot=nothing,
            lse=nothing,
            embeddings=embeddings,
            calibration=calibration,
        )

    def embed(self, hidden: Tensor, batch: DeviceBatch) -> Tensor:
        """Return the unit embeddings [C, E], fp32, of the segments of hidden [B, S, D]."""
        pooled = mean_states(hidden, batch.segment_index, batch.segment_lengths).to(self.weight.dtype)
        projected = torch.einsum("cd,mde->cme", pooled, self.weight)
        own = projected[torch.arange(len(pooled), device=hidden.device), batch.segment_modality].float()
        embeddings: Tensor = own * (own.square().sum(1, keepdim=True) + 1e-12).rsqrt()
        return embeddings


HEADS: dict[str, type[Head]] = {
    "language_model": LanguageModelHead,
    "contrastive": ContrastiveHead,
    "matching": MatchingHead,
    "masked_tokens": MaskedTokensHead,
    "masked_media": MaskedMediaHead,
    "classification": ClassificationHead,
    "regression": RegressionHead,
}
"""Objective name -> head class, made with (config, vocab_size=, media_features=)."""
