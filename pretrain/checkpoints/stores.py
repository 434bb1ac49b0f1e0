"""Where checkpoints lie: a folder that all ranks share, or a prefix of an object store. One set of verbs for both.

    begin     make place for a checkpoint (rank 0)
    write     one whole file of it (any rank), durable when the call returns
    commit    its manifest, by the one act that makes it visible (rank 0)
    discard   out of sight by one act, then gone
    sweep     remove what killed writers left behind

    folder    ROOT/.writing-step-0000010-TOKEN/...  becomes  ROOT/step-0000010/  by a rename
    prefix    ROOT/step-0000010/TOKEN-...           counts once step-0000010/manifest.json is there: a conditional put

TOKEN is drawn anew for every save, so a writer that was thought dead cannot touch what a later one writes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from abc import ABC, abstractmethod
from pathlib import Path

from triweave.data_pipeline.storage.client import ObjectClient, ObjectInfo, client_of
from triweave.data_pipeline.storage.files import file_size, read_file
from triweave.data_pipeline.storage.location import is_remote, object_location
from triweave.pretrain.errors import CheckpointError

MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step-(\d{7,})")
WRITE_BYTES = 8 << 20
"""Bytes of one write to a local disk."""


def step_name(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:07d}"


def open_store(root: str | Path) -> Store:
    """Return the store of a folder or of s3://bucket/prefix; looks at nothing yet."""
    return PrefixStore(Path(root)) if is_remote(root) else FolderStore(Path(root))


class Store(ABC):
    """The checkpoints below one root. Raises CheckpointError, StorageError and OSError."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or would be."""
        return self.root / step_name(step)

    @abstractmethod
    def steps(self) -> list[int]:
        """Return the steps of complete checkpoints, ascending; those being written are not among them."""

    @abstractmethod
    def begin(self, step: int, token: str) -> None:
        """Make place for a checkpoint; an overtaken one of the same step is discarded."""

    @abstractmethod
    def write(self, step: int, token: str, name: str, data: memoryview, size: int) -> str:
        """Write the first `size` bytes of `data` (which is whole pages), and return the file's name in its folder."""

    @abstractmethod
    def commit(self, step: int, token: str, manifest: bytes) -> None:
        """Make the checkpoint visible."""

    @abstractmethod
    def discard(self, step: int) -> None:
        """Remove a checkpoint."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove what belongs to no complete checkpoint; no save may be under way."""


class FolderStore(Store):
    """Checkpoints in a folder on storage that all ranks share."""

    def steps(self) -> list[int]:
        found = (STEP_NAME.fullmatch(path.name) for path in self.root.glob("step-*") if (path / MANIFEST).is_file())
        return sorted(int(match[1]) for match in found if match)

    def begin(self, step: int, token: str) -> None:
        self.sweep()
        self._working(step, token).mkdir(parents=True)

    def write(self, step: int, token: str, name: str, data: memoryview, size: int) -> str:
        path = self._working(step, token) / name
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # made before the flag was refused
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        try:
            _write_all(descriptor, data)
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return name

    def commit(self, step: int, token: str, manifest: bytes) -> None:
        working, final = self._working(step, token), self.folder(step)
        with (working / MANIFEST).open("wb") as file:
            file.write(manifest)
            file.flush()
            os.fsync(file.fileno())
        _flush_entries(working)
        if final.exists():  # written by an attempt that a resume from an older checkpoint has overtaken
            self.discard(step)
        working.rename(final)
        _flush_entries(self.root)

    def discard(self, step: int) -> None:
        hidden = self.root / f".discarded-{step_name(step)}"
        shutil.rmtree(hidden, ignore_errors=True)
        self.folder(step).rename(hidden)
        shutil.rmtree(hidden)

    def sweep(self) -> None:
        for left in self.root.glob(".*-step-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _working(self, step: int, token: str) -> Path:
        return self.root / f".writing-{step_name(step)}-{token}"


class PrefixStore(Store):
    """Checkpoints below a prefix of an object store."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._root = object_location(root)

    @property
    def _client(self) -> ObjectClient:
        return client_of(self._root.bucket)

    def steps(self) -> list[int]:
        names = self._client.folders(self._root.key)
        found = [int(match[1]) for match in map(STEP_NAME.fullmatch, names) if match]
        return sorted(step for step in found if MANIFEST in self._client.names(self._key(step)))

    def begin(self, step: int, token: str) -> None:  # noqa: ARG002 - a prefix needs no making
        self.sweep()
        if MANIFEST in self._client.names(self._key(step)):
            self.discard(step)

    def write(self, step: int, token: str, name: str, data: memoryview, size: int) -> str:
        stored = f"{token}-{name}"
        self._client.put(self._key(step, stored), data[:size], "", "overwrite")
        return stored

    def commit(self, step: int, token: str, manifest: bytes) -> None:  # noqa: ARG002 - the manifest names the files
        key = self._key(step, MANIFEST)
        try:
            self._client.put(key, manifest, "", "create")
        except FileExistsError:  # by this very put, whose answer was lost and which was sent again
            info = self._client.info(key)
            if bytes(self._client.range(key, 0, info.size, info)) != manifest:
                raise CheckpointError(
                    f"s3://{self._root.bucket}/{key}: another run has written this checkpoint meanwhile; give each run "
                    "a checkpoint.location of its own"
                ) from None

    def discard(self, step: int) -> None:
        self._client.delete(self._key(step, MANIFEST))
        for name in self._client.names(self._key(step)):
            self._client.delete(self._key(step, name))

    def sweep(self) -> None:
        complete = set(self.steps())
        for name in self._client.folders(self._root.key):
            match = STEP_NAME.fullmatch(name)
            if match and int(match[1]) not in complete:
                self.discard(int(match[1]))

    def _key(self, step: int, name: str = "") -> str:
        folder = self._root.child(step_name(step))
        return folder.child(name).key if name else folder.key


class StoredFile:
    """Reads ranges of one file of a checkpoint, from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._info: ObjectInfo | None = None
        if is_remote(path):
            self._location = object_location(path)

    def size(self) -> int:
        """Return its bytes; raises FileNotFoundError."""
        size = file_size(self.path)
        if size is None:
            raise FileNotFoundError(str(self.path))
        return size

    def read(self, start: int, end: int) -> bytes | memoryview:
        """Return bytes [start, end), fewer where the file ends."""
        if is_remote(self.path):
            client = client_of(self._location.bucket)
            if self._info is None:
                self._info = client.info(self._location.key)
            return client.range(self._location.key, start, min(end, self._info.size), self._info)
        with open(self.path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), end - start, start)


def read_manifest(folder: Path) -> bytes:
    """Return the bytes of a checkpoint's manifest; raises FileNotFoundError, OSError and StorageError."""
    return bytes(read_file(folder / MANIFEST))


def _write_all(descriptor: int, data: memoryview) -> None:
    """Write all of `data`; without O_DIRECT where the file system takes the flag at the opening but not here."""
    place = 0
    while place < len(data):
        try:
            place += os.pwrite(descriptor, data[place : place + WRITE_BYTES], place)
        except OSError as error:
            if error.errno != errno.EINVAL or not _leave_direct(descriptor):
                raise


def _leave_direct(descriptor: int) -> bool:
    """Switch O_DIRECT off; return whether it was on."""
    import fcntl

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return bool(flags & os.O_DIRECT)


def _flush_entries(folder: Path) -> None:
    """Force a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
