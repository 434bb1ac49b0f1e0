"""Hundreds of damaged shard folders: verify names all of it, the loader moves nothing. By hand: make soak.

SOAK_DAMAGES damaged copies (default 300) of one shard folder, drawn from SOAK_SEED (default 0).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_loader as streams

from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.errors import CorruptionBudgetError, DataError
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.launch.cli import main

DAMAGES = int(os.environ.get("SOAK_DAMAGES", "300"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
WINDOWS = 9
ROWS_PER_WORKER_TRIAL = 25
"""Every so many damaged folders are read by two worker processes; the others without."""

Damager = Callable[[random.Random, Path, list[dict[str, Any]]], str]
Named = set[tuple[str, str, str]]


def flip(path: Path, offset: int, bits: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        (old,) = file.read(1)
        file.seek(offset)
        file.write(bytes([old ^ bits]))


def flip_anywhere(draw: random.Random, path: Path, rows: list[dict[str, Any]]) -> str:  # noqa: ARG001
    offset = draw.randrange(path.stat().st_size)
    flip(path, offset, draw.randrange(1, 256))
    return f"flip in {path.name} at {offset}"


def flip_in_member(draw: random.Random, path: Path, rows: list[dict[str, Any]]) -> str:
    _, start, end = draw.choice([member for row in rows for member in members(row)])
    offset = draw.randrange(start, end)
    flip(path, offset, draw.randrange(1, 256))
    return f"flip in a member of {path.name} at {offset}"


def overwrite_page(draw: random.Random, path: Path, rows: list[dict[str, Any]]) -> str:  # noqa: ARG001
    """What a block that the disk wrote to the wrong place leaves."""
    offset = draw.randrange(path.stat().st_size) // 4096 * 4096
    size = min(4096, path.stat().st_size - offset)
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(draw.randbytes(size))
    return f"page of {path.name} at {offset} overwritten"


def cut(draw: random.Random, path: Path, rows: list[dict[str, Any]]) -> str:  # noqa: ARG001
    anywhere = draw.randrange(path.stat().st_size)
    size = draw.choice([0, anywhere, anywhere // 512 * 512])
    os.truncate(path, size)
    return f"{path.name} cut at {size}"


def remove(draw: random.Random, path: Path, rows: list[dict[str, Any]]) -> str:  # noqa: ARG001
    path.unlink()
    return f"{path.name} removed"


def delete_member(draw: random.Random, path: Path, rows: list[dict[str, Any]]) -> str:
    """Take a member out as `tar --delete` does: what follows moves forward."""
    _, start, end = draw.choice([member for row in rows for member in members(row)])
    content = path.read_bytes()
    path.write_bytes(content[: start - 512] + content[end + -end % 512 :])
    return f"member of {path.name} at {start} deleted"


TAR_DAMAGE: dict[str, tuple[int, Damager]] = {
    "flip": (4, flip_anywhere),
    "member flip": (4, flip_in_member),
    "page": (1, overwrite_page),
    "cut": (3, cut),
    "removal": (1, remove),
    "member deletion": (3, delete_member),
}
"""Name -> (how often, damager)."""
INDEX_DAMAGE: dict[str, tuple[int, Damager]] = {"flip": (6, flip_anywhere), "cut": (2, cut), "removal": (1, remove)}


def members(row: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Return (name as far as the index knows it, start, end) of the members of a sample in its tar."""
    media = zip(row["part_offset"], row["part_size"], strict=True)
    found = [("json", row["json_offset"], row["json_offset"] + row["json_size"])]
    return found + [(f"{n:04d}", start, start + size) for n, (start, size) in enumerate(media) if start >= 0]


def damaged_parts(original: bytes, damaged: bytes, shard: str, rows: list[dict[str, Any]]) -> Named:
    """Return (shard, key, member) of all that differs; no member where only headers or padding do, or it is cut."""
    found = {(shard, "", "")}
    for row in rows:
        start, end = row["offset"], row["offset"] + row["size"]
        if original[start:end] == damaged[start:end]:
            continue
        found.add((shard, row["key"], ""))
        hit = [name for name, start, end in members(row) if original[start:end] != damaged[start:end]]
        if len(damaged) >= end:
            # The index has no hash of the JSON alone: beside another member's damage it may pass for whole.
            found |= {(shard, row["key"], name) for name in hit if name != "json" or len(hit) == 1}
    return found


def verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, str]]]:
    """Run `triweave verify --json`."""
    capsys.readouterr()
    code = main(["verify", str(folder), "--json"])
    return code, json.loads(capsys.readouterr().out)["damage"]


def config_of(data: Any, shards: Path, **changes: Any) -> DataConfig:
    config: DataConfig = streams.config_of(data, **changes)
    return replace(config, sources=[SourceConfig(name="birds", shards=str(shards), weight=3.0)])


def hurt(
    draw: random.Random, kinds: dict[str, tuple[int, Damager]], path: Path, rows: list[dict[str, Any]]
) -> tuple[str, str]:
    """Damage a file; return the kind and the description."""
    (kind,) = draw.choices(list(kinds), [weight for weight, _ in kinds.values()])
    return kind, kinds[kind][1](draw, path, rows)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_any_damage_of_tars_is_named_and_moves_nothing(
    stream_data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest.load(stream_data.birds)
    rows = [read_index(manifest, number).to_pylist() for number in range(len(manifest.shards))]
    original = [manifest.tar_path(number).read_bytes() for number in range(len(manifest.shards))]
    whole = streams.all_rows(streams.windows(streams.config_of(stream_data), WINDOWS))
    owners = {row["key"]: number for number, shard in enumerate(rows) for row in shard}
    streamed = {
        sample_id.split(":")[2] for content in whole.values() for sample_id in content["samples"][0]
    }  # source:epoch:key:first:end
    assert streamed <= owners.keys()
    kinds: Counter[str] = Counter()
    fillers = stopped = 0
    began = time.monotonic()
    for trial in range(DAMAGES):
        draw = random.Random(f"{SEED} {trial}")
        shards = tmp_path / "shards"
        shutil.copytree(stream_data.birds, shards)
        said = []
        expected: Named = set()
        for number in draw.sample(range(len(rows)), draw.choice([1, 1, 1, 2])):
            tar = shards / manifest.tar_path(number).name
            kind, description = hurt(draw, TAR_DAMAGE, tar, rows[number])
            kinds[kind] += 1
            said.append(description)
            damaged = tar.read_bytes() if tar.exists() else b""
            if not damaged:  # nothing of it can be told apart
                expected.add((manifest.shards[number].name, "", ""))
            else:
                expected |= damaged_parts(original[number], damaged, manifest.shards[number].name, rows[number])
        lost = {
            key
            for key, number in owners.items()
            if not (shards / manifest.tar_path(number).name).exists()
            or not (shards / manifest.tar_path(number).name).stat().st_size
        } | {key for _, key, _ in expected if key}
        budget = draw.choice([len(owners), len(owners), draw.randrange(4)])
        workers = 2 if trial % ROWS_PER_WORKER_TRIAL == 0 else 0
        try:
            code, damage = verified(shards, capsys)
            assert code == 1
            named = {(item["shard"], item["key"], item["member"].partition(".")[0]) for item in damage}
            named |= {(shard, key, "") for shard, key, _ in named} | {(shard, "", "") for shard, _, _ in named}
            assert expected <= named, f"verify does not name {sorted(expected - named)}"
            assert {(shard, key) for shard, key, _ in named} == {(shard, key) for shard, key, _ in expected}
            config = config_of(stream_data, shards, corrupt_budget=budget, workers=workers)
            if len(lost & streamed) > budget:
                with pytest.raises(CorruptionBudgetError):
                    streams.windows(config, WINDOWS)
                stopped += 1
            else:
                stream = streams.windows(config, WINDOWS)
                streams.assert_only_fillers_differ(stream, whole)
                events = [event for window in stream for event in window.fillers]
                assert {event.key for event in events} == lost & streamed
                assert all(event.shard == str(shards / manifest.tar_path(owners[event.key]).name) for event in events)
                fillers += len(events)
        except BaseException:
            print(f"SOAK_SEED={SEED}, trial {trial}, budget {budget}, {workers} workers: {'; '.join(said)}")
            raise
        shutil.rmtree(shards)
    with capsys.disabled():
        print(
            f"\ndamage: {DAMAGES} folders, {kinds.total()} damages ({counts(kinds)}), {fillers} fillers, {stopped} "
            f"streams stopped by the budget, {time.monotonic() - began:.0f} s, SOAK_SEED={SEED}"
        )


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_any_damage_of_indices_is_named_and_makes_no_other_plan(
    stream_data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its Parquet index a shard has no plan, and the loader says so in one line; it never needs `.tar.idx`."""
    manifest = Manifest.load(stream_data.birds)
    whole = streams.all_rows(streams.windows(streams.config_of(stream_data), WINDOWS))
    kinds: Counter[str] = Counter()
    refused = 0
    began = time.monotonic()
    for trial in range(DAMAGES):
        draw = random.Random(f"{SEED} index {trial}")
        shards = tmp_path / "shards"
        shutil.copytree(stream_data.birds, shards)
        shard, suffix = draw.choice(manifest.shards).name, draw.choice([".parquet", ".parquet", ".tar.idx"])
        kind, description = hurt(draw, INDEX_DAMAGE, shards / f"{shard}{suffix}", [])
        kinds[f"{suffix} {kind}"] += 1
        try:
            code, damage = verified(shards, capsys)
            assert code == 1
            assert {item["shard"] for item in damage} == {shard}
            assert any(f"{shard}{suffix}" in item["detail"] for item in damage)
            config = config_of(stream_data, shards, corrupt_budget=0)
            if suffix == ".parquet":
                with pytest.raises(DataError, match=shard) as caught:
                    streams.windows(config, WINDOWS)
                assert "\n" not in str(caught.value)
                refused += 1
            else:
                assert streams.all_rows(streams.windows(config, WINDOWS)) == whole
        except BaseException:
            print(f"SOAK_SEED={SEED}, trial {trial}: {description}")
            raise
        shutil.rmtree(shards)
    with capsys.disabled():
        print(
            f"\nindex damage: {DAMAGES} folders ({counts(kinds)}), {refused} refused by the loader, "
            f"{DAMAGES - refused} streamed the same, {time.monotonic() - began:.0f} s, SOAK_SEED={SEED}"
        )


def counts(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
