"""Documents: one ordered list of text and media parts, and their JSON form, version 1.

    KEY.json       {"v":1,"id":..,"parts":[{"modality":"text","text":..},
                    {"modality":"image","member":"0001.jpg","mime":..,"bytes":..,"w":..,"h":..,"xxh3":..,"phash":..},
                    {"modality":"audio","member":"0002.flac","mime":..,"bytes":..,"samples":..,"rate":..,"ms":..,
                     "xxh3":..}],
                    "source":{"corpus":..,..},"labels":{..}}
    KEY.0001.jpg   member = position in `parts`, extension = the real codec
    KEY.0002.flac

A KEY is `[0-9a-z_-]{1,64}`: no dots, because WebDataset readers cut a member's name at its first dot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from triweave.data_pipeline.errors import SchemaError
from triweave.data_pipeline.media.geometry import MediaInfo

SCHEMA_VERSION = 1
TEXT = "text"
ANNOTATIONS = "annotations"
"""The label that holds what points into the text; large, so the index goes without it."""
KEY_PATTERN = re.compile(r"[0-9a-z_-]{1,64}")
_HASH_CHARACTERS = 16
_SLUG_CHARACTERS = 64 - _HASH_CHARACTERS - 1
_INFO_FIELDS = {"width": "w", "height": "h", "samples": "samples", "rate": "rate"}


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """A run of text; `role` is set in conversations (`system`, `user`, `assistant`)."""

    text: str
    role: str | None = None

    @property
    def modality(self) -> str:
        """Return `text`, so that parts of both kinds can be asked the same question."""
        return TEXT

    @property
    def xxh3(self) -> int:
        """Return xxh3_64 of the UTF-8 text."""
        return xxhash.xxh3_64_intdigest(self.text.encode())


@dataclass(frozen=True, kw_only=True)
class MediaPart:
    """One picture, sound or other medium.

    data: encoded bytes; None when only the description was read.
    extension, mime: of the real codec, without a dot.
    xxh3: xxh3_64 of the bytes.
    member: name of its tar member after `KEY.`, set when the document is written; empty before.
    size_bytes: length of the bytes.
    alt: textual description that came with the medium, not a part of the text.
    t_ms: (start, end) on the document's clock.
    phash: perceptual hash of a picture (`dedup.images.phash`); None where none was asked for, or it shows nothing.
    """

    modality: str
    data: bytes | None
    extension: str
    mime: str
    info: MediaInfo
    xxh3: int
    size_bytes: int
    member: str = ""
    alt: str | None = None
    t_ms: tuple[int, int] | None = None
    phash: int | None = None


Part = TextPart | MediaPart


@dataclass(frozen=True, kw_only=True)
class Document:
    """An ordered list of parts with its origin.

    id: unique in its corpus, any string.
    source: `corpus` and whatever is known of `url`, `license` (SPDX) and `opt_out`.
    labels: JSON values to select, split and group by (language, category, ...).
    left_out: what of the input row is not in the document, one line for the ledger; not stored with the sample.
    """

    id: str
    parts: tuple[Part, ...]
    source: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    left_out: str = ""

    @property
    def corpus(self) -> str:
        """Return the corpus name, empty if unknown."""
        return str(self.source.get("corpus", ""))


def media_part(
    modality: str,
    data: bytes,
    extension: str,
    mime: str,
    info: MediaInfo,
    *,
    alt: str | None = None,
    t_ms: tuple[int, int] | None = None,
) -> MediaPart:
    """Return a media part of `data` with its hash and size filled in."""
    return MediaPart(
        modality=modality,
        data=data,
        extension=extension,
        mime=mime,
        info=info,
        xxh3=xxhash.xxh3_64_intdigest(data),
        size_bytes=len(data),
        alt=alt,
        t_ms=t_ms,
    )


def document_key(document_id: str) -> str:
    """Return the KEY of a document id: a readable slug, a dash, and xxh3_64 of the id in hexadecimal."""
    slug = re.sub(r"[^0-9a-z_]+", "-", document_id.lower()).strip("-")[:_SLUG_CHARACTERS].rstrip("-")
    return f"{slug or 'document'}-{xxhash.xxh3_64_hexdigest(document_id.encode())}"


def member_name(position: int, extension: str) -> str:
    """Return the member name (after `KEY.`) of the part at `position`, counted from 0."""
    return f"{position:04d}.{extension}"


def content_hash(parts: Sequence[Part]) -> str:
    """Return xxh3_128 of the parts as a hexadecimal string: equal for equal parts in any order.

    hash = xxh3_128(sorted((modality, xxh3_128(bytes)))); a source may deal one document's parts in any order, which
    must not hide that it is a copy.
    """
    digests = sorted(f"{part.modality}:{xxhash.xxh3_128_hexdigest(_content(part))}".encode() for part in parts)
    return xxhash.xxh3_128_hexdigest(b"\n".join(digests))


def _content(part: Part) -> bytes:
    if isinstance(part, TextPart):
        return part.text.encode()
    if part.data is None:
        raise SchemaError(f"a {part.modality} part without bytes has no content hash: read its member first")
    return part.data


def index_labels(document: Document) -> str:
    """Return the labels as the index holds them: JSON, without the annotations."""
    labels = {name: value for name, value in document.labels.items() if name != ANNOTATIONS}
    return json.dumps(labels, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def document_to_json(document: Document) -> bytes:
    """Return the UTF-8 JSON of a document, the same bytes for equal documents.

    Raises SchemaError when there is no part, a media part has no member name, or labels are not JSON.
    """
    if not document.parts:
        raise SchemaError(f"document {document.id!r} has no parts")
    content = {
        "v": SCHEMA_VERSION,
        "id": document.id,
        "parts": [_part_to_json(part) for part in document.parts],
        "source": dict(sorted(document.source.items())),
        "labels": dict(sorted(document.labels.items())),
    }
    try:
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text.encode()
    except (TypeError, ValueError) as error:
        raise SchemaError(f"document {document.id!r} is not JSON: {error}") from None


def document_from_json(data: bytes) -> Document:
    """Return the document described by the JSON of a KEY.json member; media parts come without bytes.

    Raises SchemaError when the JSON, its version or a part is not of the schema.
    """
    try:
        content = json.loads(data)
        version = content["v"]
        if version != SCHEMA_VERSION:
            raise SchemaError(f"document has schema version {version!r}, this Triweave reads {SCHEMA_VERSION}")
        return Document(
            id=content["id"],
            parts=tuple(_part_from_json(part) for part in content["parts"]),
            source=content["source"],
            labels=content["labels"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SchemaError(f"not the JSON of a document: {type(error).__name__}: {error}") from None


def _part_to_json(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        text: dict[str, Any] = {"modality": TEXT, "text": part.text}
        return text if part.role is None else text | {"role": part.role}
    if not part.member:
        raise SchemaError(f"a {part.modality} part has no member name; the writer gives it")
    content: dict[str, Any] = {
        "modality": part.modality,
        "member": part.member,
        "mime": part.mime,
        "bytes": part.size_bytes,
    }
    content |= {short: value for name, short in _INFO_FIELDS.items() if (value := getattr(part.info, name))}
    if part.info.samples:
        content["ms"] = part.info.ms
    content["xxh3"] = f"{part.xxh3:016x}"
    if part.phash is not None:
        content["phash"] = f"{part.phash:016x}"
    if part.alt is not None:
        content["alt"] = part.alt
    if part.t_ms is not None:
        content["t_ms"] = list(part.t_ms)
    return content


def _part_from_json(content: dict[str, Any]) -> Part:
    if content["modality"] == TEXT:
        return TextPart(text=content["text"], role=content.get("role"))
    return MediaPart(
        modality=content["modality"],
        data=None,
        extension=content["member"].partition(".")[2],
        mime=content["mime"],
        info=MediaInfo(**{name: content.get(short, 0) for name, short in _INFO_FIELDS.items()}),
        xxh3=int(content["xxh3"], 16),
        size_bytes=content["bytes"],
        member=content["member"],
        alt=content.get("alt"),
        t_ms=tuple(content["t_ms"]) if "t_ms" in content else None,
        phash=int(content["phash"], 16) if "phash" in content else None,
    )
