"""Exact counts: parameters per part of the model, and the matrix FLOPs of one PackedBatch, media included."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from triweave.data_pipeline.batch import PADDING_ID, PackedBatch
from triweave.pretrain.model_config import ModelConfig
from triweave.pretrain.optimizer import tower_of

BACKWARD_PASSES = 2
"""A matrix product's backward is two products of its size."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Forward floating-point operations that a micro-batch needs; one multiply-add is two.

    Padding, keys outside a query's interval, recomputation and everything that is not a matrix product count nothing.
    """

    projections: int
    """qkv, output and feed-forward products of real tokens."""
    attention: int
    """Scores and mixing over exactly the keys of each query's interval."""
    head: int
    """Logits of supervised positions."""
    towers: int
    """Embedding of media tokens."""
    contrastive: int = 0
    """Projection of pooled segments; the cosines are of the whole step and counted nowhere."""

    @property
    def forward(self) -> int:
        """Sum of the parts."""
        return self.projections + self.attention + self.head + self.towers + self.contrastive

    @property
    def training(self) -> int:
        """Forward plus backward, the numerator of model FLOPs utilisation."""
        # A tower's input needs no gradient, so its backward is one product, not two.
        return (1 + BACKWARD_PASSES) * self.forward - self.towers


def count_flops(batch: PackedBatch, config: ModelConfig, vocab_size: int) -> Flops:
    """Return the FLOPs of one micro-batch.

    projections  2 tokens layers (D (H + 2 G) K + H K D + 3 D F)
    attention    4 layers H K sum over queries (kv_hi - kv_lo)
    head         2 N V D
    towers       2 media tokens x features x D
    contrastive  2 C D E for C segments, 0 without the objective
    """
    D, H, G, K = config.d_model, config.heads, config.kv_heads, config.head_width
    tokens = int(np.count_nonzero(batch.modality_ids != PADDING_ID))
    pairs = int((batch.kv_hi.astype(np.int64) - batch.kv_lo).sum())
    per_token = D * (H + 2 * G) * K + H * K * D + 3 * D * config.ffn_width
    media = sum(payload.values.shape[0] * payload.values.shape[1] for payload in batch.payloads.values())
    return Flops(
        projections=2 * tokens * config.layers * per_token,
        attention=4 * config.layers * H * K * pairs,
        head=2 * len(batch.targets) * vocab_size * D,
        towers=2 * media * D,
        contrastive=2 * len(batch.segments) * D * config.contrastive.width if "contrastive" in config.objectives else 0,
    )


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return parameters per part (`trunk` and each tower's modality) and their `total`; tied ones count once.

    Under ZeRO-3 the whole parameters are counted, not the local partitions.
    """
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = tower_of(name)
        counts[part] = counts.get(part, 0) + int(getattr(parameter, "ds_numel", parameter.numel()))
    return {**counts, "total": sum(counts.values())}
