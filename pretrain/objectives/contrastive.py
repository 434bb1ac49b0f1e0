"""The contrastive loss over the pooled segments of one optimizer step: which pairs count, and what they cost.

Segments are one-span encodings of the parts of documents, an item is one document's set of them. Within a contrastive
group, for every two modalities a < b, with unit embeddings u_i of a and v_j of b, cosines c_ij = <u_i, v_j>:

    positives P   pairs (i, j) of the same item
    candidates Q  P and all pairs of different items that share no content key and no group key other than 0
    sigmoid       sum over Q of -log sigmoid(z_ij (s c_ij + t)),  z = 1 on P, else -1        (Zhai et al. 2023)
    infonce       sum over P of (log sum_{k in Q_i} exp(s c_ik) - s c_ij) / 2
                              + (log sum_{k in Q_j} exp(s c_kj) - s c_ij) / 2                (Radford et al. 2021)

The loss of a step is the sum over groups and modality pairs divided by the number of all its positives. A pair of
different items that shares a key is no negative: the same picture, caption or transcript, or one group of the splits.

C segments, E embedding width, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from triweave.data_pipeline.batch import PackedBatch

Loss = Literal["sigmoid", "infonce"]
MAX_INFONCE_SCALE = 100.0
"""InfoNCE's scale is cut here, as in CLIP: beyond it single pairs take all of the gradient."""


@dataclass(frozen=True, kw_only=True)
class SegmentTable:
    """What the loss knows of C segments beside their embeddings.

    plan_rows: int64 [C] absolute plan row. items: int64 [C] document within its row. modalities: int64 [C].
    groups: int64 [C] contrastive group. content_keys, group_keys: uint64 [C].
    """

    plan_rows: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]
    modalities: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    content_keys: npt.NDArray[np.uint64]
    group_keys: npt.NDArray[np.uint64]

    def canonical_order(self) -> npt.NDArray[np.int64]:
        """Return the permutation that sorts by (plan row, item, modality), whoever held the segments."""
        return np.lexsort((self.modalities, self.items, self.plan_rows)).astype(np.int64)

    def take(self, order: npt.NDArray[np.int64]) -> SegmentTable:
        """Return the table of the segments `order`."""
        return SegmentTable(
            plan_rows=self.plan_rows[order],
            items=self.items[order],
            modalities=self.modalities[order],
            groups=self.groups[order],
            content_keys=self.content_keys[order],
            group_keys=self.group_keys[order],
        )


@dataclass(frozen=True, kw_only=True)
class PairBlock:
    """All pairs of two modalities in one group: rows int64 [R] and columns int64 [N] number segments of the table.

    positive, candidate: bool [R, N]; every positive is a candidate.
    """

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    positive: npt.NDArray[np.bool_]
    candidate: npt.NDArray[np.bool_]


class ContrastiveSums(NamedTuple):
    """loss: scalar sum over all pairs, with gradient. pairs: positives. hits: best candidates that are positives.

    hits counts both directions, so 2 * pairs is perfect retrieval.
    """

    loss: Tensor
    pairs: int
    hits: int


def live_segments(batch: PackedBatch) -> npt.NDArray[np.bool_]:
    """Return bool [C]: the segments that take part, those of weight above 0 in rows with a group."""
    segments = batch.segments
    live: npt.NDArray[np.bool_] = (segments.weights > 0) & (batch.contrastive_group[segments.rows] >= 0)
    return live


def pair_blocks(table: SegmentTable) -> list[PairBlock]:
    """Return the blocks of every group and modality pair that has segments on both sides, in order of group."""
    blocks = []
    for group in np.unique(table.groups):
        members = np.flatnonzero(table.groups == group)
        _, item = np.unique(np.stack([table.plan_rows[members], table.items[members]]), axis=1, return_inverse=True)
        item = item.reshape(-1)
        conflict = _conflicts(item, table.content_keys[members], table.group_keys[members])
        modalities = table.modalities[members]
        for first, second in combinations(np.unique(modalities), 2):
            rows, columns = np.flatnonzero(modalities == first), np.flatnonzero(modalities == second)
            positive = item[rows][:, None] == item[columns][None, :]
            blocks.append(
                PairBlock(
                    rows=members[rows],
                    columns=members[columns],
                    positive=positive,
                    candidate=positive | ~conflict[np.ix_(item[rows], item[columns])],
                )
            )
    return blocks


def contrastive_sums(
    embeddings: Tensor, scale: Tensor, bias: Tensor, blocks: Sequence[PairBlock], loss: Loss
) -> ContrastiveSums:
    """Return the loss summed over all blocks.

    embeddings: [C, E] of unit length, in the order of the blocks' table. scale, bias: scalars s and t; InfoNCE does not
    depend on the bias.
    """
    total = embeddings.sum() * 0 + (scale + bias) * 0
    pairs = hits = 0
    for block in blocks:
        positive, candidate = (
            torch.from_numpy(mask).to(embeddings.device) for mask in (block.positive, block.candidate)
        )
        rows, columns = (torch.from_numpy(index).to(embeddings.device) for index in (block.rows, block.columns))
        cosines = embeddings[rows] @ embeddings[columns].t()
        total = total + _LOSSES[loss](cosines, scale, bias, positive, candidate)
        pairs += int(block.positive.sum())
        hits += _hits(cosines.detach(), positive, candidate)
    return ContrastiveSums(loss=total, pairs=pairs, hits=hits)


def bounded_scale_gradient(scale: float, gradient: Tensor, loss: Loss) -> Tensor:
    """Return the gradient of the scale with what would drive InfoNCE's further past its cut taken out.

    A plain clamp has no gradient beyond the cut at all, so a scale that once overshoots would never come back.
    """
    return gradient.clamp_min(0) if loss == "infonce" and scale > MAX_INFONCE_SCALE else gradient


def _sigmoid(cosines: Tensor, scale: Tensor, bias: Tensor, positive: Tensor, candidate: Tensor) -> Tensor:
    logits = scale * cosines + bias
    costs = -functional.logsigmoid(torch.where(positive, logits, -logits))
    return (costs * candidate).sum()


def _infonce(cosines: Tensor, scale: Tensor, bias: Tensor, positive: Tensor, candidate: Tensor) -> Tensor:  # noqa: ARG001 - one signature for both
    cut = scale + (scale.detach().clamp_max(MAX_INFONCE_SCALE) - scale.detach())  # the cut's value, the scale's slope
    logits = cut * cosines
    return (_retrieval(logits, positive, candidate) + _retrieval(logits.t(), positive.t(), candidate.t())) / 2


def _retrieval(logits: Tensor, positive: Tensor, candidate: Tensor) -> Tensor:
    """Return the cross-entropy of the rows that have a positive; the others ask nothing, and may have no candidate."""
    asks = positive.any(1)
    normaliser = logits[asks].masked_fill(~candidate[asks], -torch.inf).logsumexp(1, keepdim=True)
    return ((normaliser - logits[asks]) * positive[asks]).sum()


_LOSSES = {"sigmoid": _sigmoid, "infonce": _infonce}


def _hits(cosines: Tensor, positive: Tensor, candidate: Tensor) -> int:
    if not cosines.numel():
        return 0
    ranked = cosines.masked_fill(~candidate, -torch.inf)
    return sum(int(positive.gather(axis, ranked.argmax(axis, keepdim=True)).sum()) for axis in (0, 1))


def _conflicts(
    item: npt.NDArray[np.int64], content_keys: npt.NDArray[np.uint64], group_keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.bool_]:
    """Return bool [I, I]: which two items share a content key, or a group key other than 0; item numbers are 0..I-1."""
    count = int(item.max()) + 1
    conflict = np.zeros((count, count), np.bool_)
    for keys, counted in ((content_keys, np.full(len(item), fill_value=True)), (group_keys, group_keys != 0)):
        order = np.flatnonzero(counted)[np.argsort(keys[counted], kind="stable")]
        starts = np.flatnonzero(np.diff(keys[order])) + 1
        for holders in np.split(item[order], starts):
            if len(holders) > 1:
                conflict[np.ix_(holders, holders)] = True
    return conflict
