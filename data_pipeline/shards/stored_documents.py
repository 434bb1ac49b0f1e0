"""Documents as they stand in finished shards, media and all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from triweave.data_pipeline.shards.index import IndexRow
from triweave.data_pipeline.shards.schema import Document, MediaPart, Part, document_from_json


def stored_document(sample: bytes | memoryview, row: IndexRow) -> Document:
    """Return the document of a sample's bytes; its media parts hold theirs.

    row: the sample's row of the index, wherever in its tar it stands. Raises SchemaError.
    """
    start = row.json_offset - row.offset
    document = document_from_json(bytes(sample[start : start + row.json_size]))
    return replace(document, parts=tuple(_parts(sample, row, document)))


def _parts(sample: bytes | memoryview, row: IndexRow, document: Document) -> Iterator[Part]:
    for part, place, size in zip(document.parts, row.part_offset, row.part_size, strict=True):
        start = place - row.offset
        yield replace(part, data=bytes(sample[start : start + size])) if isinstance(part, MediaPart) else part
