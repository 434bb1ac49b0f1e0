"""Why a step was slow, from what its figures have more of than the median step's."""

from __future__ import annotations

from typing import Any

import pytest

from triweave.launch.report.slow_steps import slow_steps


def entry(step: int, **more: Any) -> dict[str, Any]:
    usual = {"step_s": 1.0, "data_wait_s": 0.1, "flops": 100.0, "rank_imbalance": 1.0, "loader": {"decode_ms_p99": 1.0}}
    return {"step": step, **usual, **more}


def causes(**more: Any) -> dict[str, float]:
    """Return the causes of one slow step among twenty usual ones."""
    entries = [entry(step) for step in range(1, 21)]
    entries[9] = entry(10, **more)
    (slow,) = slow_steps(entries)
    assert slow.step == 10
    return dict(slow.causes)


def test_a_usual_run_has_none():
    assert slow_steps([]) == []
    assert slow_steps([entry(step, step_s=1.0 + step % 3 / 10) for step in range(1, 30)]) == []


def test_waiting_names_the_stage():
    found = causes(step_s=3.0, data_wait_s=2.1, loader={"decode_ms_p99": 900.0, "fetch_ms_p99": 30.0, "wait_s": 2.0})
    assert found == {"waiting for data, of which decode takes longest": pytest.approx(2.0)}


def test_more_work_and_uneven_ranks_share_the_blame():
    found = causes(step_s=2.8, flops=200.0, rank_imbalance=2.0)
    assert found == {"more to compute": pytest.approx(0.9), "ranks with uneven work": pytest.approx(0.9)}


def test_what_is_left_goes_to_the_start_or_to_a_save():
    assert causes(step_s=2.0, loader={}) == {"the process had just started": pytest.approx(1.0)}
    assert causes(step_s=2.0, checkpoint={"step": 9}) == {"a checkpoint was being written": pytest.approx(1.0)}
    assert causes(step_s=2.0) == {}
    told_later = [
        entry(step, step_s=1.0 + (step == 9), **({"checkpoint": {}} if step == 10 else {})) for step in range(1, 21)
    ]
    assert dict(slow_steps(told_later)[0].causes) == {"a checkpoint was being written": pytest.approx(1.0)}


def test_the_slowest_come_first():
    entries = [entry(step, step_s=1.0 + 2 * (step in (4, 9)) + (step == 9)) for step in range(1, 21)]
    assert [slow.step for slow in slow_steps(entries)] == [9, 4]
    assert slow_steps(entries)[0].times == pytest.approx(4.0)
