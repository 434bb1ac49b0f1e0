"""A bounded folder of what was read from object stores, shared by all processes of a machine.

A page is a file of its own, named by xxh3_128 of its whole identity (store, bucket, key, etag, size, time of writing,
byte range), written beside its place and renamed into it: a reader sees all of a page or none. What is read least
recently goes first. Nothing is trusted: sizes are compared here, and every sample's checksum by who reads it. A note
tells that some version of an object was read: of others the store need not be asked which version may be here.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import xxhash

from triweave.data_pipeline.storage.counters import count

logger = logging.getLogger(__name__)

Identity = tuple[str | int, ...]
_ENDING = ".page"
_TEMPORARY = ".part"
_NOTE = memoryview(b"seen")
STALE_SECONDS = 3600
"""Age at which a half-written page is one that a killed process left."""
FILL_AFTER_EVICTION = 0.75
SHARE_BETWEEN_LOOKS = 1 / 16
"""Part of the bound that a process writes before it looks at the folder again: so four processes keep the bound, and
each further one may pass it by this part."""


class PageCache:
    """Pages on disk, at most `limit_bytes` of them; with 0 nothing is kept."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder / "pages"
        self.limit_bytes = limit_bytes
        self._unseen_bytes = limit_bytes  # what other processes left is unknown, so the first page makes us look
        self._told = False

    def get(self, identity: Identity, size: int) -> memoryview | None:
        """Return a page, mapped, or None where it is not there or not whole."""
        if not self.limit_bytes:
            return None
        path = self._path(identity)
        try:
            with open(path, "rb") as file:
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            if len(view) != size:
                path.unlink(missing_ok=True)
                return None
            os.utime(path)
        except (OSError, ValueError):  # not there, empty, or taken away just now
            return None
        return view

    def put(self, identity: Identity, data: memoryview) -> memoryview:
        """Keep a page and return it; where the disk does not take it, it is only returned."""
        if not self.limit_bytes:
            return data
        path = self._path(identity)
        temporary = path.with_name(f"{path.stem}-{os.getpid()}-{time.monotonic_ns()}{_TEMPORARY}")
        try:
            if self._unseen_bytes + len(data) > self.limit_bytes * SHARE_BETWEEN_LOOKS:
                self._evict()
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                file.write(data)
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            count("cache_failures")
            if not self._told:
                self._told = True
                logger.warning("%s does not take what was read (%s); going on without it", self.folder, error.strerror)
            return data
        self._unseen_bytes += len(data)
        return self.get(identity, len(data)) or data

    def note(self, name: Identity) -> None:
        """Remember that an object of this name was read."""
        self.put((*name, "note"), _NOTE)

    def noted(self, name: Identity) -> bool:
        """Return whether some version of an object of this name was read."""
        return self.get((*name, "note"), len(_NOTE)) is not None

    def forget(self, identity: Identity) -> None:
        """Remove a page that turned out to be damaged."""
        with suppress(OSError):
            self._path(identity).unlink(missing_ok=True)

    def _path(self, identity: Identity) -> Path:
        name = xxhash.xxh3_128_hexdigest(json.dumps(identity).encode())
        return self.folder / name[:2] / f"{name}{_ENDING}"

    def _evict(self) -> None:
        """Remove the pages that were read least recently until the folder is FILL_AFTER_EVICTION of its bound."""
        self._unseen_bytes = 0
        pages = sorted(self._pages())
        total = sum(size for _, size, _ in pages)
        if total <= self.limit_bytes * FILL_AFTER_EVICTION:
            return
        for _, size, path in pages:
            with suppress(OSError):
                os.unlink(path)
            total -= size
            if total <= self.limit_bytes * FILL_AFTER_EVICTION:
                return

    def _pages(self) -> Iterator[tuple[float, int, str]]:
        """Yield (time of last use, size, path) of every page; remove what killed processes left."""
        with suppress(OSError):
            for folder in os.scandir(self.folder):
                with suppress(OSError):
                    for entry in os.scandir(folder):
                        status = entry.stat()
                        if entry.name.endswith(_ENDING):
                            yield status.st_mtime, status.st_size, entry.path
                        elif time.time() - status.st_mtime > STALE_SECONDS:
                            os.unlink(entry.path)
