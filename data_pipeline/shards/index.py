"""The columnar index beside every shard: one row per sample, in tar order, enough to plan and to read by byte range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from triweave.data_pipeline.errors import ShardDamagedError, ShardMissingError
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.storage.files import read_file
from triweave.data_pipeline.storage.location import shown

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("id", pa.string()),
        ("corpus", pa.string()),
        ("labels", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("xxh3", pa.uint64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("part_modality", pa.list_(pa.string())),
        ("part_offset", pa.list_(pa.int64())),
        ("part_size", pa.list_(pa.int64())),
        ("part_width", pa.list_(pa.int32())),
        ("part_height", pa.list_(pa.int32())),
        ("part_samples", pa.list_(pa.int64())),
        ("part_rate", pa.list_(pa.int32())),
        ("part_xxh3", pa.list_(pa.uint64())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class IndexRow:
    """One sample of a shard.

    labels: JSON text, without the annotations (`schema.index_labels`).
    offset, size: byte range of the whole sample in the tar, first header to the end of the last member's padding.
    xxh3: xxh3_64 of exactly that range.
    json_offset, json_size: byte range of the JSON itself, absolute in the tar.
    part_offset: absolute start of each part's bytes; -1 for text, which lives in the JSON.
    part_size: bytes of each part; UTF-8 bytes for text.
    part_width, part_height, part_samples, part_rate: pixels, samples and Hz; 0 where they mean nothing.
    part_xxh3: xxh3_64 of each part's bytes (of the UTF-8 text for text).
    """

    key: str
    id: str
    corpus: str
    labels: str
    offset: int
    size: int
    xxh3: int
    json_offset: int
    json_size: int
    part_modality: list[str]
    part_offset: list[int]
    part_size: list[int]
    part_width: list[int]
    part_height: list[int]
    part_samples: list[int]
    part_rate: list[int]
    part_xxh3: list[int]

    def moved_to(self, offset: int) -> IndexRow:
        """Return the row of the same sample when it starts at `offset` of its tar."""
        shift = offset - self.offset
        return replace(
            self,
            offset=offset,
            json_offset=self.json_offset + shift,
            part_offset=[start if start < 0 else start + shift for start in self.part_offset],
        )


def write_index(path: Path, rows: Sequence[IndexRow]) -> None:
    """Write the Parquet index of one shard; equal rows give equal bytes."""
    table = pa.Table.from_pylist([vars(row) for row in rows], schema=INDEX_SCHEMA)
    pq.write_table(table, path, compression="zstd", row_group_size=65536)


def read_index(manifest: Manifest, shard_number: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the index of one shard as a table, all columns or the given ones.

    Raises ShardMissingError when the file is gone and ShardDamagedError when its bytes are not the ones the manifest
    names: Parquet has no checksum of its own, and one wrong number would make another plan.
    """
    path = shown(manifest.index_path(shard_number))
    xxh3 = manifest.shards[shard_number].index_xxh3
    advice = f"run `triweave verify {manifest.location}`"
    try:
        data = read_file(path, xxh3)
        if xxhash.xxh3_64_hexdigest(data) != xxh3:
            raise ShardDamagedError(f"{path} is damaged (not the bytes that were written): {advice}")
        file = pq.ParquetFile(pa.BufferReader(data))
        table = file.read(None if columns is None else list(columns), use_threads=False)
    except FileNotFoundError:
        raise ShardMissingError(f"{path} is missing: restore it, or build the shards again") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise ShardDamagedError(f"{path} is damaged ({error}): {advice}") from None
    return table
