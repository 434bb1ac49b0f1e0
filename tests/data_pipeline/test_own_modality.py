"""A modality registered from outside flows through build, plan, loader and packing without a change to them."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.media.geometry import MediaGeometry, MediaInfo
from triweave.data_pipeline.media.modalities import MODALITIES, Modality
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.sources.manifest import ManifestSource
from triweave.data_pipeline.stream.catalog import UNKNOWN_MODALITY
from triweave.data_pipeline.stream.loader import StepLoader
from triweave.data_pipeline.text.token_counts import write_token_counts
from triweave.data_pipeline.text.tokenizer import train_tokenizer


def test_a_modality_of_ones_own_flows_through_untouched_code(
    stream_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sensor reading, int16 values four to a token, is registered, built, planned, decoded and packed."""

    def probe(data: bytes) -> tuple[MediaInfo, str, str]:
        return MediaInfo(samples=len(data) // 2, rate=100), "npy", "application/octet-stream"

    def grid(info: MediaInfo, _: MediaGeometry) -> tuple[int, int, int]:
        return info.samples // 4, 1, 1

    def decode(data: bytes, *_: object) -> np.ndarray:
        return np.frombuffer(data, np.int16).reshape(-1, 4)

    sensor = Modality(
        name="sensor", id=5, extensions=("npy",), probe=probe, grid=grid, decode=decode,
        features=lambda _: 4, dtype=np.dtype(np.int16),
    )  # fmt: skip
    records = tmp_path / "readings.jsonl"
    readings = [np.arange(number, number + 8 + 4 * number, dtype=np.int16) for number in range(6)]
    with records.open("w") as file:
        for number, reading in enumerate(readings):
            part = {"modality": "sensor", "bytes": base64.b64encode(reading.tobytes()).decode()}
            text = {"modality": "text", "text": f"reading {number} looked steady for a while"}
            file.write(json.dumps({"id": str(number), "parts": [part, text]}) + "\n")
    # A tokenizer without the marker leaves the parts out and says so; nothing breaks.
    monkeypatch.setitem(MODALITIES, "sensor", sensor)
    manifest = build(ManifestSource(root=records), tmp_path / "shards", BuildOptions())
    write_token_counts(manifest, stream_data.tokenizer)
    config = DataConfig(
        sources=[SourceConfig(name="s", shards=str(tmp_path / "shards"))],
        tokenizer=str(stream_data.tokenizer),
        sequence_length=256,
        workers=0,
    )
    old = StepLoader(config, rank=0, world_size=1, global_batch_rows=1, micro_batch_rows=1)
    assert old.planner.block(0).left_out == {UNKNOWN_MODALITY: 6}
    train_tokenizer([manifest], 320, tmp_path / "tokenizer.model")
    write_token_counts(manifest, tmp_path / "tokenizer.model")
    config = replace(config, tokenizer=str(tmp_path / "tokenizer.model"))
    window = next(iter(StepLoader(config, rank=0, world_size=1, global_batch_rows=1, micro_batch_rows=1)))
    (batch,) = window.micro_batches
    payload = batch.payloads["sensor"]
    assert sorted(payload.lengths.tolist()) == [reading.size // 4 for reading in readings]
    assert sorted(payload.values.reshape(-1).tolist()) == sorted(np.concatenate(readings).tolist())
    assert batch.actual_tokens["sensor"] == payload.lengths.sum() == (batch.modality_ids == 5).sum()
    assert set(batch.row_modality.tolist()) == {0, 5}
