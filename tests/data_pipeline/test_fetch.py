"""Fetching Debian's corpora: from folders, .deb files and apt, whole or not at all."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from triweave.data_pipeline.errors import FetchError
from triweave.data_pipeline.fetch.asterisk import ASTERISK as CORPUS
from triweave.data_pipeline.fetch.asterisk import LANGUAGES, PACKAGES
from triweave.data_pipeline.fetch.debian import KNOWN_SHA256
from triweave.data_pipeline.fetch.target import Fetched
from triweave.data_pipeline.fetch.tuxpaint import fetch_tuxpaint

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


def run(out: Path, given: Path | None, installed: Path = NOWHERE) -> tuple[Fetched, list[str]]:
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
done
seen=
for word in "$@"; do
  [ "$seen" ] && { [ -d DEB ] && cp "DEB/$word"_1_all.deb . || cp DEB "./${word}_1_all.deb" || exit 1; }
  [ "$word" = download ] && seen=yes
done
[ "$seen" ]
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


def test_another_corpus_is_not_taken_for_ours(tmp_path: Path, deb: Path) -> None:
    run(tmp_path / "out", deb)
    with pytest.raises(FetchError, match="holds the corpus tuxpaint; choose another folder for asterisk"):
        CORPUS.fetch(tmp_path / "out", None, print)


def asterisk_members(language: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return the files of the two packages of a language."""
    texts = {f"./usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz": f"texts {language}"}
    texts[f"./usr/share/doc/asterisk-core-sounds-{language}/copyright"] = "not wanted"
    voice = f"./usr/share/asterisk/sounds/{language}_XX_f_Somebody"
    clips = {f"{voice}/hello.wav": f"hello {language}", f"{voice}/digits/1.wav": f"one {language}"}
    clips[f"{voice}/hello.gsm"] = "not wanted"
    return tuple({name: content.encode() for name, content in files.items()} for files in (texts, clips))  # type: ignore[return-value]


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    for language in LANGUAGES:
        for kind, members in zip(("", "-wav"), asterisk_members(language), strict=True):
            make_deb(folder / f"asterisk-core-sounds-{language}{kind}_1_all.deb", members)
    return folder


def files_below(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


ASTERISK = {
    **{f"transcripts/core-sounds-{language}.txt.gz": f"texts {language}".encode() for language in LANGUAGES},
    **{f"sounds/{language}_XX_f_Somebody/hello.wav": f"hello {language}".encode() for language in LANGUAGES},
    **{f"sounds/{language}_XX_f_Somebody/digits/1.wav": f"one {language}".encode() for language in LANGUAGES},
}


def run_asterisk(out: Path, given: Path | None, system: Path = NOWHERE) -> tuple[Fetched, dict[str, bytes]]:
    fetched = CORPUS.fetch(out, given, lambda _: None, system)
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")] == []
    return fetched, {name: content for name, content in files_below(out).items() if name != "fetched.json"}


def test_asterisk_from_packages_unpacked_installed_and_from_apt(
    tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched, found = run_asterisk(tmp_path / "a", packages)
    assert found == ASTERISK
    assert (fetched.corpus, fetched.files, fetched.origin) == ("asterisk", 15, str(packages))
    tree = tmp_path / "tree"
    for language in LANGUAGES:
        for members in asterisk_members(language):
            for name, content in members.items():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                (tree / name).write_bytes(content)
    assert run_asterisk(tmp_path / "b", tree)[1] == ASTERISK
    assert run_asterisk(tmp_path / "c", None, system=tree)[1] == ASTERISK
    assert run_asterisk(tmp_path / "d", tmp_path / "a")[1] == ASTERISK, "what was fetched can be given"
    monkeypatch.setenv("PATH", fake_apt(tmp_path / "bin", packages))
    (tree / "usr/share/doc/asterisk-core-sounds-it/core-sounds-it.txt.gz").unlink()
    fetched, found = run_asterisk(tmp_path / "e", None, system=tree)
    assert found == ASTERISK, "a language that is not wholly installed is downloaded with the others"
    assert fetched.origin == "apt-get download: asterisk-core-sounds-en_1_all.deb and 9 more"


def test_asterisk_is_whole_or_not_there(tmp_path: Path, packages: Path) -> None:
    out = tmp_path / "out"
    make_deb(packages / "asterisk-core-sounds-ru-wav_1_all.deb", {"./usr/share/asterisk/sounds/README": b"?"})
    with pytest.raises(FetchError, match=r"the transcripts of ru are missing; give copies with --from"):
        run_asterisk(out, packages)
    (packages / "asterisk-core-sounds-ru-wav_1_all.deb").unlink()
    with pytest.raises(FetchError, match="no file of the package asterisk-core-sounds-ru-wav in"):
        run_asterisk(out, packages)
    escape = "./usr/share/asterisk/sounds/../../../../escaped.wav"
    make_deb(packages / "asterisk-core-sounds-ru-wav_1_all.deb", {escape: b"?"})
    with pytest.raises(FetchError, match="points outside"):
        run_asterisk(out, packages)
    known = next(name for name in KNOWN_SHA256 if name.startswith("asterisk-core-sounds-ru-wav"))
    (packages / "asterisk-core-sounds-ru-wav_1_all.deb").rename(packages / known)
    with pytest.raises(FetchError, match="instead of ccbfaebf"):
        run_asterisk(out, packages)
    for given in (tmp_path / "gone", packages / known):
        with pytest.raises(FetchError, match="no such folder"):
            run_asterisk(out, given)
    assert not out.exists()
    assert not list(tmp_path.rglob("escaped.wav"))
    assert {name.rsplit("_", 2)[0] for name in KNOWN_SHA256} == {*PACKAGES, "tuxpaint-stamps-default"}


def test_a_target_that_no_rename_can_replace_is_refused_first(
    tmp_path: Path, deb: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    monkeypatch.chdir(tmp_path / "disk")
    for out in (tmp_path / "link", Path(".")):
        with pytest.raises(FetchError, match="is a link or the current folder; name the folder itself"):
            run(out, deb)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "stamps.deb"]


def test_files_that_cannot_be_copied_make_one_short_line(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "cat.txt").write_text("A cat.")
    for number in range(300):
        (given / f"cat{number:03}.png").symlink_to("gone")
    with pytest.raises(FetchError, match=r"No such file or directory: '.*cat000\.png' and 299 more; nothing is left"):
        run(tmp_path / "out", given)
