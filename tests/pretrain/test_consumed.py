"""The ledger of consumed samples follows the lineage that survived."""

from __future__ import annotations

import pytest

from triweave.pretrain.errors import PretrainError
from triweave.pretrain.ledger.consumed import (
    ConsumedLedger,
    begin_attempt,
    decisions_behind,
    next_attempt,
    read_consumed,
)
from triweave.pretrain.objectives.balance import Decision


@pytest.fixture
def attempt(tmp_path, make_batch):
    """Write an attempt: steps of one row per rank, rows numbered by step."""

    def attempt(number: int, steps: range, *, parent: int | None, resumed_step: int, ranks: int = 2) -> None:
        assert next_attempt(tmp_path) == number
        begin_attempt(tmp_path, number, parent=parent, resumed_step=resumed_step)
        for rank in range(ranks):
            with ConsumedLedger(tmp_path, number, rank) as ledger:
                for step in steps:
                    ledger.write(step, [make_batch([(), None], length=32, first_plan_row=ranks * step + rank)])

    return attempt


def test_rows_carry_ids_and_hashes_and_zero_loss_rows_are_left_out(tmp_path, attempt, make_batch):
    attempt(1, range(1, 3), parent=None, resumed_step=0)
    rows = read_consumed(tmp_path)
    assert [(row.step, row.row, row.attempt) for row in rows] == [(1, 2, 1), (1, 3, 1), (2, 4, 1), (2, 5, 1)]
    batch = make_batch([(), None], length=32)
    assert rows[0].ids == tuple(batch.sample_ids[0])
    assert rows[0].hashes == tuple(batch.sample_hashes[0])


def test_overtaken_steps_and_dead_branches_do_not_count(tmp_path, attempt):
    """1 ran to step 6 and was killed; 2 resumed from 4 and died before a checkpoint; 3 resumed from 4 of 1 again."""
    attempt(1, range(1, 7), parent=None, resumed_step=0)
    attempt(2, range(5, 8), parent=1, resumed_step=4)
    attempt(3, range(5, 10), parent=1, resumed_step=4)
    rows = read_consumed(tmp_path)
    assert [(row.step, row.attempt) for row in rows[::2]] == [(step, 1 if step <= 4 else 3) for step in range(1, 10)]


def test_a_resume_before_the_parents_start_cuts_the_grandparent(tmp_path, attempt):
    """3 continues attempt 1's checkpoint of step 2 after the later ones were damaged."""
    attempt(1, range(1, 7), parent=None, resumed_step=0)
    attempt(2, range(5, 8), parent=1, resumed_step=4)
    attempt(3, range(3, 5), parent=1, resumed_step=2)
    assert [(row.step, row.attempt) for row in read_consumed(tmp_path)[::2]] == [(1, 1), (2, 1), (3, 3), (4, 3)]


def test_a_line_cut_by_a_kill_is_no_row(tmp_path, attempt):
    attempt(1, range(1, 3), parent=None, resumed_step=0, ranks=1)
    path = tmp_path / "consumed" / "attempt-0001" / "rank-00000.jsonl"
    path.write_text(path.read_text()[:-5])
    assert [row.step for row in read_consumed(tmp_path)] == [1]


def test_decisions_behind_a_checkpoint_are_those_of_its_attempt_and_of_those_since(tmp_path):
    """Attempt 1 wrote the checkpoint of step 2; 2 went on from there, 3 from elsewhere."""

    def decide(number: int, parent: int | None, resumed_step: int, *steps: int) -> None:
        begin_attempt(tmp_path, number, parent=parent, resumed_step=resumed_step)
        with ConsumedLedger(tmp_path, number, 0) as ledger:
            for step in steps:
                ledger.write_decision(Decision(step=step, weights={"a": float(number)}))

    decide(1, None, 0, 1, 2, 3, 4)
    decide(2, 1, 2, 3, 5)
    decide(3, None, 0, 1, 2, 3, 4, 5, 6)
    found = sorted(decisions_behind(tmp_path, 1, 2), key=lambda decision: decision.step)
    assert [(decision.step, decision.weights["a"]) for decision in found] == [(3, 2.0), (4, 1.0), (5, 2.0)]
    assert decisions_behind(tmp_path, 9, 2) == []


def test_a_run_without_ledger_is_named(tmp_path):
    with pytest.raises(PretrainError, match="has no attempts"):
        read_consumed(tmp_path)
