"""Reading by byte range: what comes out was verified, and what is wrong is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from triweave.data_pipeline.stream import reader as reader_module
from triweave.data_pipeline.stream.reader import CorruptSampleError, ShardReader


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(range(256)) * 8)
    return path


def test_it_returns_exactly_the_range(tar: Path) -> None:
    expected = tar.read_bytes()[100:400]
    view = ShardReader().read(str(tar), 100, 300, xxhash.xxh3_64_intdigest(expected))
    assert view.tobytes() == expected
    assert view.readonly


def test_damage_is_an_error_that_says_what(tar: Path, tmp_path: Path) -> None:
    good = xxhash.xxh3_64_intdigest(tar.read_bytes()[:300])
    content = bytearray(tar.read_bytes())
    content[299] ^= 128
    tar.write_bytes(content)
    reader = ShardReader()
    with pytest.raises(CorruptSampleError, match="differ"):
        reader.read(str(tar), 0, 300, good)
    with pytest.raises(CorruptSampleError, match="ends at byte 2048, the sample at 2100"):
        reader.read(str(tar), 1900, 200, good)
    with pytest.raises(CorruptSampleError, match="missing"):
        reader.read(str(tmp_path / "b.tar"), 0, 300, good)
    (tmp_path / "empty.tar").touch()
    with pytest.raises(CorruptSampleError, match="cannot be read"):
        reader.read(str(tmp_path / "empty.tar"), 0, 300, good)


def test_few_maps_are_kept_and_views_outlive_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "MAPS_KEPT", 2)
    reader = ShardReader()
    views = []
    for number in range(5):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(bytes([number]) * 5000)
        views.append(reader.read(str(path), 10, 20, xxhash.xxh3_64_intdigest(bytes([number]) * 20)))
    assert len(reader._maps) == 2
    assert [view[0] for view in views] == [0, 1, 2, 3, 4]


def test_asking_for_local_bytes_does_nothing(tar: Path) -> None:
    reader = ShardReader()
    reader.ask([(str(tar), 100, 300), (str(tar.with_name("missing.tar")), 0, 1)])
    assert reader._remote is None
