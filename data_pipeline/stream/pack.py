"""Bin packing under several budgets at once: best-fit-decreasing by tokens, spread evenly where other budgets bind.

    share(item, d) = size_d / cap_d;  items sorted by their largest share, largest first

**Tokens alone**: each item goes to the open pack with the least room left that it fits into. Items of equal sizes are
placed as a run: after the best pack took one, it is still the best for the next while it fits, so a run costs one
look-up per pack and not per item. Open packs are found by their room, a set held as one Python integer (bit r set: a
pack with room r exists); `mask >> size` and its lowest set bit are the best fit.

**Several budgets**: best fit alone would fill the first packs with what is rich in one budget and leave the rest of
their tokens empty. No packing has fewer than N = max_d ceil(sum_d / cap_d) packs, so N are opened at once and

    head   each item goes to the pack it fits into where  sum_d load_d^2  grows least        (all packs stay alike)
    tail   the smallest items, TAIL of the tokens, and what fitted nowhere: best fit by tokens   (fills them up)

The packs of the head are in groups of about GROUP_PACKS, between which the sorted items are dealt in turns, so that one
step of numpy places an item in every group.

Budgets beside tokens that can never bind are dropped first: where every item uses budget d in at most the proportion
cap_d : cap_tokens, no pack that respects its tokens can pass d. Everything is integer arithmetic.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

GROUP_PACKS = 64
"""Fewest packs of a group of the head."""
TAIL = 0.03
"""Share of the tokens, in the smallest items, that fill up the packs."""
BALANCED_FROM = 0.7
"""A budget is balanced in the head where its sum is at least this part of what N packs hold."""
SHARE_UNITS = 1 << 20
"""Loads are counted in caps / SHARE_UNITS."""
Int = npt.NDArray[np.int64]


def best_fit_decreasing(sizes: Int, caps: tuple[int, ...]) -> Int:
    """Return the pack number of each item, int64 [N], packs numbered from 0 without gaps.

    sizes: int64 [N, D] what each item uses of each budget; column 0 is tokens, at least 1.
    caps: D budgets of one pack.

    Deterministic, and independent of the order of equal items up to their exchange. Raises ValueError where an item
    alone passes a cap (the caller splits or filters those).
    """
    if sizes.ndim != 2 or sizes.shape[1] != len(caps):
        raise ValueError(f"sizes {sizes.shape} must be [N, {len(caps)}]")
    if len(sizes) == 0:
        return np.empty(0, np.int64)
    limit = np.asarray(caps, np.int64)
    if (sizes > limit).any() or (sizes[:, 0] < 1).any():
        raise ValueError("every item must use at least 1 token and fit into a pack of its own")
    packs = _pack_tokens(sizes[:, 0], caps[0])
    may_bind = [d for d in range(1, len(caps)) if (sizes[:, d] * limit[0] > sizes[:, 0] * limit[d]).any()]
    over = (np.bincount(packs, sizes[:, d]).max() > limit[d] for d in may_bind)
    return _Spread(sizes[:, [0, *may_bind]], limit[[0, *may_bind]]).packs() if any(over) else packs


def _pack_tokens(sizes: Int, cap: int) -> Int:
    """Return the packs of items by tokens alone."""
    order = np.argsort(-sizes, kind="stable")
    ordered = sizes[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counts = np.diff(np.r_[starts, len(ordered)])
    packs = np.empty(len(sizes), np.int64)
    packs[order] = np.repeat(*_place_runs(ordered[starts].tolist(), counts.tolist(), cap))
    return packs


def _place_runs(runs: list[int], counts: list[int], cap: int) -> tuple[list[int], list[int]]:
    """Place runs of equal items by tokens; returns the moves: (pack, number of items), in the runs' order."""
    pack_of_move: list[int] = []
    items_of_move: list[int] = []
    buckets: dict[int, list[int]] = {}
    mask = packs_opened = 0
    for size, run_count in zip(runs, counts, strict=True):
        count = run_count
        while count:
            fitting = mask >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                bucket = buckets[room]
                pack = bucket.pop()
                if not bucket:
                    mask ^= 1 << room
            else:
                room, pack = cap, packs_opened
                packs_opened += 1
            moved = min(count, room // size)
            count -= moved
            pack_of_move.append(pack)
            items_of_move.append(moved)
            room -= moved * size
            if room:
                buckets.setdefault(room, []).append(pack)
                mask |= 1 << room
    return pack_of_move, items_of_move


class _Spread:
    """Packs `sizes` [N, D] under `limit` [D]; a pack's rooms are what it has left of each budget."""

    def __init__(self, sizes: Int, limit: Int) -> None:
        self.sizes, self.limit = sizes, limit
        shares = sizes * SHARE_UNITS // limit
        by_size = (-sizes[:, d] for d in range(len(limit) - 1, -1, -1))
        self.order = np.lexsort((*by_size, -shares.max(axis=1)))
        need = sizes.sum(axis=0)
        self.bound = int((-(-need // limit)).max())
        self.balanced = np.flatnonzero(need >= BALANCED_FROM * self.bound * limit)
        self.shares = shares[:, self.balanced]
        self.pack_of = np.full(len(sizes), -1, np.int64)
        self.rooms = np.empty((0, len(limit)), np.int64)

    def packs(self) -> Int:
        """Return the pack of each item."""
        self._head()
        self._tail(self.order[self.pack_of[self.order] < 0])
        return np.unique(self.pack_of, return_inverse=True)[1].reshape(-1)

    def _head(self) -> None:
        """Spread the largest items over all packs.

        Groups have equal numbers of packs, or one more; the smaller ones are left out of every `most_packs`-th step.
        """
        groups = max(1, self.bound // GROUP_PACKS)
        most_packs = -(-self.bound // groups)
        larger = self.bound - groups * (most_packs - 1)
        tokens = np.cumsum(self.sizes[self.order, 0])
        head = self.order[: int(np.searchsorted(tokens, tokens[-1] * (1 - TAIL)))]
        steps = np.arange(2 * len(head) // groups + 2)[:, None]
        served = (np.arange(groups) < larger) | ((steps + np.arange(groups)) % most_packs != 0)
        starts = np.cumsum(served.sum(axis=1)) - served.sum(axis=1)
        rooms = np.tile(self.limit[:, None, None], (1, groups, most_packs))
        rooms[:, larger:, -1] = 0
        loads = np.zeros((len(self.balanced), groups, most_packs), np.int64)
        never = np.iinfo(np.int64).max
        for start, turn in zip(starts.tolist(), served, strict=True):
            items = head[start : start + groups]
            if not len(items):
                break
            held = np.flatnonzero(turn)[: len(items)]
            items = items[: len(held)]
            costs = np.zeros((len(items), most_packs), np.int64)
            for load, share in zip(loads, self.shares[items].T, strict=True):
                costs += share[:, None] * (2 * load[held] + share[:, None])
            for room, size in zip(rooms, self.sizes[items].T, strict=True):
                costs[room[held] < size[:, None]] = never
            best = costs.argmin(axis=1)
            fits = costs[np.arange(len(items)), best] < never
            held, best, items = held[fits], best[fits], items[fits]
            rooms[:, held, best] -= self.sizes[items].T
            loads[:, held, best] += self.shares[items].T
            self.pack_of[items] = held * most_packs + best
        self.rooms = rooms.reshape(len(self.limit), -1).T

    def _tail(self, items: Int) -> None:
        """Place items in this order, each where the fewest tokens are left that it fits into, or in a new pack."""
        opened = len(self.rooms)
        rooms = np.ascontiguousarray(np.tile(self.limit, (2 * opened, 1)).T)
        rooms[:, :opened] = self.rooms.T
        never = np.iinfo(np.int64).max
        for item, size in zip(items.tolist(), self.sizes[items], strict=True):
            left = rooms[0, :opened] - size[0]
            fits = left >= 0
            for d in np.flatnonzero(size[1:]) + 1:
                fits &= rooms[d, :opened] >= size[d]
            pack = int(np.where(fits, left, never).argmin())
            if not fits[pack]:
                pack = opened
                opened += 1
                if opened > rooms.shape[1]:
                    rooms = np.concatenate([rooms, np.tile(self.limit[:, None], (1, opened))], axis=1)
            rooms[:, pack] -= size
            self.pack_of[item] = pack
