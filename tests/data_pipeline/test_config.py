"""DataConfig from YAML and overrides; every mistake is one line that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from triweave.data_pipeline.config import DataConfig, PackingConfig, SourceConfig, load_data_config
from triweave.data_pipeline.errors import ConfigError, DataError
from triweave.data_pipeline.media.geometry import MediaGeometry

YAML = """
run_dir: runs/x
model: {layers: 4}
data:
  tokenizer: tok.model
  sources:
    - {name: a, shards: shards/a, weight: 3}
    - {name: b, shards: shards/b}
  geometry: {image_patch_px: 16}
  packing: {images: 5}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(YAML)
    return file


def test_values_defaults_and_overrides(path: Path) -> None:
    config = load_data_config(path, ["data.sequence_length=512", "data.packing.audio_ms=900", "model.layers=9"])
    assert config == DataConfig(
        sources=[SourceConfig(name="a", shards="shards/a", weight=3.0), SourceConfig(name="b", shards="shards/b")],
        tokenizer="tok.model",
        sequence_length=512,
        geometry=MediaGeometry(image_patch_px=16),
        packing=PackingConfig(images=5, audio_ms=900),
    )


def test_default_caps_scale_with_the_length() -> None:
    small, large = (PackingConfig().caps(length, MediaGeometry()) for length in (512, 4096))
    assert small == {"tokens": 512, "image_tokens": 512, "images": 128, "audio_ms": 512 * 80 + 25}
    assert large["images"] == 8 * small["images"]
    # Fewer frames in a token make tokens shorter, so the same window holds less audio.
    assert PackingConfig().caps(512, MediaGeometry(audio_frames_per_token=4))["audio_ms"] == 512 * 40 + 25


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sequense_length=1", "data.sequense_length: unknown key; did you mean data.sequence_length"),
        ("data.packing.imags=1", "did you mean data.packing.images"),
        ("data.geometry.image_patch=1", "did you mean data.geometry.image_patch_px"),
        ("data.seed.x=1", "data.seed has no keys"),
        ("data.seed", "key=value"),
        ("data=5", "one key of data at a time"),
        ("data.sequence_length=many", "sequence_length"),
        ("data.sequence_length=2", "sequence_length=2: must be at least 8"),
        ("data.packing.images=0", "packing.images=0"),
        ("data.geometry.image_patch_px=0", "image_patch_px"),
        ("data.workers=-1", "workers=-1"),
        ("data.corrupt_budget=-1", "corrupt_budget"),
        ("data.sequence_length=99999999999999999999", "sequence_length=99999999999999999999: must be at most"),
        ("data.seed=-1", "seed=-1"),
        ("data.packing.contrastive_share=1.5", "packing.contrastive_share=1.5: must be from 0 to 1"),
        ("data.packing.contrastive_share=-0.1", "packing.contrastive_share=-0.1: must be from 0 to 1"),
    ],
)
def test_wrong_overrides(path: Path, override: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_data_config(path, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: {sources: [], tokenizer: t}", "data.sources is empty"),
        ("data: {sources: [{name: a, shards: s}, {name: a, shards: t}], tokenizer: t}", "names 'a' twice"),
        ("data: {sources: [{name: a, shards: s, weight: 0}], tokenizer: t}", "weight=0"),
        ("data: {sources: [{name: a/b, shards: s}], tokenizer: t}", "'a/b'"),
        ("data: {sources: [{name: a, shard: s}], tokenizer: t}", "did you mean data.sources[0].shards"),
        (
            "data: {sources: [{name: a, shards: s, split: dev}], tokenizer: t}",
            "split='dev': must be one of train, valid",
        ),
        ("data: {sources: [{name: a, shards: s, hold_out: 5/5}], tokenizer: t}", "hold_out='5/5': must be k/N"),
        ("data: {sources: [{name: a, shards: s, hold_out: 0/1}], tokenizer: t}", "hold_out='0/1': must be k/N"),
        ("data: {sources: [{name: a, shards: s, hold_out: fold 1}], tokenizer: t}", "hold_out='fold 1': must be k/N"),
        (
            "data: {sources: [{name: a, shards: s, hold_out: 0/5, split: train}], tokenizer: t}",
            "split=train and hold_out=0/5 do not go together",
        ),
        ("data: {sources: [{name: a, shards: s, shuffle_pairs: -1}], tokenizer: t}", "shuffle_pairs=-1"),
        ("data: {tokenizer: t}", "sources"),
        ("data: 5", "must be a mapping"),
        ("model: {}", "no `data:` key"),
        ("- 1", "no mapping"),
        ("data: {", "not YAML"),
    ],
)
def test_wrong_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_data_config(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_data_config(tmp_path / "none.yaml")


def test_an_endless_corrupt_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="corrupt_budget=inf: must be 0 or more, and finite"):
        DataConfig(sources=[SourceConfig(name="a", shards="s")], tokenizer="t", corrupt_budget=float("inf"))
