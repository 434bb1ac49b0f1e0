"""Memory of plan and loader does not grow with the data set: measured in processes of their own, as peak RSS.

A shard folder of many samples is one real shard under many names (hard links). `make soak` walks the plan of
SOAK_PLAN_SAMPLES samples (default 100 million), block by block:

    .venv/bin/python -m pytest -s -m soak tests/data_pipeline/test_stream_memory.py
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.manifest import Manifest, write_manifest
from triweave.data_pipeline.sources.manifest import ManifestSource
from triweave.data_pipeline.stream.plan import Planner
from triweave.data_pipeline.text.token_counts import write_token_counts
from triweave.data_pipeline.text.tokenizer import Tokenizer, train_tokenizer

SAMPLES = int(os.environ.get("SOAK_PLAN_SAMPLES", str(10**8)))
GIB = 2**30
FLAT = 1.15
"""Peak RSS of a hundred times the samples over that of one: allocators and page tables are not exact."""


def one_shard(folder: Path, documents: int) -> Manifest:
    """Build one tokenised shard of short texts."""
    draw = np.random.default_rng(0)
    words = np.asarray(["a", "bird", "sings", "on", "the", "branch", "of", "an", "old", "tree", "until", "evening"])
    records = folder / "records.jsonl"
    with records.open("w") as file:
        for number in range(documents):
            text = " ".join(draw.choice(words, draw.integers(4, 60)).tolist())
            parts = [{"modality": "text", "text": f"{number} {text}"}]
            file.write(json.dumps({"id": f"d{number}", "parts": parts}) + "\n")
    manifest = build(ManifestSource(root=records), folder / "one", BuildOptions(shard_size_bytes=GIB))
    assert len(manifest.shards) == 1
    train_tokenizer([manifest], 320, folder / "tokenizer.model")
    write_token_counts(manifest, folder / "tokenizer.model")
    return manifest


def replicated(one: Manifest, tokenizer: Path, out: Path, times: int) -> Path:
    """Return a folder that has the shard of `one` under `times` names."""
    out.mkdir()
    (shard,) = one.shards
    endings = [".tar", ".tar.idx", ".parquet", f".tokens-{Tokenizer.load(tokenizer).hash[:16]}.parquet"]
    names = [f"shard-{number:06d}" for number in range(times)]
    for name, ending in itertools.product(names, endings):
        os.link(one.root / (shard.name + ending), out / (name + ending))
    write_manifest(replace(one, root=out, shards=tuple(replace(shard, name=name) for name in names)))
    return out


def measured(task: str, shards: Path, tokenizer: Path, **options: int) -> dict[str, Any]:
    """Run a task of this file in a process of its own."""
    command = [sys.executable, __file__, task, str(shards), str(tokenizer), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def walk(config: DataConfig, options: dict[str, int]) -> dict[str, Any]:
    """Plan `blocks` blocks (0: those of one epoch)."""
    planner = Planner(config)
    rows = samples = 0
    for block in range(options["blocks"] or planner.mixture.epoch_blocks):
        plan = planner.block(block)
        rows, samples = rows + plan.rows, samples + plan.drawn_samples
    return {"rows": rows, "samples": samples}


def load(config: DataConfig, options: dict[str, int]) -> dict[str, Any]:
    """Load `steps` steps."""
    from triweave.data_pipeline.stream.loader import StepLoader

    stream = iter(StepLoader(config, rank=0, world_size=1, global_batch_rows=16, micro_batch_rows=8))
    rows = sum(window.end_row - window.first_row for window in itertools.islice(stream, options["steps"]))
    stream.close()
    return {"rows": rows}


def main() -> None:
    """Run one task and print its figures and the peak RSS of this process and of its workers."""
    task, shards, tokenizer, text = sys.argv[1:]
    options = json.loads(text)
    config = DataConfig(
        sources=[SourceConfig(name="many", shards=shards)],
        tokenizer=tokenizer,
        sequence_length=4096,
        block_samples=options["block_samples"],
        workers=options.get("workers", 0),
    )
    began = time.process_time()
    figures = {"walk": walk, "load": load}[task](config, options)
    figures["cpu_s"] = time.process_time() - began
    for name, who in (("peak_bytes", resource.RUSAGE_SELF), ("worker_peak_bytes", resource.RUSAGE_CHILDREN)):
        figures[name] = resource.getrusage(who).ru_maxrss * 1024
    print(json.dumps(figures))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_memory_of_plan_and_loader_is_flat_from_ten_thousand_to_a_million_samples(tmp_path: Path) -> None:
    one, tokenizer = one_shard(tmp_path, 1000), tmp_path / "tokenizer.model"
    few, many = (replicated(one, tokenizer, tmp_path / f"x{times}", times) for times in (10, 1000))
    walks = [measured("walk", shards, tokenizer, blocks=20, block_samples=5000) for shards in (few, many)]
    loads = [measured("load", shards, tokenizer, steps=40, block_samples=5000, workers=1) for shards in (few, many)]
    for name, (small, large) in (("plan", walks), ("loader", loads)):
        peaks = [
            round(figures[key] / 2**20) for figures in (small, large) for key in ("peak_bytes", "worker_peak_bytes")
        ]
        print(f"{name}: peak RSS of process and worker at 10^4 samples {peaks[:2]} MiB, at 10^6 {peaks[2:]} MiB")
        assert large["rows"] == pytest.approx(small["rows"], rel=0.1)
        assert large["peak_bytes"] <= FLAT * small["peak_bytes"]
        assert large["worker_peak_bytes"] <= FLAT * small["worker_peak_bytes"]


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_the_plan_of_a_hundred_million_samples_is_walked_within_two_gib(tmp_path: Path) -> None:
    one, tokenizer = one_shard(tmp_path, 10_000), tmp_path / "tokenizer.model"
    shards = replicated(one, tokenizer, tmp_path / "many", SAMPLES // 10_000)
    figures = measured("walk", shards, tokenizer, blocks=0, block_samples=65_536)
    print(
        f"{figures['samples']:,} samples in {figures['rows']:,} packs: {figures['cpu_s']:.0f} s of processor time, "
        f"{figures['cpu_s'] / figures['samples'] * 1e6:.1f} us a sample; peak RSS {figures['peak_bytes'] / GIB:.2f} GiB"
    )
    assert figures["samples"] == SAMPLES
    assert figures["peak_bytes"] <= 2 * GIB


if __name__ == "__main__":
    main()
