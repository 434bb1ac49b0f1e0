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


SCHEDULE = """
run_dir: runs/x
data:
  tokenizer: tok.model
  weight_unit: tokens
  sources:
    - {name: a, shards: shards/a, weight: 3}
    - {name: b, shards: shards/b, weight: 0}
  packing: {images: 5, encoder_weights: {image: 2.5}}
  batch_caps: {images: 50}
  schedule:
    - {after_step: 10, weights: {b: 1}, images: 8}
    - {after_step: 20, sequence_length: 512}
"""


def test_each_entry_of_a_schedule_changes_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(SCHEDULE)
    config = load_data_config(file)
    first, second, third = config.segments
    assert [[source.weight for source in segment.sources] for segment in config.segments] == [[3, 0], [3, 1], [3, 1]]
    assert [segment.packing.images for segment in config.segments] == [5, 8, 8]
    assert [segment.sequence_length for segment in config.segments] == [4096, 4096, 512]
    assert first.caps["encoder_cost"] == 4096 * 2.5
    assert [segment.schedule for segment in (first, second, third)] == [[], [], []]
    assert {segment.weight_unit for segment in config.segments} == {"tokens"}
    override = 'data.schedule=[{"after_step": 7, "weights": {"a": 0, "b": 2}}]'
    assert [source.weight for source in load_data_config(file, [override]).segments[1].sources] == [0, 2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('data.schedule=[{"after_step": 0}]', "data.schedule[0].after_step=0: must be above 0"),
        ('data.schedule=[{"after_step": 5}, {"after_step": 5}]', "must be above that of the entry before it, 5"),
        (
            'data.schedule=[{"after_step": 5, "weights": {"bb": 1}}]',
            "weights.bb: data.sources has no such name; did you",
        ),
        ('data.schedule=[{"after_step": 5, "weights": {"a": 0}}]', "data.schedule[0]: data.sources: every source has"),
        ('data.schedule=[{"after_step": 5, "weights": {"a": -1}}]', "data.schedule[0]: data.sources.a.weight=-1"),
        (
            'data.schedule=[{"after_step": 5, "images": 60}]',
            "data.schedule[0]: data.batch_caps.images=50: a single pack",
        ),
        ('data.schedule=[{"after_step": 5, "sequence_length": 4}]', "data.schedule[0]: data.sequence_length=4"),
        ("data.batch_caps.images=4", "data.batch_caps.images=4: a single pack may hold 5"),
        ("data.batch_caps.audio_ms=9", "set data.packing.audio_ms to 9 or less"),
        ("data.packing.contrastive_share=0.5", "and one of 64 packs may hold 320; raise it, or lower data.packing."),
        ("data.packing.encoder_weights.image=-1", "encoder_weights.image=-1"),
        ("data.packing.encoder_cost=0", "packing.encoder_cost=0"),
        ("data.weight_unit=words", "weight_unit"),
    ],
)
def test_schedules_and_caps_that_cannot_be(tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(SCHEDULE)
    with pytest.raises(ConfigError) as caught:
        load_data_config(file, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_of_a_schedule_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(SCHEDULE.replace("sequence_length: 512", "sequence_lenght: 512"))
    with pytest.raises(ConfigError, match=r"data.schedule\[1\].sequence_lenght: unknown key; did you mean"):
        load_data_config(file)


def test_default_caps_scale_with_the_length() -> None:
    small, large = (PackingConfig().caps(length, MediaGeometry()) for length in (512, 4096))
    assert small == {"tokens": 512, "image_tokens": 512, "images": 128, "audio_ms": 512 * 80 + 25, "encoder_cost": 512}
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
        ("data: {sources: [{name: a, shards: s, weight: 0}], tokenizer: t}", "every source has weight=0"),
        ("data: {sources: [{name: a, shards: s, weight: -1}], tokenizer: t}", "weight=-1"),
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
