"""`triweave tokenizer train` and `triweave tokenize`, as a user calls them: results, reuse, kills, wrong use."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.sources.folder import FolderSource
from triweave.data_pipeline.text.token_counts import read_token_counts
from triweave.launch.cli import main

DOCUMENTS = 60


@pytest.fixture
def shards(tmp_path) -> Path:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(DOCUMENTS):
        (corpus / f"{number}.txt").write_text(f"The owl number {number} says hello to bird {number // 7}.", "utf-8")
    build(FolderSource(root=corpus), tmp_path / "shards", BuildOptions(shard_size_bytes=20_000))
    return tmp_path / "shards"


@pytest.fixture
def model(shards, tmp_path) -> Path:
    path = tmp_path / "models" / "owl.model"
    assert main(["tokenizer", "train", str(shards), "--vocab-size", "330", "--out", str(path)]) == 0
    return path


def test_train_then_tokenize_then_reuse(shards, tmp_path, capsys):
    path = tmp_path / "owl.model"
    assert main(["tokenizer", "train", str(shards), "--vocab-size", "330", "--out", str(path), "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert (trained["vocab_size"], trained["texts"]) == (330, DOCUMENTS)
    assert trained["sampled_bytes"] == trained["text_bytes"] > 0
    command = ["tokenize", str(shards), "--tokenizer", str(path), "--workers", "1", "--json"]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(command) == 0
    second = json.loads(capsys.readouterr().out)
    assert first["written"] == second["reused"] == len(Manifest.load(shards).shards) > 1
    assert (first["reused"], second["written"]) == (0, 0)
    assert first["texts"] == second["texts"] == DOCUMENTS
    assert first["tokens"] == second["tokens"] > DOCUMENTS
    assert first["tokens_per_text"] == pytest.approx(first["tokens"] / DOCUMENTS, abs=1e-3)
    assert len(read_token_counts(Manifest.load(shards), 0, trained["hash"])) > 0


def test_without_json_one_line_for_people(shards, model, capsys):
    capsys.readouterr()
    assert main(["tokenize", str(shards), "--tokenizer", str(model), "--workers", "1"]) == 0
    assert f"{DOCUMENTS} samples: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("tokenizer train nowhere --vocab-size 330 --out x.model", "no shard folder at nowhere"),
        ("tokenizer train SHARDS --vocab-size 100000 --out x.model", "vocab_size=100000 is too large"),
        ("tokenizer train SHARDS --vocab-size -5 --out x.model", "vocab_size=-5 is too small"),
        ("tokenizer train SHARDS --vocab-size 330 --out SHARDS", "is a folder"),
        ("tokenizer train SHARDS --vocab-size 330 --out SHARDS/manifest.json/x", "cannot be written"),
        ("tokenizer train SHARDS --vocab-size 330 --out x.model --sample-mb 0", "--sample-mb=0"),
        ("tokenize SHARDS --tokenizer none.model", "none.model cannot be read"),
        ("tokenize SHARDS --tokenizer SHARDS/manifest.json", "no sentencepiece model"),
        ("tokenize SHARDS --tokenizer MODEL --workers 0", "--workers=0"),
        ("tokenize nowhere --tokenizer MODEL", "no shard folder at nowhere"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(command, complaint, shards, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    words = command.replace("SHARDS", str(shards)).replace("MODEL", str(model)).split()
    before = sorted(tmp_path.rglob("*"))
    assert main(words) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["tokenizer", "tokenizer train", "tokenize", "tokenizer train x --vocab-size many"])
def test_arguments_that_do_not_parse_exit_with_2(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 2
    assert "usage: triweave token" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["tokenizer", "tokenize"])
def test_help_shows_examples(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"examples:\n  triweave {command}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_is_continued(shards, model):
    """Kill the command at several moments; every sidecar that is there is whole, and the next run ends the work."""
    manifest, environment = Manifest.load(shards), os.environ | {"OMP_NUM_THREADS": "1"}
    program = "import sys; from triweave.launch.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "tokenize", str(shards), "--tokenizer", str(model), "--workers", "2"]
    for delay_s in (0.6, 1.2, 1.8):
        process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 20
        while group_lives(process.pid):
            assert time.monotonic() < deadline, "a worker outlived the killed command"
            time.sleep(0.05)
    finished = subprocess.run([*command, "--json"], env=environment, capture_output=True, check=True)
    report = json.loads(finished.stdout)
    assert report["written"] + report["reused"] == len(manifest.shards)
    assert (report["texts"], report["samples"]) == (DOCUMENTS, DOCUMENTS)
    assert not list(shards.glob("*.tmp*"))


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
