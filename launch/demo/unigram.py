"""The yardstick of the demo: what the best model that ignores all context would score on the same tokens.

    unigram(class) = -sum_v p(v) ln p(v)     p = distribution of the supervised targets of the class in these rows

The distribution is that of the very tokens it is scored on, so no unigram model can do better; a model that is below it
uses what stands before. Classes are the modality that a target follows: text, image, audio.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triweave.data_pipeline.config import DataConfig
    from triweave.data_pipeline.stream.plan import Planner
    from triweave.data_pipeline.stream.state import StreamState


def entropy(counts: Counter[int]) -> float:
    """Return the entropy in nats of the distribution with these counts."""
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


def state_after(planner: Planner, *, steps: int, global_batch_rows: int) -> StreamState:
    """Return the state of a stream of one plan segment after so many steps."""
    block, first_row, row = 0, 0, steps * global_batch_rows
    while row >= first_row + planner.block(block).rows:
        first_row += planner.block(block).rows
        block += 1
    return planner.state_at(block=block, block_first_row=first_row, next_row=row, step=steps)


def unigram_losses(
    data: DataConfig, *, global_batch_rows: int, steps: int, state: StreamState | None
) -> tuple[dict[str, float], dict[str, int]]:
    """Return class -> loss of the best unigram model, nats per token, and class -> supervised tokens.

    The targets are those of `steps` optimizer steps from `state` on (None: from the start of the stream), read by the
    loader that training uses.
    """
    from triweave.data_pipeline.batch import TEXT_ID
    from triweave.data_pipeline.media.modalities import MODALITIES
    from triweave.data_pipeline.stream.loader import StepLoader

    names = {TEXT_ID: "text"} | {modality.id: name for name, modality in MODALITIES.items()}
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    loader = StepLoader(
        data, rank=0, world_size=1, global_batch_rows=global_batch_rows, micro_batch_rows=global_batch_rows, state=state
    )
    for window in itertools.islice(loader, steps):
        for batch in window.micro_batches:
            used = batch.row_weight > 0
            for follows, target in zip(batch.row_modality[used].tolist(), batch.targets[used].tolist(), strict=True):
                counts[names[follows]][target] += 1
    return (
        {name: entropy(counter) for name, counter in counts.items()},
        {name: sum(counter.values()) for name, counter in counts.items()},
    )
