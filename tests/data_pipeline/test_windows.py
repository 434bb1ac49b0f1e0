"""Dealing the rows of a step to ranks."""

from __future__ import annotations

import numpy as np
import pytest

from triweave.data_pipeline.errors import WindowError
from triweave.data_pipeline.stream.windows import WindowShape, assign_rows


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_row_goes_to_one_rank_with_room(world_size: int) -> None:
    costs = np.random.default_rng(world_size).random(17).tolist()
    room = -(-17 // world_size)
    ranks = assign_rows(costs, world_size, room)
    assert sorted(row for rank in ranks for row in rank) == list(range(17))
    assert all(1 <= len(rank) <= room for rank in ranks)
    assert all(rank == sorted(rank) for rank in ranks)


def test_ranks_get_about_equal_work() -> None:
    costs = np.random.default_rng(0).exponential(size=64).tolist()
    ranks = assign_rows(costs, 4, 20)
    work = [sum(costs[row] for row in rank) for rank in ranks]
    assert max(work) <= 1.05 * sum(costs) / 4
    in_turn = [sum(costs[rank::4]) for rank in range(4)]
    assert max(work) < max(in_turn)


def test_by_hand() -> None:
    # Largest first: 9 -> rank 0, 5 -> rank 1, 4 -> rank 1, 1 and 1 -> the tie at 9 goes to rank 0, then to rank 1.
    assert assign_rows([1.0, 5.0, 9.0, 4.0, 1.0], 2, 3) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize(
    ("world_size", "G", "B", "accumulation"), [(1, 8, 2, 4), (3, 8, 2, 2), (3, 3, 4, 1), (2, 9, 2, 3)]
)
def test_accumulation_is_the_fewest_micro_batches_that_hold_the_step(
    world_size: int, G: int, B: int, accumulation: int
) -> None:
    shape = WindowShape(rank=0, world_size=world_size, global_batch_rows=G, micro_batch_rows=B)
    assert shape.accumulation == accumulation
    assert world_size * shape.rank_rows >= G > world_size * (shape.rank_rows - B)


def test_more_ranks_than_rows_are_refused() -> None:
    with pytest.raises(WindowError, match=r"global_batch_rows=2.*fewer ranks"):
        WindowShape(rank=0, world_size=3, global_batch_rows=2, micro_batch_rows=1)
