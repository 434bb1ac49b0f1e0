"""One bucket of an object store: exact reads, whole writes, retries with back-off until a deadline, and plain errors.

obstore signs, connects and pools; its own retries are off, so that every one is counted and bounded here. A process has
one client for each bucket; a forked child cannot use its parent's, for its threads are not forked with it.
"""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from triweave.data_pipeline.errors import StorageError
from triweave.data_pipeline.storage.counters import count
from triweave.data_pipeline.storage.credentials import store_options
from triweave.data_pipeline.storage.location import ObjectLocation
from triweave.data_pipeline.storage.settings import StorageSettings

if TYPE_CHECKING:
    from obstore.store import S3Store

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.1, 5.0
XXH3_ATTRIBUTE = "xxh3"
"""User metadata of the objects that `triweave push` writes: xxh3_64 of their bytes in hex."""
UPLOAD_PART_BYTES = 16 << 20
_STATUS = re.compile(r"status code: (\d+ [A-Za-z ]+)")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_INSTANCE_ROLE = "169.254.169.254"
_this_thread = threading.local()
Result = TypeVar("Result")


class ChangedObjectError(Exception):
    """An object is no longer the one that was asked about. Not for the user."""


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """What tells an object from every other of its name. xxh3: of its bytes, where its writer said it; else empty."""

    size: int
    etag: str
    modified: str
    xxh3: str = ""


class ObjectClient:
    """Reads and writes the objects of one bucket."""

    def __init__(self, bucket: str, settings: StorageSettings) -> None:
        """Connect to nothing yet. Raises StorageError where the variables or the profile cannot be used."""
        from obstore.store import S3Store

        options = store_options(os.environ)
        self.bucket = bucket
        self.endpoint = options.get("endpoint", "")
        self.settings = settings
        self._process = os.getpid()
        self._waits = random.Random()  # jitter; changes when, never what
        try:
            self._store: S3Store = S3Store(
                bucket,
                client_options={
                    "allow_http": self.endpoint.startswith("http://"),
                    "connect_timeout": timedelta(seconds=min(CONNECT_SECONDS, settings.timeout_s)),
                    "read_timeout": timedelta(seconds=settings.timeout_s),
                    "timeout": timedelta(seconds=settings.deadline_s),
                },
                retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=settings.deadline_s)},
                **options,  # type: ignore[arg-type]
            )
        except Exception as error:  # obstore names an unusable endpoint or region in one of several kinds
            reason = _reason(error)
            raise StorageError(f"s3://{bucket}: cannot be opened ({reason}); {_advice(reason)}") from None

    def name(self, key: str) -> tuple[str, ...]:
        """Return what names an object among those of all stores."""
        return self.endpoint, self.bucket, key

    def identity(self, key: str, info: ObjectInfo) -> tuple[str | int, ...]:
        """Return what tells a version of an object from all others."""
        return *self.name(key), info.etag, info.size, info.modified

    def info(self, key: str) -> ObjectInfo:
        """Return the identity of an object. Raises FileNotFoundError and StorageError."""
        import obstore

        def ask() -> ObjectInfo:
            result = obstore.get(self._store, key, options={"head": True})
            return _info(result.meta, result.attributes)

        return self._repeat("read", key, ask)

    def first(self, key: str, start: int, end: int) -> tuple[ObjectInfo, memoryview]:
        """Return the identity of an object and its bytes [start, end), of one answer; fewer bytes where it ends.

        Raises FileNotFoundError and StorageError.
        """
        import obstore

        def ask() -> tuple[ObjectInfo, memoryview] | None:
            try:
                result = obstore.get(self._store, key, options={"range": (start, end)})
            except obstore.exceptions.GenericError as error:
                if _reason(error).startswith("416"):  # it ends before `start`, or is empty
                    return None
                raise
            info, data = _info(result.meta, result.attributes), memoryview(result.bytes())
            _check_length(data, min(end, info.size) - start)
            return info, data

        return self._repeat("read", key, ask) or (self.info(key), memoryview(b""))

    def range(self, key: str, start: int, end: int, info: ObjectInfo) -> memoryview:
        """Return bytes [start, end) of the object that `info` is of.

        Raises ChangedObjectError where another object has its name by now, FileNotFoundError and StorageError.
        """
        import obstore

        def ask() -> memoryview:
            options = {"range": (start, end)} | ({"if_match": info.etag} if info.etag else {})
            result = obstore.get(self._store, key, options=options)  # type: ignore[arg-type]
            if result.meta["size"] != info.size:
                raise ChangedObjectError(key)
            data = memoryview(result.bytes())
            _check_length(data, end - start)
            return data

        return self._repeat("read", key, ask)

    def put(
        self, key: str, content: Path | bytes | memoryview, xxh3: str, mode: Literal["overwrite", "create"]
    ) -> None:
        """Write an object whole. `create` raises FileExistsError where there is one; then the object is untouched.

        xxh3: xxh3_64 of the content to keep as its metadata; empty where readers know what it must be.
        """
        import obstore

        def write() -> None:
            attributes = {XXH3_ATTRIBUTE: xxh3} if xxh3 else {}
            parts = {} if mode == "create" else {"chunk_size": UPLOAD_PART_BYTES, "max_concurrency": 4}
            obstore.put(self._store, key, content, attributes=attributes, mode=mode, **parts)  # type: ignore[arg-type]

        self._repeat("written", key, write)

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        import obstore

        self._repeat("removed", key, lambda: obstore.delete(self._store, key))

    def names(self, prefix: str) -> dict[str, int]:
        """Return the names right below a prefix and their sizes."""
        import obstore

        def ask() -> dict[str, int]:
            found = obstore.list_with_delimiter(self._store, prefix)["objects"]
            return {item["path"].rpartition("/")[2]: item["size"] for item in found}

        return self._repeat("listed", prefix, ask)

    def folders(self, prefix: str) -> list[str]:
        """Return the names of the prefixes right below a prefix."""
        import obstore

        def ask() -> list[str]:
            found = obstore.list_with_delimiter(self._store, prefix)["common_prefixes"]
            return [name.rstrip("/").rpartition("/")[2] for name in found]

        return self._repeat("listed", prefix, ask)

    def signed_url(self, key: str, seconds: float) -> str:
        """Return a URL by which anyone may read an object for a while; for readers that know HTTP alone."""
        import obstore

        return obstore.sign(self._store, "GET", key, timedelta(seconds=seconds))

    def _repeat(self, done: str, key: str, request: Callable[[], Result]) -> Result:
        """Return what `request` returns, sending it again with growing waits until the deadline.

        done: what could not be done, as the error says it. Failures that no repetition ends are raised at once.
        """
        from obstore import exceptions

        assert os.getpid() == self._process, "a forked child needs a client of its own: see stream/transport.py"
        refusals = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        location = ObjectLocation(bucket=self.bucket, key=key)
        deadline = time.monotonic() + self.settings.deadline_s
        attempt = 0
        while True:
            count("requests")
            try:
                return request()
            except ChangedObjectError:
                raise
            except FileNotFoundError as error:
                if _code(error) != "NoSuchBucket":
                    raise
                raise self._no_such_bucket() from None
            except exceptions.PreconditionError:
                raise ChangedObjectError(key) from None
            except exceptions.AlreadyExistsError:
                raise FileExistsError(str(location)) from None
            except (exceptions.BaseError, OSError) as error:
                reason = _reason(error)
                if _code(error) == "NoSuchBucket":  # of listings obstore tells by the answer alone
                    raise self._no_such_bucket() from None
                if isinstance(error, refusals) or reason.startswith(("401", "403")):
                    raise StorageError(
                        f"{location}: the store refuses ({reason}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY "
                        "or AWS_PROFILE, and what they may do"
                    ) from None
            wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**attempt) * self._waits.uniform(0.5, 1)
            left = deadline - time.monotonic() - wait
            if left <= 0:
                raise StorageError(
                    f"{location}: could not be {done} within {self.settings.deadline_s:g} s, {attempt + 1} attempts "
                    f"({reason}); {_advice(reason)}"
                )
            attempt += 1
            count("retries")
            log = logger.warning if attempt >= 3 else logger.info
            log("%s: not %s yet, attempt %d (%s); trying for another %.0f s", location, done, attempt, reason, left)
            _wait(wait, location)

    def _no_such_bucket(self) -> StorageError:
        where = self.endpoint or "AWS"
        return StorageError(
            f"s3://{self.bucket}: {where} has no such bucket; make it, or check its name and AWS_ENDPOINT_URL"
        )


def repeat_until(given_up: threading.Event) -> None:
    """Have the requests of the calling thread be repeated no more once the event is set."""
    _this_thread.given_up = given_up


def client_of(bucket: str) -> ObjectClient:
    """Return this process's client of a bucket, with the settings and the store of the environment as it is now."""
    return _client(os.getpid(), bucket, StorageSettings.from_environment(), tuple(store_options(os.environ).items()))


def used_in_this_process() -> bool:
    """Return whether a client has been made here, so that a forked child could not make one."""
    return _client.cache_info().currsize > 0


def forget_clients() -> None:
    """Drop this process's clients; its children may be forked again, and use none of what is held elsewhere."""
    _client.cache_clear()


@lru_cache(maxsize=16)
def _client(process: int, bucket: str, settings: StorageSettings, options: tuple[tuple[str, str], ...]) -> ObjectClient:
    del process, options  # part of what it is kept for
    return ObjectClient(bucket, settings)


def _wait(seconds: float, location: ObjectLocation) -> None:
    given_up: threading.Event | None = getattr(_this_thread, "given_up", None)
    if given_up is None:
        time.sleep(seconds)
    elif given_up.wait(seconds):
        raise StorageError(f"{location}: reading it was given up")


def _check_length(data: memoryview, expected: int) -> None:
    """Count the bytes that came. Raises ConnectionError where they are fewer than the answer must have."""
    if len(data) != expected:
        raise ConnectionError(f"{len(data)} of {expected} bytes came")
    count("read_bytes", len(data))


def _info(meta: object, attributes: object) -> ObjectInfo:
    entries: dict[str, object] = dict(meta)  # type: ignore[call-overload]
    given: dict[str, object] = dict(attributes)  # type: ignore[call-overload]
    size = entries["size"]
    assert isinstance(size, int)
    return ObjectInfo(
        size=size,
        etag=str(entries["e_tag"] or ""),
        modified=str(entries["last_modified"]),
        xxh3=str(given.get(XXH3_ATTRIBUTE, "")),
    )


def _reason(error: Exception) -> str:
    """Return why a request failed, in a few words: status and code of the answer, else the first line.

    The rest of an answer may quote what was signed; it stays out of messages and logs.
    """
    text = str(error)
    if _INSTANCE_ROLE in text:
        return "no credentials in the environment, and no instance role answers"
    status, code = _STATUS.search(text), _code(error)
    if status:
        return status[1].strip() + (f", {code}" if code else "")
    line = re.sub(r"\?\S*", "", text.splitlines()[0] if text else type(error).__name__)
    return line.rpartition(": ")[2][:160] or type(error).__name__


def _code(error: Exception) -> str:
    """Return the code that the store's answer names the failure by, empty where it names none."""
    code = _CODE.search(str(error))
    return code[1] if code else ""


def _advice(reason: str) -> str:
    if "credentials" in reason or "KeyId" in reason or "AccessKey" in reason:
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    return "check AWS_ENDPOINT_URL and the network, or raise TRIWEAVE_S3_DEADLINE_S"
