"""The learning-rate factor at the points that define it."""

from __future__ import annotations

import pytest

from triweave.pretrain.engine.schedule import ScheduleConfig, learning_rate_factor
from triweave.pretrain.errors import PretrainError


def test_warm_up_rises_linearly_and_reaches_the_peak():
    config = ScheduleConfig(warmup_steps=4)
    assert [learning_rate_factor(config, step, 100) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_passes_its_middle_and_ends_at_the_final_fraction():
    config = ScheduleConfig(kind="cosine", warmup_steps=10, total_steps=110, final_fraction=0.2)
    assert learning_rate_factor(config, 60, 9999) == pytest.approx(0.6)
    assert learning_rate_factor(config, 110, 9999) == pytest.approx(0.2)
    assert learning_rate_factor(config, 500, 9999) == pytest.approx(0.2)
    falling = [learning_rate_factor(config, step, 9999) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


def test_wsd_is_stable_until_its_linear_end():
    config = ScheduleConfig(kind="wsd", warmup_steps=2, final_fraction=0.0, decay_steps=10)
    assert [learning_rate_factor(config, step, 50) for step in (2, 20, 40)] == [1.0, 1.0, 1.0]
    assert learning_rate_factor(config, 45, 50) == pytest.approx(0.5)
    assert learning_rate_factor(config, 50, 50) == 0.0
    assert learning_rate_factor(config, 60, 50) == 0.0


def test_total_steps_follow_the_run_unless_named():
    assert learning_rate_factor(ScheduleConfig(warmup_steps=0), 30, 30) == pytest.approx(0.1)
    assert learning_rate_factor(ScheduleConfig(warmup_steps=0, total_steps=60), 30, 30) == pytest.approx(0.55)


def test_a_fall_longer_than_the_run_starts_after_the_warm_up_without_a_jump():
    config = ScheduleConfig(kind="wsd", warmup_steps=10, final_fraction=0.0, decay_steps=500)
    factors = [learning_rate_factor(config, step, 50) for step in range(10, 51)]
    assert factors[0] == 1.0
    assert factors[20] == pytest.approx(0.5)
    assert factors[-1] == 0.0


@pytest.mark.parametrize(
    "wrong", [{"warmup_steps": -1}, {"decay_steps": -1}, {"final_fraction": 1.5}, {"total_steps": 0}]
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(PretrainError, match=rf"schedule\.{next(iter(wrong))} is "):
        ScheduleConfig(**wrong)
