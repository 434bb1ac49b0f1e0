"""The manifest: what makes a folder finished, and how tampering shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from triweave.data_pipeline.errors import DataError, ShardDamagedError, ShardMissingError
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest


@pytest.fixture
def folder(tiny_shards: Manifest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards.root, tmp_path / "elsewhere"))


def test_hash_does_not_depend_on_the_place(tiny_shards: Manifest, folder: Path) -> None:
    moved = Manifest.load(folder)
    assert moved.hash == tiny_shards.hash
    assert moved.shards == tiny_shards.shards
    assert moved.samples == tiny_shards.samples == sum(read_index(moved, n).num_rows for n in range(len(moved.shards)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": 99}, "version 99"),
        ({"shards": []}, "altered"),
        ({"shards": 3}, "no manifest"),
        ({"rows": None, "hash": None}, "altered"),
    ],
)
def test_altered_manifests_are_refused(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        Manifest.load(folder)


def test_shard_names_stay_inside_the_folder(folder: Path) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["shards"][0]["name"] = "../../etc/shard"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="not in its folder"):
        Manifest.load(folder)


def test_missing_folder_manifest_and_index(folder: Path) -> None:
    with pytest.raises(DataError, match="no shard folder"):
        Manifest.load(folder / "nothing")
    manifest = Manifest.load(folder)
    manifest.index_path(1).unlink()
    with pytest.raises(ShardMissingError, match=r"shard-000001\.parquet is missing"):
        read_index(manifest, 1)
    manifest.index_path(0).write_bytes(b"PAR1 nonsense")
    with pytest.raises(ShardDamagedError, match="damaged"):
        read_index(manifest, 0)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json is missing: the build did not finish"):
        Manifest.load(folder)
    with pytest.raises(DataError, match=r"manifest\.json is missing: this is no shard folder"):
        Manifest.load(folder.parent)


def test_an_index_of_another_shard_is_noticed(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.shards[0].samples != manifest.shards[-1].samples
    shutil.copy(manifest.index_path(len(manifest.shards) - 1), manifest.index_path(0))
    with pytest.raises(ShardDamagedError, match="not the bytes that were written"):
        read_index(manifest, 0)
