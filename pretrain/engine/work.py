"""What the micro-batches of a step hold, counted on the host for the step's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.batch import PADDING_ID, PackedBatch
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.flops import count_flops
from triweave.pretrain.objectives.losses import MODALITY_SLOTS

WORK_FIGURES = 1 + 2 * MODALITY_SLOTS
"""Length of `Work.row`."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Whole micro-batches of one rank, or all ranks' together.

    flops: of their training (`flops.Flops.training`). tokens: float64 [MODALITY_SLOTS] positions that are no padding.
    items: float64 [MODALITY_SLOTS] pictures, sounds ...; 0 for text.
    """

    flops: float = 0.0
    tokens: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(MODALITY_SLOTS))
    items: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(MODALITY_SLOTS))

    @property
    def row(self) -> npt.NDArray[np.float64]:
        """The figures one after the other, to be exchanged."""
        return np.concatenate([[self.flops], self.tokens, self.items])

    @classmethod
    def of_row(cls, row: npt.NDArray[np.float64]) -> Work:
        """Return what `row` was made of."""
        return cls(flops=float(row[0]), tokens=row[1 : 1 + MODALITY_SLOTS], items=row[1 + MODALITY_SLOTS :])


def count_work(micro_batches: Sequence[PackedBatch], model: ModelConfig, vocab_size: int) -> Work:
    """Count whole micro-batches, before anything is cut out of them."""
    work = Work(flops=float(sum(count_flops(batch, model, vocab_size).training for batch in micro_batches)))
    for batch in micro_batches:
        filled = batch.modality_ids[batch.modality_ids != PADDING_ID]
        work.tokens[:] += np.bincount(filled, minlength=MODALITY_SLOTS)
        for name, payload in batch.payloads.items():
            work.items[MODALITIES[name].id] += len(payload.lengths)
    return work
