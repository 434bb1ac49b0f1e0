"""The index of a shard from its tar alone, and how fast: the very bytes of the writer, or damage that is named."""

from __future__ import annotations

import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from triweave.data_pipeline.bench.index_speed import measure_indexers
from triweave.data_pipeline.errors import ConfigError, ShardDamagedError
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.reindex import write_indices


def test_both_indices_have_the_bytes_of_the_writer(tiny_shards: Manifest, tmp_path: Path) -> None:
    index, idx = tmp_path / "index.parquet", tmp_path / "tar.idx"
    for number, entry in enumerate(tiny_shards.shards):
        assert write_indices(tiny_shards.tar_path(number), index, idx) == entry.samples
        assert index.read_bytes() == tiny_shards.index_path(number).read_bytes()
        assert idx.read_bytes() == tiny_shards.idx_path(number).read_bytes()


def test_no_changed_byte_gets_an_index(tiny_shards: Manifest, tmp_path: Path) -> None:
    """Bytes of headers, descriptions and media: refused. Padding is in no member: it changes the sample's hash."""
    whole = tiny_shards.tar_path(0).read_bytes()
    rows = read_index(tiny_shards, 0).to_pylist()
    media = next((row, part) for row in rows for part, offset in enumerate(row["part_offset"]) if offset >= 0)
    start = media[0]["part_offset"][media[1]]
    places = (rows[1]["offset"] + 10, rows[1]["offset"] + 130, rows[1]["json_offset"], start, start - 400, start - 356)
    tar = tmp_path / "changed.tar"
    for place in places:
        tar.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ShardDamagedError, match=r"changed\.tar.*run `triweave verify`"):
            write_indices(tar, tmp_path / "a", tmp_path / "b")
    tar.write_bytes(whole[: start + 5])
    with pytest.raises(ShardDamagedError, match=r"changed\.tar ends within"):
        write_indices(tar, tmp_path / "a", tmp_path / "b")


def test_members_that_no_description_has_are_refused(tiny_shards: Manifest, tmp_path: Path) -> None:
    """Whole by their own checksums: a folder, and a file that counts to the last sample."""
    last = read_index(tiny_shards, 0).to_pylist()[-1]
    whole = tiny_shards.tar_path(0).read_bytes()[: last["offset"] + last["size"]]
    tar, member = tmp_path / "more.tar", tarfile.TarInfo(f"{last['key']}.more")
    for kind, said in (
        (tarfile.DIRTYPE, r"member of type b'5'"),
        (tarfile.REGTYPE, f"sample {last['key']} is damaged"),
    ):
        member.type = kind
        tar.write_bytes(whole + member.tobuf(tarfile.USTAR_FORMAT) + bytes(2 * tarfile.BLOCKSIZE))
        with pytest.raises(ShardDamagedError, match=said):
            write_indices(tar, tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_indexers_take_turns_and_say_what_keeps_them(tiny_shards: Manifest, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(tiny_shards.root, tmp_path / "shards"))
    told: list[str] = []
    (tmp_path / "out").mkdir()
    rows = measure_indexers(
        shards, tmp_path / "out", peers=("energon",), python="/bin/false", repeats=1, progress=told.append
    )
    assert [row.indexer for row in rows] == ["triweave index", "triweave verify", "energon"]
    assert [row.samples for row in rows] == [tiny_shards.samples, tiny_shards.samples, None]
    assert rows[0].samples_per_s
    assert rows[0].ratio_to_energon is None
    assert rows[2].error == "no output"
    assert len(told) == 3


def test_an_unknown_peer_is_refused(tiny_shards: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--peers wids: is none of energon"):
        measure_indexers(tiny_shards.root, tmp_path, peers=("wids",), python=sys.executable, repeats=1, progress=print)
