"""The seam between source and shards, and the clock beside it: order, same bytes, what the ledger and the times say."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import test_build as builds

from triweave.data_pipeline.errors import BuildError
from triweave.data_pipeline.filters.options import FilterOptions
from triweave.data_pipeline.shards.build import BuildOptions, BuildProgress, build
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.stage_times import StageClock
from triweave.data_pipeline.shards.throughput import THROUGHPUT_NAME, ThroughputMeter, read_throughput

numbers = builds.numbers


def options(numbers: ModuleType, **others: object) -> BuildOptions:
    steps = (numbers.SuffixStep(suffix=" one"), numbers.SuffixStep(suffix=" two", name="second"))
    filters, near = FilterOptions(max_words=3), numbers.NeighbourTwins()
    given = {"shard_size_bytes": 60_000, "filters": filters, "steps": steps, "near_duplicates": near} | others
    return BuildOptions(**given)


@pytest.fixture(scope="module")
def stepped(numbers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test source through a filter, two steps and near duplicates, by one process."""
    out = tmp_path_factory.mktemp("stepped") / "shards"
    build(numbers.NumberSource(), out, options(numbers))
    return out


def test_filters_then_steps_then_exact_then_near_duplicates(stepped: Path) -> None:
    manifest = Manifest.load(stepped)
    by_id = {row["id"]: row for row in builds.ledger_rows(stepped)}
    assert Counter(row["status"] for row in by_id.values()) == manifest.rows
    assert by_id["row 104"]["status"] in ("kept", "duplicate"), (
        "the filter saw the text before the steps made it longer"
    )
    assert by_id["row 105"]["reason"] == "a fifth"
    assert by_id["row 101"]["reason"] == "ValueError: no suffix for 101"
    tens = Counter(int(row["id"].split()[1]) // 10 for row in by_id.values() if row["status"] == "kept")
    assert all(count == 1 for ten, count in tens.items() if ten >= 10)
    assert {row["reason"] for row in by_id.values() if row["status"] == "duplicate"} == {"same parts", "the same ten"}
    for row in by_id.values():
        if row["status"] == "duplicate":
            assert by_id[row["duplicate_of"]]["status"] == "kept"
    sample = read_index(manifest, 0, ["labels", "part_size"]).to_pylist()[0]
    length = json.loads(sample["labels"])["length"]
    assert sample["part_size"] == [length + len(" two")], "the second step saw what the first one made"
    assert manifest.build["steps"] == {"suffix": {"suffix": " one"}, "second": {"suffix": " two"}}
    assert manifest.build["near_duplicates"] == {"numbers": 10}


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_steps_give_the_same_bytes_for_any_workers(
    numbers: ModuleType, stepped: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(builds.SCRIPT.parent)
    build(numbers.NumberSource(), tmp_path / "shards", options(numbers, workers=workers))
    assert builds.files(tmp_path / "shards") == builds.files(stepped)


def test_near_duplicates_are_remembered_over_an_interrupt(numbers: ModuleType, stepped: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"

    def stop(progress: BuildProgress) -> None:
        if progress.shards >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(numbers.NumberSource(), out, options(numbers), stop)
    assert len(list(out.glob("shard-*.tar"))) >= 2
    build(numbers.NumberSource(), out, options(numbers))
    assert builds.files(out) == builds.files(stepped)


def test_other_steps_are_another_build(numbers: ModuleType, stepped: Path) -> None:
    with pytest.raises(BuildError, match=r"steps .* there, None now"):
        build(numbers.NumberSource(), stepped, options(numbers, steps=()))
    with pytest.raises(BuildError, match=r"near_duplicates .* there, None now"):
        build(numbers.NumberSource(), stepped, options(numbers, near_duplicates=None))


def test_a_finished_build_says_how_long_each_stage_took(
    numbers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(builds.SCRIPT.parent)
    out = tmp_path / "shards"
    source = numbers.NumberSource(rows_total=200, seconds_per_row=0.004)
    manifest = build(source, out, options(numbers, workers=2))
    content = json.loads((out / THROUGHPUT_NAME).read_bytes())
    assert (content["engine"], content["workers"], content["rows"]) == ("local", 2, 196)
    assert content["tar_bytes"] == sum(shard.tar_bytes for shard in manifest.shards)
    assert set(content["stages"]) == {"read", "filter", "suffix", "second", "dedup", "write"}
    assert content["stages"]["read"]["seconds"] >= 196 * 0.004
    assert content["stages"]["read"]["rows_per_s"] == pytest.approx(
        196 / content["stages"]["read"]["seconds"], rel=0.01
    )
    assert content["wall_s"] >= 196 * 0.004 / 2
    assert content["rows_per_s"] == pytest.approx(196 / content["wall_s"], rel=0.01)


def test_media_have_stages_of_their_own(tiny_shards: Manifest) -> None:
    content = read_throughput(tiny_shards.root)
    assert content is not None
    assert content["stages"]["decode"]["seconds"] > 0
    assert read_throughput(tiny_shards.root / "nothing") is None


def test_the_count_goes_on_after_an_interrupt_and_counts_no_chunk_twice(tmp_path: Path) -> None:
    first = ThroughputMeter(tmp_path, "local", 1)
    first.chunk_done(0, 256, {"read": 2.0}, 0.5)
    first.chunk_done(1, 256, {"read": 3.0, "filter": 1.0}, 0.5)
    second = ThroughputMeter(tmp_path, "ray", 8)
    wall_s = second.totals.wall_s
    second.chunk_done(1, 256, {"read": 9.0}, 0.5)  # its shard was not sealed, so it is read again
    second.chunk_done(2, 100, {"read": 1.0}, 0.5)
    assert (second.totals.rows, second.totals.chunks) == (612, 3)
    assert second.totals.stage_s == {"read": 6.0, "filter": 1.0, "write": 1.5}
    assert second.totals.wall_s >= wall_s > 0
    (tmp_path / THROUGHPUT_NAME).write_bytes(b"{")  # as a power cut leaves it
    assert ThroughputMeter(tmp_path, "ray", 8).totals.rows == 0


def test_a_stage_inside_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = StageClock()

    def fail() -> None:
        now[0] += 5
        raise KeyError("inside")

    with clock.stage("read"):
        now[0] += 2
        with clock.stage("decode"):
            now[0] += 30
        with pytest.raises(KeyError, match="inside"), clock.stage("decode"):
            fail()
    with clock.stage("read"):
        now[0] += 1
    assert clock.take() == {"read": 3.0, "decode": 35.0}
    assert clock.take() == {}
