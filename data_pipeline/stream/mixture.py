"""Which samples come when: keyed orders of each source and the share of each source in every block.

    order(source, epoch) = shards in a keyed permutation, dealt into groups of about `block_samples`,
                           the samples of a group in a keyed permutation
    one source:      block b = group b mod groups of epoch b div groups
    several sources: block b = positions start_s + [round(b K w_s), round((b + 1) K w_s)) of every source s, epoch after
                     epoch, K = min(block_samples, samples of a pass), w_s = weight_s / sum of weights

So weights are shares of samples (the planner turns other units into them), every sample comes exactly once per (source,
epoch), and the position of any block is known without planning the blocks before it. Shares are held in units of 2^-32
and everything is integer arithmetic. A mixture may start in the middle of the sources' orders, where another one ended.
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
HALF_SHARE = 1 << (SHARE_BITS - 1)


def keyed_order(count: int, *key: object) -> npt.NDArray[np.int64]:
    """Return the permutation of range(count) that `key` selects, int64 [count].

    Sorts the raw output of Philox under xxh3_128(key): raw bit streams are fixed by numpy's compatibility policy, its
    `permutation` is not.
    """
    digest = xxhash.xxh3_128_intdigest("\x1f".join(map(str, key)).encode())
    return np.argsort(np.random.Philox(key=digest).random_raw(count), kind="stable")


@dataclass(frozen=True, kw_only=True)
class SourceShape:
    """What the order of a source depends on: its name, its weight and the number of samples of each shard.

    weight: share of the samples, relative to the other sources'; 0: nothing of it is drawn.
    """

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

    def __init__(
        self,
        sources: Sequence[SourceShape],
        *,
        block_samples: int,
        seed: int,
        starts: Sequence[int] | None = None,
        pass_samples: int | None = None,
    ) -> None:
        """Make the orders of `sources`, of which one at least has a weight, and each a sample (the planner checks).

        starts: samples of each source, epochs counted on, that come before block 0; None: none.
        pass_samples: samples drawn in what is called one epoch; None: as many as all sources with a weight hold.
        """
        self.sources = tuple(sources)
        self.seed = seed
        self.active = tuple(number for number, source in enumerate(self.sources) if source.weight)
        self.starts = tuple(starts or [0] * len(self.sources))
        alone = len(self.active) == 1
        held = sum(self.sources[number].samples for number in self.active)
        self.epoch_samples = held if alone or pass_samples is None else pass_samples
        """Samples drawn in what is called one epoch."""
        self.block_samples = min(block_samples, self.epoch_samples)
        self._group_samples = block_samples
        self._shares = _integer_shares([source.weight for source in self.sources])
        self._groups = lru_cache(maxsize=64)(self._deal_groups)
        self._group_order = lru_cache(maxsize=2 * len(self.sources) + 2)(self._order_of_group)
        self._first_group = self._group_at_start(self.active[0]) if alone else None

    @property
    def epoch_blocks(self) -> int:
        """Blocks of one epoch."""
        if self._first_group is not None:
            return self.group_count(self.active[0])
        return -(-self.epoch_samples // self.block_samples)

    def draws(self, block: int) -> list[Draw]:
        """Return what block number `block` takes from each source, in the order of the sources and their epochs."""
        draws = []
        ends = self.positions(block + 1)
        for number, position in enumerate(self.positions(block)):
            while position < ends[number]:
                epoch, first = divmod(position, self.sources[number].samples)
                taken = min(ends[number] - position, self.sources[number].samples - first)
                draws.append(Draw(source=number, epoch=epoch, first=first, end=first + taken))
                position += taken
        return draws

    def positions(self, block: int) -> list[int]:
        """Return the samples of each source, epochs counted on, that come before block number `block`."""
        if self._first_group is None:
            drawn = block * self.block_samples
            shares = zip(self.starts, self._shares, strict=True)
            return [start + ((drawn * share + HALF_SHARE) >> SHARE_BITS) for start, share in shares]
        source = self.active[0]
        epoch, group = divmod(self._first_group + block, self.group_count(source))
        border = epoch * self.sources[source].samples + int(self._groups(source, epoch)[1][group])
        positions = list(self.starts)
        positions[source] = max(border, positions[source])
        return positions

    def cursors(self, block: int) -> dict[str, SourceCursor]:
        """Return source name -> position at the start of block number `block`."""
        cursors = {}
        for source, position in zip(self.sources, self.positions(block), strict=True):
            epoch, sample = divmod(position, source.samples)
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
        return max(1, min(len(shape.shard_samples), round(shape.samples / self._group_samples)))

    def _group_at_start(self, source: int) -> int:
        """Return the group that a source starts in, groups of the epochs before counted on; of empty ones the first."""
        epoch, sample = divmod(self.starts[source], self.sources[source].samples)
        borders = self._groups(source, epoch)[1]
        group = int(np.searchsorted(borders, sample))
        return epoch * self.group_count(source) + (group if borders[group] == sample else group - 1)

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
    """Return the weights as integers that sum to 2^SHARE_BITS, each at least 1 where the weight is above 0."""
    total = sum(weights)
    shares = [max(1, round(weight / total * (1 << SHARE_BITS))) if weight else 0 for weight in weights]
    shares[shares.index(max(shares))] += (1 << SHARE_BITS) - sum(shares)
    return shares
