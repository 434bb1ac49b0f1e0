"""LateFusion: from the parts of documents, each encoded alone, to one vector per document."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from triweave.data_pipeline.batch import TEXT_ID
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.shards.schema import TEXT
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.late.bilinear import FactorizedBilinear, FullTensor, LowRankTensor, Mutan
from triweave.pretrain.late.config import LateConfig
from triweave.pretrain.late.features import PartFeatures
from triweave.pretrain.late.operators import Concatenation, Hybrid, ModalityAttention, SpanGraph, Vote

OPERATORS: dict[str, Callable[[LateConfig, int], nn.Module]] = {
    "concatenation": Concatenation,
    "vote": Vote,
    "hybrid": Hybrid,
    "attention": ModalityAttention,
    "mfb": FactorizedBilinear,
    "mutan": Mutan,
    "lmf": LowRankTensor,
    "tfn": FullTensor,
    "graph": SpanGraph,
}
"""Name in the config -> operator class."""


class LateFusion(nn.Module):
    """One operator over pooled parts; its parameters are used by every call, also one without any item."""

    def __init__(self, config: LateConfig, width: int) -> None:
        """Make the operator for features of `width` numbers; raises PretrainError for an unknown modality."""
        super().__init__()
        known = {TEXT: TEXT_ID, **{name: modality.id for name, modality in MODALITIES.items()}}
        if unknown := [name for name in config.modalities if name not in known]:
            raise PretrainError(
                f"model.fusion.late.modalities names {unknown[0]!r}; known: {', '.join(known)}; remove it, or register "
                "it"
            )
        slots = torch.full((1 + max(known.values()),), -1)
        for slot, name in enumerate(config.modalities):
            slots[known[name]] = slot
        self.register_buffer("slots", slots, persistent=False)
        self.operator = OPERATORS[config.operator](config, width)

    def forward(self, features: Tensor, modalities: Tensor, items: Tensor, count: int) -> Tensor:
        """Return the fused features [N, D], in fp32; an item without a fused part is 0.

        features: [C, D] of the parts. modalities: int64 [C] modality ids. items: int64 [C] item of each, from 0.
        count: items N.
        """
        slots = self.slots[modalities]  # type: ignore[index]
        dtype = next(self.operator.parameters()).dtype
        fused: Tensor = self.operator(PartFeatures(features.to(dtype), slots, items, count))
        return fused.float()
