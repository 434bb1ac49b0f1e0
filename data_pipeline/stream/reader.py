"""Read samples by byte range from memory-mapped tars, checking xxh3 on every read."""

from __future__ import annotations

import mmap
from collections import OrderedDict

import xxhash

MAPS_KEPT = 256


class CorruptSampleError(Exception):
    """A sample cannot be used as planned; the loader puts a filler in its place. Not for the user.

    sample: number of the damaged sample in its shard, where it is not the one the piece is from.
    """

    def __init__(self, reason: str, sample: int | None = None) -> None:
        super().__init__(reason)
        self.sample = sample


class ShardReader:
    """Maps tars when they are first read and keeps the MAPS_KEPT latest.

    Shards do not change once their manifest is written; cutting a tar while it is mapped kills the reading process
    (SIGBUS), as with every memory-mapped format. A tar that was cut before is noticed like any other damage.
    """

    def __init__(self) -> None:
        self._maps: OrderedDict[str, memoryview] = OrderedDict()

    def read(self, tar: str, offset: int, size: int, xxh3: int) -> memoryview:
        """Return bytes [offset, offset + size) of a tar, without copying them.

        Raises CorruptSampleError where the tar is missing or shorter, or where the bytes do not hash to `xxh3`.
        """
        view = self._maps.get(tar)
        if view is None:
            view = self._map(tar)
        sample = view[offset : offset + size]
        if len(sample) != size:
            raise CorruptSampleError(f"the tar ends at byte {len(view)}, the sample at {offset + size}")
        if xxhash.xxh3_64_intdigest(sample) != xxh3:
            raise CorruptSampleError("the bytes differ from what was built (xxh3)")
        return sample

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
