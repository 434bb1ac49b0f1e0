"""Training equals one plain torch process: every ZeRO stage, world size, accumulation and mix of modalities.

Tolerance of shared design: loss and weights |a - b| <= 1e-6 max(1, |b|), moments within 1e-6 of the tensor's maximum.
The towers have equal sizes, so a reduction that mixes them up shows in the values only.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TASKS = Path(__file__).with_name("engine_tasks.py")
GOLDEN = TASKS.with_name("golden_losses.json")
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
    ("text_only", 3, 2, 1),
}
"""(case, stage, ranks, accumulation) that run always: every stage, every mix; the rest of the matrix is slow."""
MATRIX = [
    (case, stage, ranks, accumulation)
    for ranks in (1, 2, 3)
    for case in ("all", "text_only_ranks", "image_against_audio", "text_only", "nobody_has_audio")
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


def assert_parity(
    tasks: Any, answers: list[dict[str, Any]], expected: dict[str, Any], *, moments: float = TOLERANCE
) -> None:
    """Compare losses, norms, weights, moments and step counts after every step; moments: tolerance of these."""
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
                allowed = TOLERANCE if kind == "weight" else moments
                assert worst <= allowed * scale, f"step {step}: {kind} of {name} differs by {worst / (scale or 1)}"


@pytest.mark.parametrize(
    ("case", "stage", "ranks", "accumulation"),
    [pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow) for cell in MATRIX],
)
def test_engine_equals_plain_torch(tasks, trained, reference, case, stage, ranks, accumulation):
    assert_parity(tasks, trained(case, stage, ranks, accumulation), reference(case, ranks, accumulation, 0.0))


SLOW = pytest.mark.slow
GATHERED = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}}
"""Every parameter is gathered for each use and dropped behind it; by default ones of this size stay whole."""


@pytest.mark.parametrize(
    ("case", "accumulation"),
    [
        ("text_only_ranks", 1),
        pytest.param("all", 2, marks=SLOW),
        pytest.param("image_against_audio", 2, marks=SLOW),
        pytest.param("text_only", 1, marks=SLOW),
        pytest.param("nobody_has_audio", 2, marks=SLOW),
    ],
)
def test_stage_3_gathers_every_parameter_the_same(rank_pool, tasks, reference, case, accumulation):
    answers = rank_pool.pool(2).run(
        TASKS, "train_case", case=case, zero_stage=3, accumulation=accumulation, deepspeed=GATHERED
    )
    assert_parity(tasks, answers, reference(case, 2, accumulation, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["image_against_audio", "nobody_has_audio"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_equal_those_of_one_process(rank_pool, tasks, case, stage):
    """Without a first-moment decay exp_avg is the gradient of the step: each is compared, not a mean over steps."""
    settings = {"case": case, "accumulation": 2, "betas": (0.0, 0.95)}
    answers = rank_pool.pool(2).run(TASKS, "train_case", zero_stage=stage, **settings)
    assert_parity(tasks, answers, tasks.reference_case(ranks=2, **settings))


@pytest.mark.parametrize("case", ["nobody_has_audio", pytest.param("text_only", marks=SLOW)])
@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=SLOW), pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW)]
)
def test_a_guarded_tower_takes_a_step_of_zeros(rank_pool, tasks, case, stage):
    """absent_modality=guard equals a process in which the gradient of an absent tower is 0, not missing."""
    settings = {"case": case, "accumulation": 1, "absent_modality": "guard"}
    answers = rank_pool.pool(2).run(TASKS, "train_case", zero_stage=stage, **settings)
    expected = tasks.reference_case(ranks=2, **settings)
    assert_parity(tasks, answers, expected)
    assert set(expected["states"][-1]["steps"].values()) == {float(tasks.STEPS)}


@pytest.mark.parametrize(
    ("norm", "stage"),
    [
        ("global_documents", 2),
        pytest.param("global_documents", 0, marks=SLOW),
        pytest.param("global_square_root", 3, marks=SLOW),
        pytest.param("global_square_root", 1, marks=SLOW),
        pytest.param("micro_batch_tokens", 2, marks=SLOW),
        pytest.param("micro_batch_tokens", 3, marks=SLOW),
    ],
)
def test_a_loss_norm_equals_one_process(rank_pool, tasks, norm, stage):
    settings = {"case": "image_against_audio", "accumulation": 2, "loss_norm": norm}
    answers = rank_pool.pool(2).run(TASKS, "train_case", zero_stage=stage, **settings)
    assert_parity(tasks, answers, tasks.reference_case(ranks=2, **settings))
    tokens = tasks.reference_case(ranks=2, case="image_against_audio", accumulation=2, steps=1)
    assert abs(answers[0]["losses"][0] - tokens["losses"][0]) > 1e-4  # it is another mean


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


@pytest.mark.slow
def test_fifty_steps_follow_the_golden_curve(rank_pool, tasks):
    """The losses of 50 steps, written down at full precision once: what no comparison of two of today's paths shows.

    `python tests/pretrain/engine_tasks.py` writes the file anew; only after a change that is meant to change the loss.
    """
    golden = json.loads(GOLDEN.read_text())
    plain = tasks.reference_case(steps=len(golden), **tasks.GOLDEN_CASE)["losses"]
    np.testing.assert_allclose(plain, golden, rtol=TOLERANCE, atol=TOLERANCE)
    settings = {name: value for name, value in tasks.GOLDEN_CASE.items() if name != "ranks"}
    answers = rank_pool.pool(2).run(TASKS, "train_case", zero_stage=2, steps=len(golden), **settings)
    np.testing.assert_allclose(answers[0]["losses"], golden, rtol=TOLERANCE, atol=TOLERANCE)


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
