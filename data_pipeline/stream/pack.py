"""Best-fit-decreasing bin packing under several budgets at once.

    share(item, d) = size_d / cap_d;  items sorted by their largest share, largest first;
    each goes to the open pack with the least room left in the item's largest-share budget that it fits into

With tokens alone this is plain best-fit-decreasing. Items of equal sizes are placed as a run: after the best pack took
one, it is still the best for the next while it fits, so a run costs one look-up per pack and not per item. Open packs
are found by their room, per budget a set of rooms held as one Python integer (bit r set: a pack with room r exists);
`mask >> size` and its lowest set bit are the best fit.

Budgets beside tokens that can never bind are dropped first: where every item uses budget d in at most the proportion
cap_d : cap_tokens, no pack that respects its tokens can pass d. With several budgets left, at most TRIES packs are
looked at before a new one is opened, so the cost stays linear.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TRIES = 16
"""Candidate packs looked at per run where another budget refuses the best fit."""
LEVELS = 1 << 14
"""Distinct rooms a budget is searched by; larger budgets (milliseconds) are searched in coarser steps."""


def best_fit_decreasing(sizes: npt.NDArray[np.int64], caps: tuple[int, ...]) -> npt.NDArray[np.int64]:
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
    may_bind = [d for d in range(1, len(caps)) if (sizes[:, d] * limit[0] > sizes[:, 0] * limit[d]).any()]
    used = np.ascontiguousarray(sizes[:, [0, *may_bind]])
    shares = used / limit[[0, *may_bind]]
    order = np.lexsort((*(-used[:, d] for d in range(used.shape[1] - 1, -1, -1)), -shares.max(axis=1)))
    ordered = used[order]
    starts = np.flatnonzero(np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)])
    counts = np.diff(np.r_[starts, len(ordered)])
    runs = ordered[starts].tolist()
    caps_used = [caps[0], *(caps[d] for d in may_bind)]
    if may_bind:
        leading = shares[order[starts]].argmax(axis=1).tolist()
        moves = _place_many_budgets(runs, counts.tolist(), leading, caps_used)
    else:
        moves = _place_one_budget([size for (size,) in runs], counts.tolist(), caps[0])
    packs = np.empty(len(sizes), np.int64)
    packs[order] = np.repeat(*moves)
    return packs


def _place_one_budget(runs: list[int], counts: list[int], cap: int) -> tuple[list[int], list[int]]:
    """Place runs of equal items by tokens alone; returns the moves: (pack, number of items), in the runs' order."""
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


def _place_many_budgets(
    runs: list[list[int]], counts: list[int], leading: list[int], caps: list[int]
) -> tuple[list[int], list[int]]:
    """Place runs of equal items by every budget in `caps`; `leading` is each run's largest-share budget."""
    pack_of_move: list[int] = []
    items_of_move: list[int] = []
    smallest = [min((run[d] for run in runs if run[d]), default=cap) for d, cap in enumerate(caps)]
    opened = _OpenPacks(caps, smallest)
    for run, run_count, lead in zip(runs, counts, leading, strict=True):
        count = run_count
        while count:
            pack = opened.best(run, lead)
            left = opened.rooms[pack]
            moved = min(count, min(room // size for room, size in zip(left, run, strict=True) if size))
            count -= moved
            pack_of_move.append(pack)
            items_of_move.append(moved)
            opened.take(pack, [moved * size for size in run])
    return pack_of_move, items_of_move


class _OpenPacks:
    """Rooms of every open pack, searchable by each budget.

    Packs are filed by class: bit d set where the smallest item that uses budget d still fits into it, so an item never
    looks at packs that are full of what it needs. Entries of a bucket may be stale; they are dropped when met.
    """

    def __init__(self, caps: list[int], smallest: list[int]) -> None:
        self.caps = caps
        self.smallest = smallest
        self.units = [max(1, cap // LEVELS) for cap in caps]
        self.rooms: list[list[int]] = []
        self.classes: list[int] = []
        self.masks = [[0] * (1 << len(caps)) for _ in caps]
        self.buckets: list[list[dict[int, list[int]]]] = [[{} for _ in range(1 << len(caps))] for _ in caps]

    def best(self, run: list[int], lead: int) -> int:
        """Return the pack with the least room in budget `lead` that `run` fits into.

        Where other budgets refuse TRIES of them, the emptiest packs of each budget are asked before one is opened.
        """
        uses = sum(1 << d for d, size in enumerate(run) if size)
        masks = self.masks[lead]
        classes = [number for number in range(len(masks)) if number & uses == uses]
        floors = {number: run[lead] // self.units[lead] for number in classes if masks[number]}
        for _ in range(TRIES):
            nearest = [
                (floor + (fitting & -fitting).bit_length() - 1, number)
                for number, floor in floors.items()
                if (fitting := masks[number] >> floor)
            ]
            if not nearest:
                break
            level, number = min(nearest)
            pack = self._last(lead, number, level)
            if self._fits(pack, run):
                return pack
            floors[number] = level + 1
        for d, size in enumerate(run):
            for number in classes if size else ():
                while self.masks[d][number]:
                    pack = self._last(d, number, self.masks[d][number].bit_length() - 1)
                    if self._fits(pack, run):
                        return pack
                    if pack >= 0:
                        break
        self.rooms.append(list(self.caps))
        self.classes.append(0)
        return len(self.rooms) - 1

    def _fits(self, pack: int, run: list[int]) -> bool:
        return pack >= 0 and all(room >= size for room, size in zip(self.rooms[pack], run, strict=True))

    def _last(self, d: int, number: int, level: int) -> int:
        """Drop stale entries and return the newest pack of a bucket; -1, and the mask cleared, if none is left."""
        bucket, unit = self.buckets[d][number][level], self.units[d]
        while bucket:
            pack = bucket[-1]
            if self.classes[pack] == number and self.rooms[pack][d] // unit == level:
                return pack
            bucket.pop()
        self.masks[d][number] ^= 1 << level
        return -1

    def take(self, pack: int, used: list[int]) -> None:
        """Use up room of a pack and file it under its new class and rooms; a pack without tokens left is closed."""
        before = self.rooms[pack]
        rooms = [room - size for room, size in zip(before, used, strict=True)]
        number = sum(1 << d for d, (room, least) in enumerate(zip(rooms, self.smallest, strict=True)) if room >= least)
        moved_class = number != self.classes[pack]
        self.rooms[pack], self.classes[pack] = rooms, number
        if not number & 1:
            return
        for d, unit in enumerate(self.units):
            level = rooms[d] // unit
            if number >> d & 1 and (moved_class or level != before[d] // unit):
                self.buckets[d][number].setdefault(level, []).append(pack)
                self.masks[d][number] |= 1 << level
