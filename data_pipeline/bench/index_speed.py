"""Measure how many samples per second the indices of existing tars are made and checked at, beside `energon prepare`.

triweave index    both indices of every tar from the tar alone: each sample and member hashed (xxh3), dimensions, labels
                  and byte ranges of every part; the files must come out with the bytes that the manifest names
triweave verify   every file and every sample against its hash
energon           `energon prepare` on links to the same tars, one process: byte ranges of members in SQLite and
                  `.tar.idx`; it hashes nothing

Each measurement is a fresh process; imports are not timed. Processor time is that of the process and its children.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triweave.data_pipeline.bench.loader_bench import ONE_THREAD, PeerFailedError
from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.shards.manifest import Manifest

INDEX_PEERS = ("energon",)
CLOCK_S = 1 / os.sysconf("SC_CLK_TCK")
"""Tick of the clock of processor time."""
_TIMED = """
import json, os, sys, time
asked = json.loads(sys.argv[1])
%s
began, cpu = time.perf_counter(), sum(os.times()[:4])
samples = work()
print(json.dumps([samples, time.perf_counter() - began, sum(os.times()[:4]) - cpu, version]))
"""
_INDEX = """
from pathlib import Path
from triweave.data_pipeline.shards.manifest import Manifest, file_xxh3
from triweave.data_pipeline.shards.reindex import write_indices
version = ""
def work():
    manifest, out, samples = Manifest.load(asked["shards"]), Path(asked["out"]), 0
    for number, entry in enumerate(manifest.shards):
        index, idx = out / f"{entry.name}.parquet", out / f"{entry.name}.tar.idx"
        samples += write_indices(manifest.tar_path(number), index, idx)
        assert (file_xxh3(index), file_xxh3(idx)) == (entry.index_xxh3, entry.idx_xxh3), entry.name
    return samples
"""
_VERIFY = """
from pathlib import Path
from triweave.data_pipeline.shards.verify import verify
version = ""
def work():
    report = verify(Path(asked["shards"]))
    assert not report.damage, report.damage[0]
    return report.samples
"""
_ENERGON = """
from importlib.metadata import version as version_of
from pathlib import Path
from megatron.energon.flavors import BaseWebdatasetFactory
version, out = version_of("megatron-energon"), Path(asked["out"])
names = sorted(path.name for path in Path(asked["shards"]).glob("shard-*.tar"))
for name in names:
    os.symlink(Path(asked["shards"], name).resolve(), out / name)
def work():
    BaseWebdatasetFactory.prepare_dataset(out, names, split_parts_ratio=[("train", 1.0)], workers=1)
    return sum(json.loads((out / ".nv-meta" / ".info.json").read_text())["shard_counts"].values())
"""
PROGRAMS = {"triweave index": _INDEX, "triweave verify": _VERIFY, "energon": _ENERGON}


@dataclass(frozen=True, kw_only=True)
class IndexerRow:
    """Medians of one indexer; None where `error` says what kept it from running.

    samples_per_cpu_s: per second of processor time. ratio_to_energon: of samples_per_cpu_s over energon's.
    """

    indexer: str
    version: str = ""
    samples: int | None = None
    tar_bytes: int | None = None
    samples_per_s: float | None = None
    samples_per_cpu_s: float | None = None
    ratio_to_energon: float | None = None
    error: str | None = None


def measure_indexers(
    shards: Path,
    folder: Path,
    *,
    peers: tuple[str, ...],
    python: str,
    repeats: int,
    progress: Callable[[str], None],
) -> list[IndexerRow]:
    """Return the rows of our two and of the peers, which take turns `repeats` times.

    folder: an empty one, for links and indices. python: interpreter of the peers.
    Raises ConfigError for an unknown peer, DataError where the shards cannot be read.
    """
    for peer in peers:
        if peer not in INDEX_PEERS:
            raise ConfigError(f"--peers {peer}: is none of {', '.join(INDEX_PEERS)}")
    manifest = Manifest.load(shards)
    names = ("triweave index", "triweave verify", *dict.fromkeys(peers))
    runs: dict[str, list[tuple[int, float, float, str]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for turn in range(repeats):
        for name in names if turn % 2 == 0 else names[::-1]:
            if name in failed:
                continue
            progress(f"{name}, turn {turn + 1} of {repeats}")
            out = folder / f"{name.replace(' ', '-')}-{turn}"
            out.mkdir()
            try:
                runs[name].append(_run(python if name in peers else sys.executable, name, shards, out))
            except PeerFailedError as error:
                failed[name] = str(error)
    peer_rate = _rate(runs["energon"], 2) if "energon" in peers and "energon" not in failed else None
    tar_bytes = sum(entry.tar_bytes for entry in manifest.shards)
    return [
        IndexerRow(indexer=name, error=failed[name])
        if name in failed
        else IndexerRow(
            indexer=name,
            version=runs[name][0][3],
            samples=runs[name][0][0],
            tar_bytes=tar_bytes,
            samples_per_s=_rate(runs[name], 1),
            samples_per_cpu_s=_rate(runs[name], 2),
            ratio_to_energon=_rate(runs[name], 2) / peer_rate if peer_rate else None,
        )
        for name in names
    ]


def _rate(runs: list[tuple[int, float, float, str]], field: int) -> float:
    """Return samples per second; a clock that has not moved yet counts as one of its ticks."""
    return statistics.median(run[0] / max(float(run[field]), CLOCK_S) for run in runs)


def _run(python: str, name: str, shards: Path, out: Path) -> tuple[int, float, float, str]:
    asked = json.dumps({"shards": str(shards.resolve()), "out": str(out)})
    command = [python, "-c", _TIMED % PROGRAMS[name], asked]
    try:
        done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"--python {python}: cannot be started ({error.strerror})") from None
    if done.returncode:
        raise PeerFailedError((done.stderr.strip() or "no output").splitlines()[-1])
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return int(found[0]), float(found[1]), float(found[2]), str(found[3])
