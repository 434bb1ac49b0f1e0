"""Which plan rows each rank runs in each global step.

    step n takes plan rows [c, c + g);  g = G, or fewer where one more row would pass a cap of the global batch; with
                                        contrastive groups (rows r of equal r // group rows) one more group
    a rank runs A = ceil(G / (W B)) micro-batches of B rows in every step

Rows move between ranks only inside that range, largest estimated cost first to the least loaded rank that has room,
and then by exchanges; a rank's rows are then in plan order, and what it is short of is filled up with zero-loss rows at
its end. Where the config's schedule says so, the rows of the next step come from the next plan segment.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.errors import WindowError
from triweave.data_pipeline.stream.layout import PiecePlan, row_pieces
from triweave.data_pipeline.stream.plan import BlockPlan, Planner
from triweave.data_pipeline.stream.state import StreamState

ZERO_LOSS_ROW = -1
EXCHANGES = 4
"""Most exchanges of rows per rank when a step's rows are dealt."""
LEAST_GAIN = 1e-3
"""Smallest part of the gap between two ranks that an exchange must close."""


@dataclass(frozen=True, kw_only=True)
class MicroBatchTask:
    """What one micro-batch holds.

    plan_rows: B absolute plan rows, ZERO_LOSS_ROW where there is none.
    pieces: the pieces of each of these rows.
    planner: the plan that they are from; None once the batch is made.
    first_row, end_row: the window this micro-batch is part of.
    state: the stream after the window, with the window's last micro-batch; None with the others.
    """

    plan_rows: list[int]
    pieces: list[list[PiecePlan]]
    planner: Planner | None
    first_row: int
    end_row: int
    state: StreamState | None


@dataclass(frozen=True, kw_only=True)
class WindowShape:
    """How global steps are dealt to ranks. Raises WindowError where a rank could never have a row."""

    rank: int
    world_size: int
    global_batch_rows: int
    micro_batch_rows: int

    def __post_init__(self) -> None:
        """Check the sizes against each other."""
        if not 0 <= self.rank < self.world_size:
            raise WindowError(f"rank={self.rank}: must be in [0, world_size={self.world_size})")
        if self.micro_batch_rows < 1:
            raise WindowError(f"micro_batch_rows={self.micro_batch_rows}: must be at least 1")
        if self.global_batch_rows < self.world_size:
            raise WindowError(
                f"global_batch_rows={self.global_batch_rows}: must be at least the number of ranks, {self.world_size}, "
                "so that each has a row; raise it or start fewer ranks"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches a rank runs per step, ceil(G / (W B))."""
        return -(-self.global_batch_rows // (self.world_size * self.micro_batch_rows))

    @property
    def rank_rows(self) -> int:
        """Rows a rank runs per step, zero-loss rows included."""
        return self.accumulation * self.micro_batch_rows


def assign_rows(costs: Sequence[float], world_size: int, rank_rows: int) -> list[list[int]]:
    """Deal rows 0..len(costs) to ranks: largest cost first, to the least loaded rank with fewer than `rank_rows` rows.

    Then the most and the least loaded rank exchange the two rows that bring them closest, as long as that helps. Ties
    go to the lower row and the lower rank, and each rank's rows are returned in ascending order.
    """
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    load = [(0.0, rank) for rank in range(world_size)]
    for row in sorted(range(len(costs)), key=lambda row: (-costs[row], row)):
        cost, rank = heapq.heappop(load)
        ranks[rank].append(row)
        if len(ranks[rank]) < rank_rows:
            heapq.heappush(load, (cost + costs[row], rank))
    loads = [sum(costs[row] for row in rows) for rows in ranks]
    for _ in range(EXCHANGES * world_size):
        if not _exchange(costs, ranks, loads):
            break
    return [sorted(rows) for rows in ranks]


def _exchange(costs: Sequence[float], ranks: list[list[int]], loads: list[float]) -> bool:
    """Exchange one row of the most loaded rank for one of the least loaded; return whether that narrowed the two."""
    high, low = loads.index(max(loads)), loads.index(min(loads))
    gap = loads[high] - loads[low]
    best, given, taken = min(
        ((abs(gap - 2 * (costs[mine] - costs[other])), mine, other) for mine in ranks[high] for other in ranks[low]),
        default=(gap, -1, -1),
    )
    if best >= gap * (1 - LEAST_GAIN):
        return False
    for rank, out, into in ((high, given, taken), (low, taken, given)):
        ranks[rank][ranks[rank].index(out)] = into
        loads[rank] += costs[into] - costs[out]
    return True


def micro_batch_tasks(
    planner: Planner, shape: WindowShape, start: StreamState, *, worker: int = 0, workers: int = 1
) -> Iterator[MicroBatchTask]:
    """Yield the micro-batches of one rank from `start` on, without end; of these every `workers`-th, from `worker` on.

    planner: that of the segment that `start` stands at (`Planner.resumed`).

    Raises WindowError where `start` stands outside of its block, and where the sources give no row at all.
    """
    walk = StepWalk(planner, start)
    task = 0
    while True:
        first_row = walk.next_row
        window = walk.step(shape.global_batch_rows)
        costs = [float(plan.row_costs[row]) for plan, row in window]
        chosen = assign_rows(costs, shape.world_size, shape.rank_rows)[shape.rank]
        B = shape.micro_batch_rows
        for number in range(shape.accumulation):
            task += 1
            if (task - 1) % workers != worker:
                continue
            held = chosen[number * B : (number + 1) * B]
            short = B - len(held)
            yield MicroBatchTask(
                plan_rows=[first_row + row for row in held] + [ZERO_LOSS_ROW] * short,
                pieces=[row_pieces(*window[row]) for row in held] + [[] for _ in range(short)],
                planner=walk.planner,
                first_row=first_row,
                end_row=walk.next_row,
                state=walk.state() if number == shape.accumulation - 1 else None,
            )


class StepWalk:
    """The steps of a stream, one after the other; every rank and worker walks the same ones."""

    def __init__(self, planner: Planner, start: StreamState) -> None:
        self.planner = planner
        self.earlier = start.segments[:-1]
        self.next_row, self.steps = start.next_row, start.step
        self.block, self.block_first_row = start.block, start.block_first_row
        self.caps = self._caps()
        self.barren = 0
        if (rows := planner.block(self.block).rows) < self._row:
            raise WindowError(f"the saved stream stands at row {self._row} of block {self.block}, which has {rows}")

    def step(self, most_rows: int) -> list[tuple[BlockPlan, int]]:
        """Return the rows of the next step, each as its block's plan and its number there."""
        packing = self.planner.schedule.packing
        unit = packing.contrastive_group_rows if packing.contrastive_share else 1
        if self.steps == self.planner.last_step:
            self._next_segment()
        window: list[tuple[BlockPlan, int]] = []
        used = np.zeros(len(self.planner.caps), np.int64)
        whole = None  # where the latest group ended: rows so far, and where the stream stood
        while len(window) < most_rows:
            plan = self.planner.block(self.block)
            if self._row == plan.rows:
                self._next_block(plan)
                continue
            used += plan.row_budgets[self._row]
            if window and (used > self.caps).any():
                if whole is not None:
                    rows, self.next_row, self.block, self.block_first_row = whole
                    del window[rows:]
                break
            window.append((plan, self._row))
            self.next_row += 1
            if self.next_row % unit == 0:
                whole = len(window), self.next_row, self.block, self.block_first_row
        self.steps += 1
        return window

    def state(self) -> StreamState:
        """Return the state after the latest step."""
        return self.planner.state_at(
            block=self.block,
            block_first_row=self.block_first_row,
            next_row=self.next_row,
            step=self.steps,
            earlier=self.earlier,
        )

    @property
    def _row(self) -> int:
        return self.next_row - self.block_first_row

    def _next_block(self, plan: BlockPlan) -> None:
        self.barren = 0 if plan.rows else self.barren + 1
        if self.barren > self.planner.mixture.epoch_blocks:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in plan.left_out.items()) or "no samples"
            raise WindowError(
                f"a whole epoch gives no pack at sequence_length={self.planner.config.sequence_length} ({reasons})"
            )
        self.block, self.block_first_row = self.block + 1, self.block_first_row + plan.rows

    def _next_segment(self) -> None:
        """Hand over to the next segment's plan behind the rows taken so far."""
        self.earlier = self.state().segments
        self.planner = self.planner.following(block=self.block, row=self._row)
        self.block, self.block_first_row, self.barren = 0, self.next_row, 0
        self.caps = self._caps()

    def _caps(self) -> npt.NDArray[np.int64]:
        """Return the cap of a step on each budget of the rows."""
        unlimited, caps = np.iinfo(np.int64).max, self.planner.config.batch_caps.set_caps
        return np.asarray([caps.get(name, unlimited) for name in self.planner.caps], np.int64)
