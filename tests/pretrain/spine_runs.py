"""Runs of the training program over tiny shards, and what they left: shared by the tests that start or read some."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from triweave.pretrain.checkpoints.checkpoint import list_checkpoints
from triweave.pretrain.ledger.consumed import read_consumed

STEPS = 20
HALF = 10


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def consumed(run_dir: Path) -> list[tuple[Any, ...]]:
    return [(row.step, row.row, row.ids, row.hashes) for row in read_consumed(run_dir)]


def files_of(run_dir: Path) -> dict[str, list[str]]:
    """Return rank file -> checksums of the newest checkpoint: weights, moments and RNG, all of it."""
    manifest = json.loads((list_checkpoints(run_dir)[-1] / "manifest.json").read_text())
    return {name: entry["blocks"] for name, entry in manifest["files"].items() if name.startswith("rank-")}


def run_program(run_config: Path, run_dir: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """Start the program as a plain process, a world of one."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, "-m", "triweave.pretrain.train", str(run_config), f"run_dir={run_dir}", *words],
        env={**clean, **environment}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
