"""Configs of controls and folds, and when a variant is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from triweave.launch import variants
from triweave.launch.errors import LaunchError
from triweave.launch.machine import Machine
from triweave.pretrain.config import RunConfig, load_config, to_plain

MACHINE = Machine(cores=2)


@pytest.fixture
def config(tiny_run: Path) -> RunConfig:
    return load_config(tiny_run)


def differing(first: object, second: object, path: str = "") -> dict[str, object]:
    """Return dotted key -> value of the second config where the two differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        found: dict[str, object] = {}
        for key in first:
            found |= differing(first[key], second[key], f"{path}.{key}")
        return found
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        found = {}
        for number, pair in enumerate(zip(first, second, strict=True)):
            found |= differing(*pair, f"{path}[{number}]")
        return found
    return {} if first == second else {path: second}


def test_the_control_differs_in_its_pairs_and_its_folder_only(config: RunConfig, tmp_path: Path) -> None:
    control = variants.control_config(config, tmp_path / "run")
    assert differing(to_plain(config), to_plain(control)) == {
        ".run_dir": str(tmp_path / "run" / "control"),
        ".data.sources[0].shuffle_pairs": 1,
    }


def test_a_fold_takes_the_place_of_the_split(config: RunConfig, tmp_path: Path) -> None:
    sources = [replace(source, split="train") for source in config.data.sources]
    trained = replace(config, data=replace(config.data, sources=sources))
    fold = variants.fold_config(trained, tmp_path / "run", 2, 5)
    assert differing(to_plain(trained), to_plain(fold)) == {
        ".run_dir": str(tmp_path / "run" / "folds" / "2"),
        ".data.sources[0].split": None,
        ".data.sources[0].hold_out": "2/5",
    }


def test_what_is_trained_already_is_not_trained_again(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = variants.control_config(config, tmp_path / "run")
    done = Path(control.run_dir) / "checkpoints" / f"step-{control.train.steps:07d}"
    done.mkdir(parents=True)
    (done / "manifest.json").write_text("{}")
    monkeypatch.setattr("triweave.launch.processes.run_to_end", lambda *_, **__: pytest.fail("started a launcher"))
    lines: list[str] = []
    assert variants.train_variant(control, ranks=1, machine=MACHINE, tell=lines.append) == Path(control.run_dir)
    assert "trained already" in lines[0]


def test_a_folder_of_another_training_is_refused(config: RunConfig, tmp_path: Path) -> None:
    control = variants.control_config(config, tmp_path / "run")
    other = replace(control, seed=9)
    Path(other.run_dir).mkdir(parents=True)
    variants._write_request(other, Path(other.run_dir))
    with pytest.raises(LaunchError, match="another config"):
        variants.train_variant(control, ranks=1, machine=MACHINE)


def test_a_run_named_by_another_path_is_the_same_run(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = variants._write_request(variants.control_config(config, Path("run")), Path("run/control"))
    named = variants.control_config(config, tmp_path / "run")
    assert variants._write_request(named, Path(named.run_dir)).samefile(first)
    assert load_config(first).run_dir == str(tmp_path / "run" / "control")  # what the launcher is given


def test_a_folder_that_cannot_be_written_is_one_line(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(LaunchError, match="can be written"):
        variants.train_variant(variants.control_config(config, tmp_path / "run"), ranks=1, machine=MACHINE)
