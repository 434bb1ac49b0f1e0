"""Shards in an object store are shown as local ones are, through the loader's reader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import object_server
import pytest

from triweave.data_pipeline.config import load_data_config
from triweave.data_pipeline.storage.client import forget_clients
from triweave.launch.view.packs import PackBook
from triweave.launch.view.server import Parameters, ViewServer
from triweave.launch.view.shard_folder import ShardFolder

ASKED = (
    *("/api/samples", "/api/samples?start=31&query=chante", "/api/samples?query=modality:audio+language:ja"),
    *("/api/document?sample=0", "/api/document?sample=59", "/api/facets", "/api/facets", "/api/facets"),
    *("/medium?sample=31&part=1", "/thumbnail?sample=0&part=0", "/api/waveform?sample=31&part=1"),
    *("/api/block?block=1", "/api/pack?row=2"),
)


@pytest.fixture
def store(view_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The store of the storage tests, with the shards at corpora/birds."""
    settings = {
        "TRIWEAVE_CACHE_DIR": str(tmp_path / "cache"),
        "TRIWEAVE_S3_TIMEOUT_S": "2",
        "TRIWEAVE_S3_DEADLINE_S": "4",
    }
    with object_server.object_server() as server:
        for name, value in (server.environment | settings).items():
            monkeypatch.setenv(name, value)
        for file in view_data.shards.iterdir():
            server.store(f"corpora/birds/{file.name}", file.read_bytes())
        yield server
    forget_clients()


def answers(view_data: Any, location: str) -> list[bytes]:
    config = load_data_config(view_data.config)
    config = replace(config, sources=[replace(config.sources[0], shards=location)])
    with ViewServer(0, [ShardFolder("birds", location)], packs=PackBook(config)) as server:
        found = []
        for address in ASKED:
            path, _, query = address.partition("?")
            values = {
                name: [value.replace("+", " ")]
                for name, value in (item.split("=") for item in query.split("&") if item)
            }
            found.append(server.answer(path, Parameters(values=values)).body)
        return found


def test_a_remote_folder_looks_like_a_local_one(view_data: Any, store: Any) -> None:
    remote = answers(view_data, "s3://corpora/birds")
    assert remote == answers(view_data, str(view_data.shards))
    assert store.ranges(".tar")  # by range
    assert "" not in store.ranges(".tar")


def test_what_the_store_has_lost_is_damage(store: Any) -> None:
    del store.objects["corpora/birds/shard-000001.tar"]
    with ViewServer(0, [ShardFolder("birds", "s3://corpora/birds")]) as server:
        lost = json.loads(server.answer("/api/document", Parameters(values={"sample": ["30"]})).body)
        assert (lost["id"], lost["damage"], lost["parts"]) == ("item/30", "the tar is missing", [])
        listed = json.loads(server.answer("/api/samples", Parameters(values={"start": ["20"]})).body)["samples"]
        assert [bool(entry["damage"]) for entry in listed[:30]] == [False] * 5 + [True] * 25
