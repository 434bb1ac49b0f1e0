"""The contrastive loss of one optimizer step, exact however its segments are spread over ranks and micro-batches.

Every rank gathers the fp32 embeddings of the whole step, sorts them by (plan row, item, modality), computes the whole
loss and takes its gradient with respect to the embeddings, the scale and the bias. That is done in float64: where
embeddings lie close together the terms of InfoNCE's gradient cancel, and in fp32 its last bits would show in moments
beyond the parity tolerance. A micro-batch then adds

    sum over its segments <embedding, gradient>        (and once per step <(scale, bias), gradient>)

to what it back-propagates, which has the gradients of the loss. With accumulation the embeddings come from a first pass
without gradient (Gao et al. 2021, GradCache).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from triweave.data_pipeline.batch import PackedBatch
from triweave.pretrain.engine.participation import Window
from triweave.pretrain.engine.world import World
from triweave.pretrain.objectives.contrastive import (
    Loss,
    SegmentTable,
    bounded_scale_gradient,
    contrastive_sums,
    live_segments,
    pair_blocks,
)
from triweave.pretrain.objectives.losses import LossSums

SCALE = 0
"""Place of the scale in the calibration (scale, bias)."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveFigures:
    """The contrastive part of one step, the same on every rank.

    loss: per positive pair, before the objective's weight; 0 in a step without positive pairs. pairs: positives.
    accuracy: share of queries, in both directions, whose nearest candidate of their group is their own partner.
    """

    loss: float
    pairs: int
    accuracy: float


NO_PAIRS = ContrastiveFigures(loss=0.0, pairs=0, accuracy=0.0)


class ContrastiveWindow:
    """Gradients of one step's contrastive mean, for each micro-batch of this rank.

    Attributes: `figures`, known after `solve`.
    """

    def __init__(
        self, world: World, window: Window, micro_batches: Sequence[PackedBatch], *, loss: Loss, weight: float
    ) -> None:
        """weight: of the contrastive mean in the objective."""
        self._world, self._window, self._loss, self._weight = world, window, loss, weight
        self._live = [np.flatnonzero(live_segments(batch)) for batch in micro_batches]
        self._table = _table(micro_batches, self._live)
        self._gradients: list[Tensor] | None = None
        self._calibration_gradient: Tensor | None = None
        self.figures = NO_PAIRS

    @property
    def holds_segments(self) -> bool:
        """Whether any rank holds a segment in this step."""
        return bool(self._window.segments.any())

    def solve(self, embeddings: Sequence[Tensor], calibration: Tensor) -> None:
        """Compute the loss and its gradients from this rank's embeddings [C, E] per micro-batch; collective."""
        mine = torch.cat(
            [
                values.detach()[torch.from_numpy(live).to(values.device)]
                for values, live in zip(embeddings, self._live, strict=True)
            ]
        )
        table, gathered = self._gather(mine)
        order = table.canonical_order()
        places = torch.from_numpy(order).to(mine.device)
        ordered = gathered[places].double().requires_grad_()
        known = calibration.detach().double().requires_grad_()
        with torch.enable_grad():
            sums = contrastive_sums(ordered, known[0], known[1], pair_blocks(table.take(order)), self._loss)
        if not sums.pairs:
            return
        by_embedding, by_calibration = torch.autograd.grad(sums.loss, (ordered, known))
        by_calibration[SCALE] = bounded_scale_gradient(float(calibration[SCALE]), by_calibration[SCALE], self._loss)
        factor = self._weight / sums.pairs
        returned = torch.empty_like(gathered)
        returned[places] = (by_embedding * factor).float()
        self._gradients = self._share(returned, embeddings)
        self._calibration_gradient = (by_calibration * factor).float()
        self.figures = ContrastiveFigures(
            loss=float(sums.loss.detach()) / sums.pairs, pairs=sums.pairs, accuracy=sums.hits / (2 * sums.pairs)
        )

    def surrogate(self, sums: LossSums, micro_batch: int) -> Tensor:
        """Return the scalar whose gradients, summed over ranks and micro-batches, are those of the weighted mean.

        The head takes part in every micro-batch, with gradients of 0 where there is nothing to learn.
        """
        assert sums.embeddings is not None
        assert sums.calibration is not None
        if self._gradients is None or self._calibration_gradient is None:
            return (sums.embeddings * 0).sum() + (sums.calibration * 0).sum()
        once = self._world.rank == 0 and micro_batch == 0
        by_calibration = self._calibration_gradient if once else torch.zeros_like(self._calibration_gradient)
        return (sums.embeddings * self._gradients[micro_batch]).sum() + (sums.calibration * by_calibration).sum()

    def _gather(self, mine: Tensor) -> tuple[SegmentTable, Tensor]:
        """Return the table and the embeddings of the whole step, rank by rank."""
        counts = self._window.segments.sum(axis=1).tolist()
        columns = torch.from_numpy(self._table)
        world = self._world
        rows = _gather_ragged(columns, counts, world, group=world.control)
        fields = rows.numpy().T
        table = SegmentTable(
            plan_rows=fields[0],
            items=fields[1],
            modalities=fields[2],
            groups=fields[3],
            content_keys=np.ascontiguousarray(fields[4]).view(np.uint64),
            group_keys=np.ascontiguousarray(fields[5]).view(np.uint64),
        )
        return table, _gather_ragged(mine, counts, world, group=None)

    def _share(self, gradients: Tensor, embeddings: Sequence[Tensor]) -> list[Tensor]:
        """Return each micro-batch's part of the gathered gradients, zero at its segments that take part in nothing."""
        start = int(self._window.segments[: self._world.rank].sum())
        shares = []
        for values, live in zip(embeddings, self._live, strict=True):
            share = torch.zeros_like(values)
            share[torch.from_numpy(live).to(values.device)] = gradients[start : start + len(live)]
            shares.append(share)
            start += len(live)
        return shares


def _table(micro_batches: Sequence[PackedBatch], live: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Return int64 [live segments, 6]: plan row, item, modality, group, content key, group key (both as their bits)."""
    parts = [np.empty((0, 6), np.int64)]
    for batch, chosen in zip(micro_batches, live, strict=True):
        segments = batch.segments
        rows = segments.rows[chosen]
        columns = (
            batch.plan_rows[rows],
            segments.items[chosen],
            segments.modality[chosen],
            batch.contrastive_group[rows],
            segments.content_keys[chosen].view(np.int64),
            segments.group_keys[chosen].view(np.int64),
        )
        parts.append(np.stack([column.astype(np.int64) for column in columns], axis=1))
    return np.concatenate(parts)


def _gather_ragged(rows: Tensor, counts: Sequence[int], world: World, *, group: object) -> Tensor:
    """Return all ranks' rows [counts[rank], ...], one rank after the other; collective."""
    if world.size == 1:
        return rows
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
