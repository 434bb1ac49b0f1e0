"""The core sounds of Asterisk, studio prompts with transcripts in five languages: from Debian packages or a folder.

    OUT/sounds/<voice>/<prompt>.wav              <voice> is like en_US_f_Allison
    OUT/transcripts/core-sounds-<language>.txt.gz

Two packages a language: asterisk-core-sounds-XX holds the transcripts, asterisk-core-sounds-XX-wav the clips.
"""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

from triweave.data_pipeline.fetch.packages import PackageCorpus

LANGUAGES = ("en", "es", "fr", "it", "ru")
PACKAGES = tuple(f"asterisk-core-sounds-{language}{kind}" for language in LANGUAGES for kind in ("", "-wav"))
_SOUNDS = PurePosixPath("usr/share/asterisk/sounds")
_DOCUMENTS = PurePosixPath("usr/share/doc")
_TRANSCRIPTS = "core-sounds-*.txt.gz"


def _sounds_and_transcripts(tree: Path) -> tuple[Path, list[Path]]:
    """Return the folder of voices and the transcript files of an unpacked tree, or of what this module wrote."""
    if (tree / "transcripts").is_dir():
        return tree / "sounds", sorted((tree / "transcripts").glob(_TRANSCRIPTS))
    return tree / _SOUNDS, sorted((tree / _DOCUMENTS).glob(f"asterisk-core-sounds-*/{_TRANSCRIPTS}"))


def _missing(tree: Path) -> str:
    """Return of which languages clips or the transcripts are missing, in words."""
    sounds, transcripts = _sounds_and_transcripts(tree)
    written = {path.name for path in transcripts}
    languages = [
        language
        for language in LANGUAGES
        if f"core-sounds-{language}.txt.gz" not in written
        or not any(next(voice.rglob("*.wav"), None) for voice in sounds.glob(f"{language}_*"))
    ]
    return f"the clips or the transcripts of {', '.join(languages)} are missing" if languages else ""


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


ASTERISK = PackageCorpus(
    name="asterisk",
    packages=PACKAGES,
    folders=(_SOUNDS, _DOCUMENTS),
    megabytes=98,
    help_line="give copies with --from FOLDER (the ten .deb files of asterisk-core-sounds-XX and -XX-wav, or unpacked)",
    missing=_missing,
    copy=_copy,
)
