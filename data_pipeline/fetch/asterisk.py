"""The core sounds of Asterisk, studio prompts with transcripts in five languages: from Debian packages or a folder.

    OUT/sounds/<voice>/<prompt>.wav              <voice> is like en_US_f_Allison
    OUT/transcripts/core-sounds-<language>.txt.gz

Two packages a language: asterisk-core-sounds-XX holds the transcripts, asterisk-core-sounds-XX-wav the clips.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path, PurePosixPath

from triweave.data_pipeline.errors import FetchError
from triweave.data_pipeline.fetch.debian import apt_download, check_sha256, package_file, unpack
from triweave.data_pipeline.fetch.target import Fetched, Origin, Report, fetch_whole

LANGUAGES = ("en", "es", "fr", "it", "ru")
PACKAGES = tuple(f"asterisk-core-sounds-{language}{kind}" for language in LANGUAGES for kind in ("", "-wav"))
SYSTEM = Path("/")
_SOUNDS = PurePosixPath("usr/share/asterisk/sounds")
_DOCUMENTS = PurePosixPath("usr/share/doc")
_TRANSCRIPTS = "core-sounds-*.txt.gz"
_HELP_LINE = "give copies with --from FOLDER (the ten .deb files of asterisk-core-sounds-XX and -XX-wav, or unpacked)"


def fetch_asterisk(out: Path, given: Path | None = None, report: Report = print, system: Path = SYSTEM) -> Fetched:
    """Put clips and transcripts into `out` and return what is there; does nothing when they are already there.

    given: a folder with the .deb files of all five languages, or one that they were unpacked into; None tries the
        packages installed below `system`, then `apt-get download`.
    report: called with one line for every step.

    Raises FetchError when the target is in use for something else or a language cannot be had.
    """
    return fetch_whole("asterisk", out, partial(_prepare, given, report, system), report)


def _prepare(given: Path | None, report: Report, system: Path, corpus: Path, aside: Path) -> Origin:
    if given is None and not _missing_languages(system):
        given = system
    if given is None:
        report(f"downloading {len(PACKAGES)} packages asterisk-core-sounds-XX and -XX-wav with apt-get (98 MB)")
        packages = apt_download(PACKAGES, aside, _HELP_LINE)
        origin = f"apt-get download: {packages[0].name} and {len(packages) - 1} more"
    elif not given.is_dir():
        raise FetchError(f"--from {given}: no such folder; {_HELP_LINE}")
    elif next(given.glob("*.deb"), None) is not None:
        packages = [package_file(given, package, _HELP_LINE) for package in PACKAGES]
        origin = str(given)
    else:
        _require_whole(given)
        report(f"copying {given}")
        _copy(given, corpus)
        return Origin(origin="the installed packages" if given == system else str(given))
    report("unpacking")
    unpacked = aside / "unpacked"
    for package in packages:
        check_sha256(package)
        if not unpack(package, {folder: unpacked / folder for folder in (_SOUNDS, _DOCUMENTS)}):
            raise FetchError(f"{package}: holds neither {_SOUNDS} nor {_DOCUMENTS}: download it again")
    _require_whole(unpacked)
    _copy(unpacked, corpus)
    return Origin(origin=origin)


def _sounds_and_transcripts(tree: Path) -> tuple[Path, list[Path]]:
    """Return the folder of voices and the transcript files of an unpacked tree, or of what this module wrote."""
    if (tree / "transcripts").is_dir():
        return tree / "sounds", sorted((tree / "transcripts").glob(_TRANSCRIPTS))
    return tree / _SOUNDS, sorted((tree / _DOCUMENTS).glob(f"asterisk-core-sounds-*/{_TRANSCRIPTS}"))


def _missing_languages(tree: Path) -> list[str]:
    """Return the languages of which clips or the transcripts are missing."""
    sounds, transcripts = _sounds_and_transcripts(tree)
    written = {path.name for path in transcripts}
    return [
        language
        for language in LANGUAGES
        if f"core-sounds-{language}.txt.gz" not in written
        or not any(next(voice.rglob("*.wav"), None) for voice in sounds.glob(f"{language}_*"))
    ]


def _require_whole(tree: Path) -> None:
    missing = _missing_languages(tree)
    if missing:
        raise FetchError(f"{tree}: the clips or the transcripts of {', '.join(missing)} are missing; {_HELP_LINE}")


def _copy(tree: Path, corpus: Path) -> None:
    """Bring the files into our layout."""
    sounds, transcripts = _sounds_and_transcripts(tree)
    (corpus / "transcripts").mkdir()
    for path in transcripts:
        shutil.copy2(path, corpus / "transcripts" / path.name)
    for language in LANGUAGES:
        for clip in sorted(sounds.glob(f"{language}_*/**/*.wav")):
            target = corpus / "sounds" / clip.relative_to(sounds)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(clip, target)
