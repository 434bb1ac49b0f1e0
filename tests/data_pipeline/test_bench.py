"""The loader benchmark does the same work with every loader, each in a process of its own."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from triweave.data_pipeline.bench.contenders.base import SampleStream, Setting
from triweave.data_pipeline.bench.contenders.containers import from_bytes, to_bytes
from triweave.data_pipeline.bench.contenders.registry import CONTENDERS, PEERS, make_contender
from triweave.data_pipeline.bench.contenders.webdataset import tar_samples
from triweave.data_pipeline.bench.loader_bench import BenchOptions, bench_loader
from triweave.data_pipeline.bench.subset import copy_first_samples
from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.shards.manifest import Manifest

SAMPLES = 72
FEW = BenchOptions(raw_samples=1000, full_samples=1000, repeats=1, sequence_length=1024)


@pytest.fixture
def setting(stream_data: Any, tmp_path: Path) -> Setting:
    sources = [SourceConfig(name="bench", shards=str(stream_data.birds))]
    config = DataConfig(sources=sources, tokenizer=str(stream_data.tokenizer), sequence_length=1024, workers=0)
    return Setting(config=config, samples=SAMPLES, folder=tmp_path)


@pytest.mark.slow
def test_a_peer_that_does_not_run_is_a_row_that_says_so(stream_data: Any, tmp_path: Path) -> None:
    """An interpreter whose litdata raises what a broken installation raises."""
    (tmp_path / "litdata.py").write_text("raise ImportError('libchunks.so: cannot open shared object file')")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    options = replace(FEW, peers=("litdata",), python=str(python))
    rows = {
        (row.work, row.loader): row for row in bench_loader(stream_data.birds, stream_data.tokenizer, options, print)
    }
    for work in ("raw", "full"):
        row = rows[work, "litdata"]
        assert row.error == "ImportError: libchunks.so: cannot open shared object file"
        assert (row.samples_per_s, row.samples, row.first_batch_s) == (None, None, None)
        assert rows[work, "triweave"].samples == SAMPLES


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_yields_the_samples_of_the_tars_and_goes_on_where_it_was(setting: Setting, name: str) -> None:
    try:
        peer = make_contender(name, setting)
    except ImportError as error:
        pytest.skip(f"{CONTENDERS[name].package} is not installed here (the extra `bench`): {error}")
    assert isinstance(peer, SampleStream)

    def contents(samples: Any) -> list[tuple[tuple[str, bytes], ...]]:
        return [tuple(sorted(members.items())) for members in samples]

    stored = contents(tar_samples(setting))
    streamed = contents(peer.samples())
    assert len(stored) == SAMPLES
    assert Counter(streamed) == Counter(stored)
    for count in (0, SAMPLES // 2, SAMPLES - 1):
        state = peer.state_behind(count)
        for _ in range(2):
            assert contents(peer.samples(state)) == streamed[count:]


@pytest.mark.parametrize("name", ["triweave", "bare", "webdataset"])
def test_raw_and_full_work_see_every_sample(setting: Setting, name: str) -> None:
    contender = make_contender(name, setting)
    assert contender.raw() == contender.full() == SAMPLES
    contender.first_batch()
    contender.prepare_resume(0.5)
    contender.resume()


def test_members_survive_their_container() -> None:
    members = {"json": b"{}", "0001.jpg": bytes(300), "été": b""}
    assert from_bytes(to_bytes(members)) == members


def test_a_subset_is_whole_shards_of_the_first_samples(stream_data: Any, tmp_path: Path) -> None:
    manifest = Manifest.load(stream_data.birds)
    subset = copy_first_samples(manifest, tmp_path / "subset", 30)
    assert 30 <= subset.samples <= 30 + len(manifest.shards)
    for number in range(len(subset.shards)):
        whole = manifest.tar_path(number).read_bytes()
        part = subset.tar_path(number).read_bytes()
        assert part.endswith(bytes(1024))
        assert whole.startswith(part[:-1024])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"repeats": 0}, "--repeats 0"), ({"full_samples": 0}, "--samples 0"), ({"peers": ("dali",)}, "--peers dali")],
)
def test_what_cannot_be_measured_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchOptions(**change)
