"""The demo from nothing to its report, short and long, on small corpora with the layouts of the real ones."""

from __future__ import annotations

import dataclasses
import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

from triweave.launch.demo import settings, short
from triweave.launch.demo.corpora import SETS, CorpusChoice
from triweave.launch.demo.long import run_long
from triweave.launch.demo.short import DemoOptions, run_demo
from triweave.launch.demo.tables import print_long_result, print_result
from triweave.launch.demo.training import DemoTraining
from triweave.launch.errors import DemoError

PICTURES, PROMPTS = 240, 40
LANGUAGES = ("en", "es", "fr", "it", "ru")
RATE_HZ = 16_000


def write_stamps(folder: Path, pictures: int) -> Path:
    """Write stamps of four kinds with captions in three languages; every third one is spoken."""
    random = np.random.default_rng(0)
    for number in range(pictures):
        stem = folder / "stamps" / f"kind{number % 4}" / f"thing{number}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (8, 8, 4), dtype=np.uint8)
        Image.fromarray(pixels, "RGBA").resize((48, 40)).save(stem.with_suffix(".png"))
        lines = [f"Thing {number} of kind {number % 4}.", f"de.utf8=Ding {number} der Art {number % 4}."]
        lines.append(f"fr.utf8=Chose {number} du genre {number % 4}.")
        stem.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if number % 3 == 0:
            _write_tone(stem.with_name(f"{stem.name}_desc.ogg"), number)
    return folder


def write_prompts(folder: Path, prompts: int) -> Path:
    """Write as many spoken prompts for each of the five languages."""
    (folder / "transcripts").mkdir(parents=True)
    for language in LANGUAGES:
        lines = [f"word-{number}: Word {number} in {language}" for number in range(prompts)]
        transcript = ("\n".join(lines) + "\n").encode()
        (folder / "transcripts" / f"core-sounds-{language}.txt.gz").write_bytes(gzip.compress(transcript, mtime=0))
        for number in range(prompts):
            clip = folder / "sounds" / f"{language}_XX_f_Voice" / f"word-{number}.wav"
            clip.parent.mkdir(parents=True, exist_ok=True)
            _write_tone(clip, 1000 + 100 * LANGUAGES.index(language) + number)
    return folder


def _write_tone(path: Path, number: int) -> None:
    """Write a quarter of a second that no other number has."""
    wave = 0.5 * np.sin(np.arange(RATE_HZ // 4) * (0.05 + number / 5000))
    soundfile.write(path, wave, RATE_HZ)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoOptions]:
    """A demo of a model that trains in seconds; both tests use its folder, so that data are made once."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SHORT_TEMPLATE", "LONG_TEMPLATE"):
            tree = yaml.safe_load(getattr(settings, name).read_text(encoding="utf-8"))
            tree["model"] |= {"d_model": 48, "layers": 1}
            tree["data"] |= {"workers": 0, "sequence_length": 128}
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
            patch.setattr(settings, name, folder / f"{name}.yaml")
        patch.setitem(SETS, "debian", dataclasses.replace(SETS["debian"], vocabulary=340))
        patch.setenv("OMP_NUM_THREADS", "1")
        given = {
            "tuxpaint": write_stamps(folder / "tuxpaint", PICTURES),
            "asterisk": write_prompts(folder / "asterisk", PROMPTS),
        }
        yield DemoOptions(out=folder / "out", choice=CorpusChoice(given=given), steps=30)


@pytest.mark.slow
def test_the_whole_demo(
    options: DemoOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It trains, loses a rank, resumes on the other number of ranks, and is interrupted and continued on the way."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(DemoTraining, "resume", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_demo(options)
    result = run_demo(options)

    assert json.loads((options.out / "result.json").read_text(encoding="utf-8")) == result
    assert result["steps"] == 30
    assert {name: own["documents"] for name, own in result["corpora"].items()} == {
        "tuxpaint": 3 * PICTURES,
        "asterisk": 5 * PROMPTS,
    }
    assert result["samples"] == 3 * PICTURES + 5 * PROMPTS
    assert result["resume_compared_steps"] >= 3
    assert result["resume_max_abs_diff"] < 1e-3
    assert set(result["loss_by_modality"]) == {"text", "image", "audio"} == set(result["unigram_by_modality"])
    assert result["loss_last"] < result["loss_first"]
    assert set(result["seconds"]) == set(short.STAGES)
    assert result["caption_nll_true"] > 0 < result["caption_nll_shuffled"]
    assert set(result["caption_nll_by_modality"]) == {"image", "audio"}
    task = result["retrieval"]["tuxpaint image->caption en"]
    assert set(task) == {"r1", "r10", "ci", "floor", "chance", "n"}
    assert 0 <= task["ci"]["r10"][0] <= task["r10"] <= task["ci"]["r10"][1] <= 1
    assert "<html" in Path(result["report"]).read_text(encoding="utf-8")
    log = (options.out / "train" / "launch.log").read_text(encoding="utf-8")
    assert log.count("resuming from") == 1
    assert "return code = -9" in log
    assert "reused" in capsys.readouterr().err

    began = time.monotonic()
    assert run_demo(options) == result
    assert time.monotonic() - began < 5
    print_result(result)
    printed = capsys.readouterr().out
    assert all(f"{result['unigram_by_modality'][name]:.3f}" in printed for name in ("text", "image", "audio"))
    assert "tuxpaint image->caption en" in printed
    assert result["report"] in printed


@pytest.mark.slow
def test_the_long_demo_shares_the_data_and_pools_its_seeds(
    options: DemoOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    short_options = dataclasses.replace(options, steps=12)
    result = run_long(short_options)
    out = options.out / "long"
    assert json.loads((out / "result.json").read_text(encoding="utf-8")) == result
    assert set(result["runs"]) == {"seed0", "seed1", "seed2", "control"}
    assert all((out / name / "evaluation.json").exists() for name in result["runs"])
    task = result["retrieval"]["tuxpaint image->caption en"]
    singles = []
    for number in range(3):
        evaluation = json.loads((out / f"seed{number}" / "evaluation.json").read_text(encoding="utf-8"))
        singles.append(evaluation["retrieval"]["tuxpaint image->caption en"]["r10"])
    assert task["seeds"]["r10"] == singles
    assert task["r10"] == pytest.approx(np.mean(singles))
    control = json.loads((out / "control" / "evaluation.json").read_text(encoding="utf-8"))
    assert task["control"]["r10"] == control["retrieval"]["tuxpaint image->caption en"]["r10"]
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert all(f"long/{name}" in page for name in result["runs"])

    capsys.readouterr()
    began = time.monotonic()
    assert run_long(short_options) == result
    assert time.monotonic() - began < 5
    assert capsys.readouterr().err.count("reused: ") == 8
    print_long_result(result)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| tuxpaint image->caption en") and line.endswith("|") for line in lines)
    with pytest.raises(DemoError, match="other settings"):
        run_long(dataclasses.replace(options, steps=13))
