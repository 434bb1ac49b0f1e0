"""Whole files of shard folders, wherever they lie: the one way to read an index, a sidecar, a ledger or a manifest.

Samples are read by `stream.reader.ShardReader`, which takes the same locations.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path

import xxhash

from triweave.data_pipeline.errors import StorageError
from triweave.data_pipeline.storage.cache import PageCache
from triweave.data_pipeline.storage.client import ChangedObjectError, ObjectClient, ObjectInfo, client_of
from triweave.data_pipeline.storage.counters import count
from triweave.data_pipeline.storage.location import ObjectLocation, is_remote, object_location
from triweave.data_pipeline.storage.settings import StorageSettings

MOST_BYTES = 2 << 30
"""Largest file that is read whole: an index, sidecar, ledger or manifest beyond it is not one of ours."""
_WHOLE = "whole"
CHECKED_READS = 3
"""Times that something is read from the store before its damage counts as damage of the object."""


def read_file(path: Path | str, xxh3: str = "") -> bytes | memoryview:
    """Return the bytes of a file.

    xxh3: xxh3_64 in hex that they must have, where the caller knows it. A remote file with another one (or another than
    its own metadata says) is read again, CHECKED_READS times in all, and then returned as it is: the caller says what
    is damaged. Local files are not checked here.

    Raises FileNotFoundError, OSError for local files, and StorageError.
    """
    if not is_remote(path):
        return Path(path).read_bytes()
    location = object_location(path)
    client, settings = client_of(location.bucket), StorageSettings.from_environment()
    cache = PageCache(settings.cache_dir, settings.cache_bytes)
    data: bytes | memoryview = b""
    for attempt in range(CHECKED_READS):
        held = _held(cache, client, location) if attempt == 0 else None
        count("cache_misses" if held is None else "cache_hits")
        try:
            info, data = held or _whole(client, location, settings)
        except ChangedObjectError:
            continue
        identity = (*client.identity(location.key, info), _WHOLE)
        expected = xxh3 or info.xxh3
        if not expected or xxhash.xxh3_64_hexdigest(data) == expected:
            if held is None and info.size:
                cache.put(identity, memoryview(data))
                cache.note(client.name(location.key))
            return data
        cache.forget(identity)
        count("failed_checks")
    return data


def read_range(path: Path | str, offset: int, size: int) -> bytes | memoryview:
    """Return bytes [offset, offset + size) of a file, fewer where it ends. Raises as `read_file`."""
    if not is_remote(path):
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    location = object_location(path)
    client, settings = client_of(location.bucket), StorageSettings.from_environment()
    with _unchanging(location):
        return b"".join(_pieces(client, location, offset, offset + size, settings)[1])


def file_size(path: Path | str) -> int | None:
    """Return the size of a file, None where there is none. Raises StorageError."""
    if is_remote(path):
        location = object_location(path)
        try:
            return client_of(location.bucket).info(location.key).size
        except FileNotFoundError:
            return None
    return Path(path).stat().st_size if Path(path).is_file() else None


def file_names(folder: Path | str) -> dict[str, int]:
    """Return name -> size of the files right in a folder. Raises StorageError."""
    if is_remote(folder):
        location = object_location(folder)
        return client_of(location.bucket).names(location.key)
    return {path.name: path.stat().st_size for path in Path(folder).iterdir() if path.is_file()}


@contextmanager
def local_files(folder: Path | str, names: list[str]) -> Iterator[Path]:
    """Yield a local folder that holds the named files of `folder`: itself, or copies that are gone afterwards.

    A file that is not there is not there either. For what reads files from end to end; copies are not kept in the
    cache, which is for what is read again. Raises StorageError, also where they find no room.
    """
    if not is_remote(folder):
        yield Path(folder)
        return
    settings = StorageSettings.from_environment()
    with ExitStack() as until_done:
        try:
            settings.cache_dir.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.TemporaryDirectory(prefix="copies-", dir=settings.cache_dir)
            copies = Path(until_done.enter_context(temporary))
            for name in names:
                _copy(object_location(folder).child(name), copies / name, settings)
        except OSError as error:
            raise StorageError(
                f"{settings.cache_dir}: cannot hold copies of {object_location(folder)} ({error.strerror}); make room, "
                "or set TRIWEAVE_CACHE_DIR to another folder"
            ) from None
        yield copies


def _copy(location: ObjectLocation, path: Path, settings: StorageSettings) -> None:
    client = client_of(location.bucket)
    for _ in range(CHECKED_READS):
        digest = xxhash.xxh3_64()
        with _unchanging(location), open(path, "wb") as file:
            try:
                info, pieces = _pieces(client, location, 0, sys.maxsize, settings)
            except FileNotFoundError:
                os.unlink(path)
                return
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
        if info.xxh3 in ("", digest.hexdigest()):
            return
        count("failed_checks")


def _held(cache: PageCache, client: ObjectClient, location: ObjectLocation) -> tuple[ObjectInfo, memoryview] | None:
    """Return a file of the version that the store has now as the cache holds it, None where it does not."""
    if not cache.noted(client.name(location.key)):
        return None
    info = client.info(location.key)
    data = cache.get((*client.identity(location.key, info), _WHOLE), info.size)
    return None if data is None else (info, data)


def _whole(client: ObjectClient, location: ObjectLocation, settings: StorageSettings) -> tuple[ObjectInfo, bytes]:
    info, pieces = _pieces(client, location, 0, MOST_BYTES, settings)
    if info.size > MOST_BYTES:
        raise StorageError(f"{location}: {info.size} bytes, more than the {MOST_BYTES} that are read whole")
    return info, b"".join(pieces)


def _pieces(
    client: ObjectClient, location: ObjectLocation, start: int, end: int, settings: StorageSettings
) -> tuple[ObjectInfo, Iterator[memoryview]]:
    """Return the identity of an object and the pieces of its bytes [start, end), fewer where it ends.

    The first answer gives the identity; the other pieces are read when they are taken, of the same version.
    """
    request = settings.request_bytes
    info, first = client.first(location.key, start, min(end, start + request))
    end = min(end, info.size)
    rest = (
        client.range(location.key, begin, min(end, begin + request), info)
        for begin in range(start + len(first), end, request)
    )
    return info, chain([first], rest)


@contextmanager
def _unchanging(location: ObjectLocation) -> Iterator[None]:
    try:
        yield
    except ChangedObjectError:
        raise StorageError(f"{location}: was replaced while it was read; run the same command again") from None
