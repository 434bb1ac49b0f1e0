"""Every kind of damage is named: shard, key, member."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from triweave.data_pipeline.errors import DataError, ShardDamagedError
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.schema import document_key
from triweave.data_pipeline.shards.verify import Damage, verify

SHARD = 1


@pytest.fixture
def manifest(tiny_shards: Manifest, tmp_path: Path) -> Manifest:
    return Manifest.load(shutil.copytree(tiny_shards.root, tmp_path / "shards"))


@pytest.fixture
def row(manifest: Manifest) -> dict[str, Any]:
    """A row of shard SHARD with a picture and a clip, and not the shard's first."""
    rows = read_index(manifest, SHARD).to_pylist()
    return next(row for row in rows[1:] if {"image", "audio"} <= set(row["part_modality"]))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def damage(manifest: Manifest) -> list[Damage]:
    return list(verify(manifest.root).damage)


def test_whole_shards(manifest: Manifest) -> None:
    calls: list[tuple[int, int]] = []
    report = verify(manifest.root, lambda done, total: calls.append((done, total)))
    assert report.damage == ()
    assert (report.shards, report.samples) == (len(manifest.shards), 24)
    assert calls[-1] == (report.shards, report.shards)


def test_a_flipped_byte_in_a_member(manifest: Manifest, row: dict[str, Any]) -> None:
    position = row["part_modality"].index("audio")
    flip(manifest.tar_path(SHARD), row["part_offset"][position] + 10)
    (found,) = damage(manifest)
    assert (found.shard, found.key, found.member) == ("shard-000001", row["key"], f"{position:04d}.flac")
    assert "bytes" in found.detail


@pytest.mark.parametrize("where", ["json", "label", "name in json", "header", "json header", "padding"])
def test_a_flipped_byte_around_members(manifest: Manifest, row: dict[str, Any], where: str) -> None:
    position = row["part_modality"].index("image")
    image = row["part_offset"][position]
    data = manifest.tar_path(SHARD).read_bytes()
    offset, member = {
        "json": (row["json_offset"], "json"),
        "label": (data.index(b'"corpus":"', row["json_offset"]) + 10, "json"),
        "name in json": (data.index(f'"{position:04d}.'.encode(), row["json_offset"]) + 3, "json"),
        "header": (image - 512, f"{position:04d}"),
        "json header": (row["json_offset"] - 512, "json"),
        "padding": (image + row["part_size"][position], f"{position:04d}"),
    }[where]
    assert where != "padding" or row["part_size"][position] % 512
    flip(manifest.tar_path(SHARD), offset)
    found = damage(manifest)
    assert [(item.shard, item.key, item.member.partition(".")[0]) for item in found] == [
        ("shard-000001", row["key"], member)
    ]


def test_every_flip_in_an_index_keeps_it_from_being_read(manifest: Manifest) -> None:
    path = manifest.index_path(SHARD)
    original = path.read_bytes()
    for offset in range(0, len(original), len(original) // 100):
        flip(path, offset)
        with pytest.raises(ShardDamagedError, match=r"shard-000001\.parquet is damaged"):
            read_index(manifest, SHARD)
        path.write_bytes(original)
    assert read_index(manifest, SHARD).num_rows


def test_every_single_flip_in_a_shard_is_noticed(manifest: Manifest) -> None:
    tar = manifest.tar_path(SHARD)
    original = tar.read_bytes()
    for offset in range(0, len(original), len(original) // 50):
        flip(tar, offset)
        assert damage(manifest), offset
        tar.write_bytes(original)
    assert not damage(manifest)


def test_two_flips_name_two_samples(manifest: Manifest) -> None:
    rows = read_index(manifest, SHARD).to_pylist()
    for row in (rows[0], rows[-1]):
        flip(manifest.tar_path(SHARD), row["json_offset"])
    assert {found.key for found in damage(manifest)} == {rows[0]["key"], rows[-1]["key"]}


def test_a_cut_tar_names_every_lost_key(manifest: Manifest, row: dict[str, Any]) -> None:
    tar = manifest.tar_path(SHARD)
    tar.write_bytes(tar.read_bytes()[: row["offset"] + 600])
    found = damage(manifest)
    rows = read_index(manifest, SHARD).to_pylist()
    lost = [item["key"] for item in rows if item["offset"] >= row["offset"]]
    assert [item.key for item in found if item.key] == lost
    assert all(item.kind == "cut" for item in found)
    assert "ends at byte" in found[-1].detail


def test_a_tar_cut_at_a_member_boundary(manifest: Manifest, row: dict[str, Any]) -> None:
    """What webdataset reads without any complaint."""
    tar = manifest.tar_path(SHARD)
    tar.write_bytes(tar.read_bytes()[: row["offset"]])
    assert row["key"] in {item.key for item in damage(manifest)}


def test_empty_and_longer_tars(manifest: Manifest) -> None:
    with open(manifest.tar_path(0), "ab") as file:
        file.write(b"more")
    manifest.tar_path(SHARD).write_bytes(b"")
    found = damage(manifest)
    assert [(item.shard, item.kind) for item in found] == [("shard-000000", "changed"), ("shard-000001", "cut")]


@pytest.mark.parametrize("suffix", [".tar", ".tar.idx", ".parquet"])
def test_missing_and_changed_files(manifest: Manifest, suffix: str) -> None:
    path = manifest.root / f"shard-000001{suffix}"
    original = path.read_bytes()
    path.unlink()
    (found,) = damage(manifest)
    assert (found.shard, found.kind) == ("shard-000001", "missing")
    assert path.name in found.detail
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    (found,) = damage(manifest)
    assert (found.shard, found.kind) == ("shard-000001", "changed")
    assert path.name in found.detail


def test_members_are_named_even_without_an_index(manifest: Manifest, row: dict[str, Any]) -> None:
    flip(manifest.tar_path(SHARD), row["part_offset"][row["part_modality"].index("image")] + 5)
    manifest.index_path(SHARD).unlink()
    found = damage(manifest)
    assert any(item.key == row["key"] and item.member.startswith("0000.") for item in found)


def test_ledger_manifest_and_unlisted_shards(manifest: Manifest) -> None:
    shutil.copy(manifest.tar_path(0), manifest.root / "shard-000099.tar")
    flip(manifest.ledger_path, 200)
    found = damage(manifest)
    assert [item.kind for item in found] == ["changed", "unlisted"]
    assert "ledger.parquet" in found[0].detail
    (manifest.root / "manifest.json").write_text("{}")
    assert "manifest.json" in damage(manifest)[0].detail
    (manifest.root / "manifest.json").unlink()
    (missing,) = damage(manifest)
    assert missing.kind == "missing"
    assert "manifest.json" in missing.detail


def test_a_folder_that_never_held_shards_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a shard folder"):
        verify(tmp_path)
    with pytest.raises(DataError, match="not a shard folder"):
        verify(tmp_path / document_key("nothing"))
