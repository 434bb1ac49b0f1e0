"""Measure reading shards from an object store: with an empty cache, with a full one, and beside a local folder.

Every reader reads the indices of all shards and then samples in one shuffled order, checking each; it asks for samples
READ_AHEAD before they are needed, as a loader asks for its next micro-batches. Nothing is decoded.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.storage.counters import StorageCounts, storage_counts
from triweave.data_pipeline.storage.location import is_remote, shown
from triweave.data_pipeline.storage.settings import StorageSettings
from triweave.data_pipeline.storage.side_by_side import side_by_side
from triweave.data_pipeline.stream.reader import ShardReader

FIRST_SAMPLES = 64
READ_AHEAD = 128
_COLUMNS = ("offset", "size", "xxh3")
_CACHE_DIR = "TRIWEAVE_CACHE_DIR"


@dataclass(frozen=True, kw_only=True)
class StorageRow:
    """One reader. store: with an empty cache; cache: what it left; local: a folder of this machine.

    index_s: until all indices were there. first_s: from then until the first FIRST_SAMPLES samples were.
    cpu_s: processor time of all of the reader's threads. counts: what the object store did meanwhile.
    """

    reader: Literal["store", "cache", "local"]
    samples: int
    sample_bytes: int
    index_s: float
    first_s: float
    samples_per_s: float
    mb_per_s: float
    cpu_s: float
    counts: StorageCounts


def measure_storage(
    url: str, *, local: Path | None, samples: int, seed: int, progress: Callable[[str], None]
) -> list[StorageRow]:
    """Return a row for each reader; the cache they use is a folder of its own, which is gone afterwards.

    Raises ConfigError for fewer than one sample, DataError where shards cannot be read.
    """
    if samples < 1:
        raise ConfigError(f"--samples {samples}: must be at least 1")
    rows = []
    with _cache_of_its_own():
        progress(f"reading {shown(url)} with an empty cache")
        rows.append(_read("store", url, samples, seed))
        progress("reading the same from the cache")
        rows.append(_read("cache", url, samples, seed))
    if local is not None:
        progress(f"reading the same from {local}")
        rows.append(_read("local", str(local), samples, seed))
    return rows


def _read(reader: Literal["store", "cache", "local"], folder: str, samples: int, seed: int) -> StorageRow:
    before, cpu, began = storage_counts(), time.process_time(), time.perf_counter()
    manifest = Manifest.load(folder)
    planned = []
    reads = [partial(read_index, manifest, number, _COLUMNS) for number in range(len(manifest.shards))]
    threads = StorageSettings.from_environment().connections if is_remote(folder) else 1
    for number, table in enumerate(side_by_side(reads, threads)):
        tar = str(manifest.tar_path(number))
        planned += [(tar, *row) for row in zip(*(column.to_pylist() for column in table.columns), strict=True)]
    random.Random(seed).shuffle(planned)
    del planned[samples:]
    indexed = time.perf_counter()
    first = indexed
    source = ShardReader()
    for place, (tar, offset, size, xxh3) in enumerate(planned):
        if place % FIRST_SAMPLES == 0:
            start = 0 if place == 0 else place + READ_AHEAD
            source.ask(row[:3] for row in planned[start : place + READ_AHEAD + FIRST_SAMPLES])
        source.read(tar, offset, size, xxh3)
        if place < FIRST_SAMPLES:
            first = time.perf_counter()
    seconds = time.perf_counter() - indexed
    sample_bytes = sum(row[2] for row in planned)
    return StorageRow(
        reader=reader,
        samples=len(planned),
        sample_bytes=sample_bytes,
        index_s=indexed - began,
        first_s=first - indexed,
        samples_per_s=len(planned) / seconds,
        mb_per_s=sample_bytes / 1e6 / seconds,
        cpu_s=time.process_time() - cpu,
        counts=storage_counts() - before,
    )


@contextmanager
def _cache_of_its_own() -> Iterator[None]:
    """Use an empty cache beside the configured one for the block."""
    configured = os.environ.get(_CACHE_DIR)
    folder = StorageSettings.from_environment().cache_dir
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="measured-", dir=folder) as temporary:
        os.environ[_CACHE_DIR] = temporary
        try:
            yield
        finally:
            if configured is None:
                del os.environ[_CACHE_DIR]
            else:
                os.environ[_CACHE_DIR] = configured
