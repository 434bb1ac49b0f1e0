"""Emoji, a synthetic corpus: one document per emoji, its picture, its Unicode name as caption, and the name spoken.

    emoji.jsonl              one object a line: code, name, category, voice
    pictures/<code>.png      OpenMoji's drawing, rendered
    speech/<code>.flac       the name, spoken by eSpeak NG

Concepts (labels `group` and `split`): emoji that share the normalised name or the bytes of the picture. They are named
for code points, so that another release of the renderer or of the speech library moves none of them.
Part order: see `part_order`; `canonical` is picture, caption, speech.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triweave.data_pipeline.errors import SourceError
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

SOURCE = {"corpus": "emoji", "license": "CC-BY-SA-4.0", "synthetic": True}
_INDEX_NAME = "emoji.jsonl"
_FIELDS = ("code", "name", "category", "voice")


@dataclass(frozen=True, kw_only=True)
class EmojiSource:
    """The emoji corpus.

    root: what `triweave fetch emoji` wrote.
    speech: whether the spoken names are used.
    part_order: `mixed` or `canonical`, see `triweave.data_pipeline.sources.part_order`.
    """

    root: Path
    speech: bool = True
    part_order: PartOrder = "mixed"
    name: str = "emoji"

    def __post_init__(self) -> None:
        """Refuse an unknown part order."""
        require_part_order(self.part_order)

    @property
    def options(self) -> dict[str, Any]:
        """Return the options that decide what comes out."""
        return {"speech": self.speech, "part_order": self.part_order}

    def rows(self) -> Iterator[Row]:
        """List one row per line of the index; a line that is none of ours is a failed row."""
        require_folder(self.root, "what `triweave fetch emoji` wrote")
        index = self.root / _INDEX_NAME
        if not index.is_file():
            raise SourceError(f"--input {self.root}: has no {_INDEX_NAME}; run `triweave fetch emoji`")
        sizes = dict(walk_files(self.root))
        lines = [line for line in index.read_text(encoding="utf-8").splitlines() if line.strip()]
        entries = [_entry(line) for line in lines]
        groups = group_rows([self._concept_keys(number, entry) for number, entry in enumerate(entries)])
        for number, (entry, group) in enumerate(zip(entries, groups, strict=True)):
            if entry is None:
                yield Row(id=f"line:{number + 1}", failed=f"line {number + 1} of {_INDEX_NAME} is damaged")
                continue
            picture, clip = _files(entry["code"])
            recipe = {**entry, "group": group, "picture": [picture, sizes.get(picture)]}
            if self.speech:
                recipe["speech"] = [clip, sizes.get(clip)]
            needed = (picture, clip) if self.speech else (picture,)
            missing = next((path for path in needed if path not in sizes), None)
            yield Row(id=entry["code"], recipe=recipe, failed=f"{missing} is missing" if missing else None)

    def _concept_keys(self, number: int, entry: dict[str, str] | None) -> list[str]:
        """Return the keys of an emoji for `group_rows`, whatever the options leave out."""
        if entry is None:
            return [f"line:{number}"]
        picture, _ = _files(entry["code"])
        return [f"code:{entry['code']}", f"picture:{file_key(self.root / picture)}", *text_keys(entry["name"])]

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one emoji."""
        recipe = row.recipe
        parts: dict[str, Part] = {
            "image": encoder.encode_file(self.root / recipe["picture"][0]),
            "caption": TextPart(text=recipe["name"]),
        }
        if self.speech:
            parts["speech"] = encoder.encode_file(self.root / recipe["speech"][0])
        orders = PICTURE_CAPTION_AND_SPEECH if self.speech else PICTURE_AND_CAPTION
        order = deal_order(row.id, orders) if self.part_order == "mixed" else tuple(parts)
        labels = {
            "category": recipe["category"],
            "language": "en",
            "stem": recipe["code"],
            "kind": "speech" if self.speech else "caption",
            "voice": recipe["voice"],
            "synthetic": True,
            **group_labels(recipe["group"]),
        }
        return Document(id=row.id, parts=tuple(parts[name] for name in order), source=dict(SOURCE), labels=labels)


def _entry(line: str) -> dict[str, str] | None:
    """Return the fields of a line of the index, None where it has others or a code that is no plain name."""
    try:
        content = json.loads(line)
        entry = {name: content[name] for name in _FIELDS}
    except (ValueError, KeyError, TypeError):
        return None
    plain = all(isinstance(value, str) and value for value in entry.values())
    return entry if plain and entry["code"].replace("-", "").isalnum() else None


def _files(code: str) -> tuple[str, str]:
    """Return the paths of the picture and the clip below the root."""
    return f"pictures/{code}.png", f"speech/{code}.flac"
