"""Measure the loader against its peers and against the bare functions, on the same samples, in one run.

raw   triweave    plan the packs, read every planned sample by byte range from mapped tars, checksum it (xxh3)
      peers       read every sample in the order they have it, checksum every member (xxh3)
      bare        slice every sample from the mapped tars in tar order and checksum it; nothing else
full  triweave    the whole pipeline of a rank: plan, read, verify, tokenise, decode, resize, mel, pack
      peers       their reader, the same tokenise and decode functions, the same packing of samples as they come
      bare        the tokenise and decode functions alone, sample by sample, on bytes that lie in memory; no packing

webdataset and Energon read the same tars; litdata and streaming their own formats, written from them first. Every
loader has a process of its own, with one thread, no worker processes, and nothing else in it. They take turns, repeat
by repeat and in turning order, and medians are reported, so a slow minute of the machine hits all alike. The samples
are the first of every shard, copied to a folder of their own, hence read from the page cache. Nothing decoded is kept
between samples. A loader that is not installed, or fails, is a row that says so.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from triweave.data_pipeline.bench.contenders.registry import FROM_STORE, OWN, PEERS
from triweave.data_pipeline.bench.subset import copied_to_store, copy_first_samples
from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.text.token_counts import write_token_counts

RESUME_SHARES = {"resume_s_at_0": 0.0, "resume_s_at_50": 0.5, "resume_s_at_99": 0.99}
"""Field of a row -> share of an epoch behind which the loader goes on."""
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One loader's medians on one work; all figures are None where `error` says what kept it from running.

    samples_per_cpu_s: the same per second of processor time: what a core gives on a machine that is shared.
    ratio_to_bare_decode: samples/s over those of the bare functions; the median of the ratios within each repeat.
    first_batch_s: from nothing to the first pack of the full work; first_batch_from_store_s: the same from an object
        store and an empty cache, None without one and for loaders that are not measured there.
    resume_s_at_*: from a saved state to the pack behind it; None for the raw work, which makes no packs.
    seconds: of each repeat.
    """

    loader: str
    work: str
    version: str = ""
    samples: int | None = None
    samples_per_s: float | None = None
    samples_per_cpu_s: float | None = None
    ratio_to_bare_decode: float | None = None
    first_batch_s: float | None = None
    first_batch_from_store_s: float | None = None
    resume_s_at_0: float | None = None
    resume_s_at_50: float | None = None
    resume_s_at_99: float | None = None
    seconds: tuple[float, ...] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure. python: interpreter of all loaders' processes, so that peers can have an environment.

    store: s3://BUCKET/PREFIX below which the samples of the full work are kept for the time of the run; None: no store.
    """

    peers: tuple[str, ...] = ("webdataset",)
    raw_samples: int = 50_000
    full_samples: int = 2000
    repeats: int = 7
    sequence_length: int = 4096
    python: str = sys.executable
    store: str | None = None

    def __post_init__(self) -> None:
        """Refuse counts below 1 and peers that nobody knows."""
        counts = {"raw-samples": self.raw_samples, "samples": self.full_samples, "repeats": self.repeats}
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"--{name} {count}: must be at least 1")
        for peer in self.peers:
            if peer not in PEERS:
                raise ConfigError(f"--peers {peer}: is none of {', '.join(PEERS)}")


class PeerFailedError(Exception):
    """A loader or indexer does not run here; the message is its row's error. Not for the user."""


def bench_loader(
    shards: Path, tokenizer: Path, options: BenchOptions, progress: Callable[[str], None]
) -> list[BenchRow]:
    """Measure all loaders; `progress` is told what is measured.

    Raises DataError where shards or tokenizer cannot be read, or the store cannot be written.
    """
    manifest = Manifest.load(shards)
    rows: list[BenchRow] = []
    for work, count in (("raw", options.raw_samples), ("full", options.full_samples)):
        with tempfile.TemporaryDirectory() as folder:
            progress(f"copying {min(count, manifest.samples)} samples for the {work} work")
            subset = copy_first_samples(manifest, Path(folder) / "shards", count)
            write_token_counts(subset, tokenizer)
            with ExitStack() as stack:
                store = ""
                if work == "full" and options.store is not None:
                    progress(f"copying them to {options.store}")
                    store = stack.enter_context(copied_to_store(subset, options.store))
                rows += _measure(work, subset, tokenizer, replace(options, store=store), Path(folder), progress)
    return rows


class LoaderProcess:
    """A loader in a process of its own; see `process.py`."""

    def __init__(self, name: str, subset: Manifest, tokenizer: Path, options: BenchOptions, folder: Path) -> None:
        """Start it and let it prepare. Raises PeerFailedError."""
        own = folder / name
        own.mkdir()
        self.name = name
        self._process = subprocess.Popen(
            [options.python, "-m", "triweave.data_pipeline.bench.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / f"{name}.log").open("w"),
            text=True,
            env=os.environ | ONE_THREAD,
        )
        self._log = folder / f"{name}.log"
        content = {
            "contender": name,
            "shards": str(subset.root),
            "tokenizer": str(tokenizer.resolve()),
            "sequence_length": options.sequence_length,
            "samples": subset.samples,
            "folder": str(own),
            "store": options.store,
        }
        self.version = str(self._ask(content)["version"])

    def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Let it do something; return its seconds, processor seconds and result. Raises PeerFailedError."""
        return self._ask({"do": do, **arguments})

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, content: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise PeerFailedError(f"its process ended with {self._process.wait()}: {' '.join(last)}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerFailedError(reply["error"])
        return reply


def _measure(
    work: str,
    subset: Manifest,
    tokenizer: Path,
    options: BenchOptions,
    folder: Path,
    progress: Callable[[str], None],
) -> list[BenchRow]:
    names = (*OWN, *dict.fromkeys(options.peers))
    running: dict[str, LoaderProcess] = {}
    failed: dict[str, str] = {}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    starts: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        for name in names:
            progress(f"{work}: {name} prepares")
            try:
                running[name] = LoaderProcess(name, subset, tokenizer, options, folder)
                stack.callback(running[name].close)
            except PeerFailedError as error:
                failed[name] = str(error)
        for repeat in range(options.repeats):
            for name in _turns(list(running), repeat):
                progress(f"{work} {name}, {repeat + 1} of {options.repeats}")
                try:
                    runs[name].append(running[name].call(work))
                    if work == "full" and repeat == options.repeats - 1:
                        starts[name] = _start_times(running[name], options)
                except PeerFailedError as error:
                    failed[name] = str(error)
                    del running[name]
    bare = [run["seconds"] for run in runs["bare"]]
    return [
        BenchRow(loader=name, work=work, error=failed[name])
        if name in failed
        else _row(work, running[name], runs[name], bare, starts.get(name, {}))
        for name in names
    ]


def _turns(names: list[str], repeat: int) -> list[str]:
    return names if repeat % 2 == 0 else names[::-1]


def _start_times(process: LoaderProcess, options: BenchOptions) -> dict[str, float]:
    """Return medians of the time to the first pack, from nothing, from the store, behind each share of an epoch."""
    repeats = options.repeats
    times = {"first_batch_s": statistics.median(process.call("first_batch")["seconds"] for _ in range(repeats))}
    if options.store and process.name in FROM_STORE:
        seconds = []
        for _ in range(repeats):
            process.call("prepare_store")
            seconds.append(process.call("first_batch_from_store")["seconds"])
        times["first_batch_from_store_s"] = statistics.median(seconds)
    for name, share in RESUME_SHARES.items():
        process.call("prepare_resume", share=share)
        times[name] = statistics.median(process.call("resume")["seconds"] for _ in range(repeats))
    return times


def _row(
    work: str, process: LoaderProcess, runs: list[dict[str, Any]], bare: Sequence[float], starts: dict[str, Any]
) -> BenchRow:
    seconds = [run["seconds"] for run in runs]
    samples = int(runs[-1]["result"])
    return BenchRow(
        loader=process.name,
        work=work,
        version=process.version,
        samples=samples,
        samples_per_s=samples / statistics.median(seconds),
        samples_per_cpu_s=samples / statistics.median(run["cpu_s"] for run in runs),
        ratio_to_bare_decode=statistics.median(first / own for first, own in zip(bare, seconds, strict=True)),
        seconds=tuple(seconds),
        **starts,
    )
