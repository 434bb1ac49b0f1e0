"""Runs as they lie on disk, made of numbers: metrics, config, evaluation and cached samples, without training."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

from triweave.launch.report.write import write_report

STEPS = 40
HOSTILE = "<script>alert(1)</script> & \"quoted\" 'text' </style>"
CONFIG: dict[str, Any] = {
    "run_dir": "runs/a",
    "data": {"sources": [{"name": "tiny", "shards": "gone"}], "tokenizer": "gone.model", "sequence_length": 64},
    "optimizer": {"lr": 0.005},
    "train": {"steps": STEPS, "global_batch_rows": 4},
}


def metrics_entry(step: int, draw: random.Random) -> dict[str, Any]:
    losses = {name: 8 - 0.1 * step + draw.uniform(-0.1, 0.1) for name in ("text", "image", "audio")}
    return {
        "step": step,
        "loss": sum(losses.values()) / 3,
        "loss_by_modality": losses,
        "supervised_by_modality": dict.fromkeys(losses, 10.0),
        "contrastive_loss": 5 - 0.05 * step,
        "contrastive_pairs": 64,
        "contrastive_accuracy": step / STEPS,
        "lr": 1e-3,
        "tokens": 250,
        "supervised_tokens": 30.0,
        "tokens_per_s": 1000.0,
        "step_s": 0.25,
        "data_wait_s": 0.025,
        "data_wait_fraction": 0.1,
        "memory_bytes": 1 << 30,
    }


def retrieval_entry(r10: float, floor: float, **more: Any) -> dict[str, Any]:
    """A task whose intervals reach 0.05 to either side of R@10 and of its difference to the ridge floor."""
    difference = r10 - floor
    return {
        "corpus": "tuxpaint-stamps",
        "n": 120,
        "pool": 100.0,
        "r1": r10 / 4,
        "r10": r10,
        "median_rank": 12.0,
        "mrr": 0.2,
        "ci": {"r1": [r10 / 5, r10 / 3], "r10": [r10 - 0.05, r10 + 0.05]},
        "chance": {"r1": 0.01, "r10": 0.1},
        "floors": {"ridge": {"r1": floor / 4, "r10": floor}, "length": {"r1": 0.01, "r10": 0.12}},
        "difference": {
            "floor": "ridge",
            "r1": {"mean": difference / 4, "ci": [difference / 4 - 0.02, difference / 4 + 0.02]},
            "r10": {"mean": difference, "ci": [difference - 0.05, difference + 0.05]},
        },
        "control": None,
        **more,
    }


def evaluation_content() -> dict[str, Any]:
    """One task above its floor with a control at chance, one at chance; pictures matter to captions, sounds do not."""
    control = {"r1": 0.01, "r10": 0.11, "ci": {"r1": [0.0, 0.03], "r10": [0.07, 0.15]}}
    symbols = {"n": 90, "r1": 0.05, "r10": 0.33, "chance": {"r1": 0.011, "r10": 0.125}}
    return {
        "version": 1,
        "run_dir": "runs/a",
        "step": STEPS,
        "parameters": 4_820_224,
        "split": "test",
        "folds": None,
        "machine": {"processor": "Processor <b>X</b>", "cores": 2},
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "seconds": 12.5,
        "retrieval": {
            "tuxpaint image->caption en": retrieval_entry(0.40, 0.30, control=control, without_symbols=symbols),
            "tuxpaint speech->image": retrieval_entry(0.12, 0.20),
        },
        "classification": {
            "category": {
                "n": 120,
                "classes": 16,
                "prompt": None,
                "probe": {"accuracy": 0.55, "ci": [0.5, 0.6]},
                "floors": {"pixels": 0.51, "majority": 0.266},
            }
        },
        "caption_nll": {
            "image": {"n": 120, "true": 3.0, "shuffled": 3.2, "gap": 0.2, "ci": [0.1, 0.3], "language_only": 3.15},
            "audio": {"n": 80, "true": 2.0, "shuffled": 2.01, "gap": 0.01, "ci": [-0.02, 0.04]},
        },
    }


def cached_samples(text: str) -> dict[str, Any]:
    picture, sound = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(picture, "JPEG")
    soundfile.write(sound, np.zeros(1600, np.int16), 16_000, format="FLAC")
    uris = {
        "image": f"data:image/jpeg;base64,{base64.b64encode(picture.getvalue()).decode()}",
        "audio": f"data:audio/flac;base64,{base64.b64encode(sound.getvalue()).decode()}",
    }
    samples = [
        {"key": f"{name}-1", "modality": name, "uri": uri, "truth": text, "generated": f"generated {text}"}
        | {"about": "corpus", "held_out": True}
        for name, uri in uris.items()
    ]
    return {"version": 1, "step": STEPS, "counts": {"image": 12, "audio": 6}, "samples": samples}


def write_run(
    parent: Path, name: str = "a", *, evaluated: bool = True, sample_text: str = HOSTILE, config: Any = CONFIG
) -> Path:
    folder = parent / "runs" / name
    folder.mkdir(parents=True)
    draw = random.Random(name)
    lines = [json.dumps(metrics_entry(step, draw)) + "\n" for step in range(1, STEPS + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "report_samples.json").write_text(json.dumps(cached_samples(sample_text)), encoding="utf-8")
    if evaluated:
        (folder / "evaluation.json").write_text(json.dumps(evaluation_content()), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def run_writer() -> Callable[..., Path]:
    """Return `write_run`."""
    return write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a run's folder below tmp_path and returns it."""
    return partial(write_run, tmp_path)


@pytest.fixture(scope="session")
def page_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the page of one evaluated run."""
    folder = write_run(tmp_path_factory.mktemp("page"))
    write_report([folder], folder / "report.html", tell=lambda _: None)
    return (folder / "report.html").read_text(encoding="utf-8")
