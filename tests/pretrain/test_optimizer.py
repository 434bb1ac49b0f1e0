"""Parameter groups per tower and decay rule, and an AdamW that leaves absent towers alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from triweave.pretrain.engine.optimizer import OptimizerConfig, build_adamw, group_parameters, tower_of
from triweave.pretrain.errors import PretrainError


def model() -> nn.Module:
    torch.manual_seed(0)
    whole = nn.Module()
    whole.towers = nn.ModuleDict({"image": nn.Linear(3, 2), "audio": nn.Linear(3, 2)})
    whole.norm = nn.LayerNorm(2)
    whole.out = nn.Linear(2, 2, bias=False)
    whole.frozen = nn.Linear(2, 2).requires_grad_(False)
    return whole


def test_groups_are_tower_by_decay():
    groups = group_parameters(model().named_parameters(), OptimizerConfig(weight_decay=0.3))
    assert {group["name"]: (group["weight_decay"], group["parameter_names"]) for group in groups} == {
        "trunk.decay": (0.3, ["out.weight"]),
        "trunk.no_decay": (0.0, ["norm.weight", "norm.bias"]),
        "audio.decay": (0.3, ["towers.audio.weight"]),
        "audio.no_decay": (0.0, ["towers.audio.bias"]),
        "image.decay": (0.3, ["towers.image.weight"]),
        "image.no_decay": (0.0, ["towers.image.bias"]),
    }
    assert [group["tower"] for group in groups] == ["trunk"] * 2 + ["audio"] * 2 + ["image"] * 2


def test_only_the_towers_prefix_makes_a_tower():
    assert tower_of("towers.image.project.weight") == "image"
    assert tower_of("decoder.towers.image.weight") == "trunk"


def test_absent_towers_keep_weights_moments_and_steps():
    """Gradients are there (ZeRO has zeros in its buffers), yet nothing of an absent tower moves."""
    whole = model()
    adamw = build_adamw(group_parameters(whole.named_parameters(), OptimizerConfig()), OptimizerConfig())
    adamw.fill_state()
    trained = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    for step in range(3):
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        adamw.absent = frozenset({"audio"}) if step else frozenset()
        before = [parameter.clone() for parameter in trained]
        adamw.step()
        moved = {id(new) for new, old in zip(trained, before, strict=True) if not torch.equal(new, old)}
        audio = {id(parameter) for parameter in whole.towers["audio"].parameters()}
        assert moved == {id(parameter) for parameter in trained} - (audio if step else set())
    assert {float(adamw.state[parameter]["step"]) for parameter in whole.towers["audio"].parameters()} == {1.0}
    assert {float(adamw.state[parameter]["step"]) for parameter in whole.towers["image"].parameters()} == {3.0}
    assert len(adamw.param_groups) == 6


def test_filled_state_is_what_adamw_would_start_from():
    results = []
    for fill in (False, True):
        whole = model()
        adamw = build_adamw(group_parameters(whole.named_parameters(), OptimizerConfig()), OptimizerConfig())
        if fill:
            adamw.fill_state()
        for _ in range(2):
            whole.out(whole.norm(whole.towers["image"](torch.ones(1, 3)))).sum().backward()
            adamw.step()
        results.append([parameter.detach().numpy().tobytes() for parameter in whole.parameters()])
    assert results[0] == results[1]


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}, {"clip_norm": float("nan")}])
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(PretrainError, match=rf"optimizer\.{next(iter(wrong))} is "):
        OptimizerConfig(**wrong)
