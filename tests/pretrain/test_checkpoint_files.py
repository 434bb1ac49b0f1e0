"""The files of a checkpoint: safetensors that the library reads, ranges of any cut, checksums by block, both stores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from triweave.data_pipeline.storage.client import forget_clients
from triweave.pretrain.checkpoints import blocks, snapshot
from triweave.pretrain.checkpoints.blocks import block_digests
from triweave.pretrain.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    checkpoint_root,
    existing_checkpoints,
    find_whole_checkpoint,
    list_checkpoints,
    read_checkpoint,
)
from triweave.pretrain.checkpoints.export import export_weights
from triweave.pretrain.checkpoints.fragments import Fragment
from triweave.pretrain.checkpoints.manifest import seal
from triweave.pretrain.checkpoints.reader import CheckpointReader, Wanted
from triweave.pretrain.checkpoints.retention import kept_steps, prune
from triweave.pretrain.checkpoints.snapshot import Snapshot
from triweave.pretrain.checkpoints.stores import Store, open_store
from triweave.pretrain.errors import CheckpointError, PretrainError

RNG = {"cpu": torch.arange(77, dtype=torch.uint8)}
SHAPES = {"decoder.weight": (40, 25), "towers.image.bias": (7,), "towers.image.frozen": (6, 3)}
TOKEN = "0123456789ab"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of at most 4 kB and checksums of 1 kB, so that little tensors are cut often."""
    monkeypatch.setattr(snapshot, "FILE_BYTES", 4096)
    for module in ("blocks", "reader"):
        monkeypatch.setattr(f"triweave.pretrain.checkpoints.{module}.BLOCK_BYTES", 1024)


def fragments(rank: int, ranks: int, seed: int = 0) -> list[Fragment]:
    """One rank's share of three parameters, cut in the middle of rows; the last is frozen and bf16."""
    found = []
    for number, (name, shape) in enumerate(SHAPES.items()):
        whole = torch.Size(shape).numel()
        start, end = whole * rank // ranks, whole * (rank + 1) // ranks
        values = {
            kind: torch.randn(whole, generator=torch.Generator().manual_seed(100 * seed + 10 * number + place))
            for place, kind in enumerate(("weight", "exp_avg", "exp_avg_sq"))
        }
        if name.endswith("frozen"):
            values = {"weight": values["weight"].to(torch.bfloat16)}
        tensors = {kind: value[start:end].clone() for kind, value in values.items()}
        found.append(
            Fragment(name=name, shape=shape, offset=start, tensors=tensors, steps=None, owned=(0, end - start))
        )
    return found


def write(store: Store, step: int, ranks: int = 2, token: str = TOKEN) -> dict[str, Any]:
    """Write a checkpoint of all ranks as the saving threads do, without committing it; return its manifest."""
    files: dict[str, Any] = {}
    store.begin(step, token)
    for rank in range(ranks):
        taken = Snapshot(fragments(rank, ranks, seed=step), RNG)
        taken.copy(fragments(rank, ranks, seed=step), RNG)
        for number, (data, note) in enumerate(taken.files):
            size = note["bytes"]
            name = store.write(step, token, f"rank-{rank:05d}-{number:03d}.safetensors", data, size)
            files[name] = {**note, "rank": rank, "blocks": block_digests(data[:size])}
    parameters = {name: {"shape": list(shape), "steps": 1.0} for name, shape in SHAPES.items()}
    return {"format": 3, "step": step, "world_size": ranks, "parameters": parameters, "files": files,
            "state": {}, "config": "seed: 0\n"}  # fmt: skip


def save(root: str | Path, step: int) -> Checkpoint:
    store = open_store(root)
    store.commit(step, TOKEN, seal(write(store, step)))
    return read_checkpoint(store.folder(step))


def read(reader: CheckpointReader, name: str, kind: str, start: int, end: int) -> torch.Tensor:
    target = torch.full((end - start,), torch.nan)
    reader.read([Wanted(target=target, kind=kind, name=name, offset=start)])
    return target


@pytest.fixture(params=["folder", "prefix"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Where checkpoints go: a folder, and a prefix of an object store in this process."""
    if request.param == "folder":
        yield tmp_path / "checkpoints"
        return
    import object_server

    with object_server.object_server() as server:
        for name, value in (server.environment | {"TRIWEAVE_CACHE_DIR": str(tmp_path / "cache")}).items():
            monkeypatch.setenv(name, value)
        yield "s3://corpora/runs/one"
        forget_clients()


@pytest.mark.usefixtures("small_blocks")
def test_files_are_safetensors_of_what_a_rank_owns(tmp_path):
    made = save(tmp_path, 3)
    assert len(made.manifest["files"]) == 2 * 2
    found: dict[str, torch.Tensor] = {}
    for name in made.manifest["files"]:
        path = made.folder / name
        assert path.stat().st_size <= 2 * 4096 + 100
        for key, values in load_file(path).items():
            found.setdefault(key, values)
    for rank in range(2):
        for part in fragments(rank, 2, seed=3):
            pieces = [(int(key.rpartition(":")[2]), values) for key, values in found.items()
                      if key.startswith(f"weight:{part.name}:")]  # fmt: skip
            whole = torch.cat([values for _, values in sorted(pieces, key=lambda piece: piece[0])])
            assert torch.equal(whole[part.offset : part.offset + part.numel], part.tensors["weight"].float())
    assert torch.equal(found["rng:cpu"], RNG["cpu"])


@pytest.mark.usefixtures("small_blocks")
def test_any_range_is_read_and_no_byte_too_many(root):
    """Across pieces, files and blocks, from both stores; into another dtype; and the states of both ranks."""
    reader = save(root, 1).reader
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        parts = [part for rank in range(2) for part in fragments(rank, 2, seed=1) if part.name == name]
        for kind in parts[0].tensors:
            whole = torch.cat([part.tensors[kind].float() for part in parts])
            for start, end in ((0, numel), (1, numel - 1), (numel // 2 - 1, numel // 2 + 1), (numel - 1, numel)):
                assert torch.equal(read(reader, name, kind, start, end), whole[start:end]), (name, kind, start, end)
    half = torch.empty(7, dtype=torch.bfloat16)
    reader.read([Wanted(target=half, kind="weight", name="towers.image.bias", offset=0)])
    assert torch.equal(half, read(reader, "towers.image.bias", "weight", 0, 7).to(torch.bfloat16))
    assert [torch.equal(reader.rng(rank)["cpu"], RNG["cpu"]) for rank in (0, 1)] == [True, True]
    with pytest.raises(
        CheckpointError, match=r"holds 0 of elements 0 to 18 of exp_avg of parameter towers\.image\.frozen"
    ):
        read(reader, "towers.image.frozen", "exp_avg", 0, 18)


@pytest.mark.usefixtures("small_blocks")
def test_a_second_snapshot_uses_the_same_memory():
    taken = Snapshot(fragments(0, 2, seed=1), RNG)
    taken.copy(fragments(0, 2, seed=1), RNG)
    before = [bytes(data) for data, _ in taken.files]
    address = taken.buffer.ctypes.data
    assert taken.fits(fragments(0, 2, seed=2), RNG)
    taken.copy(fragments(0, 2, seed=2), RNG)
    assert taken.buffer.ctypes.data == address
    assert [bytes(data) for data, _ in taken.files] != before
    taken.copy(fragments(0, 2, seed=1), RNG)
    assert [bytes(data) for data, _ in taken.files] == before
    assert not taken.fits(fragments(1, 2), RNG)
    assert not taken.fits(fragments(0, 2), {"cpu": RNG["cpu"][1:]})


def test_what_is_not_committed_is_not_there(root):
    """Nor does it stand in the way of the same step, or stay; a commit replaces an overtaken checkpoint."""
    save(root, 1)
    store = open_store(root)
    write(store, 2, token="dead00000000")
    assert store.steps() == [1]
    again = save(root, 2)
    again.verify()
    assert store.steps() == [1, 2]
    assert not any("dead" in name for name in again.manifest["files"])
    write(store, 3, token="dead00000000")
    save(root, 2).verify()
    assert store.steps() == [1, 2]
    store.begin(4, TOKEN)
    assert [path for path in Path(root).glob(".*") if "dead" in path.name] == []


def test_retention(root):
    assert kept_steps([1, 2, 3, 4], 2) == [3, 4]
    assert kept_steps([2, 4, 6, 8, 9], 1, keep_every_steps=4) == [4, 8, 9]
    for step in (1, 2, 3):
        save(root, step)
    store = open_store(root)
    assert prune(store, 1, step=2, keep_every_steps=0) == [1, 3]  # 3 was damaged: the run had gone on from 2
    assert store.steps() == [2]
    read_checkpoint(store.folder(2)).verify()


def test_two_runs_cannot_share_a_location(root):
    store = open_store(root)
    mine, other = write(store, 1), write(store, 1, token="beefbeefbeef")
    if isinstance(root, Path):
        pytest.skip("a folder has renames: the last one wins, whole")
    store.commit(1, "beefbeefbeef", seal(other))
    store.commit(1, "beefbeefbeef", seal(other))  # an answer that was lost: no error
    with pytest.raises(CheckpointError, match=r"step-0000001/manifest\.json: another run has written this checkpoint"):
        store.commit(1, TOKEN, seal(mine))


@pytest.mark.usefixtures("small_blocks")
def test_damage_of_one_block_is_found_by_who_reads_it(tmp_path):
    made = save(tmp_path, 1)
    file = next(name for name, entry in made.manifest["files"].items() if entry["rank"] == 1)
    name, offset, numel, positions = made.manifest["files"][file]["fragments"][0]
    path = made.folder / file
    data = bytearray(path.read_bytes())
    data[positions["exp_avg"]] ^= 1
    path.write_bytes(bytes(data))
    reader = read_checkpoint(made.folder).reader
    block = positions["exp_avg"] // blocks.BLOCK_BYTES
    with pytest.raises(CheckpointError, match=rf"{file} is damaged: the xxh3 of block {block} is not the manifest's"):
        read(reader, name, "exp_avg", offset, offset + numel)
    with pytest.raises(CheckpointError, match="is damaged"):
        made.verify()
    made.verify(rank=0, size=10**6)  # its share does not hold that file
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{file} is missing"):
        made.verify()


def test_export_holds_every_parameter_bit_by_bit(root, tmp_path):
    made = save(root, 1)
    done = export_weights(made, tmp_path / "one")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert {name: tuple(values.shape) for name, values in whole.items()} == SHAPES
    assert torch.equal(whole["decoder.weight"].flatten(), read(made.reader, "decoder.weight", "weight", 0, 1000))
    assert (done.parameters, done.elements, done.files, done.bytes) == (3, 1025, 1, 4100)
    assert (tmp_path / "one" / "config.yaml").read_text() == "seed: 0\n"
    export_weights(made, tmp_path / "parts", dtype="bf16", shard_bytes=100)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2050
    assert len(set(index["weight_map"].values())) == 2
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "parts" / file)[name], whole[name].to(torch.bfloat16))
    with pytest.raises(Exception, match="holds something else; choose a new or an empty folder"):
        export_weights(made, tmp_path / "one")


def test_a_run_is_found_by_its_folder_or_its_location(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert checkpoint_root(run_dir) == run_dir / "checkpoints"
    (run_dir / "config.yaml").write_text(f"checkpoint: {{location: '{elsewhere}'}}\n")
    save(elsewhere, 2)
    save(elsewhere, 4)
    assert [path.name for path in list_checkpoints(run_dir)] == ["step-0000002", "step-0000004"]
    assert list_checkpoints(run_dir, "") == []
    assert find_whole_checkpoint(run_dir).step == 4
    assert find_whole_checkpoint(run_dir, 2).step == 2
    assert checkpoint_root("s3://bucket/x") == Path("s3://bucket/x")
    with pytest.raises(CheckpointError, match="has no checkpoint of step 3; it has 2, 4"):
        existing_checkpoints(run_dir, 3)
    with pytest.raises(CheckpointError, match="nowhere: no such run"):
        existing_checkpoints(tmp_path / "nowhere")


def test_settings_that_cannot_be_are_refused():
    assert CheckpointConfig(location="s3://bucket/x").root("run") == Path("s3://bucket/x")
    for settings, said in (
        ({"keep": 0}, "checkpoint.keep is 0; keep at least 1"),
        ({"every_steps": 10, "keep_every_steps": 15}, "no multiple of checkpoint.every_steps=10"),
        ({"keep_every_steps": -1}, "checkpoint.keep_every_steps is -1; it must be 0 or above"),
        ({"location": "gs://bucket/x"}, "must be a folder or s3://bucket/prefix"),
        ({"location": "s3://b/x"}, "checkpoint.location: s3://b/x: is no s3://BUCKET/PREFIX"),
    ):
        with pytest.raises(PretrainError, match=said.replace(".", r"\.")):
            CheckpointConfig(**settings)  # type: ignore[arg-type]
