"""Loss sums: what a forward pass returns, unnormalised, so that any split of the work adds up to the same mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triweave.data_pipeline.batch import PackedBatch

MODALITY_SLOTS = 8
"""Length of every per-modality vector; modality ids are below it."""


class LossSums(NamedTuple):
    """Sums over the supervised positions of one micro-batch on one rank; a named tuple so that ZeRO-3 can look inside.

    total: scalar with gradient, sum over heads of objective weight x head sum.
    per_modality: [MODALITY_SLOTS] detached, weighted cross-entropy by what the target follows (row_modality), nats.
    lse: [N] detached, log-partition of each supervised position.
    heads: head name -> detached scalar sum before the objective weight; 0 for the contrastive head, whose loss is one
        of the whole step (`contrastive_window`).
    embeddings: [C, E] of the micro-batch's segments, calibration: [2] scale and bias, both fp32 with gradient; None
        without the contrastive head.
    """

    total: Tensor
    per_modality: Tensor
    lse: Tensor
    heads: dict[str, Tensor]
    embeddings: Tensor | None = None
    calibration: Tensor | None = None


class HeadSums(NamedTuple):
    """What one head returns: `total` scalar with gradient; per_modality and lse as in LossSums, or empty [0].

    embeddings, calibration: as in LossSums.
    """

    total: Tensor
    per_modality: Tensor
    lse: Tensor
    embeddings: Tensor | None = None
    calibration: Tensor | None = None


def combine(sums: Mapping[str, HeadSums], objectives: Mapping[str, float]) -> LossSums:
    """Add the heads' sums with their objective weights; per-modality figures come from the first head that has them."""
    total = torch.stack([sums[name].total * objectives[name] for name in sums]).sum()
    reported = next((head for head in sums.values() if head.per_modality.numel()), next(iter(sums.values())))
    pooled = next((head for head in sums.values() if head.embeddings is not None), reported)
    return LossSums(
        total=total,
        per_modality=reported.per_modality.detach(),
        lse=reported.lse.detach(),
        heads={name: head.total.detach() for name, head in sums.items()},
        embeddings=pooled.embeddings,
        calibration=pooled.calibration,
    )


def weight_by_modality(batch: PackedBatch) -> npt.NDArray[np.float64]:
    """Return the supervised weight per modality [MODALITY_SLOTS], the denominators of LossSums.per_modality.

    Its sum over all ranks and micro-batches of a step is the normaliser of the step's loss.
    """
    sums = np.bincount(batch.row_modality, weights=batch.row_weight, minlength=MODALITY_SLOTS)
    return sums.astype(np.float64)
