"""Starting from an object store: files side by side, none asked about before it is read, the first pack first."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.errors import ShardMissingError, StorageError
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.storage.client import ChangedObjectError, ObjectClient, client_of
from triweave.data_pipeline.storage.counters import storage_counts
from triweave.data_pipeline.storage.files import read_file
from triweave.data_pipeline.storage.location import object_location
from triweave.data_pipeline.storage.objects import ByteRange, RemoteRanges
from triweave.data_pipeline.storage.push import push
from triweave.data_pipeline.storage.read_ahead import read_ahead
from triweave.data_pipeline.storage.settings import StorageSettings
from triweave.data_pipeline.storage.side_by_side import CALLS_AHEAD, side_by_side
from triweave.data_pipeline.stream.loader import StepLoader
from triweave.data_pipeline.stream.plan import Planner
from triweave.data_pipeline.stream.reader import CorruptSampleError, ShardReader

PAGE = 16 << 10


@pytest.fixture
def config(store: Any, stream_data: Any) -> DataConfig:  # noqa: ARG001 - the store must be there first
    for name in ("birds", "talk"):
        push(getattr(stream_data, name), f"s3://corpora/{name}")
    sources = [SourceConfig(name=name, shards=f"s3://corpora/{name}") for name in ("birds", "talk")]
    return DataConfig(
        sources=sources,
        tokenizer=str(stream_data.tokenizer),
        sequence_length=256,
        weight_unit="tokens",
        workers=0,
    )


def first_step(config: DataConfig) -> None:
    next(iter(StepLoader(config, rank=0, world_size=1, global_batch_rows=1, micro_batch_rows=1)))


def test_what_is_read_is_not_asked_about_before(store: Any, config: DataConfig) -> None:
    store.log.clear()
    before = storage_counts()
    first_step(config)
    counts = storage_counts() - before
    assert counts.requests == len(store.log)
    assert {method for method, _, _ in store.log} == {"GET"}
    reads = Counter(name for _, name, _ in store.log if not name.endswith(".tar"))
    assert set(reads.values()) == {1}
    assert {name.rpartition("/")[2] for name in reads} >= {"manifest.json", "shard-000000.parquet"}


def test_a_second_start_asks_for_identities_only(store: Any, config: DataConfig) -> None:
    first_step(config)
    store.log.clear()
    first_step(config)
    assert {method for method, _, _ in store.log} == {"HEAD"}


def test_metadata_is_read_side_by_side_and_within_the_bound(
    store: Any, config: DataConfig, use_store: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_store(store.environment, S3_CONNECTIONS=3)
    active, most, lock, first = 0, 0, threading.Lock(), ObjectClient.first

    def slow(client: ObjectClient, key: str, start: int, end: int) -> Any:
        nonlocal active, most
        with lock:
            active, most = active + 1, max(most, active + 1)
        time.sleep(0.01)
        try:
            return first(client, key, start, end)
        finally:
            with lock:
                active -= 1

    monkeypatch.setattr(ObjectClient, "first", slow)
    Planner(config).block(0)
    assert most == 3


def test_the_first_error_in_order_is_the_one_that_is_told(store: Any, config: DataConfig) -> None:
    del store.objects["corpora/birds/shard-000001.parquet"]
    store.objects = {name: stored for name, stored in store.objects.items() if not name.startswith("corpora/talk/s")}
    for _ in range(3):
        with pytest.raises(ShardMissingError, match=r"s3://corpora/birds/shard-000001\.parquet is missing"):
            Planner(config)


def test_results_come_in_order_and_are_bounded() -> None:
    begun: list[int] = []

    def call(number: int) -> int:
        begun.append(number)
        time.sleep(0.001 * (number % 3))
        return number

    results = side_by_side([partial(call, number) for number in range(50)], 4)
    taken = [next(results) for _ in range(10)]
    time.sleep(0.02)
    assert len(begun) <= 10 + CALLS_AHEAD * 4
    assert taken + list(results) == list(range(50))


def test_what_is_given_up_is_not_repeated(store: Any) -> None:
    """Ctrl-C in an outage must not wait for the deadline: a process that ends waits for its threads."""
    client = client_of("corpora")
    store.failure = (503, "SlowDown")

    def interrupted() -> None:
        time.sleep(0.2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(side_by_side([interrupted, partial(client.info, "x")], 2))
    waiting = [thread for thread in threading.enumerate() if thread.name.startswith("object-store")]
    for thread in waiting:
        thread.join(3)
        assert not thread.is_alive()


def test_answers_of_two_versions_are_not_mixed(
    store: Any, use_store: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_store(store.environment, S3_CONNECTIONS=1)
    store.store("corpora/x.tar", bytes(8 * PAGE))
    first = ObjectClient.first

    def replaced_afterwards(*arguments: Any) -> Any:
        answer = first(*arguments)
        store.store("corpora/x.tar", b"\1" * 8 * PAGE)
        return answer

    monkeypatch.setattr(ObjectClient, "first", replaced_afterwards)
    ranges, x = RemoteRanges(StorageSettings.from_environment()), object_location("s3://corpora/x.tar")
    ranges.ask([ByteRange(x, 0, PAGE), ByteRange(x, 4 * PAGE, PAGE)])
    assert bytes(ranges.read(x, 0, PAGE)) == bytes(PAGE)
    with pytest.raises(ChangedObjectError):
        ranges.read(x, 4 * PAGE, PAGE)


def test_a_tar_that_was_cut_is_damage_at_once(store: Any, tiny_shards: Manifest) -> None:
    push(tiny_shards.root, "s3://corpora/tiny")
    manifest = Manifest.load("s3://corpora/tiny")
    last = read_index(manifest, 0).to_pylist()[-1]
    name = "corpora/tiny/shard-000000.tar"
    for size in (100, last["offset"] + 10):
        store.store(name, store.objects[name].data[:size])
        before = storage_counts()
        with pytest.raises(CorruptSampleError, match=f"the tar ends at byte {size}, the sample at"):
            ShardReader().read(str(manifest.tar_path(0)), last["offset"], last["size"], last["xxh3"])
        assert (storage_counts() - before).retries == 0
        store.store(name, (tiny_shards.root / "shard-000000.tar").read_bytes())


def test_files_larger_than_a_request_are_read_whole(store: Any, use_store: Callable[..., None]) -> None:
    use_store(store.environment, S3_REQUEST_MB=0)  # a page of 16 KB then
    data = bytes(range(256)) * 160
    store.store("corpora/x", data)
    assert bytes(read_file("s3://corpora/x")) == data
    assert store.ranges("/x") == ["bytes=0-16383", "bytes=16384-32767", "bytes=32768-40959"]
    store.store("corpora/empty", b"")
    assert bytes(read_file("s3://corpora/empty")) == b""
    with pytest.raises(FileNotFoundError):
        read_file("s3://corpora/none")


def test_reading_ahead_begins_with_one_and_comes_to_its_depth() -> None:
    asked: list[int] = []
    seen = [(item, len(asked)) for item in read_ahead(range(12), asked.append, 4)]
    assert seen[:6] == [(0, 2), (1, 4), (2, 6), (3, 8), (4, 9), (5, 10)]
    assert [item for item, _ in seen] == list(range(12))
    assert list(read_ahead(range(3), asked.append, 0)) == [0, 1, 2]


def test_an_outage_under_the_metadata_is_one_error(
    store: Any, config: DataConfig, use_store: Callable[..., None]
) -> None:
    use_store(store.environment, S3_DEADLINE_S=0.3)
    planner = Planner(config)
    planner.forget()
    store.failure = (503, "SlowDown")
    with pytest.raises(StorageError, match=r"shard-\d+\..*parquet: could not be read within 0\.3 s"):
        planner.block(0)
