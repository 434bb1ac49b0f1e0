"""Shards in an object store give the very rows that local ones give, through every command that reads a folder."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.errors import StorageError
from triweave.data_pipeline.storage.counters import storage_counts
from triweave.data_pipeline.storage.push import push
from triweave.data_pipeline.stream.loader import StepLoader
from triweave.data_pipeline.stream.state import StreamState
from triweave.launch.cli import main

STEPS = 12
"""More than an epoch of the small corpora."""


def config(birds: Path | str, talk: Path | str, tokenizer: Path, workers: int = 0) -> DataConfig:
    return DataConfig(
        sources=[
            SourceConfig(name="birds", shards=str(birds)),
            SourceConfig(name="talk", shards=str(talk), weight=0.5),
        ],
        tokenizer=str(tokenizer),
        sequence_length=256,
        block_samples=40,
        workers=workers,
    )


def loader_of(data: DataConfig, rank: int = 0, world_size: int = 1, state: StreamState | None = None) -> StepLoader:
    return StepLoader(data, rank=rank, world_size=world_size, global_batch_rows=8, micro_batch_rows=4, state=state)


def batches(data: DataConfig, steps: int = STEPS, **rank: Any) -> tuple[list[PackedBatch], int]:
    """Return a rank's micro-batches of the first steps and the number of fillers among them."""
    windows = iter(loader_of(data, **rank))
    try:
        taken = list(islice(windows, steps))
    finally:
        windows.close()  # type: ignore[attr-defined]
    return [batch for window in taken for batch in window.micro_batches], sum(len(window.fillers) for window in taken)


def assert_equal(found: list[PackedBatch], expected: list[PackedBatch]) -> None:
    assert [batch.sample_ids for batch in found] == [batch.sample_ids for batch in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert one.payloads.keys() == other.payloads.keys()
        for name in one.payloads:
            np.testing.assert_array_equal(one.payloads[name].values, other.payloads[name].values)


@pytest.fixture
def pushed(store: Any, stream_data: Any) -> str:  # noqa: ARG001 - the store must be there first
    for name in ("birds", "talk"):
        push(getattr(stream_data, name), f"s3://corpora/some/{name}")
    return "s3://corpora/some"


@pytest.fixture(scope="module")
def expected(stream_data: Any) -> list[PackedBatch]:
    return batches(config(stream_data.birds, stream_data.talk, stream_data.tokenizer))[0]


def test_the_rows_are_those_of_local_shards(pushed: str, stream_data: Any, expected: list[PackedBatch]) -> None:
    remote = config(f"{pushed}/birds", f"{pushed}/talk/", stream_data.tokenizer)
    found, fillers = batches(remote)
    assert fillers == 0
    assert_equal(found, expected)


def test_a_second_reader_reads_the_cache_and_no_tar(
    store: Any, pushed: str, stream_data: Any, expected: list[PackedBatch]
) -> None:
    remote = config(f"{pushed}/birds", f"{pushed}/talk", stream_data.tokenizer)
    batches(remote)
    assert store.ranges(".tar")
    store.log.clear()
    before = storage_counts()
    found, _ = batches(remote)
    assert_equal(found, expected)
    assert [entry for entry in store.log if entry[0] == "GET"] == []
    assert (storage_counts() - before).read_bytes == 0


def test_the_loader_through_faults_gives_the_same_rows(
    store: Any, pushed: str, stream_data: Any, expected: list[PackedBatch], fault_proxy: Any, use_store: Any
) -> None:
    draw = random.Random(5)
    with fault_proxy(store.endpoint) as proxy:
        use_store(store.environment | {"AWS_ENDPOINT_URL": proxy.endpoint}, S3_TIMEOUT_S=0.4)
        faults = ("busy", "reset", "truncate", "short", "flip", "stall")
        proxy.choose = lambda _: draw.choice(faults) if draw.random() < 0.15 else None
        before = storage_counts()
        found, fillers = batches(config(f"{pushed}/birds", f"{pushed}/talk", stream_data.tokenizer))
    counts = storage_counts() - before
    assert fillers == 0
    assert_equal(found, expected)
    assert counts.retries > 0
    assert counts.retries + counts.failed_checks >= 0.5 * sum(proxy.done.values())


@pytest.mark.slow
def test_an_outage_under_a_worker_process_is_one_line(
    store: Any, pushed: str, stream_data: Any, use_store: Any
) -> None:
    loader = loader_of(config(f"{pushed}/birds", f"{pushed}/talk", stream_data.tokenizer, workers=1))
    use_store(store.environment, S3_DEADLINE_S=1, S3_READ_AHEAD=0)
    windows = iter(loader)
    next(windows)
    store.failure = (503, "SlowDown")
    with pytest.raises(StorageError, match="could not be read within 1 s") as caught:
        deque(islice(windows, STEPS), maxlen=0)
    assert "\n" not in str(caught.value)
    windows.close()


@pytest.mark.slow
def test_radosgw_feeds_ranks_and_workers_the_local_rows(
    ceph: Any, use_store: Callable[..., None], stream_data: Any, expected: list[PackedBatch]
) -> None:
    """Two ranks, one of them with worker processes, and a reader that goes on in the middle with an empty cache."""
    use_store(ceph.environment)
    for name in ("birds", "talk"):
        push(getattr(stream_data, name), f"s3://corpora/stream/{name}")
    places = ("s3://corpora/stream/birds", "s3://corpora/stream/talk", stream_data.tokenizer)
    by_row = {}
    for rank, workers in ((0, 2), (1, 0)):
        for batch in batches(config(*places, workers=workers), rank=rank, world_size=2)[0]:
            by_row.update(zip(batch.plan_rows.tolist(), zip(batch.sample_ids, batch.tokens, strict=True), strict=True))
    local = [
        (row, ids, tokens)
        for batch in expected
        for row, ids, tokens in zip(batch.plan_rows.tolist(), batch.sample_ids, batch.tokens, strict=True)
    ]
    assert len(by_row) == len(local)
    for row, ids, tokens in local:
        assert by_row[row][0] == ids
        np.testing.assert_array_equal(by_row[row][1], tokens)
    half = list(islice(loader_of(config(*places)), STEPS // 2))[-1].state
    use_store(ceph.environment, CACHE_DIR=Path(os.environ["TRIWEAVE_CACHE_DIR"]) / "new")
    rest, fillers = batches(config(*places), steps=STEPS - STEPS // 2, state=half)
    assert fillers == 0
    assert_equal(rest, expected[len(expected) // 2 :])


def test_bytes_of_the_next_rows_are_asked_for_together(store: Any, pushed: str, stream_data: Any) -> None:
    batches(config(f"{pushed}/birds", f"{pushed}/talk", stream_data.tokenizer), steps=1)
    tars = {name: len(stored.data) for name, stored in store.objects.items() if name.endswith(".tar")}
    spans = [tuple(map(int, span.removeprefix("bytes=").split("-"))) for span in store.ranges(".tar")]
    pages = sum(-(-(last + 1 - first) // (16 << 10)) for first, last in spans)
    assert len(spans) < pages <= sum(-(-size // (16 << 10)) for size in tars.values())
    assert all(first % (16 << 10) == 0 for first, _ in spans)


def test_damage_in_the_store_becomes_a_filler_of_that_sample(
    store: Any, pushed: str, stream_data: Any, expected: list[PackedBatch]
) -> None:
    name = "corpora/some/birds/shard-000000.tar"
    data = bytearray(store.objects[name].data)
    data[700] ^= 1
    store.store(name, bytes(data))
    before = storage_counts()
    found, fillers = batches(config(f"{pushed}/birds", f"{pushed}/talk", stream_data.tokenizer))
    assert fillers > 0
    assert (storage_counts() - before).failed_checks >= 3
    lost = [sample for batch in found for ids in batch.sample_ids for sample in ids if sample.endswith(":filler")]
    assert len({sample.split(":")[2] for sample in lost}) == 1
    assert [len(ids) for batch in found for ids in batch.sample_ids] == [
        len(ids) for batch in expected for ids in batch.sample_ids
    ]


def test_an_outage_is_an_error_and_no_filler(
    store: Any, pushed: str, stream_data: Any, use_store: Callable[..., None]
) -> None:
    remote = config(f"{pushed}/birds", f"{pushed}/talk", stream_data.tokenizer)
    loader = loader_of(remote)
    use_store(store.environment | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, S3_DEADLINE_S=0.5)
    with pytest.raises(StorageError, match=r"could not be read within 0\.5 s, \d attempts .*; check AWS_ENDPOINT_URL"):
        next(iter(loader))


def test_commands_take_a_url(pushed: str, stream_data: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["stats", str(stream_data.birds), "--json"]) == 0
    local = json.loads(capsys.readouterr().out)
    assert main(["stats", f"{pushed}/birds", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == local
    assert main(["verify", f"{pushed}/birds", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole"]
    run = tmp_path / "run.yaml"
    source = {"name": "birds", "shards": f"{pushed}/birds"}
    run.write_text(json.dumps({"data": {"sources": [source], "tokenizer": str(stream_data.tokenizer)}}))
    assert main(["plan", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] > 0
    assert main(["export", f"{pushed}/birds", "--to", "obelics", "--out", str(tmp_path / "exported")]) == 0
    assert main(["tokenize", f"{pushed}/birds", "--tokenizer", str(stream_data.tokenizer)]) == 2
    assert "beside local shards" in capsys.readouterr().err
    arguments = ["tokenizer", "train", f"{pushed}/birds", "--vocab-size", "400", "--out", str(tmp_path / "t.model")]
    assert main(arguments) == 0


def test_measuring_reads_the_store_once_and_the_cache_then(
    store: Any, pushed: str, stream_data: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store.log.clear()
    assert main(["bench", "storage", f"{pushed}/birds", "--local", str(stream_data.birds), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["reader"] for row in rows] == ["store", "cache", "local"]
    assert {(row["samples"], row["sample_bytes"]) for row in rows} == {(72, rows[0]["sample_bytes"])}
    assert rows[0]["counts"]["read_bytes"] >= rows[0]["sample_bytes"]
    assert [row["counts"]["read_bytes"] for row in rows[1:]] == [0, 0]
    assert rows[2]["counts"]["requests"] == 0
    assert rows[0]["counts"]["requests"] + rows[1]["counts"]["requests"] == len(store.log)
    assert list((tmp_path / "cache").iterdir()) == []
    assert main(["bench", "storage", f"{pushed}/birds", "--samples", "0"]) == 2


def test_missing_shards_are_named_with_the_next_step(
    store: Any, pushed: str, stream_data: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stats", "s3://corpora/nothing"]) == 2
    assert "s3://corpora/nothing/manifest.json is missing: push shards" in capsys.readouterr().err
    del store.objects["corpora/some/birds/shard-000001.parquet"]
    assert main(["stats", f"{pushed}/birds"]) == 2
    assert "s3://corpora/some/birds/shard-000001.parquet is missing" in capsys.readouterr().err
    store.objects = {name: stored for name, stored in store.objects.items() if ".tokens-" not in name}
    with pytest.raises(Exception, match=r"no token counts .* at s3://corpora/some/talk.*`triweave push` it again"):
        batches(config(stream_data.birds, f"{pushed}/talk", stream_data.tokenizer))


def test_a_folder_called_like_a_scheme_is_a_folder(
    stream_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(stream_data.birds, tmp_path / "s3")
    monkeypatch.chdir(tmp_path)
    assert main(["stats", "s3"]) == 0
