"""Write shards: USTAR tars whose bytes depend on the documents alone, with `.tar.idx` and Parquet index beside them.

Headers come from the standard library's `tarfile` with fixed time, owner and mode: webdataset's `TarWriter` would load
torch into commands that only touch data. A sample's members are contiguous, JSON first, and never cross shards.
`.tar.idx` is Energon's: one native uint64 per sample, its byte offset, and a last one for the end of the samples.
"""

from __future__ import annotations

import os
import struct
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import xxhash

from triweave.data_pipeline.errors import SchemaError
from triweave.data_pipeline.shards.index import IndexRow, write_index
from triweave.data_pipeline.shards.manifest import ShardEntry, file_xxh3, sync_folder
from triweave.data_pipeline.shards.schema import (
    KEY_PATTERN,
    Document,
    MediaPart,
    Part,
    TextPart,
    document_to_json,
    index_labels,
    member_name,
)


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """A document as the tar bytes of its members, with its index row relative to a sample that starts at 0."""

    data: bytes
    row: IndexRow


def member_header(name: str, size_bytes: int) -> bytes:
    """Return the one USTAR header block of a member; fixed time, owner and mode."""
    member = tarfile.TarInfo(name)
    member.size = size_bytes
    member.mode = 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def encode_sample(key: str, document: Document) -> EncodedSample:
    """Return a document's members as tar bytes: KEY.json, then KEY.<position>.<extension> for each medium.

    Raises SchemaError for a bad key, a document without parts, or a media part without bytes.
    """
    if not KEY_PATTERN.fullmatch(key):
        raise SchemaError(f"key {key!r} of document {document.id!r} does not match {KEY_PATTERN.pattern}")
    parts = tuple(_with_member(part, position) for position, part in enumerate(document.parts))
    document = replace(document, parts=parts)
    description = document_to_json(document)
    blocks: list[bytes] = []
    json_offset = offset = _append(blocks, f"{key}.json", description, 0)
    offset += padded(len(description))
    part_offset = []
    for part in parts:
        if isinstance(part, TextPart):
            part_offset.append(-1)
            continue
        if part.data is None:
            raise SchemaError(f"document {document.id!r}: part {part.member} has no bytes")
        part_offset.append(_append(blocks, f"{key}.{part.member}", part.data, offset))
        offset = part_offset[-1] + padded(len(part.data))
    data = b"".join(blocks)
    return EncodedSample(data=data, row=index_row(key, document, data, json_offset, len(description), part_offset))


def _with_member(part: Part, position: int) -> Part:
    return replace(part, member=member_name(position, part.extension)) if isinstance(part, MediaPart) else part


def _append(blocks: list[bytes], name: str, data: bytes, offset: int) -> int:
    """Append one member to `blocks` and return where its data starts when its header starts at `offset`."""
    header = member_header(name, len(data))
    blocks += (header, data, bytes(padded(len(data)) - len(data)))
    return offset + len(header)


def padded(size_bytes: int) -> int:
    """Return the bytes that a member's content takes in a tar: whole blocks."""
    return -(-size_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def index_row(
    key: str, document: Document, data: bytes, json_offset: int, json_size: int, part_offset: list[int]
) -> IndexRow:
    """Return the index row of a sample that starts at 0; data: the tar bytes of its members.

    document: its media parts as the JSON has them. part_offset: start of each part's bytes, -1 for text.
    """
    parts = document.parts
    media = [part.info if isinstance(part, MediaPart) else None for part in parts]
    return IndexRow(
        key=key,
        id=document.id,
        corpus=document.corpus,
        labels=index_labels(document),
        offset=0,
        size=len(data),
        xxh3=xxhash.xxh3_64_intdigest(data),
        json_offset=json_offset,
        json_size=json_size,
        part_modality=[part.modality for part in parts],
        part_offset=part_offset,
        part_size=[len(part.text.encode()) if isinstance(part, TextPart) else part.size_bytes for part in parts],
        part_width=[info.width if info else 0 for info in media],
        part_height=[info.height if info else 0 for info in media],
        part_samples=[info.samples if info else 0 for info in media],
        part_rate=[info.rate if info else 0 for info in media],
        part_xxh3=[part.xxh3 for part in parts],
    )


def write_both_indices(index: Path, idx: Path, rows: list[IndexRow], end: int) -> None:
    """Write the index of a shard and its `.tar.idx`: where every sample starts, and where the last one ends."""
    write_index(index, rows)
    idx.write_bytes(struct.pack(f"{len(rows) + 1}Q", *(row.offset for row in rows), end))


class ShardWriter:
    """Write one shard; its three files appear under their names only when `seal` has written them whole.

    Memory: the index rows, not the samples. Leaving the `with` block without `seal` removes what was written.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.tar_bytes = 0
        self.rows: list[IndexRow] = []
        self._folder = folder
        self._finals = [folder / f"{name}{suffix}" for suffix in (".tar", ".tar.idx", ".parquet")]
        self._temporaries = [path.with_name(f"{path.name}.tmp") for path in self._finals]
        self._digest = xxhash.xxh3_64()
        self._file = open(self._temporaries[0], "wb")  # noqa: SIM115 - closed by seal or __exit__

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        for path in self._temporaries:
            path.unlink(missing_ok=True)

    def append(self, sample: EncodedSample) -> None:
        """Add one sample behind those already there."""
        self.rows.append(sample.row.moved_to(self.tar_bytes))
        self._write(sample.data)

    def seal(self) -> ShardEntry:
        """End the tar, write both indices, make all three durable and give them their names."""
        samples_end = self.tar_bytes
        end = self.tar_bytes + 2 * tarfile.BLOCKSIZE
        self._write(bytes(-(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - self.tar_bytes))
        self._file.close()
        _, idx, index = self._temporaries
        write_both_indices(index, idx, self.rows, samples_end)
        entry = ShardEntry(
            name=self.name,
            samples=len(self.rows),
            tar_bytes=self.tar_bytes,
            tar_xxh3=self._digest.hexdigest(),
            index_xxh3=file_xxh3(index),
            idx_xxh3=file_xxh3(idx),
        )
        for temporary, final in zip(self._temporaries, self._finals, strict=True):
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            temporary.replace(final)
        sync_folder(self._folder)
        return entry

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.tar_bytes += len(data)
