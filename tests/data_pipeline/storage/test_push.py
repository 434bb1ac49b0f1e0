"""Pushing: the manifest last, what is there already not again, and never over other shards unasked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import xxhash

from triweave.data_pipeline.errors import ShardDamagedError, StorageError
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.storage import push as push_module
from triweave.data_pipeline.storage.push import push
from triweave.launch.cli import main

URL = "s3://corpora/a/b"


@pytest.fixture
def folder(tiny_shards: Manifest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards.root, tmp_path / "shards"))


def test_every_file_arrives_with_its_hash_and_the_manifest_last(store: Any, folder: Path) -> None:
    report = push(folder, URL)
    names = {path.name for path in folder.iterdir()}
    assert set(store.objects) == {f"corpora/a/b/{name}" for name in names}
    assert report.sent == len(names)
    assert report.sent_bytes == sum(path.stat().st_size for path in folder.iterdir())
    for name, stored in store.objects.items():
        assert stored.metadata["xxh3"] == xxhash.xxh3_64_hexdigest(stored.data)
        assert stored.data == (folder / name.rpartition("/")[2]).read_bytes()
    writes = [name for method, name, _ in store.log if method in ("PUT", "POST")]
    assert writes[-1] == "corpora/a/b/manifest.json"
    assert Manifest.load(URL).shards == Manifest.load(folder).shards


def test_large_files_go_in_parts(store: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triweave.data_pipeline.storage.client.UPLOAD_PART_BYTES", 20_000)
    push(folder, URL)
    assert any(method == "POST" for method, _, _ in store.log)
    tar = folder / "shard-000000.tar"
    assert store.objects[f"corpora/a/b/{tar.name}"].data == tar.read_bytes()


def test_only_what_is_new_is_sent_again(store: Any, folder: Path) -> None:
    push(folder, URL)
    sidecar = folder / "shard-000000.tokens-0123456789abcdef.parquet"
    sidecar.write_bytes(b"counts")
    store.store("corpora/a/b/shard-000001.tar", store.objects["corpora/a/b/shard-000001.tar"].data[:-512])
    store.log.clear()
    report = push(folder, URL)
    assert [name.rpartition("/")[2] for method, name, _ in store.log if method == "PUT"] == [
        "shard-000001.tar",
        sidecar.name,
    ]
    assert (report.sent, report.kept) == (2, len(store.objects) - 2)


def test_an_interrupted_push_leaves_no_manifest_and_goes_on(
    store: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = push_module._send
    done = []

    def interrupted(*arguments: Any) -> int:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(arguments)
        return send(*arguments)

    monkeypatch.setattr(push_module, "_send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        push(folder, URL)
    assert "corpora/a/b/manifest.json" not in store.objects
    monkeypatch.undo()
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    assert push(folder, URL).kept == 4


def test_two_pushes_to_one_prefix_do_not_both_win(
    store: Any, folder: Path, stream_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = push_module._send

    def while_another_finishes(*arguments: Any) -> int:
        store.store("corpora/a/b/manifest.json", (Path(stream_data.talk) / "manifest.json").read_bytes())
        return send(*arguments)

    monkeypatch.setattr(push_module, "_send", while_another_finishes)
    with pytest.raises(StorageError, match="another push of other shards finished meanwhile"):
        push(folder, URL)
    assert Manifest.load(URL).hash == Manifest.load(stream_data.talk).hash


def test_other_shards_are_replaced_only_when_asked(store: Any, folder: Path, stream_data: Any) -> None:
    push(folder, URL)
    before = dict(store.objects)
    with pytest.raises(StorageError, match=r"s3://corpora/a/b: holds other shards; .*--overwrite"):
        push(stream_data.talk, URL)
    assert store.objects == before
    store.store("corpora/a/b/notes.txt", b"not ours")
    report = push(stream_data.talk, URL, overwrite=True)
    names = {path.name for path in Path(stream_data.talk).iterdir()}
    assert {name.rpartition("/")[2] for name in store.objects} == names | {"notes.txt"}
    assert report.removed == len(set(before)) - len({f"corpora/a/b/{name}" for name in names} & set(before))
    assert Manifest.load(URL).hash == Manifest.load(stream_data.talk).hash


def test_damaged_local_files_are_not_pushed(store: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = folder / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ShardDamagedError, match=r"shard-000001\.tar is damaged"):
        push(folder, URL)
    assert "corpora/a/b/manifest.json" not in store.objects
    assert main(["push", str(folder), URL]) == 2
    assert "triweave verify" in capsys.readouterr().err


@pytest.mark.usefixtures("store")
def test_the_command_says_what_it_sent(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(folder), URL, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(["push", str(folder), URL]) == 0
    assert f"{URL}: 0 files sent (0.0 MB), {first['sent']} were there" in capsys.readouterr().out
    assert main(["push", URL, URL]) == 2
    assert main(["push", str(folder), str(folder)]) == 2
    assert "must be a local shard folder, then s3://BUCKET/PREFIX" in capsys.readouterr().err
