"""Training with many objectives equals one plain torch process that loops over single rows.

Tolerances are those of test_parity.py; all cells train on the same 12 rows a step. Of the last step the moments are
left out: rounding grows with every step of this fast start, and sums over single rows begin with other last bits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TASKS = Path(__file__).with_name("objective_tasks.py")
THIS = Path(__file__)
TOLERANCE = 1e-6
SLOW = pytest.mark.slow
MATRIX = [
    ("uncertainty", 2, 2, 2),
    ("fixed", 0, 1, 1),
    ("fixed", 1, 3, 1),
    ("fixed", 3, 2, 1),
    ("uncertainty", 0, 2, 1),
    ("uncertainty", 1, 1, 2),
    ("uncertainty", 3, 3, 2),
    ("loss_rate", 1, 2, 2),
    ("loss_rate", 3, 2, 1),
]
"""(weighting, stage, ranks, accumulation); the first runs always."""


@pytest.fixture(scope="session")
def tasks(rank_pool):
    return rank_pool.load(TASKS)


@pytest.fixture(scope="session")
def reference(tasks):
    """The plain torch trainer, each split of the rows once."""
    return cache(lambda weighting, ranks, accumulation: tasks.reference_case(
        weighting=weighting, ranks=ranks, accumulation=accumulation))  # fmt: skip


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("weighting", "stage", "ranks", "accumulation"),
    [pytest.param(*cell, marks=() if cell == MATRIX[0] else SLOW) for cell in MATRIX],
)
def test_engine_equals_plain_torch(rank_pool, tasks, reference, weighting, stage, ranks, accumulation):
    answers = rank_pool.pool(ranks).run(
        TASKS, "train_case", weighting=weighting, zero_stage=stage, accumulation=accumulation
    )
    expected = reference(weighting, ranks, accumulation)
    for answer in answers:
        for found, wanted in zip(answer["tasks"], expected["tasks"], strict=True):
            assert set(found) == set(wanted) == set(tasks.ALL)
            close([found[name] for name in wanted], list(wanted.values()))
        close(answer["objectives"], expected["objectives"])
        close(answer["norms"], expected["norms"])
    model = tasks.build_model(tasks.model_config(tasks.ALL, weighting))
    for step, state in enumerate(expected["states"]):
        whole, steps = tasks.load_sibling("engine_tasks").assemble(
            [answer["snapshots"][step] for answer in answers], model=model
        )
        assert steps == state["steps"], step
        for kind, parameters in state["whole"].items():
            if kind != "weight" and step == tasks.STEPS - 1:
                continue
            for name, wanted in parameters.items():
                scale = max(1.0, np.abs(wanted).max()) if kind == "weight" else np.abs(wanted).max()
                worst = np.abs(whole[kind][name] - wanted).max()
                assert worst <= TOLERANCE * scale, f"step {step}: {kind} of {name} differs by {worst / (scale or 1)}"


def idle_head(world: Any, *, stage: int) -> Any:
    """Run inside ranks: a curriculum that begins with classification at step 3."""
    from triweave.pretrain.engine.zero import Engine
    from triweave.pretrain.objectives.config import TasksConfig

    tasks = _tasks()
    model = tasks.model_config(tasks.THREE, "uncertainty")
    schedule = TasksConfig(schedule="curriculum", from_step={"classification": 3})
    engine = Engine(tasks.build_model(model), tasks.config(model, stage, tasks=schedule), world, accumulation=2)
    answers = []
    for step in range(3):
        result = engine.train_window(tasks.window(model, step, rank=world.rank, ranks=world.size, accumulation=2))
        answers.append((result.tasks, result.decision, tasks.load_sibling("engine_tasks").snapshot(engine)))
    engine.close()
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_objective_that_waits_gets_gradients_of_zero_and_its_weight_no_drift(rank_pool, tasks, stage):
    answers = rank_pool.pool(2).run(THIS, "idle_head", stage=stage)
    model = tasks.build_model(tasks.model_config(tasks.THREE, "uncertainty"))
    for step in range(3):
        figures, decision, _ = answers[0][step]
        assert answers[1][step][:2] == (figures, decision)
        assert ("classification" in decision.weights) == ("classification" in figures) == (step == 2)
        whole, _ = tasks.load_sibling("engine_tasks").assemble([answer[step][2] for answer in answers], model=model)
        moments = whole["exp_avg"]["heads.classification.weight"]
        assert moments.any() == (step == 2)
        spread = list(tasks.THREE).index("classification")
        assert (whole["exp_avg"]["joint_loss.log_variances"][spread] != 0) == (step == 2)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_contrastive_loss_has_a_learnt_weight_too(rank_pool, tasks, accumulation):
    """d/ds of w (exp(-s) L + s) at s = 0 is w (1 - L); the first moment after one step is a tenth of it."""
    answers = rank_pool.pool(2).run(THIS, "first_step", accumulation=accumulation)
    model = tasks.build_model(tasks.model_config(tasks.THREE, "uncertainty"))
    whole, _ = tasks.load_sibling("engine_tasks").assemble([snapshot for _, snapshot in answers], model=model)
    figures = answers[0][0]
    wanted = [0.1 * weight * (1 - figures[name].loss) for name, weight in tasks.THREE.items()]
    np.testing.assert_allclose(whole["exp_avg"]["joint_loss.log_variances"], wanted, rtol=1e-5)


def first_step(world: Any, *, accumulation: int) -> Any:
    """Run inside ranks: one step with learnt weights."""
    from triweave.pretrain.engine.zero import Engine

    tasks = _tasks()
    model = tasks.model_config(tasks.THREE, "uncertainty")
    engine = Engine(tasks.build_model(model), tasks.config(model, 1), world, accumulation=accumulation)
    result = engine.train_window(tasks.window(model, 0, rank=world.rank, ranks=world.size, accumulation=accumulation))
    snapshot = tasks.load_sibling("engine_tasks").snapshot(engine)
    engine.close()
    return result.tasks, snapshot


def _tasks():
    import sys

    return sys.modules["triweave_test_rank_pool" if "triweave_test_rank_pool" in sys.modules else "__main__"].load(
        TASKS
    )
