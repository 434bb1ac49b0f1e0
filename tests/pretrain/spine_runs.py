"""Runs of the training program over tiny shards, and what they left: shared by the tests that start or read some."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from triweave.pretrain.checkpoints.checkpoint import list_checkpoints
from triweave.pretrain.ledger.consumed import read_consumed

STEPS = 20
HALF = 10
SETTINGS: dict[str, dict[str, Any]] = {
    "data": {"sequence_length": 96, "geometry": {"image_patch_px": 8, "image_max_tokens": 12}, "workers": 0},
    "model": {"d_model": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 16},
    "optimizer": {"lr": 1e-3, "eps": 1e-5},
    "schedule": {"warmup_steps": 2},
    "train": {"steps": STEPS, "global_batch_rows": 4, "micro_batch_rows": 1, "zero_stage": 2, "device": "cpu",
              "torch_threads": 1},
    "checkpoint": {"every_steps": HALF, "keep": 5},
}  # fmt: skip


def write_run_config(
    corpus: ModuleType,
    folder: Path,
    *,
    documents: int = 36,
    labels: Callable[[int], dict[str, Any]] | None = None,
    **sections: dict[str, Any],
) -> Path:
    """Build tiny shards with pictures, sounds and text, and write a run YAML over them; run_dir is to be overridden.

    corpus: tests/data_pipeline/conftest.py. labels: those of a document, by its number. sections: beside SETTINGS.
    """
    records = corpus.write_records(folder / "birds.jsonl", documents)
    if labels is not None:
        rows = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps(row | {"labels": labels(number)}) for number, row in enumerate(rows)]
        records.write_text("\n".join(lines), encoding="utf-8")
    options = corpus.BuildOptions(shard_size_bytes=100_000)
    manifest = corpus.build(corpus.ManifestSource(root=records), folder / "birds", options)
    corpus.train_tokenizer([manifest], 400, folder / "tokenizer.model")
    corpus.write_token_counts(manifest, folder / "tokenizer.model")
    tree = {name: SETTINGS.get(name, {}) | sections.get(name, {}) for name in (SETTINGS | sections)}
    tree["data"] |= {
        "sources": [{"name": "birds", "shards": str(folder / "birds")}],
        "tokenizer": str(folder / "tokenizer.model"),
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(folder / "unused"), **tree}))
    return path


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
