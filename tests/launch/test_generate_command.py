"""`triweave generate` and `triweave bench generate` from the outside, on a run of seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from triweave.launch.cli import main


@pytest.fixture(scope="module")
def run_dir(tiny_data: Path, train_alone: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run."""
    folder = tmp_path_factory.mktemp("generate")
    tree = {
        "run_dir": str(folder / "run"),
        "data": {
            "sources": [{"name": "tiny", "shards": str(tiny_data / "shards")}],
            "tokenizer": str(tiny_data / "tokenizer.model"),
            "sequence_length": 64,
            "workers": 0,
            "geometry": {"image_patch_px": 8, "image_max_tokens": 4},
        },
        "model": {"d_model": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 16},
        "train": {"steps": 2, "global_batch_rows": 4, "micro_batch_rows": 4, "device": "cpu", "torch_threads": 1},
        "schedule": {"warmup_steps": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    train_alone(folder / "run.yaml")
    return folder / "run"


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "red.png", tmp_path / "blue.png"]
    for path, colour in zip(paths, ((255, 0, 0), (0, 0, 255)), strict=True):
        Image.new("RGB", (16, 16), colour).save(path)
    return list(map(str, paths))


def test_pictures_get_one_text_each(run_dir, pictures, capsys):
    command = ["generate", str(run_dir), "--image", pictures[0], "--text", "It", "--image", pictures[1]]
    options = ["--max-tokens", "6", "--temperature", "1", "--top-p", "0.9", "--seed", "3"]
    assert main([*command, *options, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["run_dir"], answer["step"]) == (str(run_dir), 2)
    assert [entry["prompt"] for entry in answer["generations"]] == [
        [{"image": path}, {"text": "It"}] for path in pictures
    ]
    for entry in answer["generations"]:
        assert 1 <= len(entry["tokens"]) <= 6
        assert entry["prompt_tokens"] >= 2 + 4 + 1
    assert main([*command, *options, "--json", "--no-cache", "--step", "2"]) == 0
    assert json.loads(capsys.readouterr().out) == answer
    assert main([*command, *options[:-1], "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) != answer


@pytest.mark.usefixtures("pictures")
def test_prompt_file_and_table(run_dir, tmp_path, capsys):
    prompt = tmp_path / "prompt.yaml"
    prompt.write_text("- text: 'A [bold]red[/bold] one: '\n- image: red.png\n- text: ' and'\n", encoding="utf-8")
    assert main(["generate", str(run_dir), "--prompt", str(prompt), "--max-tokens", "4"]) == 0
    shown = capsys.readouterr().out
    assert "step 2" in shown
    assert "<image red.png>" in shown
    assert "[bold]red[/bold]" in shown  # markup in a text is text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN"], "nothing to go on from; pass --image FILE, --audio FILE, --text TEXT or --prompt FILE"),
        (["RUN", "--image", "none.png"], "none.png: cannot be read: No such file"),
        (["RUN", "--image", "NOTES"], "notes.txt: image of 5 bytes: not a readable"),
        (["RUN", "--audio", "NOTES"], "notes.txt: audio of 5 bytes: not a readable"),
        (["RUN", "--prompt", "NOTES"], "notes.txt: holds no prompt; write a list of parts"),
        (["RUN", "--prompt", "none.json"], "none.json: cannot be read"),
        (["RUN", "--prompt", "NOTES", "--text", "a"], "holds whole prompts; leave out --image, --audio and --text"),
        (["none", "--text", "a"], "none: no such run; pass the run_dir"),
        (["EMPTY", "--text", "a"], "has no checkpoint; train it"),
        (["RUN", "--text", "a", "--step", "7"], "has no checkpoint of step 7; it has 2"),
        (["RUN", "--text", "a", "--top-p", "2"], "top_p is 2.0; it must be above 0 and at most 1"),
        (["RUN", "--text", "a", "--max-tokens", "0"], "max_tokens is 0; it must be at least 1"),
    ],
)
def test_refusals_are_one_line(run_dir, tmp_path, capsys, arguments, message):
    (tmp_path / "notes.txt").write_text("notes", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    places = {"RUN": str(run_dir), "NOTES": str(tmp_path / "notes.txt"), "EMPTY": str(tmp_path / "empty")}
    assert main(["generate", *(places.get(argument, argument) for argument in arguments)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("triweave generate: ")
    assert output.err.count("\n") == 1
    assert message in output.err


def test_bench_generate_prints_the_ratio(capsys):
    assert main(["bench", "generate", "--tokens", "4", "--repeats", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["generate"]
    assert figures["tokens"] == 4
    assert figures["ratio"] == pytest.approx(figures["recomputed_s"] / figures["cached_s"])
    assert main(["bench", "generate", "--tokens", "4", "--repeats", "1"]) == 0
    assert "s recomputing, ratio " in capsys.readouterr().out
    assert main(["bench", "generate", "--tokens", "0"]) == 2
