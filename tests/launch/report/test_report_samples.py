"""Which documents a page shows, what it keeps of them, and what it says where it has none."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from triweave.data_pipeline.config import SourceConfig
from triweave.data_pipeline.errors import DataError
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.sources.manifest import ManifestSource
from triweave.data_pipeline.splits import fold_of
from triweave.launch.cli import main
from triweave.launch.report import sample_choice
from triweave.launch.report.run_files import read_run
from triweave.launch.report.sample_choice import AUDIO_RATE_HZ, IMAGE_SIDE_PX, choose_samples
from triweave.launch.report.samples import CACHE_NAME, run_samples
from triweave.launch.report.write import write_report

LONG_S = 30


def row(number: int) -> dict[str, Any]:
    """Pictures of two categories (one has most of them), clips of two kinds; every seventh clip is long."""
    labels = {"group": f"g{number}", "split": "test" if number % 3 == 0 else "train", "language": "en"}
    content = io.BytesIO()
    if number % 2:
        Image.new("RGB", (400, 300), (number, 2 * number, 0)).save(content, "PNG")
        part = {"modality": "image"}
        labels["category"] = "rare" if number % 20 == 1 else "plenty"
    else:
        seconds = LONG_S if number % 7 == 0 else 1
        noise = np.random.default_rng(number).integers(-3000, 3000, seconds * 22_050, dtype=np.int16)
        soundfile.write(content, noise, 22_050, format="WAV")
        part = {"modality": "audio"}
        labels["kind"] = "speech" if number % 4 else "effect"
    parts = [
        {"modality": "text", "text": f"Number {number}"},
        part | {"bytes": base64.b64encode(content.getvalue()).decode()},
    ]
    return {"id": f"row-{number}", "parts": parts, "labels": labels, "source": {"corpus": "made"}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    lines = [json.dumps(row(number)) + "\n" for number in range(120)]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    build(ManifestSource(root=folder / "rows.jsonl"), folder / "shards", BuildOptions(shard_size_bytes=1_000_000))
    return folder / "shards"


def source(shards: Path, **options: Any) -> SourceConfig:
    return SourceConfig(name="made", shards=str(shards), **options)


def test_samples_are_held_out_and_spread_over_categories(shards: Path) -> None:
    chosen = choose_samples([source(shards, split="train")], {"image": 6, "audio": 4})
    assert [sample.modality for sample in chosen] == ["image"] * 6 + ["audio"] * 4
    numbers = [int(sample.truth.removeprefix("Number ")) for sample in chosen]
    assert all(number % 3 == 0 for number in numbers)
    assert all(sample.held_out for sample in chosen)
    assert {sample.about for sample in chosen[:2]} == {"made, plenty, en", "made, rare, en"}
    assert {sample.about for sample in chosen[6:]} == {"made, speech, en", "made, effect, en"}
    assert len(set(numbers)) == 10
    assert choose_samples([source(shards, split="train")], {"image": 6, "audio": 4}) == chosen


def test_the_fold_that_a_run_left_out_is_what_is_held_out(shards: Path) -> None:
    chosen = choose_samples([source(shards, hold_out="1/3")], {"image": 5})
    groups = [f"g{sample.truth.removeprefix('Number ')}" for sample in chosen]
    assert {fold_of(group, 3) for group in groups} == {1}
    assert all(sample.held_out for sample in chosen)


def test_a_run_that_has_trained_on_everything_holds_nothing_out(shards: Path) -> None:
    chosen = choose_samples([source(shards)], {"image": 5})
    assert len(chosen) == 5
    assert not any(sample.held_out for sample in chosen)


def test_media_are_small_and_clips_short(shards: Path) -> None:
    chosen = choose_samples([source(shards)], {"image": 3, "audio": 60})
    for sample in chosen:
        if sample.modality == "image":
            with Image.open(io.BytesIO(sample.shown)) as image:
                assert (image.format, max(image.size)) == ("JPEG", IMAGE_SIDE_PX)
            assert sample.mime == "image/jpeg"
        else:
            info = soundfile.info(io.BytesIO(sample.shown))
            assert (info.format, info.samplerate, info.channels, info.duration) == ("FLAC", AUDIO_RATE_HZ, 1, 1.0)
            assert int(sample.truth.removeprefix("Number ")) % 7 != 0
    assert len(chosen) == 3 + len([number for number in range(0, 120, 2) if number % 7])


def test_what_is_damaged_or_too_large_is_passed_over(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = choose_samples([source(shards)], {"image": 1})[0]
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in shards.iterdir():
        content = path.read_bytes()
        (copy / path.name).write_bytes(content.replace(whole.content, whole.content[:-1] + b"?"))
    assert choose_samples([source(copy)], {"image": 1})[0].key != whole.key
    monkeypatch.setattr(sample_choice, "LARGEST_MEDIUM_BYTES", 10)
    assert choose_samples([source(shards)], {"image": 1, "audio": 1}) == []
    with pytest.raises(DataError, match="no shard folder"):
        choose_samples([source(tmp_path / "gone")], {"image": 1})


def test_samples_come_from_the_cache_of_the_same_checkpoint_and_number(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run(), "a")
    told: list[str] = []
    kept = run_samples(run, 12, tell=told.append)
    assert (kept.step, len(kept.samples), told) == (40, 2, [])
    assert "no checkpoint" in run_samples(run, 3, tell=told.append).reason
    assert "--samples 0" in run_samples(run, 0, tell=told.append).reason
    (run.folder / CACHE_NAME).write_text("[]", encoding="utf-8")
    assert "no checkpoint" in run_samples(run, 12, tell=told.append).reason


def test_a_cache_brings_no_foreign_address_into_the_page(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run(), "a")
    path = run.folder / CACHE_NAME
    content = json.loads(path.read_text(encoding="utf-8"))
    content["samples"][0]["uri"] = "data:text/html,<script>alert(1)</script>"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert run_samples(run, 12, tell=lambda _: None).samples == ()


def test_a_trained_run_captions_its_pictures_once(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Trains four steps, reports, and reports again with the model's shards out of reach: the same bytes."""
    assert main(["train", str(tiny_run)]) == 0
    folder, told = tmp_path / "run", []
    write_report([folder], tmp_path / "one.html", pictures=4, tell=told.append)
    assert [line.partition(": ")[2] for line in told] == ["captioning 4 samples with the checkpoint of step 4"]
    page = (tmp_path / "one.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/jpeg;base64,') == 4
    assert page.count("<dt>generated</dt>") == 4
    assert "documents that the run may have been trained on" in page
    hidden = tiny_data / "hidden"
    (tiny_data / "shards").rename(hidden)
    try:
        write_report([folder], tmp_path / "two.html", pictures=4, tell=told.append)
        assert (tmp_path / "two.html").read_text(encoding="utf-8") == page
        assert len(told) == 1
        (folder / CACHE_NAME).unlink()
        write_report([folder], tmp_path / "three.html", pictures=4, tell=told.append)
        assert "no samples: no shard folder at" in (tmp_path / "three.html").read_text(encoding="utf-8")
    finally:
        hidden.rename(tiny_data / "shards")
