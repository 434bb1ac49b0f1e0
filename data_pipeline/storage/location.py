"""Where shards lie: a folder of this machine, or `s3://bucket/prefix` of an object store.

Every place that takes a shard folder or a file of one takes either, as a string or as a Path. A Path joins the two
slashes of a URL to one, so `s3:/bucket/prefix` means the same; that way a Path to a file of a shard folder stays one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from triweave.data_pipeline.errors import StorageError

_URL = re.compile(r"s3:/{1,2}(?!/)", re.IGNORECASE)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
MAX_KEY_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class ObjectLocation:
    """An object, or the prefix of several; `key` has no slash at its ends and no empty segment."""

    bucket: str
    key: str

    def __str__(self) -> str:
        """Return the URL."""
        return f"s3://{self.bucket}/{self.key}"

    def child(self, name: str) -> ObjectLocation:
        """Return the object of that name below this prefix."""
        return ObjectLocation(bucket=self.bucket, key=f"{self.key}/{name}" if self.key else name)


def is_remote(location: Path | str) -> bool:
    """Return whether a location is in an object store."""
    return _URL.match(str(location)) is not None


def require_local(option: str, path: Path, error: type[Exception], instead: str) -> None:
    """Raise `error` for a URL where a command needs a path of this machine; `instead` says what to do."""
    if is_remote(path):
        written = _URL.sub("s3://", str(path), count=1)
        raise error(f"{option} {written}: must be on this machine; {instead}")


def shown(location: Path | str) -> str:
    """Return a location as a user writes it."""
    return str(object_location(location)) if is_remote(location) else str(location)


@lru_cache(maxsize=4096)
def object_location(url: Path | str) -> ObjectLocation:
    """Return the bucket and key of a URL. Raises StorageError where it has no bucket, or a key no store takes."""
    text = str(url)
    match = _URL.match(text)
    bucket, _, key = (text[match.end() :] if match else "").partition("/")
    if not _BUCKET.fullmatch(bucket):
        written = f"s3://{bucket}/{key}" if match else text
        raise StorageError(f"{written}: is no s3://BUCKET/PREFIX with a bucket of 3 to 63 of a-z, 0-9, dot and hyphen")
    segments = [segment for segment in key.split("/") if segment]
    if any(segment in (".", "..") for segment in segments) or len(key.encode()) > MAX_KEY_BYTES:
        raise StorageError(
            f"s3://{bucket}/{key}: its key has `.` or `..` as a segment, or more than {MAX_KEY_BYTES} bytes"
        )
    return ObjectLocation(bucket=bucket, key="/".join(segments))
