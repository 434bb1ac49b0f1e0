"""The loader benchmark does the same work with every loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from triweave.data_pipeline.bench import bench_loader, copy_first_samples
from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.shards.manifest import Manifest


def test_every_loader_sees_every_sample(stream_data: Any) -> None:
    told: list[str] = []
    rows = bench_loader(
        stream_data.birds,
        stream_data.tokenizer,
        raw_samples=1000,
        full_samples=1000,
        repeats=1,
        sequence_length=1024,
        progress=told.append,
    )
    assert [(row.work, row.loader) for row in rows] == [
        (work, loader) for work in ("raw", "full") for loader in ("triweave", "webdataset", "bare")
    ]
    assert {row.samples for row in rows} == {72}
    for row in rows:
        assert row.samples_per_s == pytest.approx(72 / row.seconds[0])
        if row.loader == "bare":
            assert row.ratio_to_bare_decode == 1.0
    assert any("webdataset" in line for line in told)


def test_a_subset_is_whole_shards_of_the_first_samples(stream_data: Any, tmp_path: Path) -> None:
    manifest = Manifest.load(stream_data.birds)
    subset = copy_first_samples(manifest, tmp_path / "subset", 30)
    assert 30 <= subset.samples <= 30 + len(manifest.shards)
    for number in range(len(subset.shards)):
        whole = manifest.tar_path(number).read_bytes()
        part = subset.tar_path(number).read_bytes()
        assert part.endswith(bytes(1024))
        assert whole.startswith(part[:-1024])


def test_counts_below_one_are_refused(stream_data: Any) -> None:
    with pytest.raises(ConfigError, match="--repeats 0"):
        bench_loader(
            stream_data.birds,
            stream_data.tokenizer,
            raw_samples=1,
            full_samples=1,
            repeats=0,
            sequence_length=64,
            progress=print,
        )
