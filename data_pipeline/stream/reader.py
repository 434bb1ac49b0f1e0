"""Read samples by byte range, from memory-mapped tars or an object store, checking xxh3 on every read."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Iterable

import xxhash

from triweave.data_pipeline.storage.client import ChangedObjectError
from triweave.data_pipeline.storage.counters import count
from triweave.data_pipeline.storage.files import CHECKED_READS
from triweave.data_pipeline.storage.location import is_remote, object_location
from triweave.data_pipeline.storage.objects import ByteRange, RemoteRanges
from triweave.data_pipeline.storage.settings import StorageSettings

MAPS_KEPT = 256


class CorruptSampleError(Exception):
    """A sample cannot be used as planned; the loader puts a filler in its place. Not for the user.

    sample: number of the damaged sample in its shard, where it is not the one the piece is from.
    """

    def __init__(self, reason: str, sample: int | None = None) -> None:
        super().__init__(reason)
        self.sample = sample


class ShardReader:
    """Maps tars when they are first read and keeps the MAPS_KEPT latest; those of an object store it reads by range.

    Shards do not change once their manifest is written; cutting a tar while it is mapped kills the reading process
    (SIGBUS), as with every memory-mapped format. A tar that was cut before is noticed like any other damage.
    """

    def __init__(self) -> None:
        self._maps: OrderedDict[str, memoryview] = OrderedDict()
        self._remote: RemoteRanges | None = None

    def read(self, tar: str, offset: int, size: int, xxh3: int) -> memoryview:
        """Return bytes [offset, offset + size) of a tar, without copying them where it is local.

        Raises CorruptSampleError where the tar is missing or shorter, or where the bytes do not hash to `xxh3`;
        StorageError where an object store does not answer: its samples are not damaged, so they become no fillers.
        """
        view = self._maps.get(tar)
        if view is None:
            if is_remote(tar):
                return self._read_object(tar, offset, size, xxh3)
            view = self._map(tar)
        sample = view[offset : offset + size]
        if len(sample) != size:
            raise CorruptSampleError(f"the tar ends at byte {len(view)}, the sample at {offset + size}")
        if xxhash.xxh3_64_intdigest(sample) != xxh3:
            raise CorruptSampleError("the bytes differ from what was built (xxh3)")
        return sample

    def ask(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Send for (tar, offset, size) that will be read soon; does nothing for local tars. Raises StorageError."""
        remote = [ByteRange(object_location(tar), offset, size) for tar, offset, size in ranges if is_remote(tar)]
        if remote:
            self._ranges.ask(remote)

    def _read_object(self, tar: str, offset: int, size: int, xxh3: int) -> memoryview:
        """Return a sample of a remote tar; what fails its checksum is read from the store again, past the cache."""
        location = object_location(tar)
        for _ in range(CHECKED_READS):
            try:
                sample = self._ranges.read(location, offset, size)
                if len(sample) == size and xxhash.xxh3_64_intdigest(sample) == xxh3:
                    return sample
                count("failed_checks")
            except FileNotFoundError:
                raise CorruptSampleError("the tar is missing") from None
            except ChangedObjectError:
                sample = memoryview(b"")
            self._ranges.forget(location, offset, size)
        if len(sample) != size:
            held = self._ranges.size(location)
            raise CorruptSampleError(f"the tar ends at byte {held}, the sample at {offset + size}")
        raise CorruptSampleError(f"the bytes differ from what was built (xxh3), {CHECKED_READS} times")

    @property
    def _ranges(self) -> RemoteRanges:
        if self._remote is None:
            self._remote = RemoteRanges(StorageSettings.from_environment())
        return self._remote

    def _map(self, tar: str) -> memoryview:
        try:
            with open(tar, "rb") as file:
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError:
            raise CorruptSampleError("the tar is missing") from None
        except (OSError, ValueError) as error:
            raise CorruptSampleError(f"the tar cannot be read: {error}") from None
        # Views handed out keep their map alive, so dropping one here never takes bytes from under a decoder.
        while len(self._maps) >= MAPS_KEPT:
            self._maps.popitem(last=False)
        self._maps[tar] = view
        return view
