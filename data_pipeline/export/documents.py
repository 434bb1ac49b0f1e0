"""The documents of finished shards, media and all, checked against the index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.schema import Document, MediaPart, Part, document_from_json
from triweave.data_pipeline.stream.reader import CorruptSampleError, ShardReader

Damaged = Callable[[str], None]
"""Told of each sample that cannot be read, in one line."""


def read_documents(manifest: Manifest, damaged: Damaged) -> Iterator[tuple[str, Document]]:
    """Yield (key, document) of every sample in the order of the shards; its media parts hold their bytes.

    A sample whose bytes are not what was built is left out and `damaged` told of it.
    """
    reader = ShardReader()
    for number in range(len(manifest.shards)):
        tar = str(manifest.tar_path(number))
        for row in read_index(manifest, number).to_pylist():
            try:
                sample = reader.read(tar, row["offset"], row["size"], row["xxh3"])
            except CorruptSampleError as error:
                damaged(f"{tar}, {row['key']}: {error}")
                continue
            start = row["json_offset"] - row["offset"]
            document = document_from_json(bytes(sample[start : start + row["json_size"]]))
            parts: list[Part] = []
            for part, place, size in zip(document.parts, row["part_offset"], row["part_size"], strict=True):
                if isinstance(part, MediaPart):
                    start = place - row["offset"]
                    part = replace(part, data=bytes(sample[start : start + size]))
                parts.append(part)
            yield row["key"], replace(document, parts=tuple(parts))
