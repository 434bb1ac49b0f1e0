"""Shards as the JSON of LLaVA, which the source `chat` and the field's finetuning scripts take.

    OUT/conversations.json   [{"id", "image" | "audio": path or list of paths, "conversations": [{"from", "value"}]}]
    OUT/media/<key>.<member>

A turn is the media that come before a text and the text, with a marker for each medium. Text with a role keeps it; of a
document without roles the media are asked with and the text answers: `human` gives the markers, `gpt` the text.
Documents without text are left out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triweave.data_pipeline.export.exported import Exported, Exporting
from triweave.data_pipeline.shards.schema import Document, TextPart

SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}
"""Our role -> what LLaVA calls the speaker."""


def export_llava(documents: Iterator[tuple[str, Document]], out: Path) -> Exported:
    """Write one record per document with text, in order, as one JSON array."""
    exporting = Exporting()
    (out / "media").mkdir()
    with open(out / "conversations.json", "w", encoding="utf-8") as file:
        file.write("[")
        for key, document in documents:
            if not any(isinstance(part, TextPart) for part in document.parts):
                exporting.leave_out("documents without text")
                continue
            file.write(",\n " if exporting.documents else "\n ")
            json.dump(_record(key, document, out, exporting), file, ensure_ascii=False)
            exporting.documents += 1
        file.write("\n]\n")
    return exporting.done(out)


def _record(key: str, document: Document, out: Path, exporting: Exporting) -> dict[str, Any]:
    paths: dict[str, list[str]] = {}
    turns: list[dict[str, str]] = []
    markers: list[str] = []
    for part in document.parts:
        if not isinstance(part, TextPart):
            assert part.data is not None
            name = f"media/{key}.{part.member}"
            (out / name).write_bytes(part.data)
            exporting.media += 1
            paths.setdefault(part.modality, []).append(name)
            markers.append(f"<{part.modality}>")
        elif part.role is None and markers:
            turns += [_turn("human", markers), _turn("gpt", [part.text])]
            markers.clear()
        else:
            turns.append(_turn(SPEAKERS.get(part.role or "assistant", "gpt"), [*markers, part.text]))
            markers.clear()
    if markers:
        turns.append(_turn("human", markers))
    media = {name: found[0] if len(found) == 1 else found for name, found in paths.items()}
    return {"id": document.id, **media, "conversations": turns}


def _turn(speaker: str, lines: list[str]) -> dict[str, str]:
    return {"from": speaker, "value": "\n".join(lines)}
