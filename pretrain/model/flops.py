"""Exact counts: parameters per part of the model, and the matrix FLOPs of one PackedBatch, media included."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from triweave.data_pipeline.batch import PADDING_ID, TEXT_ID, PackedBatch, Payload
from triweave.pretrain.batch import read_by
from triweave.pretrain.encoders.config import EncoderConfig
from triweave.pretrain.encoders.flops import TowerFlops, tower_flops
from triweave.pretrain.engine.optimizer import tower_of
from triweave.pretrain.fusion.flops import cross_flops
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.objectives.flops import objective_flops
from triweave.pretrain.open_models.flops import open_tower_flops

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
    """Encoders and connectors of media tokens."""
    towers_spared: int
    """What the towers' backward needs less than twice their forward: the payload gets no gradient."""
    cross: int = 0
    """Gated cross-attention layers and their resampler."""
    contrastive: int = 0
    """Projection of pooled segments; the cosines are of the whole step and counted nowhere."""
    objectives: int = 0
    """Heads of the other objectives."""

    @property
    def forward(self) -> int:
        """Sum of the parts."""
        heads = self.head + self.contrastive + self.objectives
        return self.projections + self.attention + self.cross + self.towers + heads

    @property
    def training(self) -> int:
        """Forward plus backward, the numerator of model FLOPs utilisation."""
        return (1 + BACKWARD_PASSES) * self.forward - self.towers_spared


def count_flops(batch: PackedBatch, config: ModelConfig, vocab_size: int) -> Flops:
    """Return the FLOPs of one micro-batch.

    projections  2 tokens layers (D (H + 2 G) K + H K D + 3 D F)
    attention    4 layers H K sum over queries (kv_hi - kv_lo), of what the model's layout and fusion make of the batch
    cross        `fusion.flops.cross_flops`, 0 but for the fusion cross
    head         2 N V D
    towers       `encoders.flops.tower_flops`, `open_models.flops.open_tower_flops`; 2 media tokens x features x D of a
                 linear patch embedder
    contrastive  2 C D E for C segments, 0 without the objective
    objectives   `objectives.flops.objective_flops`
    """
    D, H, G, K = config.d_model, config.heads, config.kv_heads, config.head_width
    read, axis = read_by(batch, config.layout, config.fusion)
    tokens = int(np.count_nonzero(read.modality_ids != PADDING_ID))
    pairs = int((read.kv_hi.astype(np.int64) - read.kv_lo).sum())
    if config.fusion.kind == "mmca":
        pairs -= _text_that_media_skip(read)
    per_token = D * (H + 2 * G) * K + H * K * D + 3 * D * config.ffn_width
    towers = [_tower(name, payload, config) for name, payload in batch.payloads.items()]
    return Flops(
        projections=2 * tokens * config.layers * per_token,
        attention=4 * config.layers * H * K * pairs,
        cross=0 if axis is None else cross_flops(read, axis, config),
        head=2 * len(batch.targets) * vocab_size * D,
        towers=sum(tower.forward for tower in towers),
        towers_spared=sum(tower.spared for tower in towers),
        contrastive=2 * len(batch.segments) * D * config.contrastive.width if "contrastive" in config.objectives else 0,
        objectives=objective_flops(batch, config, vocab_size),
    )


def _tower(name: str, payload: Payload, config: ModelConfig) -> TowerFlops:
    if name in config.open_encoders:
        return open_tower_flops(payload.grids, config.open_encoders[name], config)
    settings = config.encoders.get(name, EncoderConfig())
    return tower_flops(name, payload.lengths, payload.values.shape[1], settings, config)


def _text_that_media_skip(batch: PackedBatch) -> int:
    """Return the text keys in the intervals of media queries, which mmca leaves out."""
    text_before = np.pad(np.cumsum(batch.modality_ids == TEXT_ID, axis=1), ((0, 0), (1, 0)))
    lo, hi = (np.take_along_axis(text_before, bound.astype(np.int64), axis=1) for bound in (batch.kv_lo, batch.kv_hi))
    return int((hi - lo)[batch.modality_ids > TEXT_ID].sum())


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return parameters per part (`trunk` and each tower's modality) and their `total`; tied ones count once.

    Under ZeRO-3 the whole parameters are counted, not the local partitions.
    """
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = tower_of(name)
        counts[part] = counts.get(part, 0) + int(getattr(parameter, "ds_numel", parameter.numel()))
    return {**counts, "total": sum(counts.values())}
