"""The local cache: bounded, keyed by the whole identity, whole pages or none, whatever kills its writers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from triweave.data_pipeline.errors import StorageError
from triweave.data_pipeline.storage import cache as cache_module
from triweave.data_pipeline.storage.cache import PageCache
from triweave.data_pipeline.storage.client import ObjectClient
from triweave.data_pipeline.storage.counters import storage_counts
from triweave.data_pipeline.storage.files import read_file
from triweave.data_pipeline.storage.location import object_location
from triweave.data_pipeline.storage.objects import ByteRange, RemoteRanges
from triweave.data_pipeline.storage.settings import StorageSettings

PAGE = 16 << 10


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_page_comes_back_mapped_and_read_only(tmp_path: Path) -> None:
    cache = PageCache(tmp_path, 1 << 20)
    assert cache.get(("a",), 5) is None
    assert bytes(cache.put(("a",), memoryview(b"hello"))) == b"hello"
    view = PageCache(tmp_path, 1 << 20).get(("a",), 5)
    assert view is not None
    assert view.readonly
    assert bytes(view) == b"hello"
    cache.forget(("a",))
    assert cache.get(("a",), 5) is None
    assert bytes(view) == b"hello"


def test_every_part_of_the_identity_counts(store: Any) -> None:
    """webdataset's cache, keyed by basename, served shard A for shard B."""
    contents = {f"s3://{bucket}/{key}": f"{bucket} {key}".encode().ljust(64)
                for bucket in ("one", "two") for key in ("a/x.tar", "b/x.tar", "x.tar")}  # fmt: skip
    for url, data in contents.items():
        name = url.removeprefix("s3://")
        store.store(name, data)
        store.objects[name] = store.objects[name]._replace(etag='"the same"')
    for _ in range(2):
        ranges = RemoteRanges(StorageSettings.from_environment())
        for url, data in contents.items():
            assert bytes(ranges.read(object_location(url), 0, 64)) == data
    replaced = b"replaced".ljust(64)
    store.store("one/x.tar", replaced)
    fresh = RemoteRanges(StorageSettings.from_environment())
    assert bytes(fresh.read(object_location("s3://one/x.tar"), 0, 64)) == replaced
    assert bytes(read_file("s3://one/x.tar")) == replaced


def test_a_page_of_the_wrong_size_is_none(tmp_path: Path) -> None:
    cache = PageCache(tmp_path, 1 << 20)
    cache.put(("a",), memoryview(b"hello"))
    [path] = files(tmp_path)
    path.write_bytes(b"hell")
    assert cache.get(("a",), 5) is None
    assert files(tmp_path) == []


def test_it_stays_within_its_bound_and_drops_what_was_read_least_recently(tmp_path: Path) -> None:
    cache = PageCache(tmp_path, 100 * 1000)
    cache.put((0,), memoryview(bytes(1000)))
    for number in range(1, 400):
        cache.put((number,), memoryview(bytes(1000)))
        os.utime(cache._path((number,)), (number, number))
        os.utime(cache._path((0,)), (0, 0))
        assert cache.get((0,), 1000) is not None  # which makes it the latest again
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 100 * 1000
    assert cache.get((399,), 1000) is not None
    assert cache.get((200,), 1000) is None


def test_nothing_is_kept_with_a_bound_of_zero(tmp_path: Path) -> None:
    cache = PageCache(tmp_path / "none", 0)
    assert bytes(cache.put(("a",), memoryview(b"hello"))) == b"hello"
    assert cache.get(("a",), 5) is None
    assert not (tmp_path / "none").exists()


def test_what_killed_writers_left_goes_after_an_hour(tmp_path: Path) -> None:
    cache = PageCache(tmp_path, 1000)
    cache.put(("a",), memoryview(b"hello"))
    [page] = files(tmp_path)
    old, new = page.with_name("old-1-1.part"), page.with_name("new-1-1.part")
    for path in (old, new):
        path.write_bytes(b"half")
    hours_ago = time.time() - cache_module.STALE_SECONDS - 60
    os.utime(old, (hours_ago, hours_ago))
    PageCache(tmp_path, 1000).put(("b",), memoryview(b"hello"))
    assert not old.exists()
    assert new.exists()


def _write_pages(folder: Path) -> None:
    cache = PageCache(folder, 64 * PAGE)
    number = 0
    while True:
        cache.put((number % 200,), memoryview(bytes([number % 200]) * PAGE))
        number += 1


@pytest.mark.slow
def test_writers_that_are_killed_leave_whole_pages_only(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for delay in range(12):
        writers = [context.Process(target=_write_pages, args=(tmp_path,)) for _ in range(3)]
        for writer in writers:
            writer.start()
        time.sleep(0.05 + 0.02 * delay)
        for writer in writers:
            assert writer.pid is not None
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        cache = PageCache(tmp_path, 64 * PAGE)
        found = [cache.get((number,), PAGE) for number in range(200)]
        assert any(found)
        for number, page in enumerate(found):
            assert page is None or bytes(page) == bytes([number]) * PAGE
        pages = [path for path in files(tmp_path) if path.suffix == ".page"]
        assert all(path.stat().st_size == PAGE for path in pages)
        assert len(pages) <= 64 + 4


def test_neighbouring_pages_are_one_request_up_to_its_bound(store: Any, use_store: Any) -> None:
    data = os.urandom(40 * PAGE + 100)
    store.store("corpora/x.tar", data)
    use_store(store.environment, S3_REQUEST_MB=8 * PAGE / (1 << 20))
    ranges, x = RemoteRanges(StorageSettings.from_environment()), object_location("s3://corpora/x.tar")
    ranges.ask([ByteRange(x, 3 * PAGE + 5, 2 * PAGE), ByteRange(x, 6 * PAGE, 10), ByteRange(x, 20 * PAGE, 12 * PAGE)])
    for offset, size in ((3 * PAGE + 5, 2 * PAGE), (6 * PAGE, 10), (20 * PAGE, 12 * PAGE), (39 * PAGE, 3 * PAGE)):
        assert bytes(ranges.read(x, offset, size)) == data[offset : offset + size]
    spans = sorted(tuple(map(int, span.removeprefix("bytes=").split("-"))) for span in store.ranges(".tar"))
    assert [(first // PAGE, -(-last // PAGE)) for first, last in spans] == [(3, 7), (20, 28), (28, 32), (39, 41)]
    before = storage_counts()
    assert bytes(ranges.read(x, 3 * PAGE, PAGE)) == data[3 * PAGE : 4 * PAGE]
    assert (storage_counts() - before).requests == 0


def test_a_request_that_failed_is_sent_again_for_each_of_its_pages(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(2 * PAGE)
    store.store("corpora/x.tar", data)
    ranges, x = RemoteRanges(StorageSettings.from_environment()), object_location("s3://corpora/x.tar")
    with monkeypatch.context() as broken:
        for name in ("first", "range"):
            broken.setattr(ObjectClient, name, lambda *_: (_ for _ in ()).throw(StorageError("no answer")))
        with pytest.raises(StorageError, match="no answer"):
            ranges.read(x, 0, 2 * PAGE)
    assert bytes(ranges.read(x, PAGE, PAGE)) == data[PAGE:]


def test_memory_without_a_cache_is_bounded(store: Any, use_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(64 * PAGE)
    store.store("corpora/x.tar", data)
    use_store(store.environment, CACHE_GB=0)
    monkeypatch.setattr("triweave.data_pipeline.storage.objects.HELD_BYTES", 8 * PAGE)
    ranges, x = RemoteRanges(StorageSettings.from_environment()), object_location("s3://corpora/x.tar")
    for _ in range(2):
        for number in range(0, 64, 4):
            span = slice(number * PAGE, (number + 4) * PAGE)
            assert bytes(ranges.read(x, span.start, 4 * PAGE)) == data[span]
            assert ranges._held_bytes <= 8 * PAGE
            assert ranges._held_bytes == sum(len(view) for view in ranges._held.values())
    assert ranges._coming == {}
