"""How well a plan mixes: how far samples move from where they are stored, and how many shards meet in a step.

    distance = 3 mean |place in the stream - place in storage|         places as fractions of the source's epoch
    entropy  = mean H(shards of a step's documents) / mean H(shards of as many documents drawn at random)

A uniformly random order has 1 in both (two independent uniform fractions are 1/3 apart in the mean); storage order has
distance 0, and entropy near 0 where a step lies within one shard. Blocks that hold few shards have a low entropy
whatever the distance, since the order of the shards alone moves samples far.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.stream.plan import DOCUMENT, BlockPlan, Planner

REFERENCE_STEPS = 64
"""Steps of documents drawn at random that the entropy is compared with."""
_SHARD_BITS = 32


class ShuffleQuality:
    """Collects the blocks and the steps of an epoch of one planner."""

    def __init__(self, planner: Planner) -> None:
        self._mixture = planner.mixture
        self._before = [np.r_[0, np.cumsum(source.shard_samples)] for source in planner.mixture.sources]
        self._moved = 0.0
        self._documents = 0
        self._entropies: list[float] = []
        self._step_documents: list[int] = []
        self._shards: dict[int, int] = {}

    def add_block(self, plan: BlockPlan) -> None:
        """Count how far the documents of a block are from their places in storage."""
        chosen = (plan.kinds == DOCUMENT) & (plan.first_tokens == 0) & (plan.sources < len(self._before))
        sources, epochs = plan.sources[chosen], plan.epochs[chosen]
        shards, samples = plan.shards[chosen], plan.samples[chosen]
        for draw in self._mixture.draws(plan.block):
            own = np.flatnonzero((sources == draw.source) & (epochs == draw.epoch))
            if not len(own):
                continue
            before = self._before[draw.source]
            stored = (before[shards[own]] + samples[own] + 0.5) / before[-1]
            streamed = draw.first + (np.arange(len(own)) + 0.5) / len(own) * (draw.end - draw.first)
            self._moved += float(np.abs(stored - streamed / before[-1]).sum())
            self._documents += len(own)
        for shard, count in zip(*np.unique(_shard_ids(sources, shards), return_counts=True), strict=True):
            self._shards[int(shard)] = self._shards.get(int(shard), 0) + int(count)

    def add_step(self, rows: Sequence[tuple[BlockPlan, int]]) -> None:
        """Count the shards that the documents of one step, or of as many rows, come from."""
        shards = []
        for plan, row in rows:
            span = slice(int(plan.row_starts[row]), int(plan.row_starts[row + 1]))
            chosen = (plan.kinds[span] == DOCUMENT) & (plan.first_tokens[span] == 0)
            shards.append(_shard_ids(plan.sources[span][chosen], plan.shards[span][chosen]))
        drawn = np.concatenate(shards)
        self._entropies.append(entropy_bits(np.unique(drawn, return_counts=True)[1]))
        self._step_documents.append(len(drawn))

    @property
    def distance(self) -> float | None:
        """How far samples move: 0 in storage order, about 1 in a uniformly random one; None without documents."""
        return 3 * self._moved / self._documents if self._documents else None

    @property
    def entropy(self) -> float | None:
        """Entropy of a step's shards over that of a uniformly random order; None where all lies in one shard."""
        counts = np.asarray(list(self._shards.values()), np.float64)
        if len(counts) < 2 or not self._entropies:
            return None
        generator = np.random.default_rng(0)
        sizes = generator.choice(np.asarray(self._step_documents), REFERENCE_STEPS)
        expected = np.mean([entropy_bits(generator.multinomial(size, counts / counts.sum())) for size in sizes])
        return float(np.mean(self._entropies) / expected) if expected else None


def entropy_bits(counts: npt.NDArray[np.int64]) -> float:
    """Return the entropy of a histogram, -sum p log2 p."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log2(shares)).sum())


def _shard_ids(sources: npt.NDArray[np.int32], shards: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    return sources.astype(np.int64) << _SHARD_BITS | shards
