"""The loader benchmark with an object store: nothing is cached, everything is removed, each loader packs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triweave.data_pipeline.bench.contenders.base import Setting
from triweave.data_pipeline.bench.contenders.registry import FROM_STORE, make_contender
from triweave.data_pipeline.bench.loader_bench import RESUME_SHARES, BenchOptions, bench_loader
from triweave.data_pipeline.bench.subset import copied_to_store
from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.storage.client import client_of

SAMPLES = 72


@pytest.fixture
def config(stream_data: Any) -> DataConfig:
    sources = [SourceConfig(name="bench", shards=str(stream_data.birds))]
    return DataConfig(sources=sources, tokenizer=str(stream_data.tokenizer), sequence_length=1024, workers=0)


@pytest.mark.parametrize("name", FROM_STORE)
def test_every_first_pack_is_read_from_the_store(name: str, store: Any, config: DataConfig, tmp_path: Path) -> None:
    with copied_to_store(Manifest.load(config.sources[0].shards), "s3://corpora/bench") as url:
        contender: Any = make_contender(name, Setting(config=config, samples=SAMPLES, folder=tmp_path, store=url))
        for _ in range(2):
            store.log.clear()
            contender.prepare_store()
            contender.first_batch_from_store()
            assert [entry for entry in store.log if entry[0] == "GET" and entry[1].endswith(".tar")]
    assert store.objects == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", FROM_STORE)
def test_first_packs_from_radosgw(
    name: str, ceph: Any, use_store: Callable[..., None], config: DataConfig, tmp_path: Path
) -> None:
    use_store(ceph.environment)
    with copied_to_store(Manifest.load(config.sources[0].shards), "s3://corpora/measured") as url:
        contender: Any = make_contender(name, Setting(config=config, samples=SAMPLES, folder=tmp_path, store=url))
        contender.prepare_store()
        contender.first_batch_from_store()
    assert client_of("corpora").folders("measured") == []


@pytest.mark.slow
def test_every_loader_sees_every_sample_and_starts_anywhere(store: Any, stream_data: Any) -> None:
    options = BenchOptions(
        raw_samples=1000, full_samples=1000, repeats=1, sequence_length=1024, store="s3://corpora/measured"
    )
    told: list[str] = []
    rows = bench_loader(stream_data.birds, stream_data.tokenizer, options, told.append)
    assert [(row.work, row.loader) for row in rows] == [
        (work, loader) for work in ("raw", "full") for loader in ("triweave", "bare", "webdataset")
    ]
    assert {row.samples for row in rows} == {SAMPLES}
    for row in rows:
        assert row.error is None
        assert row.samples_per_s == pytest.approx(SAMPLES / row.seconds[0])
        assert row.samples_per_cpu_s is not None
        starts = [row.first_batch_s, *(getattr(row, name) for name in RESUME_SHARES)]
        assert all(seconds and seconds > 0 for seconds in starts) if row.work == "full" else starts == [None] * 4
        assert (row.first_batch_from_store_s is not None) == (row.work == "full" and row.loader in FROM_STORE)
        if row.loader == "bare":
            assert row.ratio_to_bare_decode == 1.0
    assert any("webdataset" in line for line in told)
    assert store.objects == {}
