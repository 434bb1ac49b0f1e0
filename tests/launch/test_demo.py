"""The parts of the demo that can be checked in seconds, and (slow) the whole demo on a small corpus of its own."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

from triweave.data_pipeline.config import load_data_config
from triweave.data_pipeline.stream.loader import StepLoader
from triweave.data_pipeline.stream.plan import Planner
from triweave.launch.commands.demo import print_table
from triweave.launch.demo import DemoOptions, run_demo
from triweave.launch.demo_training import kill_rank, write_config
from triweave.launch.errors import DemoError
from triweave.launch.metrics import mean_loss_by_modality
from triweave.launch.unigram import entropy, state_before, unigram_losses
from triweave.pretrain.config import load_config

RESULT_KEYS = {
    *("shards", "samples", "pack_fill", "steps", "loss_first", "loss_last", "loss_by_modality"),
    *("resume_max_abs_diff", "data_wait_fraction", "seconds"),
}


def test_entropy_of_known_distributions() -> None:
    assert entropy(Counter({1: 7})) == 0
    assert entropy(Counter({1: 2, 2: 2, 3: 2, 4: 2})) == pytest.approx(math.log(4))


def test_unigram_losses_are_those_of_the_supervised_targets(tiny_run: Path) -> None:
    """Texts without a picture count under text, texts behind one under image; placeholders are no targets."""
    data = load_data_config(tiny_run)
    losses, tokens = unigram_losses(data, global_batch_rows=4, steps=3, state=None)
    assert set(losses) == {"text", "image"}
    assert all(0 < loss < math.log(320) for loss in losses.values())
    one_step, fewer_tokens = unigram_losses(data, global_batch_rows=4, steps=1, state=None)
    assert sum(fewer_tokens.values()) < sum(tokens.values())
    # an image document is bos, marker, 4 placeholders, text, eos: 5 positions of the row cannot be supervised
    assert 4 * 64 * 0.7 < sum(fewer_tokens.values()) < 4 * 64
    assert one_step != losses


def test_a_state_can_stand_in_any_epoch(tiny_run: Path) -> None:
    """The stream from there on is that of a loader that came there step by step."""
    data = load_data_config(tiny_run)
    planner = Planner(data)
    rows = planner.block(0).rows + planner.block(1).rows + 2
    loader = StepLoader(data, rank=0, world_size=1, global_batch_rows=rows, micro_batch_rows=8)
    expected = next(iter(loader)).state
    assert state_before(planner, rows) == expected
    assert state_before(planner, 0) == planner.start()


def test_mean_losses_weigh_by_tokens() -> None:
    entries = [
        {"loss_by_modality": {"text": 1.0, "image": 4.0}, "supervised_by_modality": {"text": 30.0, "image": 5.0}},
        {"loss_by_modality": {"text": 2.0}, "supervised_by_modality": {"text": 10.0}},
    ]
    assert mean_loss_by_modality(entries) == {"text": 1.25, "image": 4.0}


def test_the_config_of_the_demo_points_into_its_folder(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, 77))
    assert config.train.steps == 77
    places = [config.run_dir, config.data.tokenizer, config.data.sources[0].shards]
    assert all(Path(place).is_relative_to(tmp_path) for place in places)


def test_kill_rank_kills_the_rank_and_not_its_reader() -> None:
    """Two processes with the environment of rank 1, one the child of the other, beside a rank 0."""
    script = """
export RANK=0; sleep 60 & zero=$!
export RANK=1; bash -c 'sleep 60 & echo $!; wait' & one=$!
echo $zero $one; wait $one; echo ended $?; kill $zero; wait
"""
    process = subprocess.Popen(
        ["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline(), process.stdout.readline()
    assert not kill_rank(process.pid, 5)
    deadline = time.monotonic() + 10
    while not kill_rank(process.pid, 1):
        assert time.monotonic() < deadline
    assert process.stdout.readline() == "ended 137\n"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)


def test_too_few_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="at least"):
        run_demo(DemoOptions(out=tmp_path, steps=3))


def write_stamps(folder: Path) -> None:
    """Write a corpus with the layout of Tux Paint: 60 pictures, captions in three languages, some speech."""
    random = np.random.default_rng(0)
    for number in range(60):
        stem = folder / "stamps" / f"kind{number % 4}" / f"thing{number}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (8, 8, 4), dtype=np.uint8)
        Image.fromarray(pixels, "RGBA").resize((48, 40)).save(stem.with_suffix(".png"))
        lines = [f"Thing {number} of kind {number % 4}.", f"de.utf8=Ding {number} der Art {number % 4}."]
        lines.append(f"fr.utf8=Chose {number} du genre {number % 4}.")
        stem.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if number % 3 == 0:
            wave = np.sin(np.arange(8000) * (0.05 + number / 500))
            soundfile.write(stem.with_name(f"{stem.name}_desc.ogg"), wave, 16000)


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It trains, loses a rank, resumes on the other number of ranks, and is interrupted and continued on the way."""
    from triweave.launch import demo_data, demo_training
    from triweave.launch.demo_training import DemoTraining

    small = yaml.safe_load(demo_training.TEMPLATE.read_text(encoding="utf-8"))
    small["model"] |= {"d_model": 48, "layers": 1}
    small["data"] |= {"workers": 0, "sequence_length": 128}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small), encoding="utf-8")
    monkeypatch.setattr(demo_training, "TEMPLATE", tmp_path / "small.yaml")
    monkeypatch.setattr(demo_data, "VOCABULARY", 340)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_stamps(tmp_path / "corpus")
    options = DemoOptions(out=tmp_path / "demo", corpus=tmp_path / "corpus", steps=30)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(DemoTraining, "resume", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_demo(options)
    result = run_demo(options)

    assert set(result) >= RESULT_KEYS
    assert json.loads((tmp_path / "demo" / "result.json").read_text(encoding="utf-8")) == result
    assert result["steps"] == 30
    assert result["samples"] == 180
    assert result["resume_compared_steps"] >= 3
    assert result["resume_max_abs_diff"] < 1e-3
    assert set(result["loss_by_modality"]) == {"text", "image", "audio"} == set(result["unigram_by_modality"])
    assert result["loss_last"] < result["loss_first"]
    assert set(result["seconds"]) == {
        *("fetch", "build", "verify", "tokenizer", "tokenize", "plan"),
        *("train", "resume", "score"),
    }
    log = (tmp_path / "demo" / "train" / "launch.log").read_text(encoding="utf-8")
    assert log.count("resuming from") == 1
    assert "return code = -9" in log
    assert "reused" in capsys.readouterr().err

    began = time.monotonic()
    assert run_demo(options) == result
    assert time.monotonic() - began < 5
    print_table(result)
    table = capsys.readouterr().out
    assert all(f"{result['unigram_by_modality'][name]:.3f}" in table for name in ("text", "image", "audio"))
