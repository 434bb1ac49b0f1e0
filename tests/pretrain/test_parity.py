"""Training equals one plain torch process: every ZeRO stage, world size, accumulation and mix of modalities.

Tolerance of shared design: loss and weights |a - b| <= 1e-6 max(1, |b|), moments within 1e-6 of the tensor's maximum.
The towers have equal sizes, so a reduction that mixes them up shows in the values only.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TASKS = Path(__file__).with_name("engine_tasks.py")
TOLERANCE = 1e-6
QUICK = {
    ("image_against_audio", 1, 2, 1),
    ("image_against_audio", 2, 2, 2),
    ("image_against_audio", 3, 2, 2),
    ("text_only_ranks", 3, 2, 1),
    ("nobody_has_audio", 0, 2, 1),
    ("nobody_has_audio", 1, 2, 1),
    ("nobody_has_audio", 2, 2, 1),
    ("nobody_has_audio", 3, 2, 1),
    ("all", 2, 2, 1),
}
"""(case, stage, ranks, accumulation) that run always: every stage, every mix; the rest of the matrix is slow."""
MATRIX = [
    (case, stage, ranks, accumulation)
    for ranks in (1, 2, 3)
    for case in ("all", "image_against_audio", "text_only_ranks", "nobody_has_audio")
    for stage in (0, 1, 2, 3)
    for accumulation in (1, 2)
]


@pytest.fixture(scope="session")
def tasks(rank_pool):
    """The module engine_tasks, as the ranks load it."""
    return rank_pool.load(TASKS)


@pytest.fixture(scope="session")
def reference(tasks):
    """The plain torch trainer, each case once."""
    return cache(lambda case, ranks, accumulation, clip: tasks.reference_case(
        case=case, ranks=ranks, accumulation=accumulation, clip_norm=clip))  # fmt: skip


@pytest.fixture(scope="session")
def trained(rank_pool):
    """Answers of all ranks for a cell of the matrix, each cell trained once."""
    return cache(lambda case, stage, ranks, accumulation: rank_pool.pool(ranks).run(
        TASKS, "train_case", case=case, zero_stage=stage, accumulation=accumulation))  # fmt: skip


def assert_parity(tasks: Any, answers: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Compare losses, norms, weights, moments and step counts after every step."""
    for answer in answers:
        np.testing.assert_allclose(answer["losses"], expected["losses"], rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(answer["norms"], expected["norms"], rtol=TOLERANCE, atol=TOLERANCE)
    for step, state in enumerate(expected["states"]):
        whole, steps = tasks.assemble([answer["snapshots"][step] for answer in answers])
        assert steps == state["steps"], step
        for kind, parameters in state["whole"].items():
            for name, wanted in parameters.items():
                scale = max(1.0, np.abs(wanted).max()) if kind == "weight" else np.abs(wanted).max()
                worst = np.abs(whole[kind][name] - wanted).max()
                assert worst <= TOLERANCE * scale, f"step {step}: {kind} of {name} differs by {worst / (scale or 1)}"


@pytest.mark.parametrize(
    ("case", "stage", "ranks", "accumulation"),
    [pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow) for cell in MATRIX],
)
def test_engine_equals_plain_torch(tasks, trained, reference, case, stage, ranks, accumulation):
    assert_parity(tasks, trained(case, stage, ranks, accumulation), reference(case, ranks, accumulation, 0.0))


SLOW = pytest.mark.slow


@pytest.mark.parametrize("stage", [pytest.param(0, marks=SLOW), 1, pytest.param(2, marks=SLOW), 3])
def test_clipping_uses_the_global_norm(rank_pool, tasks, reference, stage):
    """Every step is clipped (norms are about 0.7); a norm of one rank's part, or with stale parts, would show."""
    answers = rank_pool.pool(2).run(
        TASKS, "train_case", case="text_only_ranks", zero_stage=stage, accumulation=1, clip_norm=0.3
    )
    assert min(answers[0]["norms"]) > 0.3
    assert_parity(tasks, answers, reference("text_only_ranks", 2, 1, 0.3))


@pytest.mark.parametrize(
    ("stage", "overlap"), [pytest.param(1, False, marks=SLOW), (2, False), pytest.param(2, True, marks=SLOW), (3, True)]
)
def test_small_buckets_reduce_the_same(rank_pool, tasks, reference, stage, overlap):
    """Buckets smaller than the model are reduced in the middle of the backward pass, in the order of the hooks."""
    answers = rank_pool.pool(2).run(
        TASKS, "train_case", case="image_against_audio", zero_stage=stage, accumulation=1,
        deepspeed={"zero_optimization": {"reduce_bucket_size": 1500, "overlap_comm": overlap}},
    )  # fmt: skip
    assert_parity(tasks, answers, reference("image_against_audio", 2, 1, 0.0))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_tower_nobody_holds_is_bit_unchanged(tasks, trained, stage):
    """From ABSENT_FROM on nobody holds audio: weights (also the decay), moments and step counts of its tower stand."""
    answers = trained("nobody_has_audio", stage, 2, 1)
    before, _ = tasks.assemble([answer["snapshots"][tasks.ABSENT_FROM - 1] for answer in answers])
    after, steps = tasks.assemble([answer["snapshots"][-1] for answer in answers])
    for kind, parameters in after.items():
        for name, values in parameters.items():
            if name.startswith("towers.audio."):
                assert values.tobytes() == before[kind][name].tobytes(), (kind, name)
                assert steps[name] == tasks.ABSENT_FROM
                assert kind == "weight" or np.abs(values).max() > 0
            else:
                assert values.tobytes() != before[kind][name].tobytes(), (kind, name)


@pytest.mark.parametrize("stage", [1, 2, pytest.param(3, marks=SLOW)])
def test_bf16_keeps_fp32_master_weights(rank_pool, tasks, stage):
    """Tiny updates that bf16 weights could not hold add up in the masters, and all stages agree to bf16's rounding."""
    answers = rank_pool.pool(2).run(
        TASKS, "train_case", case="image_against_audio", zero_stage=stage, accumulation=2, precision="bf16", lr=1e-5
    )
    losses = np.array(answers[0]["losses"])
    fp32 = tasks.reference_case(case="image_against_audio", ranks=2, accumulation=2, steps=1)["losses"]
    assert losses[0] == pytest.approx(fp32[0], rel=2e-3)
    first, _ = tasks.assemble([answer["snapshots"][0] for answer in answers])
    last, _ = tasks.assemble([answer["snapshots"][-1] for answer in answers])
    moved = np.abs(last["weight"]["decoder.final_norm.weight"] - first["weight"]["decoder.final_norm.weight"])
    assert (moved > 0).all()
    assert moved.max() < 2**-9  # half a step of bf16 at 1: none of it would have been kept
