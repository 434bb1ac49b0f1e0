"""A million samples: the page is there at once, any sample is a click away, and memory stays small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest, ShardEntry, file_xxh3, write_manifest

SHARDS, SHARD_SAMPLES = 10, 100_000
OPEN_SECONDS = 10.0
MOST_MIB = 700
"""Peak of resident memory; Python with pyarrow and numpy takes about 100 of it."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def million(view_data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose index has a million rows, which are the 25 samples of one real tar over and over."""
    folder = tmp_path_factory.mktemp("million")
    source = Manifest.load(view_data.shards)
    tar = source.tar_path(0).read_bytes()
    table = read_index(source, 0)
    entries = []
    for shard in range(SHARDS):
        numbers = np.arange(SHARD_SAMPLES) + shard * SHARD_SAMPLES
        rows = table.take(pa.array(numbers % table.num_rows))
        labels = [f'{{"language":"{("en", "fr", "ja")[number % 3]}","number":{number}}}' for number in numbers.tolist()]
        for name, values in (("labels", labels), ("id", [f"item/{number}" for number in numbers.tolist()])):
            rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(values))
        name = f"shard-{shard:06d}"
        (folder / f"{name}.tar").write_bytes(tar)
        pq.write_table(rows, folder / f"{name}.parquet", compression="zstd", row_group_size=65536)
        index = file_xxh3(folder / f"{name}.parquet")
        entries.append(
            ShardEntry(name=name, samples=SHARD_SAMPLES, tar_bytes=len(tar), tar_xxh3="", index_xxh3=index, idx_xxh3="")
        )
    write_manifest(Manifest(root=folder, shards=tuple(entries)))
    return folder


class Viewer:
    """The command in a process of its own. answers: JSON of an API call."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    def get(self, name: str, **parameters: object) -> Any:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", f"/api/{name}?{urlencode(parameters)}")
        answer = connection.getresponse()
        content = json.loads(answer.read())
        connection.close()
        assert answer.status == 200, content
        return content

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024


@pytest.fixture
def viewer(million: Path) -> Iterator[Viewer]:
    command = [sys.executable, "-m", "triweave.launch.cli", "view", str(million), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().split("/")[2].rpartition(":")[2])
        yield Viewer(process, port)
        process.terminate()


def test_a_million_samples(viewer: Viewer) -> None:
    began = time.monotonic()
    first = viewer.get("samples")
    assert [entry["id"] for entry in first["samples"]] == [f"item/{number}" for number in range(40)]
    assert time.monotonic() - began < OPEN_SECONDS
    for number in (0, 999_999, 512_345):
        began = time.monotonic()
        shown = viewer.get("document", sample=number)
        assert (shown["id"], shown["damage"], shown["samples"]) == (f"item/{number}", "", 1_000_000)
        assert time.monotonic() - began < OPEN_SECONDS
    found, start = [], 0
    while start is not None:
        answer = viewer.get("samples", query="number:777777", start=start)
        found += [entry["number"] for entry in answer["samples"]]
        start = answer["next"]
    assert found == [777_777]
    words = viewer.get("samples", query='language:fr "sings 9"', start=950_000)
    assert all("sings 9" in entry["excerpt"] for entry in words["samples"])
    assert words["samples"]
    assert words["next"] is None or words["next"] > 950_000
    before = viewer.cpu_seconds()
    start = 0
    while start is not None:
        answer = viewer.get("samples", query="nobody-wrote-this", start=start)
        assert answer["samples"] == []
        start = answer["next"]
    rate = 1e6 / (viewer.cpu_seconds() - before)
    while not (facets := viewer.get("facets"))["done"]:
        pass
    assert dict(facets["counts"]["language"]) == {"en": 333_334, "fr": 333_333, "ja": 333_333}
    print(f"peak {viewer.peak_mib():.0f} MiB; {rate:,.0f} documents searched for a word per second of process time")
    assert viewer.peak_mib() < MOST_MIB
