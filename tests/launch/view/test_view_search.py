"""What a search finds, how it goes on from where it stopped, and what is counted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from triweave.data_pipeline.errors import DataError
from triweave.launch.errors import ViewError
from triweave.launch.view import shard_folder
from triweave.launch.view.search import FACET_VALUES, Facets, parse_query, search
from triweave.launch.view.shard_folder import ShardFolder


@pytest.fixture
def birds(view_data: Any) -> ShardFolder:
    return ShardFolder("birds", str(view_data.shards))


def numbers(folder: ShardFolder, text: str, **more: Any) -> list[int]:
    return search(folder, parse_query(text), **{"start": 0, "limit": 1000, "seconds": 60.0} | more).numbers


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("", range(60).__contains__),
        ("modality:image", lambda number: number // 3 % 3 == 0),
        ("modality:audio language:ja", lambda number: number // 3 % 3 == 1 and number % 3 == 2),
        ("corpus:talk", lambda number: number >= 40),
        ("corpus:tal", frozenset().__contains__),
        ("language:FR", lambda number: number % 3 == 1),
        ("number:17", lambda number: number == 17),
        ('kind:"two words"', lambda number: number % 7 == 0),
        ("id:ITEM/3", lambda number: number == 3 or 30 <= number < 40),
        ("id:item-31", lambda number: number == 31),
        ("BIRD sings", lambda number: number % 3 == 0),
        ('"on a branch"', lambda number: number % 3 == 0),
        ('"a on branch"', frozenset().__contains__),
        ("d'été", lambda number: number % 3 == 1),
        ("ÉTÉ", lambda number: number % 3 == 1),
        ("小さな鳥", lambda number: number % 3 == 2),
        ("stripes", lambda number: number // 3 % 3 == 0 and number % 2 == 1),  # an alt text
        ("bird 5", lambda number: number % 3 == 0 and "5" in str(number)),
        ("nothing:here", frozenset().__contains__),
    ],
)
def test_a_query_finds_what_fits(birds: ShardFolder, text: str, fits: Any) -> None:
    assert numbers(birds, text) == [number for number in range(birds.samples) if fits(number)]


@pytest.mark.parametrize("text", ["", "language:fr", "bird"])
def test_pages_join_to_the_whole(birds: ShardFolder, text: str) -> None:
    found: list[int] = []
    start: int | None = 0
    while start is not None:
        page = search(birds, parse_query(text), start=start, limit=7, seconds=60.0)
        assert len(page.numbers) <= 7
        found += page.numbers
        start = page.next
    assert found == numbers(birds, text)


def test_a_search_without_time_goes_on_from_where_it_stopped(birds: ShardFolder) -> None:
    found: list[int] = []
    start: int | None = 0
    calls = 0
    while start is not None:
        page = search(birds, parse_query("bird language:en"), start=start, limit=1000, seconds=0.0)
        assert page.next is None or page.next > start
        found += page.numbers
        start = page.next
        calls += 1
    assert found == list(range(0, 60, 3))
    assert calls >= 20


def test_damage_is_passed_over_and_counted(view_data: Any, tmp_path: Path) -> None:
    shards = shutil.copytree(view_data.shards, tmp_path / "shards")
    folder = ShardFolder("copy", str(shards))
    data = bytearray((shards / "shard-000000.tar").read_bytes())
    data[folder.row(3)["offset"] + 600] ^= 1
    (shards / "shard-000000.tar").write_bytes(data)
    found = search(folder, parse_query("bird"), start=0, limit=100, seconds=60.0)
    assert found.unreadable == 1
    assert found.numbers == [number for number in range(0, 60, 3) if number != 3]
    (shards / "shard-000001.parquet").write_bytes(b"?")
    with pytest.raises(DataError, match=r"shard-000001\.parquet is damaged"):
        search(ShardFolder("copy", str(shards)), parse_query("language:fr"), start=20, limit=100, seconds=60.0)


@pytest.mark.parametrize("text", ['a "phrase', "x" * 1001])
def test_queries_that_are_refused(text: str) -> None:
    with pytest.raises(ViewError, match="the query has"):
        parse_query(text)


def test_facets_are_counted_a_little_at_a_time(birds: ShardFolder) -> None:
    facets = Facets()
    facets.advance(birds, 0.0)
    assert (facets.shards, facets.samples) == (1, 25)
    while facets.shards < 3:
        facets.advance(birds, 0.0)
    facets.advance(birds, 9.0)  # nothing left to count
    assert facets.samples == 60
    assert facets.counts["corpus"] == {"birds": 40, "talk": 20}
    assert facets.counts["modality"] == {"text": 60, "image": 21, "audio": 21}
    assert facets.counts["language"] == {"en": 20, "fr": 20, "ja": 20}


def test_facets_stay_small() -> None:
    facets = Facets()
    for number in range(FACET_VALUES + 50):
        facets._add("language", facets.counts["corpus"].__class__({f"language {number}": 1}))
    assert len(facets.counts["language"]) == FACET_VALUES


def test_few_indices_are_kept(birds: ShardFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_folder, "TABLES_BYTES", 1)
    assert [birds.sample(number).row["id"] for number in (0, 59, 30)] == ["item/0", "item/59", "item/30"]
    assert len(birds._tables) == 1
    with pytest.raises(ViewError, match="sample 60: birds has the samples 0 to 59"):
        birds.sample(60)
