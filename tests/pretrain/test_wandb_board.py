"""A run's figures in Weights & Biases: offline, read back from its own file; refusals in one line."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from triweave.pretrain.errors import PretrainError
from triweave.pretrain.wandb_board import check_wandb


def run(config: Path, run_dir: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    home = run_dir.parent / "home"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "triweave.pretrain.train", str(config), f"run_dir={run_dir}", *words],
        env=inherited | {"HOME": str(home), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a file of wandb: 7 bytes, then LevelDB's log format, blocks of 32 KiB."""
    at, parts = 7, b""
    while at < len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)  # behind a checksum of 4 bytes
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def sent(file: Path) -> list[dict[str, float]]:
    """Return the figures of each step that a file of wandb holds."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for content in records(file.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@pytest.mark.slow
def test_a_run_and_its_resume_are_one_run_with_every_step_once(run_config: Path, tmp_path: Path) -> None:
    words = ["train.wandb_project=birds", "train.norms_every_steps=1", "checkpoint.every_steps=2"]
    first = run(run_config, tmp_path / "run", *words, "train.steps=2", WANDB_MODE="offline")
    assert first.returncode == 0, first.stderr
    again = run(run_config, tmp_path / "run", *words, "train.steps=4", "--resume", WANDB_MODE="offline")
    assert again.returncode == 0, again.stderr
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1  # the same id
    rows = [row for file in files for row in sent(file)]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["_step"] for row in rows] == [1, 2, 3, 4] == [line["step"] for line in lines]
    for row, line in zip(rows, lines, strict=True):
        assert row["loss"] == line["loss"]
        assert row["tower_grad_norm/trunk"] == line["tower_grad_norm"]["trunk"]


@pytest.mark.slow
def test_without_a_key_it_is_one_line(run_config: Path, tmp_path: Path) -> None:
    answer = run(run_config, tmp_path / "run", "train.wandb_project=birds", "train.steps=2", WANDB_MODE="online")
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr
    assert "train.wandb_project is 'birds', and Weights & Biases refuses it" in answer.stderr.splitlines()[-1]


def test_a_missing_package_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triweave.pretrain.wandb_board.find_spec", lambda _: None)
    check_wandb("")
    with pytest.raises(PretrainError, match=r"wandb is not installed; .*pip install 'triweave\[wandb\]'"):
        check_wandb("birds")
