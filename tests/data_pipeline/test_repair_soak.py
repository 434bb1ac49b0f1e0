"""Repairs killed at random moments: no file is ever half of one, and the next repair ends the work.

SOAK_REPAIRS damaged folders (default 100) under `make soak`, drawn from SOAK_SEED (default 0); a few in the slow tests.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from slow_source import SHARD_SIZE_BYTES, NumberSource

from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.manifest import MANIFEST_NAME, Manifest

REPAIRS = int(os.environ.get("SOAK_REPAIRS", "100"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
KILLS = 3
LONGEST_S = 1.5
PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from slow_source import SHARD_SIZE_BYTES, NumberSource
from triweave.data_pipeline.shards.build import BuildOptions
from triweave.data_pipeline.shards.repair import repair
result = repair(NumberSource(seconds_per_row=0.001), Path(sys.argv[2]), BuildOptions(shard_size_bytes=SHARD_SIZE_BYTES))
sys.exit(1 if result.report.damage else 0)
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    out = tmp_path_factory.mktemp("repair_soak") / "shards"
    return build(NumberSource(), out, BuildOptions(shard_size_bytes=SHARD_SIZE_BYTES))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def damage(draw: random.Random, folder: Path) -> list[str]:
    """Damage some files; the ledger in one of four folders, for it means that everything is built again."""
    names = sorted(path.name for path in folder.glob("shard-*")) + ["ledger.parquet"] * (draw.random() < 0.25)
    chosen = draw.sample(names, draw.randint(1, 6))
    for name in chosen:
        path = folder / name
        data = bytearray(path.read_bytes())
        path.unlink()
        kind = draw.choice(("flip", "cut", "gone"))
        if kind == "flip":
            data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
        if kind != "gone":
            path.write_bytes(data[: draw.randrange(len(data))] if kind == "cut" else data)
    return chosen


def killed_repairs(shards: Manifest, folder: Path, trials: int) -> int:
    """Return how many repairs were killed before they were done."""
    draw, kills = random.Random(SEED), 0
    whole = {name: data for name, data in files_of(shards.root).items() if name != "throughput.json"}
    for trial in range(trials):
        copy = folder / str(trial)
        shutil.copytree(shards.root, copy)
        told = f"seed {SEED}, folder {trial}, damaged {damage(draw, copy)}"
        before = files_of(copy)
        command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(copy)]
        for _ in range(KILLS):
            try:
                subprocess.run(command, timeout=draw.uniform(0.2, LONGEST_S), check=True)
            except subprocess.TimeoutExpired:  # by SIGKILL
                kills += 1
            now = files_of(copy)
            assert all(now[name] in (whole[name], before.get(name)) for name in now if name in whole), told
            assert (copy / MANIFEST_NAME).read_bytes() == whole[MANIFEST_NAME]
        subprocess.run(command, timeout=120, check=True)
        assert {name: data for name, data in files_of(copy).items() if name in whole} == whole, told
        assert not (copy / ".repair").exists()
        shutil.rmtree(copy)
    return kills


@pytest.mark.slow
def test_a_few_killed_repairs(shards: Manifest, tmp_path: Path) -> None:
    assert killed_repairs(shards, tmp_path, trials=3) > 0


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_many_killed_repairs(shards: Manifest, tmp_path: Path) -> None:
    kills = killed_repairs(shards, tmp_path, trials=REPAIRS)
    print(f"{kills} kills of repairs of {REPAIRS} folders")
    assert kills > REPAIRS
