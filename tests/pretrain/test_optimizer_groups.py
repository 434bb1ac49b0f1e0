"""Freezing and learning rates by group: exactly what plain torch does with the same settings, at every ZeRO stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from siblings import load_sibling

from triweave.pretrain.engine.optimizer import GroupConfig, OptimizerConfig, freeze, group_parameters
from triweave.pretrain.errors import PretrainError

TASKS = Path(__file__).with_name("open_model_tasks.py")
STEPS = 3
SLOW_TOWER = {"towers.image": GroupConfig(lr=1e-4), "decoder.blocks.0": GroupConfig(frozen=True),
              "decoder": GroupConfig(weight_decay=0.0)}  # fmt: skip
PROJECTOR_ONLY = {name: GroupConfig(frozen=True) for name in ("decoder", "token_embedding", "heads", "towers.audio")}
"""Nothing of the trunk is trained, as when LLaVA's projector is."""
CASES = {"rates and a frozen block": (SLOW_TOWER, "all"), "frozen trunk": (PROJECTOR_ONLY, "text_only_ranks")}


@pytest.fixture(scope="module")
def tasks(rank_pool) -> ModuleType:
    return rank_pool.load(TASKS)


def test_the_longest_beginning_counts():
    config = OptimizerConfig(groups={**SLOW_TOWER, "trunk": GroupConfig(lr=1e-5)})
    assert config.group_of("decoder.blocks.0.attention.out.weight") == "decoder.blocks.0"
    assert config.group_of("decoder.blocks.10.attention.out.weight") == "decoder"
    assert config.group_of("token_embedding.weight") == "trunk"
    assert config.group_of("towers.image.project.weight") == "towers.image"
    assert config.group_of("towers.audio.project.weight") == ""


def test_each_group_has_its_rate_and_frozen_parameters_are_in_none():
    config = OptimizerConfig(lr=1e-3, weight_decay=0.1, groups=SLOW_TOWER)
    trained = load_sibling("engine_tasks").build_model()
    freeze(trained, config)
    found = {group["name"]: group for group in group_parameters(trained.named_parameters(), config)}
    assert found["image[towers.image].decay"]["peak_lr"] == 1e-4
    assert found["audio.decay"]["peak_lr"] == 1e-3
    assert found["trunk[decoder].decay"]["weight_decay"] == 0.0
    assert found["trunk.decay"]["weight_decay"] == 0.1
    assert not any("blocks.0." in name for group in found.values() for name in group["parameter_names"])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"towers.imag": GroupConfig()}, r"optimizer.groups.towers.imag: .* did you mean towers.image"),
        ({"trunk": GroupConfig(frozen=True), "towers": GroupConfig(frozen=True)}, r"freezes every parameter"),
    ],
)
def test_what_cannot_work_is_refused(groups, message):
    with pytest.raises(PretrainError, match=message):
        freeze(load_sibling("engine_tasks").build_model(), OptimizerConfig(groups=groups))


def test_bad_numbers_are_refused():
    with pytest.raises(PretrainError, match=r"optimizer.groups.trunk.lr is 0"):
        OptimizerConfig(groups={"trunk": GroupConfig(lr=0)})
    with pytest.raises(PretrainError, match=r"optimizer.groups.trunk.weight_decay is -1"):
        OptimizerConfig(groups={"trunk": GroupConfig(weight_decay=-1)})


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("zero_stage", "ranks", "accumulation"), [(0, 2, 1), (1, 2, 2), (2, 2, 1), (3, 2, 2), (3, 1, 1)]
)
def test_it_trains_as_plain_torch_does(rank_pool, tasks, case, zero_stage, ranks, accumulation):
    groups, pattern = CASES[case]
    options = {"accumulation": accumulation, "groups": groups, "case": pattern, "steps": STEPS}
    expected = tasks.reference_groups(ranks=ranks, **options)
    answers = rank_pool.pool(ranks).run(TASKS, "train_groups", zero_stage=zero_stage, **options)
    np.testing.assert_allclose(answers[0]["losses"], expected["losses"], rtol=1e-6, atol=1e-6)
    first = load_sibling("engine_tasks").build_model()
    begun = {name: parameter.detach().flatten().numpy() for name, parameter in first.named_parameters()}
    config = dataclasses.replace(OptimizerConfig(), groups=groups)
    covered = {name: np.zeros(len(values), bool) for name, values in begun.items()}
    for answer in answers:
        for (name, kind, offset), values in answer["snapshot"]["pieces"].items():
            frozen = groups.get(config.group_of(name), GroupConfig()).frozen
            assert kind == "weight" or not frozen
            if kind != "weight":
                continue
            span = slice(offset, offset + len(values))
            covered[name][span] = True
            if frozen:
                assert np.array_equal(values, begun[name][span]), name
            wanted = expected["weights"][name][span]
            assert np.all(np.abs(values - wanted) <= 1e-6 * np.maximum(1, np.abs(wanted))), name
    assert all(whole.all() for whole in covered.values())
