"""A modality registered from outside, from its records to gradients of its embedder, without a change to the core."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.media.geometry import MediaGeometry, MediaInfo
from triweave.data_pipeline.media.modalities import MODALITIES, Modality
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.schema import MediaPart, document_from_json
from triweave.data_pipeline.shards.verify import verify
from triweave.data_pipeline.sources.manifest import ManifestSource
from triweave.data_pipeline.stream.loader import StepLoader
from triweave.data_pipeline.text.token_counts import write_token_counts
from triweave.data_pipeline.text.tokenizer import train_tokenizer
from triweave.launch.cli import main
from triweave.pretrain.batch import to_device
from triweave.pretrain.encoders.patch import PatchEmbedder
from triweave.pretrain.encoders.registry import ENCODERS
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.model import MultimodalTransformer

SENSOR_ID = 5
WORDS = ("falling", "rising")
READINGS = 48


class SensorEmbedder(PatchEmbedder):
    """Four int16 readings a token, in hundredths."""

    offset = 0.0
    scale = 100.0
    payload_dtype = torch.int16


SENSOR = Modality(
    name="sensor",
    id=SENSOR_ID,
    extensions=("npy",),
    probe=lambda data: (MediaInfo(samples=len(data) // 2, rate=100), "npy", "application/octet-stream"),
    grid=lambda info, geometry: (info.samples // int(geometry.extra.get("sensor_values_per_token", 4)), 1, 1),
    decode=lambda data, *_: np.frombuffer(data, np.int16).reshape(-1, 4),
    features=lambda _: 4,
    dtype=np.dtype(np.int16),
)


@pytest.fixture
def sensor_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Shards of readings that rise or fall, each followed by the word that says which."""
    monkeypatch.setitem(MODALITIES, "sensor", SENSOR)
    monkeypatch.setitem(ENCODERS, "sensor", {"patch": SensorEmbedder})
    lines = []
    for number in range(READINGS):
        values = (np.arange(16) * (1 if number % 2 else -1) * 10 + number).astype(np.int16)
        part = {"modality": "sensor", "bytes": base64.b64encode(values.tobytes()).decode(), "t_ms": [0, 160]}
        text = {"modality": "text", "text": f"{WORDS[number % 2]}"}
        lines.append(json.dumps({"id": f"{number}", "parts": [part, text]}))
    (tmp_path / "readings.jsonl").write_text("\n".join(lines))
    manifest = build(ManifestSource(root=tmp_path / "readings.jsonl"), tmp_path / "shards", BuildOptions())
    assert manifest.rows["kept"] == READINGS
    assert not verify(tmp_path / "shards").damage
    train_tokenizer([manifest], 290, tmp_path / "tokenizer.model")
    write_token_counts(manifest, tmp_path / "tokenizer.model")
    return DataConfig(
        sources=[SourceConfig(name="s", shards=str(tmp_path / "shards"))],
        tokenizer=str(tmp_path / "tokenizer.model"),
        sequence_length=128,
        workers=0,
    )


def loader_of(config: DataConfig) -> StepLoader:
    return StepLoader(config, rank=0, world_size=1, global_batch_rows=2, micro_batch_rows=2)


def test_the_schema_stores_it_and_the_plan_counts_it(
    sensor_config: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"name": "s", "shards": sensor_config.sources[0].shards}
    data: dict[str, Any] = {"sources": [source], "tokenizer": sensor_config.tokenizer, "sequence_length": 128}
    (tmp_path / "run.yaml").write_text(json.dumps({"data": data}))
    assert main(["plan", str(tmp_path / "run.yaml"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    tokens = json.dumps(plan).partition('"sensor": ')[2]
    assert tokens.startswith(str(4 * READINGS)), plan
    (tar,) = Path(sensor_config.sources[0].shards).glob("*.tar")
    content = tar.read_bytes()
    start = content.index(b'{"v":1')
    document = document_from_json(content[start : content.index(b"}}", start) + 2].rstrip(b"\0"))
    part = document.parts[0]
    assert isinstance(part, MediaPart)
    assert (part.modality, part.info.samples, part.info.rate, part.t_ms) == ("sensor", 16, 100, (0, 160))


def test_its_embedder_learns_what_the_readings_mean(sensor_config: DataConfig) -> None:
    """The word follows from the readings alone: without them no model gets below log 2 a word."""
    loader = loader_of(sensor_config)
    assert loader.media_features["sensor"] == 4
    model = MultimodalTransformer(
        ModelConfig(d_model=32, layers=2, heads=4, kv_heads=2, head_width=16),
        vocab_size=loader.tokenizer.vocab_size,
        media_features={"sensor": 4},
        seed=0,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _, window in zip(range(30), loader, strict=False):
        (batch,) = window.micro_batches
        assert set(batch.payloads) == {"sensor"}
        sums = model(to_device(batch, "cpu"))
        loss = sums.total / batch.row_weight.sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = model.towers["sensor"].project.weight.grad  # type: ignore[union-attr]
        assert isinstance(gradient, torch.Tensor)
        assert gradient.abs().max() > 0
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.1 < losses[0], losses


def test_worker_processes_load_the_same_readings(sensor_config: DataConfig) -> None:
    windows = []
    for workers in (0, 2):
        loader = loader_of(replace(sensor_config, workers=workers))
        windows.append([window.micro_batches[0] for _, window in zip(range(4), loader, strict=False)])
    for ours, theirs in zip(*windows, strict=True):
        assert np.array_equal(ours.payloads["sensor"].values, theirs.payloads["sensor"].values)
        assert np.array_equal(ours.tokens, theirs.tokens)


def test_a_batch_with_it_needs_its_embedder(sensor_config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ENCODERS, "sensor")
    loader = loader_of(sensor_config)
    with pytest.raises(Exception, match="no encoder for modality 'sensor'"):
        MultimodalTransformer(
            ModelConfig(d_model=32, layers=1, heads=2, kv_heads=2, head_width=16),
            vocab_size=loader.tokenizer.vocab_size,
            media_features=loader.media_features,
        )
    assert MediaGeometry(extra={"sensor_values_per_token": 8}).hash != MediaGeometry().hash
