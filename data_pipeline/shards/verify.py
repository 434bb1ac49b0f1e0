"""Verify a shard folder: hash every byte again, and name the shard, key and member of whatever differs.

tar, .tar.idx, index, ledger   xxh3_64 against the manifest
every sample                   xxh3_64 against the index
a damaged sample               every member's header, bytes and padding against the index and its JSON
a tar whose index is damaged   every member against the xxh3 in its sample's JSON
"""

from __future__ import annotations

import mmap
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import xxhash

from triweave.data_pipeline.errors import DataError, SchemaError
from triweave.data_pipeline.shards.index import IndexRow, read_index
from triweave.data_pipeline.shards.ledger import count_statuses, read_ledger
from triweave.data_pipeline.shards.manifest import LEDGER_NAME, MANIFEST_NAME, Manifest, ShardEntry, file_xxh3
from triweave.data_pipeline.shards.schema import Document, MediaPart, document_from_json, index_labels
from triweave.data_pipeline.shards.writer import member_header
from triweave.data_pipeline.storage.files import file_names, file_size, local_files
from triweave.data_pipeline.storage.location import is_remote, shown

DamageKind = Literal["missing", "cut", "changed", "unlisted"]
_JSON = "json"
_INDEX_ROWS = 4096
"""Index rows that are unpacked at a time."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong.

    shard: the shard's name; empty for files of the whole folder.
    key, member: the sample, and its member's name after `KEY.`; empty when the damage is not inside one.
    kind: `missing` (a file), `cut` (ends too early), `changed` (other bytes), `unlisted` (not in the manifest).
    """

    shard: str
    key: str = ""
    member: str = ""
    kind: DamageKind
    detail: str

    def __str__(self) -> str:
        """Return one line: where, what."""
        where = " ".join(filter(None, (self.shard or "folder", self.key, self.member)))
        return f"{where}: {self.kind}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was looked at and what is wrong; whole when `damage` is empty."""

    shards: int
    samples: int
    tar_bytes: int
    damage: tuple[Damage, ...]


def verify(folder: Path, on_progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Verify a shard folder, here or at `s3://bucket/prefix`, of which a shard at a time is copied.

    `on_progress(shards done, shards in all)` is called after every shard.
    Raises DataError when there is no such folder or it never was one of shards.
    """
    if file_size(folder / MANIFEST_NAME) is None:
        return _without_manifest(folder)
    try:
        manifest = Manifest.load(folder)
    except DataError as error:
        damage = Damage(shard="", kind="changed", detail=str(error))
        return VerifyReport(shards=0, samples=0, tar_bytes=0, damage=(damage,))
    found: list[Damage] = []
    for number, entry in enumerate(manifest.shards):
        with local_files(folder, shard_files(entry)) as copies:
            found += _verify_shard(replace(manifest, root=copies), number)
        if on_progress is not None:
            on_progress(number + 1, len(manifest.shards))
    with local_files(folder, [LEDGER_NAME]) as copies:
        found += _verify_ledger(replace(manifest, root=copies))
    found += _unlisted(manifest)
    return VerifyReport(
        shards=len(manifest.shards),
        samples=manifest.samples,
        tar_bytes=sum(shard.tar_bytes for shard in manifest.shards),
        damage=tuple(found),
    )


def shard_files(entry: ShardEntry) -> list[str]:
    """Return the names of a shard's files: tar, offsets, index."""
    return [f"{entry.name}{suffix}" for suffix in (".tar", ".tar.idx", ".parquet")]


def _tars(folder: Path) -> list[str]:
    names = file_names(folder) if is_remote(folder) or folder.is_dir() else {}
    return sorted(name for name in names if name.startswith("shard-") and name.endswith(".tar"))


def _without_manifest(folder: Path) -> VerifyReport:
    shards = _tars(folder)
    if not shards:
        raise DataError(f"{shown(folder)}: is not a shard folder; give the --out of a `triweave build`")
    detail = f"{MANIFEST_NAME} is gone, or the build did not finish: run the same `triweave build` again"
    damage = Damage(shard="", kind="missing", detail=detail)
    return VerifyReport(shards=len(shards), samples=0, tar_bytes=0, damage=(damage,))


def _verify_shard(manifest: Manifest, number: int) -> Iterator[Damage]:
    entry = manifest.shards[number]
    yield from _compare_file(entry.name, manifest.idx_path(number), entry.idx_xxh3)
    index_damage = list(_compare_file(entry.name, manifest.index_path(number), entry.index_xxh3))
    yield from index_damage
    tar = manifest.tar_path(number)
    if not tar.is_file():
        yield Damage(shard=entry.name, kind="missing", detail=f"{tar.name} ({entry.samples} samples)")
        return
    located = list(_damaged_members(tar, entry, None if index_damage else read_index(manifest, number)))
    yield from located
    yield from _compare_tar(tar, entry, located_samples=bool(located))


def _compare_file(shard: str, path: Path, xxh3: str) -> Iterator[Damage]:
    if not path.is_file():
        yield Damage(shard=shard, kind="missing", detail=path.name)
    elif file_xxh3(path) != xxh3:
        yield Damage(shard=shard, kind="changed", detail=f"{path.name}: not the bytes that were written")


def _compare_tar(tar: Path, entry: ShardEntry, *, located_samples: bool) -> Iterator[Damage]:
    size = tar.stat().st_size
    if size < entry.tar_bytes:
        detail = f"{tar.name} ends at byte {size} of {entry.tar_bytes}"
        yield Damage(shard=entry.name, kind="cut", detail=detail)
    elif size > entry.tar_bytes:
        detail = f"{tar.name} has {size - entry.tar_bytes} bytes too many"
        yield Damage(shard=entry.name, kind="changed", detail=detail)
    elif not located_samples and file_xxh3(tar) != entry.tar_xxh3:
        detail = f"{tar.name}: bytes differ, but none of a sample: its end, or what its index can not tell"
        yield Damage(shard=entry.name, kind="changed", detail=detail)


def _damaged_members(tar: Path, entry: ShardEntry, index: pa.Table | None) -> Iterator[Damage]:
    """Yield the damaged members of a tar, by its index if that is whole, else by the JSON of its samples."""
    if tar.stat().st_size == 0:
        return
    if index is None:
        if file_xxh3(tar) != entry.tar_xxh3:
            yield from _walk_members(tar, entry.name)
        return
    with open(tar, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
            for start in range(0, index.num_rows, _INDEX_ROWS):
                for content in index.slice(start, _INDEX_ROWS).to_pylist():
                    row = IndexRow(**content)
                    sample = view[row.offset : row.offset + row.size]
                    if len(sample) < row.size or xxhash.xxh3_64_intdigest(sample) != row.xxh3:
                        yield from _damage_in_sample(entry.name, row, bytes(sample))
                    sample.release()
        finally:
            view.release()


def _damage_in_sample(shard: str, row: IndexRow, sample: bytes) -> Iterator[Damage]:
    """Yield the damaged members of one sample whose hash differs; at least one."""
    if len(sample) < row.size:
        at = f"its bytes end at {len(sample)} of {row.size}" if sample else "it lies beyond the tar's end"
        yield Damage(shard=shard, key=row.key, kind="cut", detail=at)
        return
    document, problem = _described(row, sample[row.json_offset - row.offset :][: row.json_size])
    found = []
    for name, offset, size, xxh3 in _expected_members(row, sample, document):
        found += list(_damage_in_member(shard, row, sample, name, offset - row.offset, size, xxh3))
    described = any(damage.member == _JSON for damage in found)
    if problem is not None and not described:
        found.insert(0, Damage(shard=shard, key=row.key, member=_JSON, kind="changed", detail=problem))
    elif not found:
        detail = "bytes of the description differ"
        found.append(Damage(shard=shard, key=row.key, member=_JSON, kind="changed", detail=detail))
    yield from found


def _described(row: IndexRow, description: bytes) -> tuple[Document | None, str | None]:
    """Return the document of a sample's JSON, and what is wrong with it as far as the index can tell."""
    try:
        document = document_from_json(description)
    except SchemaError as error:
        return None, str(error)
    hashes = [part.xxh3 for part in document.parts]
    if (document.id, index_labels(document), hashes) != (row.id, row.labels, row.part_xxh3):
        return (document if len(hashes) == len(row.part_xxh3) else None), "the description differs from the index"
    return document, None


def _expected_members(
    row: IndexRow, sample: bytes, document: Document | None
) -> Iterator[tuple[str, int, int, int | None]]:
    """Yield (member name, offset in the tar, size, xxh3) of a sample; the JSON's hash is not in the index."""
    yield _JSON, row.json_offset, row.json_size, None
    for position, offset in enumerate(row.part_offset):
        if offset >= 0:
            start = offset - row.offset
            name = _name_in_header(row, sample[start - tarfile.BLOCKSIZE : start], position)
            part = document.parts[position] if document is not None else None
            name = name or (part.member if isinstance(part, MediaPart) else f"{position:04d}")
            yield name, offset, row.part_size[position], row.part_xxh3[position]


def _name_in_header(row: IndexRow, header: bytes, position: int) -> str | None:
    """Return a member's name by its tar header, which has a checksum, where the JSON may be what is damaged."""
    try:
        key, _, name = tarfile.TarInfo.frombuf(header, "utf-8", "replace").name.partition(".")
    except tarfile.HeaderError:
        return None
    return name if key == row.key and name.startswith(f"{position:04d}.") else None


def _damage_in_member(
    shard: str, row: IndexRow, sample: bytes, name: str, offset: int, size: int, xxh3: int | None
) -> Iterator[Damage]:
    header = sample[offset - tarfile.BLOCKSIZE : offset]
    known_name = "." in name or name == _JSON
    padding = sample[offset + size : offset + size + -size % tarfile.BLOCKSIZE]
    wrong = []
    if known_name and header != member_header(f"{row.key}.{name}", size):
        wrong.append("tar header")
    if xxh3 is not None and xxhash.xxh3_64_intdigest(sample[offset : offset + size]) != xxh3:
        wrong.append(f"bytes ({size}, xxh3 is not {xxh3:016x})")
    if any(padding):
        wrong.append("padding")
    if wrong:
        yield Damage(shard=shard, key=row.key, member=name, kind="changed", detail=" and ".join(wrong))


def _walk_members(tar: Path, shard: str) -> Iterator[Damage]:
    """Compare the members of a tar with the JSON of their samples, as far as the tar can be read."""
    expected: dict[str, int] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                key, _, name = member.name.partition(".")
                reader: Any = archive.extractfile(member)
                data = reader.read() if reader is not None else b""
                if name == _JSON:
                    parts = document_from_json(data).parts
                    expected = {f"{key}.{part.member}": part.xxh3 for part in parts if isinstance(part, MediaPart)}
                elif expected.get(member.name) != xxhash.xxh3_64_intdigest(data):
                    detail = "bytes differ from the xxh3 in its sample's JSON"
                    yield Damage(shard=shard, key=key, member=name, kind="changed", detail=detail)
    except SchemaError as error:
        yield Damage(shard=shard, key=key, member=_JSON, kind="changed", detail=str(error))
    except (tarfile.TarError, OSError) as error:
        yield Damage(shard=shard, kind="cut", detail=f"{tar.name} can not be read on: {error}")


def _verify_ledger(manifest: Manifest) -> Iterator[Damage]:
    damage = list(_compare_file("", manifest.ledger_path, manifest.ledger_xxh3))
    yield from damage
    if not damage:
        counts = count_statuses(read_ledger(manifest.ledger_path, ["status"]))
        if counts != {status: number for status, number in manifest.rows.items() if number}:
            yield Damage(shard="", kind="changed", detail=f"{LEDGER_NAME} counts {counts}, manifest {manifest.rows}")
    if manifest.rows.get("kept") != manifest.samples:
        detail = f"{MANIFEST_NAME} keeps {manifest.rows.get('kept')} rows in {manifest.samples} samples"
        yield Damage(shard="", kind="changed", detail=detail)


def _unlisted(manifest: Manifest) -> Iterator[Damage]:
    listed = {shard.name for shard in manifest.shards}
    for tar in _tars(manifest.root):
        name = tar.removesuffix(".tar")
        if name not in listed:
            yield Damage(shard=name, kind="unlisted", detail=f"{tar} is not in {MANIFEST_NAME}: remove it")
