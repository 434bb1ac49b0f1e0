"""Tux Paint stamps: one document per picture and language (picture, caption, and speech where somebody spoke it).

    stamps/<category>/.../<stem>.{png,svg}   the picture, RGBA
    <stem>.txt                               line 1 the English caption, then LANG.utf8=caption; of equal captions
                                             the first stays, and every one that was spoken
    <stem>_desc_LANG.ogg, <stem>_desc.ogg    the caption spoken in LANG, in English
    <stem>.ogg|wav                           a sound effect; with the picture and the English caption, a document too
    <stem>_LANG.ogg                          the effect in a language (spoken digits): filtered

Concepts (labels `group` and `split`): stems that share an English caption, the text or the bytes of a spoken caption,
or the bytes of a picture or effect are one, over the whole corpus, whatever is built of it.
Part order: see `part_order`; `canonical` is picture, caption, speech.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.media import images
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import Document, Part, TextPart
from triweave.data_pipeline.sources.base import Row, require_folder, walk_files
from triweave.data_pipeline.sources.concepts import file_key, group_labels, text_keys
from triweave.data_pipeline.sources.part_order import (
    PICTURE_AND_CAPTION,
    PICTURE_CAPTION_AND_SPEECH,
    PartOrder,
    deal_order,
    require_part_order,
)
from triweave.data_pipeline.splits import group_rows

SOURCE = {"corpus": "tuxpaint-stamps", "license": "GPL-2.0-or-later"}
SVG_SIDE_PX = 512
"""Longer side of rendered SVGs when pictures keep their size."""
_ENGLISH = "en"
_EFFECT = "effect"
_CAPTION_LINE = re.compile(r"(?P<language>[A-Za-z_@]+)\.utf8=(?P<caption>.*)")
_SPEECH = re.compile(r"(?P<stem>.+)_desc(?:_(?P<language>[A-Za-z_@]+))?\.(?:ogg|wav)")
_VARIANT = re.compile(r".*_(?:mirror|flip)(?:_.*)?")
_SOUND_SUFFIXES = (".ogg", ".wav")
_STEM_SUFFIXES = (".png", ".svg", *_SOUND_SUFFIXES)


@dataclass(frozen=True)
class _File:
    path: str
    size: int

    @property
    def recipe(self) -> list[Any]:
        return [self.path, self.size]


@dataclass(frozen=True)
class _Stem:
    """One stamp: its captions by language, and its concept."""

    name: str
    captions: dict[str, str]
    group: str


@dataclass(frozen=True, kw_only=True)
class TuxPaintSource:
    """The stamps of Tux Paint.

    root: the `stamps` folder, or a folder that holds one (what `triweave fetch tuxpaint` wrote).
    languages: keep only these; empty keeps all. Sound effects count as English.
    speech, effects: whether clips are used; without speech its documents become picture and caption.
    svg: render pictures that exist as SVG alone (needs the extra `svg`); otherwise their rows are filtered.
    part_order: `mixed` or `canonical`, see `triweave.data_pipeline.sources.part_order`.
    """

    root: Path
    languages: tuple[str, ...] = ()
    speech: bool = True
    effects: bool = True
    svg: bool = False
    part_order: PartOrder = "mixed"
    name: str = "tuxpaint"

    def __post_init__(self) -> None:
        """Refuse an unknown part order, and SVG without its renderer."""
        if self.svg and importlib.util.find_spec("resvg_py") is None:
            raise SourceError("--svg needs the package resvg-py: install it with `pip install 'triweave[svg]'`")
        require_part_order(self.part_order)

    @property
    def options(self) -> dict[str, Any]:
        """Return the options that decide what comes out."""
        return {
            "languages": sorted(self.languages),
            "speech": self.speech,
            "effects": self.effects,
            "svg": self.svg,
            "part_order": self.part_order,
        }

    @property
    def stamps(self) -> Path:
        """Return the folder of categories."""
        inner = self.root / "stamps"
        return inner if inner.is_dir() else self.root

    def rows(self) -> Iterator[Row]:
        """List (picture, language) pairs, effects, and every other picture or clip as a filtered row."""
        require_folder(self.root, "the stamps folder of Tux Paint (get it with `triweave fetch tuxpaint`)")
        files = {path: _File(path, size) for path, size in walk_files(self.stamps)}
        if not any(path.endswith(".txt") for path in files):
            raise SourceError(f"--input {self.root}: no stamps in it (no .txt files); run `triweave fetch tuxpaint`")
        used: set[str] = set()
        speech = _speech_clips(files)
        stems = {
            path.removesuffix(".txt"): _captions((self.stamps / path).read_bytes())
            for path in files
            if path.endswith(".txt")
        }
        keys = [self._concept_keys(stem, captions, files, speech) for stem, captions in stems.items()]
        for (stem, captions), group in zip(stems.items(), group_rows(keys), strict=True):
            yield from self._stem_rows(_Stem(stem, captions, group), files, speech, used)
        for path in files:
            reason = _why_unused(path, files) if path not in used else None
            if reason is not None:
                yield Row(id=f"file:{path}", recipe=files[path].recipe, filtered=reason)

    def _concept_keys(
        self, stem: str, captions: dict[str, str], files: dict[str, _File], speech: dict[str, dict[str, str]]
    ) -> list[str]:
        """Return the keys of a stem for `group_rows`, whatever the options leave out."""
        clips = speech.get(stem, {})
        spoken = [caption for language, caption in captions.items() if language.lower() in clips]
        media = [path for suffix in _STEM_SUFFIXES if (path := f"{stem}{suffix}") in files]
        content = [file_key(self.stamps / path) for path in (*media, *clips.values())]
        return [f"stem:{stem}", *text_keys(captions[_ENGLISH], *spoken), *content]

    def _stem_rows(
        self, whole: _Stem, files: dict[str, _File], speech: dict[str, dict[str, str]], used: set[str]
    ) -> Iterator[Row]:
        stem, captions = whole.name, whole.captions
        picture = files.get(f"{stem}.png") or files.get(f"{stem}.svg")
        used.update((f"{stem}.png", f"{stem}.svg"))
        no_picture = _picture_problem(picture, self.svg)
        clips = speech.get(stem, {})
        same = {"picture": picture and picture.recipe, "stem": stem, "group": whole.group}
        first_with: dict[str, str] = {}
        for language, caption in captions.items():
            clip = clips.get(language.lower())
            used.update([clip] if clip else [])
            recipe = {**same, "language": language, "caption": caption}
            if self.speech and clip:
                recipe["speech"] = files[clip].recipe
            reason = no_picture or ("no caption" if not caption else self._language_problem(language))
            if reason is None and first_with.setdefault(caption, language) != language and "speech" not in recipe:
                # left to the duplicate check, the survivor's language would be a matter of the shuffle
                reason = "the caption of another language"
            yield Row(id=f"{stem}:{language}", recipe=recipe, filtered=reason)
        effect = next((clip for suffix in _SOUND_SUFFIXES if (clip := f"{stem}{suffix}") in files), None)
        if effect is not None:
            used.add(effect)
            recipe = {**same, "language": _ENGLISH, "caption": captions[_ENGLISH], "effect": files[effect].recipe}
            off = None if self.effects else "sound effects are switched off"
            reason = no_picture or off or self._language_problem(_ENGLISH)
            yield Row(id=f"{stem}:{_EFFECT}", recipe=recipe, filtered=reason)

    def _language_problem(self, language: str) -> str | None:
        unwanted = self.languages and language not in self.languages
        return "language is not among those asked for" if unwanted else None

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one picture in one language, or of one sound effect."""
        recipe = row.recipe
        parts: dict[str, Part] = {
            "image": self._picture(recipe["picture"][0], encoder),
            "caption": TextPart(text=recipe["caption"]),
        }
        kind = "caption"
        for sound in ("speech", _EFFECT):
            if sound in recipe:
                kind = sound
                parts[sound] = encoder.encode_file(self.stamps / recipe[sound][0])
        labels = {
            "category": recipe["stem"].partition("/")[0],
            "language": recipe["language"],
            "stem": recipe["stem"],
            "kind": kind,
            **group_labels(recipe["group"]),
        }
        order = part_order(row.id, kind, self.part_order)
        return Document(id=row.id, parts=tuple(parts[name] for name in order), source=dict(SOURCE), labels=labels)

    def _picture(self, path: str, encoder: MediaEncoder) -> Part:
        if not path.endswith(".svg"):
            return encoder.encode_file(self.stamps / path, shared=True)
        max_side_px = encoder.options.image_max_side_px or SVG_SIDE_PX
        render = partial(images.render_svg, max_side_px=max_side_px)
        return encoder.encode_file(self.stamps / path, "image", shared=True, convert=render)


def part_order(document_id: str, kind: str, order: PartOrder) -> tuple[str, ...]:
    """Return the names of a document's parts in order; `kind` is caption, speech or effect.

    >>> part_order("animals/cat:de", "speech", "canonical")
    ('image', 'caption', 'speech')
    """
    if kind == _EFFECT:
        return ("image", _EFFECT, "caption")
    if order == "canonical":
        return ("image", "caption", "speech") if kind == "speech" else ("image", "caption")
    return deal_order(document_id, PICTURE_CAPTION_AND_SPEECH if kind == "speech" else PICTURE_AND_CAPTION)


def _speech_clips(files: dict[str, _File]) -> dict[str, dict[str, str]]:
    """Return stem -> lower-case language -> clip path."""
    clips: dict[str, dict[str, str]] = {}
    for path in files:
        if match := _SPEECH.fullmatch(path):
            clips.setdefault(match["stem"], {})[(match["language"] or _ENGLISH).lower()] = path
    return clips


def _captions(text: bytes) -> dict[str, str]:
    """Return language -> caption with white space collapsed, English first."""
    english, *others = text.decode("utf-8-sig", errors="replace").splitlines() or [""]
    captions = {_ENGLISH: " ".join(english.split())}
    for line in others:
        if match := _CAPTION_LINE.fullmatch(line.strip()):
            captions[match["language"]] = " ".join(match["caption"].split())
    return captions


def _picture_problem(picture: _File | None, svg: bool) -> str | None:
    if picture is None:
        return "no picture"
    if picture.path.endswith(".svg") and not svg:
        return "the picture is an SVG (build with --svg)"
    return None


def _why_unused(path: str, files: dict[str, _File]) -> str | None:
    """Return why a picture or clip makes no document of its own; None for files that are neither."""
    file = PurePosixPath(path)
    if file.suffix in (".png", ".svg"):
        return "a mirrored or flipped variant" if _VARIANT.fullmatch(file.stem) else "a picture without captions"
    if file.suffix not in _SOUND_SUFFIXES:
        return None
    if _SPEECH.fullmatch(path):
        return "speech without a caption in its language"
    stem = str(file.with_suffix(""))
    while "_" in stem:
        stem = stem.rpartition("_")[0]
        if f"{stem}.txt" in files:
            return "a sound effect in one language"
    return "a sound without a picture"
