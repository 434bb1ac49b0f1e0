"""Which samples come when: keyed orders of each source and the share of each source in every block.

    order(source, epoch) = shards in a keyed permutation, dealt into groups of about `block_samples`,
                           the samples of a group in a keyed permutation
    one source:      block b = group b mod groups of epoch b div groups
    several sources: block b = positions [floor(b K w_s), floor((b + 1) K w_s)) of every source s, epoch after epoch,
                     K = min(block_samples, samples of all sources), w_s = weight_s / sum of weights

So weights are shares of samples, every sample comes exactly once per (source, epoch), and the position of any block is
known without planning the blocks before it. Shares are held in units of 2^-32 and everything is integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import xxhash

from triweave.data_pipeline.stream.state import SourceCursor

SHARE_BITS = 32


def keyed_order(count: int, *key: object) -> npt.NDArray[np.int64]:
    """Return the permutation of range(count) that `key` selects, int64 [count].

    Sorts the raw output of Philox under xxh3_128(key): raw bit streams are fixed by numpy's compatibility policy, its
    `permutation` is not.
    """
    digest = xxhash.xxh3_128_intdigest("\x1f".join(map(str, key)).encode())
    return np.argsort(np.random.Philox(key=digest).random_raw(count), kind="stable")


@dataclass(frozen=True, kw_only=True)
class SourceShape:
    """What the order of a source depends on: its name, its weight and the number of samples of each shard."""

    name: str
    weight: float
    shard_samples: tuple[int, ...]

    @property
    def samples(self) -> int:
        """Samples of one epoch."""
        return sum(self.shard_samples)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Positions [first, end) of the order of one epoch of one source (by its number in the mixture)."""

    source: int
    epoch: int
    first: int
    end: int


class Mixture:
    """The order of samples of several sources. Holds no samples; cheap to make, the same in every process."""

    def __init__(self, sources: Sequence[SourceShape], *, block_samples: int, seed: int) -> None:
        """Sources must have at least one sample each (the planner checks)."""
        self.sources = tuple(sources)
        self.seed = seed
        self.block_samples = min(block_samples, sum(source.samples for source in self.sources))
        self._shares = _integer_shares([source.weight for source in self.sources])
        self._groups = lru_cache(maxsize=64)(self._deal_groups)
        self._group_order = lru_cache(maxsize=2 * len(self.sources) + 2)(self._order_of_group)

    @property
    def epoch_samples(self) -> int:
        """Samples drawn in what is called one epoch: as many as all sources hold together."""
        return sum(source.samples for source in self.sources)

    @property
    def epoch_blocks(self) -> int:
        """Blocks of one epoch."""
        return self.group_count(0) if len(self.sources) == 1 else -(-self.epoch_samples // self.block_samples)

    def draws(self, block: int) -> list[Draw]:
        """Return what block number `block` takes from each source, in the order of the sources and their epochs."""
        if len(self.sources) == 1:
            groups = self.group_count(0)
            epoch, group = divmod(block, groups)
            borders = self._groups(0, epoch)[1]
            first, end = int(borders[group]), int(borders[group + 1])
            return [Draw(source=0, epoch=epoch, first=first, end=end)] if end > first else []
        draws = []
        for number, source in enumerate(self.sources):
            position, end = self._drawn_before(number, block), self._drawn_before(number, block + 1)
            while position < end:
                epoch, first = divmod(position, source.samples)
                taken = min(end - position, source.samples - first)
                draws.append(Draw(source=number, epoch=epoch, first=first, end=first + taken))
                position += taken
        return draws

    def cursors(self, block: int) -> dict[str, SourceCursor]:
        """Return source name -> position at the start of block number `block`."""
        if len(self.sources) == 1:
            epoch, group = divmod(block, self.group_count(0))
            position = int(self._groups(0, epoch)[1][group])
            return {self.sources[0].name: SourceCursor(epoch=epoch, sample=position)}
        cursors = {}
        for number, source in enumerate(self.sources):
            epoch, sample = divmod(self._drawn_before(number, block), source.samples)
            cursors[source.name] = SourceCursor(epoch=epoch, sample=sample)
        return cursors

    def order(self, draw: Draw) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return the shard number and the number within its shard of each sample of a draw, int32 [end - first]."""
        _, borders = self._groups(draw.source, draw.epoch)
        shards, rows = [], []
        first_group = int(np.searchsorted(borders, draw.first, side="right")) - 1
        for group in range(first_group, len(borders) - 1):
            start = int(borders[group])
            if start >= draw.end:
                break
            part = slice(max(draw.first - start, 0), draw.end - start)
            group_shards, group_rows = self._group_order(draw.source, draw.epoch, group)
            shards.append(group_shards[part])
            rows.append(group_rows[part])
        return np.concatenate(shards), np.concatenate(rows)

    def group_count(self, source: int) -> int:
        """Groups of shards an epoch of a source is dealt into; the same in every epoch."""
        shape = self.sources[source]
        return max(1, min(len(shape.shard_samples), round(shape.samples / self.block_samples)))

    def _drawn_before(self, source: int, block: int) -> int:
        return (block * self.block_samples * self._shares[source]) >> SHARE_BITS

    def _deal_groups(self, source: int, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the shards of an epoch in order, and the sample positions where its groups begin and the last ends.

        A group's border is the shard border nearest below its fair share, so groups may be empty, never split a shard.
        """
        shape = self.sources[source]
        shards = keyed_order(len(shape.shard_samples), self.seed, "shards", shape.name, epoch)
        shard_ends = np.cumsum(np.asarray(shape.shard_samples, np.int64)[shards])
        shard_borders = np.r_[0, shard_ends]
        groups = self.group_count(source)
        fair = np.arange(groups + 1) * shape.samples // groups
        borders = shard_borders[np.searchsorted(shard_borders, fair, side="right") - 1]
        borders[-1] = shape.samples
        return shards, borders

    def _order_of_group(
        self, source: int, epoch: int, group: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        shape = self.sources[source]
        shards, borders = self._groups(source, epoch)
        shard_borders = np.r_[0, np.cumsum(np.asarray(shape.shard_samples, np.int64)[shards])]
        first, end = int(borders[group]), int(borders[group + 1])
        positions = first + keyed_order(end - first, self.seed, "samples", shape.name, epoch, group)
        place = np.searchsorted(shard_borders, positions, side="right") - 1
        return shards[place].astype(np.int32), (positions - shard_borders[place]).astype(np.int32)


def _integer_shares(weights: Sequence[float]) -> list[int]:
    """Return the weights as integers that sum to 2^SHARE_BITS, each at least 1."""
    total = sum(weights)
    shares = [max(1, round(weight / total * (1 << SHARE_BITS))) for weight in weights]
    shares[shares.index(max(shares))] += (1 << SHARE_BITS) - sum(shares)
    return shares
