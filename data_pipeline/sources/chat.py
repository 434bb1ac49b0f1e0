"""Conversations about media: the JSON of LLaVA, ShareGPT and their many children.

    [{"id": "7", "image": "train2017/0007.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "An owl."}]}]

    {"id": "8", "images": ["a.png"], "audios": ["b.wav"], "messages": [{"role": "user", "content": "<image> <audio>"},
        {"role": "assistant", "content": [{"type": "text", "text": "A bird."}]}]}

`image`, `images`, `audio`, `audios` are a path or a list of them, relative to `media` (the file's folder unless given).
The n-th marker `<image>` or `<audio>` stands for the n-th path; without markers the media come first. Turns become text
parts with their role. Media are what a conversation is about: one that is missing or damaged fails its row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import Document
from triweave.data_pipeline.sources.base import Row
from triweave.data_pipeline.sources.collected_parts import CollectedParts, file_size
from triweave.data_pipeline.sources.json_records import json_records, read_json_record

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}
"""What corpora call a speaker -> our role."""
_TURNS = ("conversations", "conversation", "messages")


@dataclass(frozen=True, kw_only=True)
class ChatSource:
    """The conversations of the .json or .jsonl file `root`.

    media: folder that the paths of media are relative to; the file's own unless given.
    """

    root: Path
    media: Path | None = None
    name: str = "chat"

    @property
    def options(self) -> dict[str, Any]:
        """Return no options: where the media lie does not change what comes out."""
        return {}

    def rows(self) -> Iterator[Row]:
        """List one row per record."""
        for record in json_records(self.root):
            unnamed = f"record:{record.number}"
            if record.value is None:
                yield Row(id=unnamed, failed=f"record {record.number} {record.problem}")
                continue
            sizes = [file_size(self._media, path) for paths in _paths(record.value).values() for path in paths]
            name = record.value.get("id")
            document_id = str(name) if isinstance(name, (str, int)) and str(name) else unnamed
            # ids repeat in LLaVA's own mixture; the number keeps them apart
            yield Row(id=f"{document_id}#{record.number}", recipe=[record.start, record.size, sizes])

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one conversation."""
        record = read_json_record(self.root, *row.recipe[:2])
        collected = CollectedParts(root=self._media, encoder=encoder)
        paths = _paths(record)
        turns = _turns(record)
        waiting = {name: iter(found) for name, found in paths.items()}
        for name, found in paths.items():
            marked = sum(text.count(f"<{name}>") for _, text in turns)
            if marked > len(found):
                raise SourceError(f"{marked} markers <{name}> for {len(found)} paths in {name!r}")
            for _ in range(len(found) - marked):
                collected.add_file(next(waiting[name]), name)
        for role, text in turns:
            for piece in _MARKER.split(text):
                name = piece[1:-1]
                if name in waiting and piece == f"<{name}>":
                    collected.add_file(next(waiting[name]), name)
                else:
                    collected.add_text(piece, role)
        if collected.left_out:
            raise SourceError(collected.left_out)
        return Document(id=row.id, parts=tuple(collected.parts), source={"corpus": self.root.stem})

    @property
    def _media(self) -> Path:
        return self.root.parent if self.media is None else self.media


_MARKER = re.compile(f"({'|'.join(f'<{name}>' for name in MODALITIES)})")


def _paths(record: dict[str, Any]) -> dict[str, list[str]]:
    """Return modality -> the paths that a record names, for every modality."""
    found: dict[str, list[str]] = {}
    for name in MODALITIES:
        value = record.get(name) or record.get(f"{name}s") or []
        items = value if isinstance(value, list) else [value]
        found[name] = [item for item in items if isinstance(item, str)]
    return found


def _turns(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (role, text) of every turn. Raises SourceError for another shape."""
    turns = next((record[name] for name in _TURNS if name in record), None)
    if not isinstance(turns, list) or not turns:
        raise SourceError(f"has no turns; a record has one of {', '.join(_TURNS)}, a list")
    result = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise SourceError(f"turn {number}: must be an object")
        speaker = turn.get("from", turn.get("role"))
        if speaker not in ROLES:
            raise SourceError(f"turn {number}: unknown speaker {speaker!r}; known are {', '.join(ROLES)}")
        result.append((ROLES[speaker], _text(number, turn.get("value", turn.get("content")))))
    return result


def _text(number: int, content: Any) -> str:
    """Return a turn's text; a list of typed pieces has its media as markers."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise SourceError(f"turn {number}: its text must be a string or a list of pieces")
    pieces = []
    for piece in content:
        kind = piece.get("type") if isinstance(piece, dict) else None
        if kind == "text" and isinstance(piece.get("text"), str):
            pieces.append(piece["text"])
        elif kind in MODALITIES:
            pieces.append(f"<{kind}>")
        else:
            raise SourceError(f"turn {number}: a piece must be text or one of {', '.join(MODALITIES)}, is {kind!r}")
    return "\n".join(pieces)
