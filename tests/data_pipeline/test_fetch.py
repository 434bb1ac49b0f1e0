"""Fetching: from folders, .deb files and apt, whole or not at all."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from triweave.data_pipeline import fetch
from triweave.data_pipeline.errors import FetchError
from triweave.data_pipeline.fetch import KNOWN_SHA256, fetch_tuxpaint

STAMPS = {"animals/cat.txt": b"A cat.\n", "animals/cat.png": b"picture", "people/tux.txt": b"Tux.\n"}
NOWHERE = Path("/nonexistent/stamps")


def make_deb(path: Path, members: dict[str, bytes], data_name: str = "data.tar.xz") -> Path:
    """Write a .deb: an ar archive of debian-binary and a compressed tar."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        link = tarfile.TarInfo("./usr/share/tuxpaint/stamps/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1_600_000_000
            archive.addfile(member, io.BytesIO(content))
    blocks = [b"!<arch>\n"]
    for name, content in (("debian-binary", b"2.0\n1"), (data_name, data.getvalue())):
        blocks.append(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode())
        blocks.append(content + b"\n" * (len(content) % 2))
    path.write_bytes(b"".join(blocks))
    return path


@pytest.fixture
def deb(tmp_path: Path) -> Path:
    members = {f"./usr/share/tuxpaint/stamps/{name}": content for name, content in STAMPS.items()}
    return make_deb(tmp_path / "stamps.deb", members | {"./etc/passwd": b"not wanted"})


def stamps(out: Path) -> dict[str, bytes]:
    root = out / "stamps"
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def run(out: Path, given: Path | None, installed: Path = NOWHERE) -> tuple[fetch.Fetched, list[str]]:
    lines: list[str] = []
    return fetch_tuxpaint(out, given, lines.append, installed), lines


def test_from_a_package_file(tmp_path: Path, deb: Path) -> None:
    out = tmp_path / "corpora" / "tuxpaint"
    fetched, lines = run(out, deb)
    assert stamps(out) == STAMPS
    assert (fetched.files, fetched.total_bytes) == (3, 19)
    assert fetched.sha256 in lines[0]
    assert (out / "stamps" / "people" / "tux.txt").stat().st_mtime == 1_600_000_000
    assert sorted(path.name for path in out.iterdir()) == ["fetched.json", "stamps"]
    assert [path.name for path in out.parent.iterdir()] == ["tuxpaint"], "no working folder is left"


@pytest.mark.parametrize("below", ["", "stamps", "usr/share/tuxpaint/stamps"])
def test_from_a_folder_and_from_the_installed_package(tmp_path: Path, below: str) -> None:
    for name, content in STAMPS.items():
        path = tmp_path / "given" / below / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    run(tmp_path / "a", tmp_path / "given")
    assert stamps(tmp_path / "a") == STAMPS
    run(tmp_path / "b", None, installed=tmp_path / "given" / below)
    assert stamps(tmp_path / "b") == STAMPS


def test_a_second_run_needs_nothing(tmp_path: Path, deb: Path) -> None:
    first, _ = run(tmp_path / "out", deb)
    deb.unlink()
    second, lines = run(tmp_path / "out", None)
    assert second == first
    assert "already there" in lines[0]


def test_the_known_version_is_checked(tmp_path: Path, deb: Path) -> None:
    known = deb.rename(tmp_path / next(iter(KNOWN_SHA256)))
    with pytest.raises(FetchError, match="instead of 6db6c1bf"):
        run(tmp_path / "out", known)
    assert not (tmp_path / "out").exists()


def test_nothing_lands_outside(tmp_path: Path) -> None:
    hostile = make_deb(tmp_path / "bad.deb", {"./usr/share/tuxpaint/stamps/../../../../../escaped.txt": b"?"})
    with pytest.raises(FetchError, match="points outside"):
        run(tmp_path / "a" / "b" / "c" / "d" / "out", hostile)
    through_link = make_deb(tmp_path / "link.deb", {"./usr/share/tuxpaint/stamps/link/x.txt": b"?"})
    run(tmp_path / "out", through_link)
    assert stamps(tmp_path / "out") == {"link/x.txt": b"?"}
    assert not (tmp_path / "out" / "stamps" / "link").is_symlink()
    assert not list(tmp_path.rglob("escaped.txt"))


def test_bad_inputs_leave_nothing(tmp_path: Path, deb: Path) -> None:
    (tmp_path / "plain").write_text("?")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.deb").write_bytes(deb.read_bytes()[:-40])
    make_deb(tmp_path / "zst.deb", {}, data_name="data.tar.zst")
    make_deb(tmp_path / "other.deb", {"./usr/bin/tool": b"?"})
    for name, message in {
        "plain": "is not a Debian package",
        "empty": "holds no stamps",
        "cut.deb": "damaged",
        "zst.deb": "only data.tar.xz",
        "other.deb": "holds no usr/share/tuxpaint/stamps",
        "gone": "no such file or folder",
    }.items():
        with pytest.raises(FetchError, match=message):
            run(tmp_path / "out", tmp_path / name)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out.")]
    with pytest.raises(FetchError, match="holds something else"):
        run(tmp_path, deb)


APT = """#!/bin/sh
for word in "$@"; do case "$word" in Dir::*=*) case "${word#*=}" in /*) ;; *) echo "E: relative $word" >&2; exit 100;;
esac;; esac; done
for word in "$@"; do
  [ "$word" = update ] && exit UPDATE
  [ "$word" = download ] && cp DEB ./tuxpaint-stamps-default_1_all.deb && exit 0
done
exit 1
"""


def fake_apt(folder: Path, deb: Path, update: str = "0") -> str:
    folder.mkdir()
    script = folder / "apt-get"
    script.write_text(APT.replace("DEB", str(deb)).replace("UPDATE", update))
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_apt_downloads_into_a_folder_of_its_own(tmp_path: Path, deb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", fake_apt(tmp_path / "bin", deb))
    monkeypatch.chdir(tmp_path)
    fetched, lines = run(Path("out"), None)
    assert stamps(tmp_path / "out") == STAMPS
    assert fetched.origin == "apt-get download: tuxpaint-stamps-default_1_all.deb"
    assert "downloading" in lines[0]


def test_a_clear_message_when_nothing_can_be_had(tmp_path: Path, deb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", fake_apt(tmp_path / "bin", deb, update="100"))
    with pytest.raises(FetchError, match=r"apt-get update failed .*--from FOLDER or --from FILE\.deb"):
        run(tmp_path / "out", None)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(FetchError, match=r"no apt-get here: give a copy with --from"):
        run(tmp_path / "out", None)


def test_a_damaged_marker_is_named(tmp_path: Path) -> None:
    (tmp_path / "fetched.json").write_bytes(b"")
    with pytest.raises(FetchError, match=r"fetched.json: is damaged: remove .* and fetch again"):
        run(tmp_path, None)


def test_a_package_member_of_negative_size_is_no_endless_loop(tmp_path: Path) -> None:
    package = tmp_path / "loop.deb"
    package.write_bytes(b"!<arch>\n" + f"{'control':<16}{'':<32}{-60:<10}`\n".encode())
    with pytest.raises(FetchError, match="member control of -60 bytes"):
        run(tmp_path / "out", package)
