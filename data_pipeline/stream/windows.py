"""Which plan rows each rank runs in each global step.

    step n takes plan rows [c, c + G);  a rank runs A = ceil(G / (W B)) micro-batches of B rows in every step

Rows move between ranks only inside that range, largest estimated cost first to the least loaded rank that has room; a
rank's rows are then in plan order, and what it is short of is filled up with zero-loss rows at its end.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from triweave.data_pipeline.errors import WindowError
from triweave.data_pipeline.stream.layout import PiecePlan, row_pieces
from triweave.data_pipeline.stream.plan import BlockPlan, Planner
from triweave.data_pipeline.stream.state import StreamState

ZERO_LOSS_ROW = -1


@dataclass(frozen=True, kw_only=True)
class MicroBatchTask:
    """What one micro-batch holds.

    plan_rows: B absolute plan rows, ZERO_LOSS_ROW where there is none.
    pieces: the pieces of each of these rows.
    first_row, end_row: the window this micro-batch is part of.
    state: the stream after the window, with the window's last micro-batch; None with the others.
    """

    plan_rows: list[int]
    pieces: list[list[PiecePlan]]
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

    Ties go to the lower row and the lower rank, and each rank's rows are returned in ascending order.
    """
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    load = [(0.0, rank) for rank in range(world_size)]
    for row in sorted(range(len(costs)), key=lambda row: (-costs[row], row)):
        cost, rank = heapq.heappop(load)
        ranks[rank].append(row)
        if len(ranks[rank]) < rank_rows:
            heapq.heappush(load, (cost + costs[row], rank))
    return [sorted(rows) for rows in ranks]


def micro_batch_tasks(
    planner: Planner, shape: WindowShape, start: StreamState, *, worker: int = 0, workers: int = 1
) -> Iterator[MicroBatchTask]:
    """Yield the micro-batches of one rank from `start` on, without end; of these every `workers`-th, from `worker` on.

    Raises StateError where `start` belongs to another plan, WindowError where the sources give no row at all.
    """
    start.check_plan(planner.plan_hash, planner.identity)
    rows = _rows(planner, start)
    earlier = start.segments[:-1]
    next_row = start.next_row
    task = 0
    while True:
        window = [next(rows) for _ in range(shape.global_batch_rows)]
        first_row, next_row = next_row, next_row + len(window)
        costs = [float(plan.row_costs[row]) for plan, row, _ in window]
        chosen = assign_rows(costs, shape.world_size, shape.rank_rows)[shape.rank]
        last_plan, _, block_first_row = window[-1]
        state = planner.state_at(
            block=last_plan.block, block_first_row=block_first_row, next_row=next_row, earlier=earlier
        )
        B = shape.micro_batch_rows
        for number in range(shape.accumulation):
            task += 1
            if (task - 1) % workers != worker:
                continue
            held = chosen[number * B : (number + 1) * B]
            short = B - len(held)
            yield MicroBatchTask(
                plan_rows=[first_row + row for row in held] + [ZERO_LOSS_ROW] * short,
                pieces=[row_pieces(*window[row][:2]) for row in held] + [[] for _ in range(short)],
                first_row=first_row,
                end_row=next_row,
                state=state if number == shape.accumulation - 1 else None,
            )


def _rows(planner: Planner, start: StreamState) -> Iterator[tuple[BlockPlan, int, int]]:
    """Yield (block plan, row within the block, absolute first row of the block) from a state on."""
    block, block_first_row, skip = start.block, start.block_first_row, start.next_row - start.block_first_row
    barren = 0
    while True:
        plan = planner.block(block)
        if skip > plan.rows:
            raise WindowError(f"the saved stream stands at row {skip} of block {block}, which has {plan.rows}")
        for row in range(skip, plan.rows):
            yield plan, row, block_first_row
        barren = 0 if plan.rows else barren + 1
        if barren > planner.mixture.epoch_blocks:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in plan.left_out.items()) or "no samples"
            raise WindowError(
                f"a whole epoch gives no pack at sequence_length={planner.config.sequence_length} ({reasons})"
            )
        block, block_first_row, skip = block + 1, block_first_row + plan.rows, 0
