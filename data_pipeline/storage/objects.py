"""Byte ranges of remote objects, by way of the local cache: pages, read together where they are neighbours.

    range -> pages it lies in -> this process's maps, a request under way, the cache on disk, or a request

A page is TRIWEAVE_S3_PAGE_KB of an object from a multiple of that on. Pages that are missing and follow each other are
one request, up to TRIWEAVE_S3_REQUEST_MB. `ask` sends what will be needed without waiting for it.

All that is read of an object is of one version. Where the cache may have some of it, the store is asked for the version
first; else the first answer with bytes says it.
"""

from __future__ import annotations

import mmap
import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple, TypeVar

from triweave.data_pipeline.storage.cache import Identity, PageCache
from triweave.data_pipeline.storage.client import ChangedObjectError, ObjectClient, ObjectInfo, client_of
from triweave.data_pipeline.storage.counters import count
from triweave.data_pipeline.storage.location import ObjectLocation
from triweave.data_pipeline.storage.settings import StorageSettings
from triweave.data_pipeline.storage.side_by_side import RequestThreads

HELD_MAPS = 4096
"""Maps of the cache's files that a process holds on to."""
HELD_BYTES = 256 << 20
"""Pages a process holds on to where they are in no file: without a cache, or with a full disk."""

Page = tuple[ObjectLocation, int]
Result = TypeVar("Result")


class ByteRange(NamedTuple):
    """Bytes [offset, offset + size) of an object."""

    location: ObjectLocation
    offset: int
    size: int


class RemoteRanges:
    """Reads ranges of objects for one process. Not for several threads at once."""

    def __init__(self, settings: StorageSettings) -> None:
        self.settings = settings
        self.cache = PageCache(settings.cache_dir, settings.cache_bytes)
        self._infos: dict[ObjectLocation, ObjectInfo] = {}
        self._clients: dict[str, ObjectClient] = {}
        self._held: OrderedDict[Page, memoryview] = OrderedDict()
        self._held_bytes = 0
        self._coming: dict[Page, Future[dict[int, memoryview]]] = {}
        self._pool = RequestThreads(settings.connections)

    def size(self, location: ObjectLocation) -> int:
        """Return the size of an object. Raises FileNotFoundError and StorageError."""
        return self._info(location).size

    def ask(self, ranges: Iterable[ByteRange]) -> None:
        """Send for ranges that will be read soon; failures show when they are read."""
        wanted: dict[ObjectLocation, set[int]] = defaultdict(set)
        for location, offset, size in ranges:
            wanted[location].update(self._pages_of(offset, size))
        noted = [location for location in wanted if self._is_noted(location)]
        asked = [self._pool.submit(partial(self._client(location).info, location.key)) for location in noted]
        for location, info in zip(noted, asked, strict=True):
            try:
                self._infos[location] = self._wait(info)
            except FileNotFoundError:  # told to who reads it
                del wanted[location]
        for location, pages in wanted.items():
            self._send(location, sorted(pages))

    def read(self, location: ObjectLocation, offset: int, size: int) -> memoryview:
        """Return bytes [offset, offset + size), fewer where the object ends.

        Raises FileNotFoundError, StorageError, and ChangedObjectError where the object was replaced.
        """
        end = min(offset + size, self._size_when_sent(location, self._pages_of(offset, size)))
        if end <= offset:
            return memoryview(b"")
        pages = self._pages_of(offset, end - offset)
        self._send(location, pages)
        parts = [self._page(location, number) for number in pages]
        first = pages[0] * self.settings.page_bytes
        if len(parts) == 1:
            return parts[0][offset - first : end - first]
        return memoryview(b"".join(parts))[offset - first : end - first]

    def forget(self, location: ObjectLocation, offset: int, size: int) -> None:
        """Drop what is known of a range and of its object, so that the next read asks the store."""
        info = self._infos.pop(location, None)
        for number in self._pages_of(offset, size):
            self._drop((location, number))
            self._coming.pop((location, number), None)
            if info is not None:
                self.cache.forget(self._identity(location, info, number))

    def close(self) -> None:
        """End the threads; what is under way is given up."""
        self._pool.close()

    def _client(self, location: ObjectLocation) -> ObjectClient:
        client = self._clients.get(location.bucket)
        if client is None:
            client = self._clients[location.bucket] = client_of(location.bucket)
        return client

    def _size_when_sent(self, location: ObjectLocation, pages: list[int]) -> int:
        """Return the size of an object; where its version is unknown, from the answer with the first of the pages."""
        if location not in self._infos and not self._is_noted(location):
            self._send(location, pages)
            coming = self._coming.get((location, pages[0]))
            if coming is not None:
                self._result(coming)
        return self._info(location).size

    def _is_noted(self, location: ObjectLocation) -> bool:
        """Return whether an object whose version is unknown here may have pages in the cache."""
        return location not in self._infos and self.cache.noted(self._client(location).name(location.key))

    def _info(self, location: ObjectLocation) -> ObjectInfo:
        info = self._infos.get(location)
        if info is None:
            info = self._infos[location] = self._client(location).info(location.key)
        return info

    def _pages_of(self, offset: int, size: int) -> list[int]:
        page = self.settings.page_bytes
        return list(range(offset // page, (offset + max(size, 1) - 1) // page + 1))

    def _page(self, location: ObjectLocation, number: int) -> memoryview:
        page = (location, number)
        view = self._held.get(page)
        if view is not None:
            self._held.move_to_end(page)
            return view
        coming = self._coming.pop(page, None)
        if coming is None:  # held when it was looked for, and pushed out by what came since
            self._send(location, [number])
            view = self._held.get(page)
            if view is not None:
                return view
            coming = self._coming.pop(page)
        pages = self._result(coming)
        self._hold(page, pages[number])
        return pages[number]

    def _result(self, coming: Future[dict[int, memoryview]]) -> dict[int, memoryview]:
        """Wait for a request; one that failed is sent again for whichever of its pages is read next."""
        began = time.perf_counter()
        try:
            return self._wait(coming)
        except Exception:
            self._coming = {page: other for page, other in self._coming.items() if other is not coming}
            raise
        finally:
            count("waited_s", time.perf_counter() - began)

    def _wait(self, coming: Future[Result]) -> Result:
        try:
            return coming.result()
        except KeyboardInterrupt:
            self.close()
            raise

    def _hold(self, page: Page, view: memoryview) -> None:
        while self._held and (len(self._held) >= HELD_MAPS or self._held_bytes >= HELD_BYTES):
            self._drop(next(iter(self._held)))
        self._held[page] = view
        self._held_bytes += _memory_of(view)

    def _drop(self, page: Page) -> None:
        view = self._held.pop(page, None)
        if view is not None:
            self._held_bytes -= _memory_of(view)

    def _send(self, location: ObjectLocation, numbers: Iterable[int]) -> None:
        """Have the pages held or under way: map those that are on disk, ask for the others."""
        info = self._infos.get(location)
        client = self._client(location)
        missing = []
        for number in numbers:
            page = (location, number)
            if page in self._held or page in self._coming:
                continue
            view = None
            if info is not None:
                start, end = self._bounds(info, number)
                if end <= start:
                    continue
                view = self.cache.get(self._identity(location, info, number), end - start)
            if view is None:
                missing.append(number)
            else:
                count("cache_hits")
                self._hold(page, view)
        for run in _runs(missing, max(1, self.settings.request_bytes // self.settings.page_bytes)):
            count("cache_misses", len(run))
            future = self._pool.submit(partial(self._fetch, client, location, info, run))
            self._coming.update(((location, number), future) for number in run)

    def _fetch(
        self, client: ObjectClient, location: ObjectLocation, info: ObjectInfo | None, run: list[int]
    ) -> dict[int, memoryview]:
        """Read neighbouring pages in one request and keep them on disk; in a thread of the pool.

        info: None where no answer has told the version yet; of several such answers all must tell the same.
        """
        start, end = run[0] * self.settings.page_bytes, (run[-1] + 1) * self.settings.page_bytes
        if info is None:
            info, data = client.first(location.key, start, end)
            if self._infos.setdefault(location, info) != info:
                raise ChangedObjectError(location.key)
            self.cache.note(client.name(location.key))
        else:
            data = client.range(location.key, start, min(end, info.size), info)
        pages = {}
        for number in run:
            first, last = self._bounds(info, number)
            part = data[first - start : max(0, last - start)]
            if not part:  # behind the end
                pages[number] = part
                continue
            kept = self.cache.put(self._identity(location, info, number), part)
            # A slice would keep all of its request alive, where there is no file to map instead.
            pages[number] = memoryview(bytes(part)) if kept is part and len(run) > 1 else kept
        return pages

    def _bounds(self, info: ObjectInfo, number: int) -> tuple[int, int]:
        start = number * self.settings.page_bytes
        return start, min(start + self.settings.page_bytes, info.size)

    def _identity(self, location: ObjectLocation, info: ObjectInfo, number: int) -> Identity:
        return *self._client(location).identity(location.key, info), *self._bounds(info, number)


def _memory_of(view: memoryview) -> int:
    return 0 if isinstance(view.obj, mmap.mmap) else len(view)


def _runs(numbers: list[int], longest: int) -> Iterator[list[int]]:
    """Yield runs of consecutive numbers, each of at most `longest`."""
    run: list[int] = []
    for number in numbers:
        if run and (number != run[-1] + 1 or len(run) == longest):
            yield run
            run = []
        run.append(number)
    if run:
        yield run
