"""Shards as the Parquet of OBELICS, which the source `interleaved` and the field's other readers take.

    OUT/part-00000.parquet   texts, images (one set per position), metadata and general_metadata as JSON, language
    OUT/media/<sha256 of the picture's URL>.<ending>

A picture's URL is `triweave:<key>/<member>`. Other media have no place in the layout and are left out and counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from triweave.data_pipeline.export.exported import Exported, Exporting
from triweave.data_pipeline.shards.schema import Document, MediaPart, TextPart

SCHEMA = pa.schema(
    [
        ("texts", pa.list_(pa.string())),
        ("images", pa.list_(pa.string())),
        ("metadata", pa.string()),
        ("general_metadata", pa.string()),
        ("language", pa.string()),
    ]
)
GROUP_ROWS = 1000
FILE_ROWS = 100_000
IMAGE = "image"


def export_obelics(documents: Iterator[tuple[str, Document]], out: Path) -> Exported:
    """Write documents that have a text or a picture; those that have neither are left out."""
    exporting = Exporting()
    (out / "media").mkdir()
    writer: pq.ParquetWriter | None = None
    rows: list[dict[str, Any]] = []
    files = written = 0

    def flush() -> None:
        nonlocal writer, files, written
        if not rows:
            return
        if writer is None:
            writer = pq.ParquetWriter(out / f"part-{files:05d}.parquet", SCHEMA, compression="zstd")
            files += 1
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
        written += len(rows)
        rows.clear()
        if written >= FILE_ROWS:
            writer.close()
            writer, written = None, 0

    try:
        for key, document in documents:
            row = _row(key, document, out / "media", exporting)
            if row is None:
                exporting.leave_out("documents without text and picture")
                continue
            rows.append(row)
            exporting.documents += 1
            if len(rows) >= GROUP_ROWS:
                flush()
        flush()
    finally:
        if writer is not None:
            writer.close()
    return exporting.done(out)


def _row(key: str, document: Document, media: Path, exporting: Exporting) -> dict[str, Any] | None:
    texts: list[str | None] = []
    images: list[str | None] = []
    notes: list[dict[str, Any] | None] = []
    for part in document.parts:
        if isinstance(part, TextPart):
            texts.append(part.text)
            images.append(None)
            notes.append(None)
        elif part.modality == IMAGE:
            url = f"triweave:{key}/{part.member}"
            _write(media, url, part)
            exporting.media += 1
            texts.append(None)
            images.append(url)
            notes.append({"src": url, **({"alt_text": part.alt} if part.alt else {})})
        else:
            exporting.leave_out(f"{part.modality} parts")
    if not texts:
        return None
    general = {"id": document.id, **document.source, "labels": document.labels}
    language = document.labels.get("language")
    return {
        "texts": texts,
        "images": images,
        "metadata": json.dumps(notes, ensure_ascii=False),
        "general_metadata": json.dumps(general, ensure_ascii=False),
        "language": language if isinstance(language, str) else None,
    }


def _write(media: Path, url: str, part: MediaPart) -> None:
    assert part.data is not None
    (media / f"{hashlib.sha256(url.encode()).hexdigest()}.{part.extension}").write_bytes(part.data)
