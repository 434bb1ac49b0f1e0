"""The folder a corpus is fetched into: it appears whole or not at all, and a second fetch finds it there.

Everything is prepared in a hidden folder beside the target, which is renamed at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from triweave.data_pipeline.errors import FetchError
from triweave.data_pipeline.new_folder import new_folder

MARKER_NAME = "fetched.json"

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What lies in the target: `origin` says where it came from, `sha256` is that of the package file if it was one."""

    corpus: str
    origin: str
    files: int
    total_bytes: int
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a corpus came from, as `Fetched` will say it."""

    origin: str
    sha256: str = ""


Prepare = Callable[[Path, Path], Origin]
"""Called with (folder for the corpus, folder for anything else), both new, empty and absolute."""


def fetch_whole(corpus: str, out: Path, prepare: Prepare, report: Report) -> Fetched:
    """Let `prepare` make the corpus and move it to `out`; return what is there, at once when it is already there.

    report: called with one line for every step.

    Raises FetchError when the target is in use for something else, holds another corpus, or cannot be written.
    """
    fetched = _already_there(corpus, out)
    if fetched is not None:
        report(f"{out}: already there ({fetched.files} files from {fetched.origin})")
        return fetched
    with new_folder(out, FetchError) as (prepared, aside):
        fetched = _completed(corpus, prepared, prepare(prepared, aside))
    report(f"{out}: {fetched.files} files, {fetched.total_bytes / 1e6:.0f} MB")
    return fetched


def _already_there(corpus: str, out: Path) -> Fetched | None:
    marker = out / MARKER_NAME
    if not marker.is_file():
        return None
    try:
        fetched = Fetched(**json.loads(marker.read_bytes()))
    except (ValueError, TypeError):
        raise FetchError(f"{marker}: is damaged: remove {out} and fetch again") from None
    if fetched.corpus != corpus:
        raise FetchError(f"--out {out}: holds the corpus {fetched.corpus}; choose another folder for {corpus}")
    return fetched


def _completed(corpus: str, prepared: Path, origin: Origin) -> Fetched:
    sizes = [path.stat().st_size for path in prepared.rglob("*") if path.is_file()]
    fetched = Fetched(corpus=corpus, files=len(sizes), total_bytes=sum(sizes), **asdict(origin))
    (prepared / MARKER_NAME).write_text(json.dumps(asdict(fetched), indent=1) + "\n", encoding="utf-8")
    return fetched
