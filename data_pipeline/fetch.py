"""Get the Tux Paint stamps: from a folder, a Debian package file, the installed package, or apt; never as root.

The corpus appears whole or not at all: everything is prepared in a hidden folder beside the target and renamed. Nothing
in the system changes: apt gets package lists, cache and state of its own, in that hidden folder.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from triweave.data_pipeline.errors import FetchError

PACKAGE = "tuxpaint-stamps-default"
KNOWN_SHA256 = {
    f"{PACKAGE}_2022.06.04-1_all.deb": "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
}
"""Package file -> sha256, for files that do not come through apt's own signature check."""
INSTALLED = Path("/usr/share/tuxpaint/stamps")
MARKER_NAME = "fetched.json"
_STAMPS = PurePosixPath("usr/share/tuxpaint/stamps")
_BLOCK_BYTES = 1 << 20
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER_BYTES = 60
_APT_SECONDS = 1800

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What lies in the target: `origin` says where it came from, `sha256` is that of the package file if it was one."""

    corpus: str
    origin: str
    files: int
    total_bytes: int
    sha256: str = ""


def fetch_tuxpaint(
    out: Path, given: Path | None = None, report: Report = print, installed: Path = INSTALLED
) -> Fetched:
    """Put the stamps into `out/stamps` and return what is there; does nothing when they are already there.

    given: a folder of stamps or a .deb to take them from; None tries the installed package, then `apt-get download`.
    report: called with one line for every step.

    Raises FetchError when the target is in use for something else or the stamps cannot be had.
    """
    marker = out / MARKER_NAME
    if marker.is_file():
        try:
            fetched = Fetched(**json.loads(marker.read_bytes()))
        except (ValueError, TypeError):
            raise FetchError(f"{marker}: is damaged: remove {out} and fetch again") from None
        report(f"{out}: already there ({fetched.files} files from {fetched.origin})")
        return fetched
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FetchError(f"--out {out}: holds something else; choose a new or an empty folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))  # apt wants it absolute
    except OSError as error:
        raise FetchError(f"--out {out}: cannot be written ({error.strerror})") from None
    try:
        return _fetch_into(out, work, given, report, installed)
    except OSError as error:
        raise FetchError(f"--out {out}: {error.strerror or error}; nothing is left behind") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch_into(out: Path, work: Path, given: Path | None, report: Report, installed: Path) -> Fetched:
    corpus = work / "corpus"
    stamps = corpus / "stamps"
    sha256 = ""
    if given is None and not installed.is_dir():
        report(f"downloading {PACKAGE} with apt-get (161 MB)")
        given = _apt_download(work)
        origin = f"apt-get download: {given.name}"
    else:
        given = given or installed
        origin = str(given)
    if given.is_dir():
        report(f"copying {given}")
        shutil.copytree(_stamps_below(given), stamps)
    elif given.is_file():
        sha256 = check_sha256(given)
        report(f"{given.name}: sha256 {sha256}{' (the known one)' if sha256 in KNOWN_SHA256.values() else ''}")
        report("unpacking")
        unpack_stamps(given, stamps)
    else:
        raise FetchError(f"--from {given}: no such file or folder")
    return _complete(out, corpus, origin, sha256, report)


def _complete(out: Path, corpus: Path, origin: str, sha256: str, report: Report) -> Fetched:
    sizes = [path.stat().st_size for path in corpus.rglob("*") if path.is_file()]
    fetched = Fetched(corpus="tuxpaint", origin=origin, files=len(sizes), total_bytes=sum(sizes), sha256=sha256)
    (corpus / MARKER_NAME).write_text(json.dumps(asdict(fetched), indent=1) + "\n", encoding="utf-8")
    corpus.replace(out)  # an empty folder of that name gives way
    report(f"{out}: {fetched.files} files, {fetched.total_bytes / 1e6:.0f} MB")
    return fetched


def _stamps_below(folder: Path) -> Path:
    """Return the folder of stamp categories in `folder`, itself or a usual place below it."""
    for candidate in (folder / _STAMPS, folder / "stamps", folder):
        if candidate.is_dir() and next(candidate.rglob("*.txt"), None) is not None:
            return candidate
    raise FetchError(f"--from {folder}: holds no stamps (pictures with .txt captions)")


def check_sha256(package: Path) -> str:
    """Return the sha256 of a package file. Raises FetchError when it is not that of the known file of this name."""
    digest = hashlib.sha256()
    with open(package, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    known = KNOWN_SHA256.get(package.name)
    if known is not None and digest.hexdigest() != known:
        raise FetchError(f"{package}: sha256 {digest.hexdigest()} instead of {known}: download it again")
    return digest.hexdigest()


def unpack_stamps(package: Path, target: Path) -> None:
    """Unpack the stamps of a .deb into `target` with the standard library alone; nothing can land outside it.

    Raises FetchError when the file is no such package.
    """
    target.mkdir(parents=True)
    try:
        with open(package, "rb") as file:
            _seek_data_member(package, file)
            with tarfile.open(fileobj=file, mode="r|xz") as archive:
                for member in archive:
                    path = PurePosixPath(member.name)
                    if member.isreg() and path.is_relative_to(_STAMPS):
                        _unpack_member(archive, member, path.relative_to(_STAMPS), target)
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError) as error:
        raise FetchError(f"{package}: damaged or no Debian package ({error}): download it again") from None
    if not any(target.iterdir()):
        raise FetchError(f"{package}: holds no {_STAMPS}; it must be the Debian package {PACKAGE}")


def _unpack_member(archive: tarfile.TarFile, member: tarfile.TarInfo, name: PurePosixPath, target: Path) -> None:
    """Write one regular file below `target`, which holds no links because none are ever made.

    By hand, because the extraction filters of tarfile came with Python 3.11.4 and Debian 12 has 3.11.2.
    """
    if ".." in name.parts:
        raise tarfile.TarError(f"member {member.name!r} points outside")
    path = target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    reader = archive.extractfile(member)
    assert reader is not None, "regular members have contents"
    with reader, open(path, "wb") as file:
        shutil.copyfileobj(reader, file)
    os.utime(path, (member.mtime, member.mtime))


def _seek_data_member(package: Path, file: BinaryIO) -> None:
    """Move to the start of data.tar.xz in the `ar` archive that a .deb is.

    A member is a 60-byte header (name 16, ..., size 10 from byte 48) and its bytes, padded to an even length.
    """
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise FetchError(f"--from {package}: is not a Debian package")
    while len(header := file.read(_AR_HEADER_BYTES)) == _AR_HEADER_BYTES:
        name = header[:16].decode("ascii", "replace").strip().rstrip("/")
        size = int(header[48:58])
        if size < 0:  # would lead back to this very header, for ever
            raise ValueError(f"member {name} of {size} bytes")
        if name == "data.tar.xz":
            if file.tell() + size > package.stat().st_size:
                raise FetchError(f"{package}: damaged, it is cut short: download it again")
            return
        if name.startswith("data.tar"):
            raise FetchError(f"{package}: its contents are {name}; only data.tar.xz can be unpacked here")
        file.seek(size + size % 2, os.SEEK_CUR)
    raise FetchError(f"{package}: has no data.tar.xz; download it again")


def _apt_download(work: Path) -> Path:
    """Download the package with lists, cache and state below `work`; apt checks the archive's signatures."""
    help_line = f"give a copy with --from FOLDER or --from FILE.deb (Debian package {PACKAGE})"
    if shutil.which("apt-get") is None:
        raise FetchError(f"the stamps are not installed and there is no apt-get here: {help_line}")
    state, cache = work / "apt-state", work / "apt-cache"
    for folder in (state / "lists" / "partial", cache / "archives" / "partial"):
        folder.mkdir(parents=True)
    options = {
        "Dir::State": state,
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": cache,
        "APT::Sandbox::User": "",
        "Acquire::Retries": 3,
        "Acquire::Languages": "none",
    }
    base = ["apt-get", "-q", *(argument for name, value in options.items() for argument in ("-o", f"{name}={value}"))]
    for step in (["update", "--error-on=any"], ["download", PACKAGE]):
        try:
            done = subprocess.run(
                [*base, *step], cwd=work, capture_output=True, text=True, timeout=_APT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise FetchError(f"apt-get {step[0]} took over {_APT_SECONDS} s: {help_line}") from None
        if done.returncode != 0:
            reason = next((line for line in done.stderr.splitlines() if line.startswith("E:")), "no reason given")
            raise FetchError(f"apt-get {step[0]} failed ({reason.removeprefix('E: ')}): {help_line}")
    found = sorted(work.glob("*.deb"))
    if not found:
        raise FetchError(f"apt-get download {PACKAGE} left no file: {help_line}")
    return found[0]
