"""Fish Fillets NG: one document per level and language, the level's picture and then its dialogue, voiced line by line.

    script/<level>/dialogs_<language>.lua   dialogId("name", "font_of_the_speaker", "English") dialogStr("own language")
    script/<level>/models.lua               createRoom(width, height, "images/"..codename.."/picture.png")
    sound/<level>/<language>/<name>.ogg     some lines, in Czech nearly all

A line is its clip, where there is one, and its text; lines stand in the order of the script, which is about that of the
game. The jokes and remarks that levels share make a document each. Levels without a clip in a language are filtered.
The Lua files are read as text and never run.

Concepts (labels `group` and `split`): a level in all its languages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import Document
from triweave.data_pipeline.sources.base import FilteredError, Row, require_folder, walk_files
from triweave.data_pipeline.sources.collected_parts import CollectedParts
from triweave.data_pipeline.sources.concepts import group_labels
from triweave.data_pipeline.splits import group_rows

SOURCE = {"corpus": "fillets-ng", "license": "GPL-2.0-only"}
SHARED = {"bore": "borejokes", "black": "blackjokes", "border": "border"}
"""Scripts that levels share, `script/share/<name>_dialogs_<language>.lua` -> folder of their clips in `sound/share`."""
_DIALOGS = re.compile(r"script/(?P<level>[^/]+)/(?:(?P<shared>\w+)_)?dialogs_(?P<language>\w+)\.lua")
_STRING = r'"((?:[^"\\]|\\.)*)"'
_CALLS = re.compile(
    rf"dialogId\(\s*{_STRING}\s*,\s*{_STRING}\s*,\s*{_STRING}\s*\)|dialogStr\(\s*{_STRING}\s*\)", re.DOTALL
)
_ROOM = re.compile(r'createRoom\(\s*\d+\s*,\s*\d+\s*,\s*"images/"\s*\.\.\s*codename\s*\.\.\s*"/([^"/\\]+)"')
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
MAX_SCRIPT_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a dialogue: the name of its clip and what is said."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class FilletsSource:
    """The levels of the game.

    root: what `triweave fetch fillets` wrote.
    languages: keep only these; empty keeps all.
    """

    root: Path
    languages: tuple[str, ...] = ()
    name: str = "fillets"

    @property
    def options(self) -> dict[str, Any]:
        """Return the options that decide what comes out."""
        return {"languages": sorted(self.languages)}

    def rows(self) -> Iterator[Row]:
        """List one row per dialogue file."""
        require_folder(self.root, "what `triweave fetch fillets` wrote")
        files = dict(walk_files(self.root))
        found = [match for path in files if (match := _DIALOGS.fullmatch(path))]
        own = {"share": set(SHARED)}  # other files with a prefix are cut scenes and demos
        scripts = [match for match in found if match["shared"] in own.get(match["level"], {None})]
        if not scripts:
            raise SourceError(f"--input {self.root}: no script/*/dialogs_*.lua in it; run `triweave fetch fillets`")
        groups = group_rows([[f"level:{_level(match)}"] for match in scripts])
        for match, group in zip(scripts, groups, strict=True):
            level, language = _level(match), match["language"]
            sounds = f"sound/{level}/{language}/"
            clips = [[path, size] for path, size in files.items() if path.startswith(sounds) and path.endswith(".ogg")]
            models = [[path, files[path]] for path in (f"script/{level}/models.lua",) if path in files]
            filtered = None if clips else "no line is voiced"
            if self.languages and language not in self.languages:
                filtered = "language is not among those asked for"
            recipe = {"script": [match[0], files[match[0]]], "models": models, "clips": clips, "group": group}
            yield Row(id=f"{level}/{language}", recipe=recipe, filtered=filtered)

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of a level in one language."""
        level, _, language = row.id.rpartition("/")
        collected = CollectedParts(root=self.root, encoder=encoder)
        for path, _size in row.recipe["models"]:
            if room := _ROOM.search(self._read(path)):
                collected.add_file(f"images/{level}/{room[1]}")
        voiced = {path for path, _ in row.recipe["clips"]}
        clips = 0
        for line in read_lines(self._read(row.recipe["script"][0])):
            clip = f"sound/{level}/{language}/{line.name}.ogg"
            if clip in voiced:
                clips += collected.add_file(clip)
            collected.add_text(line.text)
        if not clips:
            raise FilteredError("no clip belongs to a line")
        return Document(
            id=row.id,
            parts=tuple(collected.parts),
            source=dict(SOURCE),
            labels={"language": language, "level": level, "kind": "dialogue", **group_labels(row.recipe["group"])},
            left_out=collected.left_out,
        )

    def _read(self, path: str) -> str:
        with open(self.root / path, "rb") as file:
            return file.read(MAX_SCRIPT_BYTES).decode("utf-8", errors="replace")


def read_lines(script: str) -> list[Line]:
    """Return the lines of a dialogue file; a `dialogStr` replaces the English text of the `dialogId` before it."""
    lines: list[Line] = []
    for name, _font, english, own in _CALLS.findall(script):
        if name:
            lines.append(Line(name=_unescape(name), text=_unescape(english)))
        elif lines:
            lines[-1] = Line(name=lines[-1].name, text=_unescape(own))
    return lines


def _level(match: re.Match[str]) -> str:
    return f"share/{SHARED[match['shared']]}" if match["level"] == "share" else match["level"]


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda match: {"n": "\n", "t": " "}.get(match[1], match[1]), text)
