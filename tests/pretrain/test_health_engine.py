"""A bad step leaves the engine as if nobody had been given its data: at every ZeRO stage, to the bit, on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TASKS = Path(__file__).with_name("health_tasks.py")
SLOW = pytest.mark.slow


def bits(answers: list[dict[str, Any]]) -> list[dict[Any, Any]]:
    """Return every rank's snapshot in a form that compares bit by bit."""
    return [
        {**{key: values.tobytes() for key, values in answer["last"]["pieces"].items()}, **answer["last"]["steps"]}
        for answer in answers
    ]


@pytest.mark.parametrize(
    ("stage", "precision", "accumulation"),
    [
        pytest.param(0, "fp32", 1, marks=SLOW),
        pytest.param(1, "fp32", 2, marks=SLOW),
        pytest.param(1, "bf16", 1, marks=SLOW),
        (2, "fp32", 1),
        pytest.param(2, "bf16", 1, marks=SLOW),
        pytest.param(3, "fp32", 2, marks=SLOW),
        pytest.param(3, "bf16", 1, marks=SLOW),
        pytest.param(1, "fp32 offload", 2, marks=SLOW),
        pytest.param(2, "bf16 offload", 1, marks=SLOW),
        pytest.param(3, "bf16 offload", 2, marks=SLOW),
    ],
)
def test_a_bad_step_changes_nothing(rank_pool, stage, precision, accumulation):
    pool = rank_pool.pool(2)
    precision, _, offload = precision.partition(" ")
    layout = {"stage": stage, "precision": precision, "accumulation": accumulation, "offload": bool(offload)}
    wanted = pool.run(TASKS, "skip_a_step", fault="left out", **layout)
    for fault, says in (
        ("loss", "the loss of step 3 is not finite"),
        ("gradient", "the gradient of step 3 is not finite"),
        ("spike", "the gradient norm is"),
    ):
        found = pool.run(TASKS, "skip_a_step", fault=fault, **layout)
        assert bits(found) == bits(wanted), fault
        for answer in found:
            assert [action for action, _, _ in answer["verdicts"]] == ["update", "update", "skip", "update", "update"]
            _, reason, samples = answer["verdicts"][2]
            assert reason.startswith(says)
            assert answer["step"] == 5
            assert "rank 1 held samples synthetic:" in samples
            assert ("rank 0 held" in samples) == (fault != "loss")  # after the reduction a gradient is everybody's
        assert found[0]["verdicts"] == found[1]["verdicts"]
        assert found[0]["norms"][3:] == wanted[0]["norms"][2:]
