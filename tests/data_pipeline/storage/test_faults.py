"""A store that fails: requests are sent again, no sample is lost or wrong, and the counts say what happened."""

from __future__ import annotations

import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import xxhash

from triweave.data_pipeline.errors import StorageError
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.storage.counters import storage_counts
from triweave.data_pipeline.storage.files import CHECKED_READS
from triweave.data_pipeline.storage.push import push
from triweave.data_pipeline.stream.reader import CorruptSampleError, ShardReader

FAULTS = ("busy", "reset", "truncate", "short", "flip", "stall")
URL = "s3://corpora/tiny"


@pytest.fixture
def proxy(store: Any, fault_proxy: Callable[[str], AbstractContextManager[Any]], use_store: Any) -> Iterator[Any]:
    with fault_proxy(store.endpoint) as proxy:
        use_store(store.environment | {"AWS_ENDPOINT_URL": proxy.endpoint}, S3_TIMEOUT_S=0.4)
        yield proxy


def read_all(url: str) -> dict[str, bytes]:
    """Return key -> bytes of every sample, read in an order that jumps between the shards."""
    manifest, reader = Manifest.load(url), ShardReader()
    rows = [(number, row) for number in range(len(manifest.shards)) for row in read_index(manifest, number).to_pylist()]
    random.Random(3).shuffle(rows)
    ranges = [(str(manifest.tar_path(number)), row["offset"], row["size"]) for number, row in rows]
    found = {}
    for place, (number, row) in enumerate(rows):
        reader.ask(ranges[place : place + 4])
        found[row["key"]] = bytes(reader.read(str(manifest.tar_path(number)), row["offset"], row["size"], row["xxh3"]))
    return found


def local_samples(folder: Path) -> dict[str, bytes]:
    manifest = Manifest.load(folder)
    return {
        row["key"]: manifest.tar_path(number).read_bytes()[row["offset"] : row["offset"] + row["size"]]
        for number in range(len(manifest.shards))
        for row in read_index(manifest, number).to_pylist()
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_every_third_answer_spoiled(fault: str, proxy: Any, tiny_shards: Manifest) -> None:
    push(tiny_shards.root, URL)
    proxy.choose = lambda request: fault if request.number % 3 == 2 else None
    before = storage_counts()
    assert read_all(URL) == local_samples(tiny_shards.root)
    counts = storage_counts() - before
    given = proxy.done[fault]
    assert given > 2
    assert (counts.failed_checks if fault == "flip" else counts.retries) >= given - 2
    assert counts.retries == 0 or fault != "flip"


def test_a_push_through_faults_is_whole(proxy: Any, store: Any, tiny_shards: Manifest) -> None:
    proxy.choose = lambda request: ("busy", "reset")[request.number % 2] if request.number % 3 == 0 else None
    push(tiny_shards.root, URL)
    proxy.choose = lambda _: None
    assert proxy.done
    for name, stored in store.objects.items():
        assert stored.data == (tiny_shards.root / name.rpartition("/")[2]).read_bytes()
    assert read_all(URL) == local_samples(tiny_shards.root)


def test_bytes_that_stay_wrong_are_damage(proxy: Any, tiny_shards: Manifest) -> None:
    push(tiny_shards.root, URL)
    manifest = Manifest.load(URL)
    row = read_index(manifest, 0).to_pylist()[0]
    proxy.choose = lambda request: "flip" if request.path.endswith(".tar") and request.method == "GET" else None
    with pytest.raises(CorruptSampleError, match=r"differ from what was built \(xxh3\), 3 times"):
        ShardReader().read(str(manifest.tar_path(0)), row["offset"], manifest.shards[0].tar_bytes - 1024, row["xxh3"])
    assert proxy.done["flip"] >= 3


@pytest.mark.usefixtures("store")
def test_a_damaged_page_of_the_cache_is_read_again(tiny_shards: Manifest, tmp_path: Path) -> None:
    push(tiny_shards.root, URL)
    expected = read_all(URL)
    pages = sorted((tmp_path / "cache").rglob("*.page"))
    assert pages
    for page in pages:
        data = bytearray(page.read_bytes())
        data[len(data) // 2] ^= 1
        page.write_bytes(data)
    before = storage_counts()
    assert read_all(URL) == expected
    assert (storage_counts() - before).failed_checks > 0


@pytest.mark.usefixtures("store")
def test_a_full_disk_costs_the_cache_and_nothing_else(
    tiny_shards: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    push(tiny_shards.root, URL)
    (tmp_path / "cache").write_text("no folder can be made here, as on a full disk")
    before = storage_counts()
    with caplog.at_level(logging.WARNING):
        assert read_all(URL) == local_samples(tiny_shards.root)
    assert (storage_counts() - before).cache_failures > 0
    assert "does not take what was read" in caplog.text


def test_a_replaced_object_is_not_mixed_with_the_old_one(store: Any, tiny_shards: Manifest) -> None:
    push(tiny_shards.root, URL)
    manifest, reader = Manifest.load(URL), ShardReader()
    rows = read_index(manifest, 0).to_pylist()
    tar = str(manifest.tar_path(0))
    first, last = rows[0], rows[-1]
    whole = bytes(reader.read(tar, first["offset"], first["size"], first["xxh3"]))
    stored = store.objects["corpora/tiny/shard-000000.tar"]
    data = bytes(1024) + stored.data
    store.store("corpora/tiny/shard-000000.tar", data)
    moved = reader.read(tar, last["offset"] + 1024, last["size"], last["xxh3"])
    assert bytes(moved) == stored.data[last["offset"] : last["offset"] + last["size"]]
    with pytest.raises(CorruptSampleError):
        reader.read(tar, last["offset"], last["size"], last["xxh3"])
    assert bytes(ShardReader().read(tar, first["offset"] + 1024, first["size"], first["xxh3"])) == whole


def test_the_deadline_ends_a_store_that_is_always_busy(
    proxy: Any, store: Any, tiny_shards: Manifest, use_store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    push(tiny_shards.root, URL)
    use_store(store.environment | {"AWS_ENDPOINT_URL": proxy.endpoint}, S3_DEADLINE_S=1)
    proxy.choose = lambda _: "busy"
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(StorageError, match=r"within 1 s, \d attempts \(503 Service Unavailable"),
    ):
        Manifest.load(URL)
    assert "trying for another" in caplog.text
    assert store.environment["AWS_SECRET_ACCESS_KEY"] not in caplog.text


@pytest.mark.slow
def test_radosgw_through_mixed_faults(
    ceph: Any, fault_proxy: Callable[[str], AbstractContextManager[Any]], use_store: Any, stream_data: Any
) -> None:
    """Five passes with an empty cache and one, every fourth answer spoiled by a seeded draw.

    An object's bytes are flipped at most twice in a pass: three times in a row would be damage, and rightly so.
    """
    flips: Counter[str] = Counter()

    def choose(request: Any) -> str | None:
        fault = draw.choice(FAULTS) if draw.random() < 0.25 else None
        if fault == "flip":
            flips[request.path] += 1
        return fault if fault != "flip" or flips[request.path] < CHECKED_READS else None

    use_store(ceph.environment)
    push(stream_data.birds, "s3://corpora/faults")
    expected = local_samples(stream_data.birds)
    draw = random.Random(11)
    with fault_proxy(ceph.endpoint) as proxy:
        use_store(ceph.environment | {"AWS_ENDPOINT_URL": proxy.endpoint}, CACHE_GB=0, S3_TIMEOUT_S=0.4)
        proxy.choose = choose
        before = storage_counts()
        for passes in range(5):
            if passes == 4:
                os.environ["TRIWEAVE_CACHE_GB"] = "1"
            flips.clear()
            assert read_all("s3://corpora/faults") == expected
        counts = storage_counts() - before
    assert set(proxy.done) == set(FAULTS)
    assert counts.retries + counts.failed_checks >= sum(proxy.done.values()) * 0.8
    assert xxhash.xxh3_64_hexdigest(b"".join(expected.values()))  # the samples are not empty
