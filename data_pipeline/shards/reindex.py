"""The index of a shard from its tar alone: what `ShardWriter` knew of each sample, read back from the members.

Every member is checked against the xxh3 in its sample's JSON on the way.
"""

from __future__ import annotations

import mmap
import tarfile
from collections.abc import Iterator
from pathlib import Path

import xxhash

from triweave.data_pipeline.errors import SchemaError, ShardDamagedError
from triweave.data_pipeline.shards.index import IndexRow
from triweave.data_pipeline.shards.schema import MediaPart, document_from_json
from triweave.data_pipeline.shards.writer import EncodedSample, index_row, padded, write_both_indices

_JSON = ".json"
_Member = tuple[str, int, int]
"""Name, and byte range [start, end) of the content in the tar."""


def stored_samples(tar: Path) -> Iterator[EncodedSample]:
    """Yield the samples of a tar that `ShardWriter` wrote, in order, as they were appended to it.

    Raises ShardDamagedError where a header, a description or a member's bytes are not what was written.
    """
    with open(tar, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        held: list[_Member] = []
        for member in _members(data, tar):
            if member[0].endswith(_JSON) and held:
                yield _sample(data, held, tar)
                held = []
            held.append(member)
        if held:
            yield _sample(data, held, tar)


def write_indices(tar: Path, index: Path, idx: Path) -> int:
    """Write both indices of a tar, with the bytes that `ShardWriter.seal` gave them; return the samples.

    Raises ShardDamagedError as `stored_samples` does.
    """
    rows: list[IndexRow] = []
    end = 0
    for sample in stored_samples(tar):
        rows.append(sample.row.moved_to(end))
        end += sample.row.size
    write_both_indices(index, idx, rows, end)
    return len(rows)


def _members(data: mmap.mmap, tar: Path) -> Iterator[_Member]:
    at = 0
    while (header := data[at : at + tarfile.BLOCKSIZE]).strip(b"\0"):
        try:
            name, size = _name_and_size(header)
        except ValueError as error:
            raise ShardDamagedError(f"{tar} is damaged at byte {at} ({error}): run `triweave verify`") from None
        start = at + tarfile.BLOCKSIZE
        at = start + padded(size)
        if at > len(data):
            raise ShardDamagedError(f"{tar} ends within {name}: run `triweave verify`")
        yield name, start, start + size


def _name_and_size(header: bytes) -> tuple[str, int]:
    """Read a header that `member_header` made; a fifth of the time of `tarfile`, which knows all kinds of them.

    Raises ValueError where it is none, by its checksum or its type.
    """
    if len(header) < tarfile.BLOCKSIZE or int(header[148:154], 8) != 256 + sum(header[:148]) + sum(header[156:]):
        raise ValueError("a header with a wrong checksum")
    if header[156:157] != tarfile.REGTYPE:
        raise ValueError(f"a member of type {header[156:157]!r}")
    return header[:100].rstrip(b"\0").decode("ascii"), int(header[124:135], 8)


def _sample(data: mmap.mmap, members: list[_Member], tar: Path) -> EncodedSample:
    (name, json_start, json_end), *media = members
    key, first = name.removesuffix(_JSON), json_start - tarfile.BLOCKSIZE
    content = data[first : padded(members[-1][2])]
    ranges = {name: (start - first, end - first) for name, start, end in media}
    damaged = f"{tar}: sample {key} is damaged: run `triweave verify`"
    try:
        document = document_from_json(content[json_start - first : json_end - first])
    except SchemaError:
        raise ShardDamagedError(damaged) from None
    part_offset = []
    for part in document.parts:
        if not isinstance(part, MediaPart):
            part_offset.append(-1)
            continue
        start, stop = ranges.pop(f"{key}.{part.member}", (0, 0))
        if xxhash.xxh3_64_intdigest(content[start:stop]) != part.xxh3:
            raise ShardDamagedError(damaged)
        part_offset.append(start)
    if ranges:
        raise ShardDamagedError(damaged)
    row = index_row(key, document, content, json_start - first, json_end - json_start, part_offset)
    return EncodedSample(data=content, row=row)
