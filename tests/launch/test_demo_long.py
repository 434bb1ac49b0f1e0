"""The long demo's configs, its trainings side by side, and what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from triweave.launch.demo import long, parallel
from triweave.launch.demo.short import DemoOptions
from triweave.launch.errors import DemoError


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value."""
    if isinstance(tree, dict):
        return {key: value for name, inner in tree.items() for key, value in flat(inner, f"{prefix}.{name}").items()}
    if isinstance(tree, list):
        return flat(dict(enumerate(tree)), prefix)
    return {prefix: tree}


def differing(first: Any, second: Any) -> dict[str, Any]:
    one, other = flat(first), flat(second)
    return {key: other[key] for key in other if one[key] != other[key]}


def test_seeds_differ_in_their_seeds_and_the_control_in_its_pairs(tmp_path: Path) -> None:
    trees = long.run_configs(DemoOptions(out=tmp_path), "debian")
    assert list(trees) == ["seed0", "seed1", "seed2", "control"]
    run_dir = {name: {".run_dir": str(tmp_path / "long" / name)} for name in trees}
    for number in (1, 2):
        name = f"seed{number}"
        assert differing(trees["seed0"], trees[name]) == {**run_dir[name], ".seed": number, ".data.seed": number}
    shuffled = {f".data.sources.{number}.shuffle_pairs": long.SHUFFLE_SEED for number in range(2)}
    assert differing(trees["seed0"], trees["control"]) == {**run_dir["control"], **shuffled}


def test_trainings_with_other_settings_are_not_overwritten(tmp_path: Path) -> None:
    trees = long.run_configs(DemoOptions(out=tmp_path), "emoji")
    paths = long.write_configs(trees, tmp_path / "long")
    assert yaml.safe_load(paths["seed1"].read_text(encoding="utf-8")) == trees["seed1"]
    changed = long.run_configs(DemoOptions(out=tmp_path, steps=70), "emoji")
    long.write_configs(changed, tmp_path / "long")  # nothing was trained yet
    (tmp_path / "long" / "seed1").mkdir()
    long.write_configs(changed, tmp_path / "long")
    before = paths["seed0"].read_bytes()
    with pytest.raises(DemoError, match=r"seed1 was trained with other settings.*remove"):
        long.write_configs(trees, tmp_path / "long")
    assert paths["seed0"].read_bytes() == before


SIDE_BY_SIDE = """
import sys, yaml
from pathlib import Path
from triweave.launch.demo.parallel import train_side_by_side
folder = Path(sys.argv[1])
train_side_by_side({name: folder / f"{name}.yaml" for name in ("one", "two")}, steps=int(sys.argv[2]), at_once=2,
                   update=lambda done, total, words: print(done, total, words, flush=True))
"""


@pytest.fixture
def pair(tiny_run: Path, tmp_path: Path) -> Path:
    """Return a folder with the configs of two tiny runs."""
    tree = yaml.safe_load(tiny_run.read_text(encoding="utf-8"))
    tree["train"] |= {"steps": 400, "micro_batch_rows": 4}
    tree["checkpoint"]["every_steps"] = 400
    for name in ("one", "two"):
        text = yaml.safe_dump({**tree, "run_dir": str(tmp_path / name)})
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def descendants(process: int) -> list[int]:
    """Return the ids of all living processes below one."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, waiting = [], [process]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupt", "kill"])
def test_trainings_end_with_the_demo(number: signal.Signals, pair: Path) -> None:
    command = [sys.executable, "-c", SIDE_BY_SIDE, str(pair), "400"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as demo:
        assert demo.stdout is not None
        line = next(line for line in demo.stdout if line.count(" step ") == 2)
        assert line.split()[1] == "800"
        below = descendants(demo.pid)
        demo.send_signal(number)
        demo.wait(timeout=120)
        deadline = time.monotonic() + 120
        while living := [process for process in below if Path(f"/proc/{process}/cmdline").exists()]:
            assert time.monotonic() < deadline, living
            time.sleep(0.2)


@pytest.mark.slow
def test_trainings_that_are_done_are_left_and_a_failing_one_is_named(pair: Path) -> None:
    for name in ("one", "two"):
        tree = yaml.safe_load((pair / f"{name}.yaml").read_text(encoding="utf-8"))
        tree["train"]["steps"], tree["checkpoint"]["every_steps"] = 2, 2
        (pair / f"{name}.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    configs = {name: pair / f"{name}.yaml" for name in ("one", "two")}
    told: list[Any] = []
    parallel.train_side_by_side(configs, steps=2, at_once=1, update=lambda *shown: told.append(shown))
    assert told[-1][:2] == (4, 4)
    logs = [(pair / name / "launch.log").read_bytes() for name in configs]
    began = time.monotonic()
    parallel.train_side_by_side(configs, steps=2, at_once=1, update=lambda *_: None)
    assert time.monotonic() - began < 5
    assert logs == [(pair / name / "launch.log").read_bytes() for name in configs]

    tree = yaml.safe_load((pair / "two.yaml").read_text(encoding="utf-8"))
    tree["run_dir"], tree["data"]["tokenizer"] = str(pair / "three"), str(pair / "missing.model")
    (pair / "three.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(DemoError, match=r"training of three ended with exit code 2 \(.*missing\.model"):
        parallel.train_side_by_side({"three": pair / "three.yaml"}, steps=2, at_once=1, update=lambda *_: None)
