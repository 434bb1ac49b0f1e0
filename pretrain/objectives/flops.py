"""Matrix FLOPs of the heads over the rows that a batch has for them."""

from __future__ import annotations

from triweave.data_pipeline.batch import PackedBatch
from triweave.pretrain.batch import OBJECTIVE_ROWS
from triweave.pretrain.model.config import ModelConfig


def objective_flops(batch: PackedBatch, config: ModelConfig, vocab_size: int) -> int:
    """Return 2 x the multiply-adds of the forward products, for C rows of each objective.

    classification  C D classes      regression, matching  C D
    masked_tokens   C (D^2 + D V)    masked_media          C D features

    What is fused over items (`model.fusion.late`) counts nothing.
    """
    D, total = config.d_model, 0
    for name, rows in batch.extra.get(OBJECTIVE_ROWS, {}).items():
        if len(rows.parts):
            continue
        outputs = {
            "classification": len(config.classification.classes),
            "masked_tokens": D + vocab_size,
            "masked_media": rows.targets.shape[-1],
        }
        total += 2 * len(rows.weights) * D * outputs.get(name.split("/")[0], 1)
    return total
