"""Shards as other tools see them: tarfile, webdataset, Energon's offsets, and our own index."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xxhash

from triweave.data_pipeline.errors import SchemaError
from triweave.data_pipeline.media.geometry import MediaInfo
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.schema import Document, MediaPart, TextPart, document_from_json, media_part
from triweave.data_pipeline.shards.writer import ShardWriter, encode_sample


def document(number: int) -> Document:
    image = media_part("image", b"i" * (700 * number), "png", "image/png", MediaInfo(width=3, height=number))
    clip = media_part("audio", b"a" * 512, "flac", "audio/flac", MediaInfo(samples=number, rate=8000))
    return Document(id=f"document {number}", parts=(image, TextPart(text=f"Nummer {number} ü"), clip))


def write_shard(folder: Path, documents: int = 4) -> Path:
    with ShardWriter(folder, "shard-000000") as writer:
        for number in range(documents):
            writer.append(encode_sample(f"key-{number}", document(number)))
        entry = writer.seal()
    assert entry.samples == documents
    assert entry.tar_bytes == (folder / "shard-000000.tar").stat().st_size
    return folder / "shard-000000.tar"


def test_tarfile_reads_members_in_order(tmp_path: Path) -> None:
    with tarfile.open(write_shard(tmp_path)) as archive:
        members = archive.getmembers()
        assert [member.name for member in members[3:6]] == ["key-1.json", "key-1.0000.png", "key-1.0002.flac"]
        assert {(member.mtime, member.uid, member.gid, member.mode, member.uname) for member in members} == {
            (0, 0, 0, 0o644, "")
        }
        reader = archive.extractfile("key-3.0000.png")
        assert reader is not None
        assert reader.read() == b"i" * 2100


def test_bytes_equal_those_of_tarfile_itself(tmp_path: Path) -> None:
    tar = write_shard(tmp_path)
    expected = io.BytesIO()
    with tarfile.open(tar) as archive, tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as copy:
        for member in archive:
            plain = tarfile.TarInfo(member.name)
            plain.size = member.size
            copy.addfile(plain, archive.extractfile(member))
    assert tar.read_bytes() == expected.getvalue()


def test_index_points_at_the_bytes(tmp_path: Path) -> None:
    data = write_shard(tmp_path).read_bytes()
    for number, row in enumerate(pq.read_table(tmp_path / "shard-000000.parquet").to_pylist()):
        assert xxhash.xxh3_64_intdigest(data[row["offset"] : row["offset"] + row["size"]]) == row["xxh3"]
        parsed = document_from_json(data[row["json_offset"] :][: row["json_size"]])
        assert parsed.id == row["id"] == f"document {number}"
        assert row["part_modality"] == ["image", "text", "audio"]
        assert row["part_offset"][1] == -1
        for position, part in enumerate(document(number).parts):
            if isinstance(part, MediaPart):
                start = row["part_offset"][position]
                assert data[start : start + row["part_size"][position]] == part.data
            assert row["part_xxh3"][position] == part.xxh3
        assert (row["part_width"], row["part_height"]) == ([3, 0, 0], [number, 0, 0])
        assert (row["part_samples"], row["part_rate"]) == ([0, 0, number], [0, 0, 8000])


def test_offsets_are_those_energon_writes(tmp_path: Path) -> None:
    """One native uint64 per sample (where its first header starts), then the end of the last sample."""
    tar = write_shard(tmp_path)
    offsets = struct.unpack("5Q", (tmp_path / "shard-000000.tar.idx").read_bytes())
    with tarfile.open(tar) as archive:
        starts = [member.offset for member in archive if member.name.endswith(".json")]
        assert list(offsets) == [*starts, archive.offset]


def test_webdataset_reads_the_same_samples(tiny_shards: Manifest) -> None:
    webdataset = pytest.importorskip("webdataset")
    seen = 0
    for number in range(len(tiny_shards.shards)):
        tar = tiny_shards.tar_path(number)
        rows = pq.read_table(tiny_shards.index_path(number)).to_pylist()
        samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows]
        for sample, row in zip(samples, rows, strict=True):
            parsed = document_from_json(sample["json"])
            media = [part for part in parsed.parts if isinstance(part, MediaPart)]
            assert [xxhash.xxh3_64_intdigest(sample[part.member]) for part in media] == [part.xxh3 for part in media]
            assert json.loads(row["labels"]) == parsed.labels
            seen += 1
    assert seen == tiny_shards.samples == 24


def test_equal_documents_give_equal_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        write_shard(folder)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_an_unsealed_shard_leaves_nothing(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "shard-000000") as writer:
        writer.append(encode_sample("key", document(1)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["a.b", "", "A", "ü", "a/b", "x" * 65])
def test_bad_keys_are_refused(key: str) -> None:
    with pytest.raises(SchemaError, match="key"):
        encode_sample(key, document(1))
