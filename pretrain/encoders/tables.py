"""What the attentions within encoders want of a batch, made in the loader's workers; loads no torch of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from triweave.pretrain.encoders.config import EncoderConfig
from triweave.pretrain.encoders.transformer_config import sections_of, transformer_config
from triweave.pretrain.model.config import ModelConfig

if TYPE_CHECKING:
    from triweave.pretrain.batch import KernelTables


@dataclass(frozen=True, kw_only=True)
class ItemTables:
    """Tables of one modality's encoder: `encoder` of the attention within items, `perceiver` of its connector's.

    kernels: what the implementation for the encoder's heads reads. positions: c, the encoder's positions of a token.
    queries: who asks -> its queries a token.
    """

    kernels: KernelTables
    positions: int
    queries: dict[str, int]

    def __call__(self, lengths: npt.NDArray[np.int32]) -> dict[str, dict[str, npt.NDArray[Any]]]:
        """Return reader -> tables for items of `lengths` tokens."""
        ends = lengths.astype(np.int64).cumsum() * self.positions
        starts = ends - lengths.astype(np.int64) * self.positions
        keys = np.zeros((1, int(ends[-1])), np.int8)
        tables = {}
        for reader, queries in self.queries.items():
            repeats = lengths.astype(np.int64) * queries
            lo, hi = (np.repeat(bound, repeats).astype(np.int32)[None] for bound in (starts, ends))
            tables[reader] = self.kernels.of(lo, hi, keys)
        return tables


def readers(modality: str, settings: EncoderConfig) -> dict[str, int]:
    """Return which attentions an encoder and its connector have, and their queries for one token."""
    found = {"encoder": settings.positions_per_token(modality)} if settings.kind in ("vit", "transformer") else {}
    return found | ({"perceiver": 1} if settings.connector == "perceiver" else {})


def heads_config(settings: EncoderConfig, config: ModelConfig) -> ModelConfig:
    """Return a config with the heads of an encoder's attention, on which its tables depend."""
    return transformer_config(settings, config, sections_of("text", settings.head_width), layers=1)
