"""The work folder `OUT/.build` of a build that is not finished: one process at a time, nothing left behind."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from triweave.data_pipeline.errors import BuildError
from triweave.data_pipeline.machine import installed_versions
from triweave.data_pipeline.shards.manifest import LEDGER_NAME, MANIFEST_NAME, Manifest, write_atomically
from triweave.data_pipeline.shards.throughput import THROUGHPUT_NAME

BUILD_FOLDER = ".build"
FINGERPRINT_NAME = "build.json"
RETRIED_FOLDER = "retried"
"""Where `--retry-failed` builds, inside the work folder of the finished build."""

_LOCK_NAME = "lock"
_CODECS = ("simplejpeg", "pillow", "soundfile", "soxr", "pyarrow", "rensa", "av")


def remove_work_folder(out: Path) -> None:
    """Take `OUT/.build` out of reach, then delete it: a worker of a killed build may live a moment longer, and write.

    What cannot be deleted is no part of the finished folder; the next run tries again.
    """
    removed = out / f"{BUILD_FOLDER}-removed"
    with suppress(OSError):
        if removed.exists():
            shutil.rmtree(removed)
        if (out / BUILD_FOLDER).exists():
            (out / BUILD_FOLDER).rename(removed)
            shutil.rmtree(removed)


def refuse_other(out: Path, state: str, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = [
        f"{name} {there.get(name)!r} there, {wanted.get(name)!r} now"
        for name in dict.fromkeys([*wanted, *there])
        if there.get(name) != wanted.get(name)
    ]
    if different:
        raise BuildError(
            f"{out} holds a {state} build of something else ({'; '.join(different)}): choose another --out, or "
            "--overwrite"
        )


@contextmanager
def locked_work_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Make or take over `OUT/.build`, one process at a time; the lock falls with the process."""
    work = out / BUILD_FOLDER
    if out.exists() and not out.is_dir():
        raise BuildError(f"--out {out}: is not a folder")
    if _holds_other_files(out, work) and not (overwrite and (out / MANIFEST_NAME).exists()):
        raise BuildError(f"--out {out}: holds other files; choose an empty or a new folder")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"--out {out}: cannot be written ({error.strerror})") from None
    with _locked(out, work):
        if overwrite:
            _remove_build(out, work)
        yield work


@contextmanager
def locked_finished_folder(out: Path) -> Iterator[Path]:
    """Make or take over the work folder of a finished build, or of a retry of it that did not end.

    It goes again where nothing is left in it to go on with.
    """
    work = out / BUILD_FOLDER
    if not any((folder / MANIFEST_NAME).is_file() for folder in (out, work / RETRIED_FOLDER)):
        raise BuildError(f"--retry-failed: {out} holds no finished build; leave it out to begin or to continue one")
    try:
        work.mkdir(exist_ok=True)
    except OSError as error:
        raise BuildError(f"--out {out}: cannot be written ({error.strerror})") from None
    with _locked(out, work):
        try:
            yield work
        finally:
            if not (work / RETRIED_FOLDER).exists():
                remove_work_folder(out)


@contextmanager
def _locked(out: Path, work: Path) -> Iterator[None]:
    with open(work / _LOCK_NAME, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(
                f"--out {out}: another process builds there; wait for it or choose another folder"
            ) from None
        yield


def prepare_retry(retried: Path, fingerprint: dict[str, Any]) -> Path:
    """Return the work folder of a retry: that of one which was stopped, unless its input was another one."""
    work = retried / BUILD_FOLDER
    try:
        begun = json.loads((work / FINGERPRINT_NAME).read_bytes())
    except (OSError, ValueError):
        begun = {}
    if begun.get("input_xxh3") != fingerprint["input_xxh3"] and retried.exists():
        shutil.rmtree(retried)
    work.mkdir(parents=True, exist_ok=True)
    check_fingerprint(work, fingerprint)
    return work


def put_in_place(out: Path, retried: Path) -> None:
    """Replace a finished build by the one in `retried`, the manifest first gone and last back; may be run again.

    Token counts stay with the shards whose bytes are the same.
    """
    new = Manifest.load(retried)
    if (out / MANIFEST_NAME).exists():
        same = {shard.name for shard in new.shards if shard in Manifest.load(out).shards}
        (out / MANIFEST_NAME).unlink()
        for path in (*out.glob("shard-*.tar*"), *out.glob("shard-*.parquet")):
            if path.name.partition(".")[0] not in same:
                path.unlink()
    for path in sorted(retried.iterdir(), key=lambda path: path.name == MANIFEST_NAME):
        if path.name != BUILD_FOLDER:
            path.replace(out / path.name)


def _holds_other_files(out: Path, work: Path) -> bool:
    """Return whether `out` holds anything while no build began there; the `.build` of another tool is not ours."""
    if not out.is_dir() or (work / _LOCK_NAME).is_file():
        return False
    # A build killed in its first moment leaves an empty work folder.
    return any(path != work or not path.is_dir() or any(path.iterdir()) for path in out.iterdir())


def _remove_build(out: Path, work: Path) -> None:
    """Remove everything a build writes, the manifest first: without it nobody takes the rest for whole."""
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for path in (*out.glob("shard-*.tar*"), *out.glob("shard-*.parquet*"), out / LEDGER_NAME, out / THROUGHPUT_NAME):
        path.unlink(missing_ok=True)
    for path in work.iterdir():
        if path.name != _LOCK_NAME:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_fingerprint(work: Path, fingerprint: dict[str, Any]) -> None:
    """Record what is built in this work folder, or refuse to mix it with something else.

    Codec versions count here, because a half-built folder must not mix their outputs; a finished one is just data.
    """
    installed = installed_versions(_CODECS)
    wanted = fingerprint | {"codecs": {name: installed[name] for name in _CODECS}}
    path = work / FINGERPRINT_NAME
    if path.exists():
        refuse_other(work.parent, "half-finished", json.loads(path.read_bytes()), wanted)
    else:
        write_atomically(path, json.dumps(wanted).encode())
