"""Training with cross-attention and MMCA equals one plain torch process: stages, mixes of modalities, accumulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from triweave.pretrain.engine.optimizer import GroupConfig

TASKS = Path(__file__).with_name("fusion_tasks.py")
PARITY = Path(__file__).with_name("test_parity.py")
CROSS = {"kind": "cross", "cross_every": 1}
RESAMPLED = {"kind": "cross", "cross_every": 2, "scope": "preceding", "resampler_latents": 2, "resampler_layers": 1}
MMCA = {"kind": "mmca"}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("fusion", "case", "stage", "accumulation"),
    [
        pytest.param(CROSS, "image_against_audio", 3, 1, id="cross-3"),
        pytest.param(CROSS, "text_only_ranks", 2, 1, id="cross-2", marks=slow),
        pytest.param(RESAMPLED, "image_against_audio", 0, 2, id="resampled-0", marks=slow),
        pytest.param(RESAMPLED, "nobody_has_audio", 1, 1, id="resampled-1", marks=slow),
        pytest.param(RESAMPLED, "image_against_audio", 2, 1, id="resampled-2", marks=slow),
        pytest.param(RESAMPLED, "text_only_ranks", 3, 2, id="resampled-3", marks=slow),
        pytest.param(RESAMPLED, "text_only", 3, 1, id="resampled-3-text", marks=slow),
        pytest.param(MMCA, "image_against_audio", 3, 2, id="mmca-3", marks=slow),
        pytest.param(MMCA, "text_only_ranks", 1, 1, id="mmca-1", marks=slow),
    ],
)
def test_engine_equals_plain_torch(rank_pool, fusion, case, stage, accumulation):
    """Losses, norms, weights, moments and step counts after every step, as test_parity compares them."""
    cell = {"case": case, "accumulation": accumulation}
    answers = rank_pool.pool(2).run(TASKS, "train_fused", fusion=fusion, zero_stage=stage, **cell)
    with rank_pool.load(TASKS).fused(fusion) as engine:
        expected = engine.reference_case(ranks=2, **cell)
        rank_pool.load(PARITY).assert_parity(engine, answers, expected)
        if case == "nobody_has_audio":
            before, _ = engine.assemble([answer["snapshots"][engine.ABSENT_FROM - 1] for answer in answers])
            after, _ = engine.assemble([answer["snapshots"][-1] for answer in answers])
            for kind, parameters in after.items():
                for name in (name for name in parameters if name.startswith("towers.audio.")):
                    np.testing.assert_array_equal(parameters[name], before[kind][name], err_msg=f"{kind} {name}")


@slow
@pytest.mark.parametrize("stage", [1, 3])
def test_cross_attention_learns_beside_a_frozen_language_model(rank_pool, stage):
    """Flamingo's way: all of the trunk stands still but the layers that look at media, and their towers."""
    groups = {
        "trunk": GroupConfig(frozen=True),
        "decoder.cross_blocks": GroupConfig(),
        "media_keys": GroupConfig(lr=1e-3),
    }
    answers = rank_pool.pool(2).run(TASKS, "train_beside_frozen", fusion=RESAMPLED, groups=groups, zero_stage=stage)
    moved: dict[str, float] = {}
    for losses, by_name in answers:
        assert losses == answers[0][0]
        for name, far in by_name.items():
            moved[name] = max(moved.get(name, 0.0), far)
    trained = ("decoder.cross_blocks.", "media_keys.", "towers.")
    assert all((far > 0) == name.startswith(trained) for name, far in moved.items()), moved
    assert {prefix for prefix in trained if any(name.startswith(prefix) for name in moved)} == set(trained)
