"""The judge of steps: what is bad, when it skips, rolls back and stops, and that a checkpoint keeps its memory."""

from __future__ import annotations

import json
import math

import pytest

from triweave.pretrain.errors import PretrainError
from triweave.pretrain.health.judge import HEALTHY, StepJudge
from triweave.pretrain.health.settings import HealthConfig

SPIKES = HealthConfig(spike_deviations=6.0, spike_window=8)


def seasoned(config: HealthConfig, steps: int = 8) -> StepJudge:
    judge = StepJudge(config)
    for step in range(1, steps + 1):
        assert judge.judge(step, 4.0 + 0.1 * (step % 2), 1.0 + 0.2 * (step % 2)) is HEALTHY
    return judge


@pytest.mark.parametrize(
    ("loss", "norm", "says"),
    [
        (math.nan, 1.0, "the loss of step 9 is not finite"),
        (math.inf, math.nan, "the loss of step 9 is not finite"),
        (4.0, math.nan, "the gradient of step 9 is not finite"),
        (4.0, -1.0, "the gradient of step 9 is not finite"),
        (4.5, 1.1, "the loss is 4.5, 9.0 deviations above the mean 4.05 of 8 steps, at step 9"),
        (4.0, 2.1, "the gradient norm is 2.1, 10.0 deviations above the mean 1.1 of 8 steps, at step 9"),
        (4.3, 1.6, ""),
        (0.5, 0.1, ""),
        (0.0, 1.0, ""),
    ],
)
def test_what_is_bad(loss: float, norm: float, says: str) -> None:
    verdict = seasoned(SPIKES).judge(9, loss, norm)
    assert (verdict.action, verdict.reason) == ("skip" if says else "update", says)
    assert verdict.finite == ("not finite" not in says)


def test_spikes_are_judged_only_where_asked_for_and_against_enough_healthy_steps() -> None:
    assert seasoned(HealthConfig(spike_window=8)).judge(9, 1e9, 1e9) is HEALTHY
    judge = seasoned(SPIKES, steps=3)
    assert judge.judge(4, 1e9, 1.0) is HEALTHY  # three of eight
    assert seasoned(SPIKES, steps=4).judge(5, 1e9, 1.0).action == "skip"


def test_bad_steps_and_steps_without_a_loss_are_no_measure() -> None:
    judge = seasoned(SPIKES)
    judge.judge(9, 1e9, 1.0)
    judge.judge(10, 0.0, 1.0)
    assert judge.judge(11, 4.5, 1.1).reason.startswith("the loss is 4.5, 9.0 deviations")


def test_a_constant_figure_has_a_deviation_all_the_same() -> None:
    judge = StepJudge(SPIKES)
    for step in range(8):
        judge.judge(step, 4.0, 1.0)
    assert judge.judge(8, 4.3, 1.0).action == "skip"  # 6 x 1 % of 4 and more above it
    assert judge.judge(9, 4.2, 1.0) is HEALTHY


def test_a_row_of_bad_steps_rolls_back_and_at_last_stops() -> None:
    judge = StepJudge(HealthConfig(skips_in_a_row=2, rollbacks=1, skips=20))
    assert judge.judge(1, math.nan, 1.0).action == "skip"
    assert judge.judge(2, 4.0, 1.0) is HEALTHY
    assert [judge.judge(step, math.nan, 1.0).action for step in (3, 4)] == ["skip", "roll_back"]
    assert judge.first_bad_step == 3
    judge.rolled_back()
    assert [judge.judge(step, math.nan, 1.0).action for step in (5, 6)] == ["skip", "stop"]
    assert "2 bad steps in a row, and health.rollbacks=1 are spent" in judge.advice()


def test_skips_are_bounded_over_the_whole_run() -> None:
    judge = StepJudge(HealthConfig(skips=2))
    actions = [judge.judge(step, math.nan if step % 2 else 4.0, 1.0).action for step in range(1, 6)]
    assert actions == ["skip", "update", "skip", "update", "stop"]
    assert "health.skips=2 steps have been skipped" in judge.advice()
    assert StepJudge(HealthConfig(bad_step="stop")).judge(1, math.nan, 1.0).action == "stop"


def test_a_checkpoint_keeps_the_memory_to_the_bit() -> None:
    judge = seasoned(SPIKES)
    judge.judge(9, math.nan, 1.0)
    other = StepJudge(SPIKES)
    other.restore(json.loads(json.dumps(judge.state())))
    assert other.state() == judge.state()
    for step, loss in ((10, 4.05), (11, 4.5), (12, math.nan), (13, math.nan)):
        assert other.judge(step, loss, 1.1) == judge.judge(step, loss, 1.1)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"spike_deviations": 0.5}, "health.spike_deviations is 0.5"),
        ({"spike_window": 2}, "health.spike_window is 2; it must be at least 4"),
        ({"skips": -1}, "health.skips is -1"),
        ({"skips_in_a_row": 0}, "health.skips_in_a_row is 0; it must be at least 1"),
        ({"rollbacks": -1}, "health.rollbacks is -1"),
        ({"stall_s": 0.5}, "health.stall_s is 0.5"),
        ({"stall_s": math.nan}, "health.stall_s is nan"),
    ],
)
def test_limits_that_mean_nothing_are_refused(setting: dict[str, float], says: str) -> None:
    with pytest.raises(PretrainError, match=says):
        HealthConfig(**setting)  # type: ignore[arg-type]
