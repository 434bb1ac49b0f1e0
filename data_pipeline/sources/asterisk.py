"""Asterisk's core sounds: one document per studio prompt, its speech and its transcript, in five languages.

    sounds/<voice>/<prompt>.wav                     a voice is like en_US_f_Allison; 8 kHz
    transcripts/core-sounds-<language>.txt.gz       lines `prompt: transcript`; `;` begins a comment

What was recorded is not always what is written: texts that are one bracketed remark (`[ascending tones]`) or hold one
(`IAX (note: does not say "2")`) are filtered; a bracket without a letter (`at [@]`) is left out of the text.

Concepts (labels `group` and `split`): prompts that share the normalised transcript or the bytes of the clip.
Part order: see `part_order`; `canonical` is speech, transcript.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import Document, Part, TextPart
from triweave.data_pipeline.sources.base import Row, require_folder, walk_files
from triweave.data_pipeline.sources.concepts import file_key, group_labels, text_keys
from triweave.data_pipeline.sources.part_order import PartOrder, deal_order, require_part_order
from triweave.data_pipeline.splits import group_rows

CORPUS = "asterisk-core-sounds"
LICENSES = {"en": "CC-BY-SA-3.0", "es": "CC-BY-SA-3.0", "fr": "CC-BY-SA-3.0", "it": "CC-BY-3.0", "ru": "CC-BY-3.0"}
"""Language -> licence, from the copyright file of the packages."""
_ORDERS = ("speech transcript", "speech transcript", "speech transcript", "transcript speech")
_LINE = re.compile(r"(?P<prompt>[^:;\s]+)\s*:(?P<text>.*)")
_SYMBOL = re.compile(r"\s*[\[(<][^\w\[\]()<>]*[\])>]")
_REMARK = re.compile(r"[\[\]()<>]")
_ONE_REMARK = re.compile(r"\[[^\[\]]*\]|\([^()]*\)|<[^<>]*>")


@dataclass(frozen=True, kw_only=True)
class AsteriskSource:
    """The prompts of Asterisk's core sounds.

    root: what `triweave fetch asterisk` wrote.
    languages: keep only these; empty keeps all.
    part_order: `mixed` or `canonical`, see `triweave.data_pipeline.sources.part_order`.
    """

    root: Path
    languages: tuple[str, ...] = ()
    part_order: PartOrder = "mixed"
    name: str = "asterisk"

    def __post_init__(self) -> None:
        """Refuse an unknown part order and an unknown language."""
        require_part_order(self.part_order)
        unknown = sorted(set(self.languages) - set(LICENSES))
        if unknown:
            raise SourceError(f"--language {unknown[0]}: asterisk has {', '.join(LICENSES)}")

    @property
    def options(self) -> dict[str, Any]:
        """Return the options that decide what comes out."""
        return {"languages": sorted(self.languages), "part_order": self.part_order}

    def rows(self) -> Iterator[Row]:
        """List every line of every transcript file, and every clip without one as a filtered row."""
        require_folder(self.root, "what `triweave fetch asterisk` wrote")
        files = dict(walk_files(self.root))
        clips = {_prompt_of(path): path for path in files if path.startswith("sounds/") and path.endswith(".wav")}
        texts = {language: self._transcripts(language) for language in LICENSES}
        if not clips or not any(texts.values()):
            raise SourceError(f"--input {self.root}: no sounds/ or transcripts/ in it; run `triweave fetch asterisk`")
        prompts = [(f"{language}/{prompt}", found) for language in texts for prompt, found in texts[language].items()]
        groups = group_rows([self._concept_keys(name, found, clips.get(name)) for name, found in prompts])
        for (name, found), group in zip(prompts, groups, strict=True):
            clip = clips.pop(name, None)
            recipe = {"clip": clip and [clip, files[clip]], "transcript": _spoken(found[0]), "group": group}
            yield Row(id=name, recipe=recipe, filtered=self._problem(name, found, clip))
        for clip in clips.values():
            yield Row(id=f"file:{clip}", recipe=[clip, files[clip]], filtered="a clip without a transcript")

    def _transcripts(self, language: str) -> dict[str, list[str]]:
        """Return prompt -> its transcripts; more than one where the file contradicts itself."""
        path = self.root / "transcripts" / f"core-sounds-{language}.txt.gz"
        if not path.is_file():
            return {}
        try:
            text = gzip.decompress(path.read_bytes()).decode("utf-8-sig", errors="replace")
        except (OSError, EOFError, zlib.error) as error:
            raise SourceError(f"{path}: cannot be read ({error}): fetch the corpus again") from None
        found: dict[str, list[str]] = {}
        for line in text.splitlines():
            if match := _LINE.fullmatch(line):
                texts = found.setdefault(match["prompt"], [])
                texts.extend({" ".join(match["text"].split())} - set(texts))
        return found

    def _concept_keys(self, name: str, texts: list[str], clip: str | None) -> list[str]:
        """Return the keys of a prompt for `group_rows`, whatever the options leave out."""
        content = [file_key(self.root / clip)] if clip else []
        return [f"prompt:{name}", *text_keys(*map(_spoken, texts)), *content]

    def _problem(self, name: str, texts: list[str], clip: str | None) -> str | None:
        spoken = _spoken(texts[0])
        if clip is None:
            return "no clip"
        if len(texts) > 1:
            return "two transcripts"
        if _ONE_REMARK.fullmatch(texts[0]):
            return "the transcript is a remark in brackets"
        if not text_keys(spoken):
            return "no transcript"
        if _REMARK.search(spoken):
            return "a transcript with a remark in brackets"
        if self.languages and name.partition("/")[0] not in self.languages:
            return "language is not among those asked for"
        return None

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one prompt."""
        language, _, prompt = row.id.partition("/")
        parts: dict[str, Part] = {
            "speech": encoder.encode_file(self.root / row.recipe["clip"][0]),
            "transcript": TextPart(text=row.recipe["transcript"]),
        }
        order = deal_order(row.id, _ORDERS) if self.part_order == "mixed" else ("speech", "transcript")
        return Document(
            id=row.id,
            parts=tuple(parts[name] for name in order),
            source={"corpus": CORPUS, "license": LICENSES[language]},
            labels={"language": language, "prompt": prompt, "kind": "speech", **group_labels(row.recipe["group"])},
        )


def _prompt_of(path: str) -> str:
    """Return `en/digits/1` for `sounds/en_US_f_Allison/digits/1.wav`."""
    voice, _, prompt = path.removeprefix("sounds/").removesuffix(".wav").partition("/")
    return f"{voice.partition('_')[0]}/{prompt}"


def _spoken(text: str) -> str:
    """Return a transcript without its brackets that hold no letter."""
    return " ".join(_SYMBOL.sub("", text).split())
