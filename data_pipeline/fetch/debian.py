"""Debian packages without root: downloaded by apt with a state of its own, unpacked with the standard library.

Nothing in the system changes: apt gets package lists, cache and state below a folder of ours, and checks the archive's
signatures as always.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from triweave.data_pipeline.errors import FetchError

KNOWN_SHA256 = {
    "tuxpaint-stamps-default_2022.06.04-1_all.deb": "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    "asterisk-core-sounds-en_1.6.1-1_all.deb": "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    "asterisk-core-sounds-en-wav_1.6.1-1_all.deb": "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
    "asterisk-core-sounds-es_1.6.1-1_all.deb": "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74",
    "asterisk-core-sounds-es-wav_1.6.1-1_all.deb": "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903",
    "asterisk-core-sounds-fr_1.6.1-1_all.deb": "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056",
    "asterisk-core-sounds-fr-wav_1.6.1-1_all.deb": "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e",
    "asterisk-core-sounds-it_1.6.1-1_all.deb": "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b",
    "asterisk-core-sounds-it-wav_1.6.1-1_all.deb": "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb",
    "asterisk-core-sounds-ru_1.6.1-1_all.deb": "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab",
    "asterisk-core-sounds-ru-wav_1.6.1-1_all.deb": "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201",
}
"""Package file -> sha256, for files that do not come through apt's own signature check."""
_BLOCK_BYTES = 1 << 20
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER_BYTES = 60
_APT_SECONDS = 1800

Wanted = Mapping[PurePosixPath, Path]
"""Folder in the package (no leading slash) -> folder to unpack it into."""


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


def unpack(package: Path, wanted: Wanted) -> int:
    """Unpack the regular files below the wanted folders of a .deb; nothing can land outside the targets.

    Returns the number of files. The targets must hold no links, and get none. Raises FetchError when the file is no
    Debian package, or a damaged one.
    """
    files = 0
    try:
        with open(package, "rb") as file:
            _seek_data_member(package, file)
            with tarfile.open(fileobj=file, mode="r|xz") as archive:
                for member in archive:
                    path = PurePosixPath(member.name)
                    source = next((folder for folder in wanted if path.is_relative_to(folder)), None)
                    if member.isreg() and source is not None:
                        _unpack_member(archive, member, path.relative_to(source), wanted[source])
                        files += 1
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError) as error:
        raise FetchError(f"{package}: damaged or no Debian package ({error}): download it again") from None
    return files


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


def apt_download(packages: Sequence[str], aside: Path, help_line: str) -> list[Path]:
    """Download packages with lists, cache and state below the empty folder `aside`; return the files in that order.

    help_line: what to do without apt; the end of every error.

    Raises FetchError.
    """
    if shutil.which("apt-get") is None:
        raise FetchError(f"not installed, and there is no apt-get here: {help_line}")
    state, cache, downloads = aside / "apt-state", aside / "apt-cache", aside / "packages"
    for folder in (state / "lists" / "partial", cache / "archives" / "partial", downloads):
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
    for step in (["update", "--error-on=any"], ["download", *packages]):
        try:
            done = subprocess.run(
                [*base, *step], cwd=downloads, capture_output=True, text=True, timeout=_APT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise FetchError(f"apt-get {step[0]} took over {_APT_SECONDS} s: {help_line}") from None
        if done.returncode != 0:
            reason = next((line for line in done.stderr.splitlines() if line.startswith("E:")), "no reason given")
            raise FetchError(f"apt-get {step[0]} failed ({reason.removeprefix('E: ')}): {help_line}")
    return [package_file(downloads, package, help_line) for package in packages]


def package_file(folder: Path, package: str, help_line: str) -> Path:
    """Return the file of `package` in `folder`, `PACKAGE_VERSION_ARCH.deb`; of several the last by name.

    Raises FetchError when there is none.
    """
    found = sorted(folder.glob(f"{package}_*.deb"))
    if not found:
        raise FetchError(f"no file of the package {package} in {folder}: {help_line}")
    return found[-1]
