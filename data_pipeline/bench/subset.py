"""The shards that a benchmark runs on, and what it ran on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow.parquet as pq

from triweave.data_pipeline.machine import processor_name
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest, ShardEntry, file_xxh3, write_manifest
from triweave.data_pipeline.storage.client import client_of
from triweave.data_pipeline.storage.files import read_range
from triweave.data_pipeline.storage.location import object_location

TAR_END = bytes(1024)


def machine() -> dict[str, Any]:
    """Name what was measured on."""
    return {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "processes": 1,
        "storage": "page cache",
    }


def copy_first_samples(manifest: Manifest, out: Path, count: int) -> Manifest:
    """Write shards that hold the first samples of every shard of `manifest`, about `count` in all."""
    out.mkdir(parents=True)
    share = min(1.0, count / max(1, manifest.samples))
    entries = []
    for number, shard in enumerate(manifest.shards):
        samples = min(shard.samples, -int(-shard.samples * share // 1))
        if samples == 0:
            continue
        index = read_index(manifest, number).slice(0, samples)
        end = index["offset"][-1].as_py() + index["size"][-1].as_py()
        content = read_range(manifest.tar_path(number), 0, end)
        tar, parquet = out / f"{shard.name}.tar", out / f"{shard.name}.parquet"
        tar.write_bytes(bytes(content) + TAR_END)
        pq.write_table(index, parquet)
        entries.append(
            ShardEntry(
                name=shard.name,
                samples=samples,
                tar_bytes=end + len(TAR_END),
                tar_xxh3=file_xxh3(tar),
                index_xxh3=file_xxh3(parquet),
                idx_xxh3="",
            )
        )
    write_manifest(replace(manifest, root=out, shards=tuple(entries)))
    return Manifest.load(out)


@contextmanager
def copied_to_store(subset: Manifest, url: str) -> Iterator[str]:
    """Copy the files of a subset to a new prefix below `url`, yield that, and remove them afterwards.

    Raises StorageError.
    """
    target = object_location(url).child(f"bench-{uuid4().hex[:12]}")
    client = client_of(target.bucket)
    files = sorted(path for path in subset.root.iterdir() if path.is_file())
    try:
        for path in files:
            client.put(target.child(path.name).key, path, file_xxh3(path), "overwrite")
        yield str(target)
    finally:
        for path in files:
            client.delete(target.child(path.name).key)
