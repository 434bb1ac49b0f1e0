"""Loss sums: what a forward pass returns, unnormalised, so that any split of the work adds up to the same mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from triweave.data_pipeline.batch import PackedBatch

MODALITY_SLOTS = 8
"""Length of every per-modality vector; modality ids are below it."""


class LossSums(NamedTuple):
    """Sums over the supervised positions of one micro-batch on one rank; a named tuple so that ZeRO-3 can look inside.

    total: scalar with gradient, the heads' sums joined by `objectives.joint_loss` with the factors asked for.
    by_slot: [sources * MODALITY_SLOTS] detached, weighted cross-entropy by the slot of the target (`loss_slots`), nats;
        zeros where no head has figures of it.
    lse: [N] detached, log-partition of each supervised position.
    heads: head name -> detached scalar sum before its factor; 0 for the contrastive head, whose loss is one of the
        whole step (`contrastive_window`).
    hits: head name -> detached scalar, weight of the rows whose prediction is right, of heads that predict one of few.
    embeddings: [C, E] of the micro-batch's segments, calibration: [2] scale and bias, both fp32 with gradient; None
        without the contrastive head.
    log_variances: [T] of the objectives, fp32 with gradient, where the joint loss learns them.
    """

    total: Tensor
    by_slot: Tensor
    lse: Tensor
    heads: dict[str, Tensor]
    hits: dict[str, Tensor]
    embeddings: Tensor | None = None
    calibration: Tensor | None = None
    log_variances: Tensor | None = None


class HeadSums(NamedTuple):
    """What one head returns: `total` scalar with gradient; by_slot and lse as in LossSums, or empty [0].

    embeddings, calibration: as in LossSums. hits: detached scalar, None where a prediction is not right or wrong.
    """

    total: Tensor
    by_slot: Tensor
    lse: Tensor
    embeddings: Tensor | None = None
    calibration: Tensor | None = None
    hits: Tensor | None = None

    @classmethod
    def of(cls, total: Tensor, hits: Tensor | None = None) -> HeadSums:
        """Return the sums of a head that has no figures by modality."""
        nothing = total.detach().new_empty(0)
        return cls(total=total, by_slot=nothing, lse=nothing, hits=hits)


def combine(sums: Mapping[str, HeadSums], total: Tensor, log_variances: Tensor | None, *, sources: int) -> LossSums:
    """Return the heads' sums with what they are joined to; figures by slot come from the first head with some."""
    heads = list(sums.values())
    reported = next((head for head in heads if head.by_slot.numel()), None)
    pooled = next((head for head in heads if head.embeddings is not None), heads[0])
    return LossSums(
        total=total,
        by_slot=total.detach().new_zeros(sources * MODALITY_SLOTS) if reported is None else reported.by_slot.detach(),
        lse=total.detach().new_empty(0) if reported is None else reported.lse.detach(),
        heads={name: head.total.detach() for name, head in sums.items()},
        hits={name: head.hits for name, head in sums.items() if head.hits is not None},
        embeddings=pooled.embeddings,
        calibration=pooled.calibration,
        log_variances=log_variances,
    )


def loss_slots(batch: PackedBatch, sources: int = 1) -> npt.NDArray[np.int64]:
    """Return the slot of each supervised position, [N]: MODALITY_SLOTS * row_source + row_modality.

    sources: of the run; with one, sources are not told apart and the slot is the modality.
    """
    slots = batch.row_modality.astype(np.int64)
    return slots if sources == 1 else slots + MODALITY_SLOTS * batch.row_source.astype(np.int64)


def weight_by_slot(batch: PackedBatch, sources: int = 1) -> npt.NDArray[np.float64]:
    """Return the supervised weight per slot [sources, MODALITY_SLOTS], the denominators of LossSums.by_slot.

    Its sum over all ranks and micro-batches of a step is the normaliser of the step's loss.
    """
    slots = sources * MODALITY_SLOTS
    sums = np.bincount(loss_slots(batch, sources), weights=batch.row_weight, minlength=slots)
    return sums.astype(np.float64).reshape(sources, MODALITY_SLOTS)
