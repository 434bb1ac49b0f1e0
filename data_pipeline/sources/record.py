"""Turn a record of the document schema's shape (`parts`, `labels`, `source`) into a document; bytes and paths alike."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import TEXT, Document, MediaPart, Part, TextPart

ReadMember = Callable[[str], bytes]
"""Returns the bytes of a member named in a part, for records that come with members."""


def record_document(
    document_id: str,
    record: dict[str, Any],
    encoder: MediaEncoder,
    *,
    folder: Path | None = None,
    read_member: ReadMember | None = None,
) -> Document:
    """Return the document of a record.

    A part is {"modality": "text", "text": ...} or {"modality": NAME} with one of
        path: a file, relative to `folder` or absolute;
        bytes: bytes, or a base64 string;
        member: what `read_member` takes;
    and may carry `alt`, `t_ms`, `role`. Raises SourceError for any other shape, MediaError for bad media.
    """
    parts = record.get("parts")
    if not isinstance(parts, list) or not parts:
        raise SourceError("parts: must be a list of at least one part")
    labels, source = record.get("labels") or {}, record.get("source") or {}
    for name, value in (("labels", labels), ("source", source)):
        if not isinstance(value, dict):
            raise SourceError(f"{name}: must be an object, is {type(value).__name__}")
    return Document(
        id=document_id,
        parts=tuple(_part(number, part, encoder, folder, read_member) for number, part in enumerate(parts)),
        source=source,
        labels=labels,
    )


def _part(number: int, part: Any, encoder: MediaEncoder, folder: Path | None, read_member: ReadMember | None) -> Part:
    if not isinstance(part, dict) or not isinstance(part.get("modality"), str):
        raise SourceError(f"parts[{number}]: must be an object with a modality")
    if part["modality"] == TEXT:
        if not isinstance(part.get("text"), str):
            raise SourceError(f"parts[{number}].text: must be a string")
        return TextPart(text=part["text"], role=part.get("role"))
    given = {name: part[name] for name in ("path", "bytes", "member") if part.get(name) is not None}
    if "member" in given:
        given.pop("bytes", None)  # in the schema's own JSON it is the member's size
    if len(given) != 1:
        raise SourceError(f"parts[{number}]: needs exactly one of path and bytes, has {', '.join(given) or 'neither'}")
    [(name, value)] = given.items()
    if name == "path" and folder is not None and isinstance(value, str):
        media = encoder.encode_file(folder / value, part["modality"])
    elif name == "bytes":
        media = encoder.encode(part["modality"], _bytes(number, value))
    elif name == "member" and read_member is not None:
        media = encoder.encode(part["modality"], read_member(value))
    else:
        raise SourceError(f"parts[{number}].{name}: not available in this source")
    return _with_notes(media, part)


def _bytes(number: int, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError):
        raise SourceError(f"parts[{number}].bytes: must be bytes, or base64 in JSON") from None


def _with_notes(media: MediaPart, part: dict[str, Any]) -> MediaPart:
    t_ms = part.get("t_ms")
    return replace(media, alt=part.get("alt"), t_ms=(int(t_ms[0]), int(t_ms[1])) if t_ms is not None else None)
