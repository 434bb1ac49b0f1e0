"""Loss norms: what the mean that one step minimises is taken over.

    loss of a step = sum_n w'_n loss_n / sum_n w'_n      over the supervised tokens n of all ranks and micro-batches

    global_tokens        w'_n = w_n                every token counts the same
    global_square_root   w'_n = w_n / sqrt(N_d)    between the two (InternVL 2.5: "square averaging")
    global_documents     w'_n = w_n / N_d          every document counts the same, however long it is
    micro_batch_tokens   w'_n = w_n / W_b          a mean of the means of the micro-batches that supervise anything

w_n is the weight the data gives, N_d the number of supervised tokens of n's document (the piece of it in that row), W_b
the sum of the weights of n's micro-batch. The three global ones do not depend on how rows are split into ranks and
micro-batches. micro_batch_tokens does: it is what a loop computes that takes `loss.mean()` of every forward pass, and
is here to continue or compare with runs of such loops.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from triweave.data_pipeline.batch import PackedBatch
from triweave.pretrain.engine.config import LossNorm

DOCUMENT_POWER: dict[LossNorm, float] = {"global_tokens": 0.0, "global_square_root": 0.5, "global_documents": 1.0}
"""Power of N_d that a token's weight is divided by."""


def normalised(batch: PackedBatch, norm: LossNorm) -> PackedBatch:
    """Return the batch with the weights w' [N], float32, in `row_weight`; nothing else is copied or changed.

    Sums of `row_weight`, telemetry's supervised_tokens among them, then count square roots, documents or micro-batches.
    """
    weights = batch.row_weight.astype(np.float64)
    if norm == "global_tokens" or not weights.any():
        return batch
    if norm == "micro_batch_tokens":
        divisors = np.full(len(weights), weights.sum())
    else:
        divisors = _document_tokens(batch) ** DOCUMENT_POWER[norm]
    return dataclasses.replace(batch, row_weight=(weights / divisors).astype(np.float32))


def _document_tokens(batch: PackedBatch) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return, for each supervised token, how many its document has in its row [N]."""
    rows, length = batch.tokens.shape
    document = batch.document_ids.reshape(-1)[batch.row_index].astype(np.int64)
    key = batch.row_index // length * (length + 1) + document
    counts = np.bincount(key, minlength=rows * (length + 1)).astype(np.float64)
    found: np.ndarray[tuple[int], np.dtype[np.float64]] = counts[key]
    return found
