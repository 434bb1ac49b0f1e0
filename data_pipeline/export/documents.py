"""The documents of finished shards, media and all, checked against the index."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from triweave.data_pipeline.shards.index import IndexRow, read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.schema import Document
from triweave.data_pipeline.shards.stored_documents import stored_document
from triweave.data_pipeline.stream.reader import CorruptSampleError, ShardReader

ASKED_AHEAD = 64
"""Samples whose bytes are asked for ahead, where they are in an object store."""
Damaged = Callable[[str], None]
"""Told of each sample that cannot be read, in one line."""


def read_documents(manifest: Manifest, damaged: Damaged) -> Iterator[tuple[str, Document]]:
    """Yield (key, document) of every sample in the order of the shards; its media parts hold their bytes.

    A sample whose bytes are not what was built is left out and `damaged` told of it.
    """
    reader = ShardReader()
    for number in range(len(manifest.shards)):
        tar = str(manifest.tar_path(number))
        rows = [IndexRow(**content) for content in read_index(manifest, number).to_pylist()]
        for place, row in enumerate(rows):
            if place % ASKED_AHEAD == 0:
                reader.ask((tar, ahead.offset, ahead.size) for ahead in rows[place : place + 2 * ASKED_AHEAD])
            try:
                sample = reader.read(tar, row.offset, row.size, row.xxh3)
            except CorruptSampleError as error:
                damaged(f"{tar}, {row.key}: {error}")
                continue
            yield row.key, stored_document(sample, row)
