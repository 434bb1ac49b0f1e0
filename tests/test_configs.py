"""Every shipped YAML loads, says what each of its keys is for, and states every key of the parts it configures."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from triweave.pretrain.config import load_config

CONFIGS = sorted((Path(__file__).parents[1] / "launch" / "configs").glob("*.yaml"))


def test_the_configs_are_shipped() -> None:
    assert {path.stem for path in CONFIGS} >= {"demo_cpu", "one_gpu", "zero2_8gpu", "zero3_multinode"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_loads_and_means_what_it_says(path: Path) -> None:
    config = load_config(path, [])
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.train.steps == written["train"]["steps"]
    assert config.data.sequence_length == written["data"]["sequence_length"]
    assert config.model.d_model == written["model"]["d_model"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_is_commented(path: Path) -> None:
    bare = []
    previous_is_comment = False
    for line in path.read_text(encoding="utf-8").splitlines():
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            section = stripped.endswith(":")  # `train:` only groups; its keys carry the comments
            if not section and "#" not in stripped and not previous_is_comment:
                bare.append(stripped)
        previous_is_comment = stripped.startswith("#")
    assert bare == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_demo_runs_on_one_and_two_ranks(ranks: int) -> None:
    demo = next(path for path in CONFIGS if path.stem == "demo_cpu")
    load_config(demo, []).check_world(ranks)
