"""The Tux Paint stamps: from a folder, a Debian package file, the installed package, or apt; never as root.

OUT/stamps/<category>/...   as in the package
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path, PurePosixPath

from triweave.data_pipeline.errors import FetchError
from triweave.data_pipeline.fetch.debian import KNOWN_SHA256, apt_download, check_sha256, unpack
from triweave.data_pipeline.fetch.target import Fetched, Origin, Report, fetch_whole

PACKAGE = "tuxpaint-stamps-default"
INSTALLED = Path("/usr/share/tuxpaint/stamps")
_STAMPS = PurePosixPath("usr/share/tuxpaint/stamps")
_HELP_LINE = f"give a copy with --from FOLDER or --from FILE.deb (Debian package {PACKAGE})"


def fetch_tuxpaint(
    out: Path, given: Path | None = None, report: Report = print, installed: Path = INSTALLED
) -> Fetched:
    """Put the stamps into `out/stamps` and return what is there; does nothing when they are already there.

    given: a folder of stamps or a .deb to take them from; None tries the installed package, then `apt-get download`.
    report: called with one line for every step.

    Raises FetchError when the target is in use for something else or the stamps cannot be had.
    """
    return fetch_whole("tuxpaint", out, partial(_prepare, given, report, installed), report)


def _prepare(given: Path | None, report: Report, installed: Path, corpus: Path, aside: Path) -> Origin:
    stamps = corpus / "stamps"
    if given is None and not installed.is_dir():
        report(f"downloading {PACKAGE} with apt-get (161 MB)")
        (given,) = apt_download([PACKAGE], aside, _HELP_LINE)
        origin = f"apt-get download: {given.name}"
    else:
        given = given or installed
        origin = str(given)
    if given.is_dir():
        report(f"copying {given}")
        shutil.copytree(_stamps_below(given), stamps)
        return Origin(origin=origin)
    if not given.is_file():
        raise FetchError(f"--from {given}: no such file or folder")
    sha256 = check_sha256(given)
    report(f"{given.name}: sha256 {sha256}{' (the known one)' if sha256 in KNOWN_SHA256.values() else ''}")
    report("unpacking")
    if not unpack(given, {_STAMPS: stamps}):
        raise FetchError(f"{given}: holds no {_STAMPS}; it must be the Debian package {PACKAGE}")
    return Origin(origin=origin, sha256=sha256)


def _stamps_below(folder: Path) -> Path:
    """Return the folder of stamp categories in `folder`, itself or a usual place below it."""
    for candidate in (folder / _STAMPS, folder / "stamps", folder):
        if candidate.is_dir() and next(candidate.rglob("*.txt"), None) is not None:
            return candidate
    raise FetchError(f"--from {folder}: holds no stamps (pictures with .txt captions)")
