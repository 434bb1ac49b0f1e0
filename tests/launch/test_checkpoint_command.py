"""`triweave checkpoint`: list, verify, prune and export, from a run's folder and from an object store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_checkpoint_files as files
import torch
from safetensors.torch import load_file

from triweave.launch.cli import main

root = files.root


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (2, 4, 6):
        files.save(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


def damage(run_dir: Path, step: int) -> Path:
    path = run_dir / "checkpoints" / f"step-{step:07d}" / "rank-00001-000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    return path


def test_list(run_dir, capsys):
    assert main(["checkpoint", "list", str(run_dir), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert {(row["ranks"], row["elements"], row["files"]) for row in rows} == {(2, 1025, 2)}
    (run_dir / "checkpoints" / "step-0000004" / "manifest.json").write_text("{}")
    assert main(["checkpoint", "list", str(run_dir)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "1,025 parameters" in lines[0]
    assert "step-0000004/manifest.json is damaged" in lines[1]
    assert main(["checkpoint", "list", str(run_dir / "checkpoints")]) == 2
    assert "has no checkpoint; train it until" in capsys.readouterr().err


def test_verify(run_dir, capsys):
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    assert [line.split(":")[1][:6] for line in capsys.readouterr().out.splitlines()] == [" whole"] * 3
    damage(run_dir, 4)
    assert main(["checkpoint", "verify", str(run_dir), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["whole"] for row in rows] == [True, False, True]
    assert "rank-00001-000.safetensors is damaged" in rows[1]["damage"]
    assert main(["checkpoint", "verify", str(run_dir), "--step", "6"]) == 0
    assert main(["checkpoint", "verify", str(run_dir), "--step", "5"]) == 2


def test_prune(run_dir, capsys):
    words = ["checkpoint", "prune", str(run_dir), "--keep", "1", "--keep-every-steps", "4"]
    assert main([*words, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": [2], "kept": [4, 6], "dry_run": True}
    assert main(words) == 0
    assert capsys.readouterr().out == "removed steps 2; kept steps 4, 6\n"
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-0000004", "step-0000006"]
    assert main(["checkpoint", "prune", str(run_dir), "--keep", "0"]) == 2


def test_export_falls_back_to_a_whole_checkpoint(run_dir, tmp_path, capsys):
    damage(run_dir, 6)
    assert main(["checkpoint", "export", str(run_dir), "--out", str(tmp_path / "out"), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["step"] == 4
    assert "rank-00001-000.safetensors is damaged" in said.err
    parts = [part for rank in range(2) for part in files.fragments(rank, 2, seed=4) if part.name == "decoder.weight"]
    whole = torch.cat([part.tensors["weight"] for part in parts]).view(40, 25)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["decoder.weight"], whole)
    assert main(["checkpoint", "export", str(run_dir), "--out", str(tmp_path / "out")]) == 2
    assert "holds something else" in capsys.readouterr().err


@pytest.mark.parametrize("root", ["prefix"], indirect=True)
def test_an_object_store_is_a_run_too(root, tmp_path, capsys):
    for step in (1, 2):
        files.save(root, step)
    assert main(["checkpoint", "list", root]) == 0
    assert root in capsys.readouterr().out
    assert main(["checkpoint", "prune", root, "--keep", "1"]) == 0
    assert main(["checkpoint", "verify", root]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("step 2: whole")
    assert main(["checkpoint", "export", root, "--out", str(tmp_path / "out")]) == 0
