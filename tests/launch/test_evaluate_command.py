"""`triweave evaluate` on a tiny run that was really trained: tables, JSON, plots, control, folds, refusals."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from triweave.launch.cli import main

DOCUMENTS = 120
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def write_rows(path: Path) -> None:
    """Pictures of four colours with a caption each; every concept is one document."""
    with open(path, "w", encoding="utf-8") as rows:
        for number in range(DOCUMENTS):
            name, colour = list(COLOURS.items())[number % 4]
            image = Image.new("RGB", (16, 16), colour)
            image.putpixel((number % 16, number // 16), (number, 0, 0))
            picture = io.BytesIO()
            image.save(picture, "PNG")
            parts = [
                {"modality": "image", "bytes": base64.b64encode(picture.getvalue()).decode()},
                {"modality": "text", "text": f"A {name} square, the one with the number {number}."},
            ]
            labels = {"kind": "caption", "language": "en", "category": name, "group": f"group-{number}"}
            labels["split"] = "test" if number % 3 == 0 else "train"
            rows.write(json.dumps({"id": f"{number}", "parts": parts, "labels": labels}) + "\n")


@pytest.fixture(scope="module")
def run(train_alone: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a contrastive head."""
    from triweave.data_pipeline.shards.build import BuildOptions, build
    from triweave.data_pipeline.sources.manifest import ManifestSource
    from triweave.data_pipeline.text.token_counts import write_token_counts
    from triweave.data_pipeline.text.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("evaluate")
    write_rows(folder / "squares.jsonl")
    manifest = build(ManifestSource(root=folder / "squares.jsonl"), folder / "shards", BuildOptions())
    train_tokenizer([manifest], 310, folder / "tokenizer.model")
    write_token_counts(manifest, folder / "tokenizer.model")
    tree = {
        "run_dir": str(folder / "run"),
        "data": {
            "sources": [{"name": "squares", "shards": str(folder / "shards"), "split": "train"}],
            "tokenizer": str(folder / "tokenizer.model"),
            "sequence_length": 128,
            "workers": 0,
            "geometry": {"image_patch_px": 8, "image_max_tokens": 4},
            "packing": {"contrastive_share": 0.5, "contrastive_group_rows": 4},
        },
        "model": {
            "d_model": 32,
            "layers": 1,
            "heads": 2,
            "kv_heads": 1,
            "head_width": 16,
            "objectives": {"language_model": 1.0, "contrastive": 1.0},
        },
        "schedule": {"warmup_steps": 1},
        "train": {"steps": 2, "global_batch_rows": 4, "micro_batch_rows": 4, "zero_stage": 0, "device": "cpu"},
    }
    config = folder / "squares.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    train_alone(config)
    return folder / "run"


def test_tables_a_file_and_plots(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--plots", str(tmp_path / "plots"), "--threads", "1"]) == 0
    output = capsys.readouterr()
    for words in ("squares image->caption en", "ridge", "Accuracy", "Nats per caption token", "shuffled"):
        assert words in output.out
    assert "held-out documents (split test)" in output.err
    result = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    task = result["retrieval"]["squares image->caption en"]
    assert (task["n"], task["pool"], task["control"]) == (40, 40, None)
    assert (result["step"], result["split"], result["folds"]) == (2, "test", None)
    assert not list(run.glob("evaluation.json.*"))
    for name in ("retrieval", "caption_nll"):
        with Image.open(tmp_path / "plots" / f"{name}.png") as image:
            assert len(set(image.convert("RGB").resize((200, 200)).getdata())) > 10  # bars, not an empty page
        assert "<svg" in (tmp_path / "plots" / f"{name}.svg").read_text(encoding="utf-8")


def test_json_goes_to_the_output_and_to_the_file_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "evaluation.json").unlink(missing_ok=True)
    assert main(["evaluate", str(run), "--json", "--out", str(tmp_path / "deep" / "e.json"), "--threads", "1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "deep" / "e.json").read_text(encoding="utf-8"))
    assert not (run / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--folds", "1"], "--folds 1: must be from 2 to 20"),
        (["--folds", "2", "--step", "1"], "--step goes with one model"),
        (["--threads", "0"], "--threads 0: must be at least 1"),
        (["--step", "77"], "77"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_what_cannot_be_is_one_line(
    run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("triweave evaluate: ")
    assert words in line


def test_a_control_is_refused_where_there_is_no_retrieval(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from triweave.launch.commands.evaluate import control_of
    from triweave.launch.errors import LaunchError

    model = SimpleNamespace(objectives={"language_model": 1.0})
    trained = SimpleNamespace(config=SimpleNamespace(model=model), run_dir=tmp_path)
    with pytest.raises(LaunchError, match=r"--control: .* has no contrastive objective"):
        control_of(SimpleNamespace(), trained)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path / "nothing")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nothing" in line


@pytest.mark.slow
def test_control_and_folds_are_trained_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--control", "--json", "--threads", "1"]) == 0
    task = json.loads(capsys.readouterr().out)["retrieval"]["squares image->caption en"]
    assert set(task["control"]) == {"r1", "r10", "ci"}
    trained = sorted(path.stat().st_mtime_ns for path in (run / "control").rglob("*") if path.is_file())
    assert main(["evaluate", str(run), "--control", "--json", "--threads", "1"]) == 0
    output = capsys.readouterr()
    assert "is trained already" in output.err
    assert trained == sorted(path.stat().st_mtime_ns for path in (run / "control").rglob("*") if path.is_file())
    assert main(["evaluate", str(run), "--folds", "2", "--json", "--threads", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["folds"], result["split"]) == (2, None)
    assert result["retrieval"]["squares image->caption en"]["n"] == DOCUMENTS
    for fold in range(2):
        config = yaml.safe_load((run / "folds" / str(fold) / "config.yaml").read_text(encoding="utf-8"))
        assert config["data"]["sources"][0]["hold_out"] == f"{fold}/2"
