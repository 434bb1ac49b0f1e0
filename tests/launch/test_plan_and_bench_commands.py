"""`triweave plan` and `triweave bench loader` from the outside."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.sources.folder import FolderSource
from triweave.data_pipeline.text.token_counts import write_token_counts
from triweave.data_pipeline.text.tokenizer import train_tokenizer
from triweave.launch.cli import main

DOCUMENTS = 30


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config over 30 captioned pictures."""
    folder = tmp_path_factory.mktemp("commands")
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(DOCUMENTS):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 56, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        (corpus / f"item{number}.png").write_bytes(file.getvalue())
        (corpus / f"item{number}.txt").write_text(f"picture number {number}: " + "words of many kinds " * (number % 7))
    manifest = build(FolderSource(root=corpus), folder / "shards", BuildOptions())
    train_tokenizer([manifest], 340, folder / "tokenizer.model")
    write_token_counts(manifest, folder / "tokenizer.model")
    path = folder / "run.yaml"
    path.write_text(
        f"data:\n  sources: [{{name: pictures, shards: {folder}/shards}}]\n  tokenizer: {folder}/tokenizer.model\n"
        "  sequence_length: 96\n  geometry: {image_patch_px: 8}\ntrain: {global_batch_rows: 4}\n"
    )
    return path


def test_plan_prints_one_json_object(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(run_yaml), "--lengths", "96,256", "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)["lengths"]
    assert [report["sequence_length"] for report in reports] == [96, 256]
    for report in reports:
        assert report["samples"] == DOCUMENTS
        tokens = report["tokens_per_modality"]
        assert tokens["image"] == DOCUMENTS * 5 * 7
        assert tokens["audio"] == 0
        assert report["fill"] == pytest.approx(sum(tokens.values()) / report["rows"] / report["sequence_length"])
        assert sum(report["fill_counts"]) == report["rows"]
        assert report["steps_per_epoch"] == -(-report["rows"] // 4)
        assert report["left_out"] == {}
        assert report["fill_without_last"] >= report["fill"]


def test_plan_of_one_length_is_one_object_with_the_agreed_keys(
    run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(run_yaml), "--num-ranks", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    agreed = {"fill", "tokens_per_modality", "max_over_mean_rank_cost", "steps_per_epoch", "bytes_to_read"}
    assert agreed <= set(report)
    assert 1 <= report["max_over_mean_rank_cost"] <= report["worst_step_rank_cost"] < 2
    assert report["bytes_to_read"] > 1000 * DOCUMENTS
    assert main(["plan", str(run_yaml), "--num-ranks", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"{report['bytes_to_read'] / 1e6:,.1f}" in shown
    assert "costliest / mean rank, 2 ranks" in shown
    assert "model" not in shown, "the shards are local"


def test_plan_looks_at_every_segment_of_a_schedule(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    longer = run_yaml.with_name("longer.yaml")
    text = run_yaml.read_text().replace("  geometry", "  schedule: [{after_step: 3, sequence_length: 192}]\n  geometry")
    longer.write_text(text)
    assert main(["plan", str(longer), "--json"]) == 0
    segments = json.loads(capsys.readouterr().out)["segments"]
    assert [(segment["after_step"], segment["sequence_length"]) for segment in segments] == [(0, 96), (3, 192)]
    assert segments[1]["rows"] < segments[0]["rows"]
    assert main(["plan", str(longer)]) == 0
    assert "192 from step 3" in " ".join(capsys.readouterr().out.replace("│", " ").replace("┃", " ").split())


def test_plan_shows_parts_alone(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(run_yaml), "data.packing.contrastive_share=1"]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["left_out"] == {}
    # Fewer rows than a contrastive group has, so all of them are in one: 30 pictures and 30 captions.
    assert (report["segments_per_group"], report["items_per_group"]) == (2 * DOCUMENTS, DOCUMENTS)
    # A picture of 35 tokens goes with bos, start marker and eos, once more than in its document.
    assert report["tokens_per_modality"]["image"] == 2 * DOCUMENTS * 5 * 7
    assert report["alone_tokens"] > DOCUMENTS * (35 + 3 + 2)
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "tokens in parts alone" in shown
    assert f"{report['alone_tokens']:,}" in shown
    assert main(["plan", str(run_yaml)]) == 0
    assert "alone" not in capsys.readouterr().out


def test_plan_says_what_is_left_out(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(run_yaml), "data.packing.image_tokens=20", "train.global_batch_rows=2"]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["left_out"] == {"image over packing.image_tokens=20": DOCUMENTS}
    assert report["tokens_per_modality"]["image"] == 0
    assert report["steps_per_epoch"] == -(-report["rows"] // 2)
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "left out: 30 x image over packing.image_tokens=20" in shown
    assert "pack fill at length 96" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "none.yaml: cannot read the config"),
        (["RUN", "data.sequense_length=5"], "did you mean data.sequence_length?"),
        (["RUN", "data.tokenizer=none.model"], "none.model"),
        (["RUN", "--lengths", "a,b"], "--lengths a,b"),
        (["RUN", "--global-batch-rows", "0"], "global_batch_rows=0"),
        (["RUN", "--num-ranks", "5"], "number of ranks, 5"),
        (["RUN", "--link-mb-per-s", "0"], "--link-mb-per-s 0"),
    ],
)
def test_plan_refuses_in_one_line(
    run_yaml: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["plan", *[str(run_yaml) if argument == "RUN" else argument for argument in arguments]]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert message in output.err


def test_plan_loads_neither_torch_nor_webdataset(run_yaml: Path) -> None:
    program = (
        "import sys; from triweave.launch.cli import main; assert main(['plan', sys.argv[1], '--json']) == 0; "
        "print(sorted({'torch', 'webdataset', 'deepspeed', 'triton'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, run_yaml], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.slow
def test_bench_prints_the_agreed_rows(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_yaml.parent
    places = ["--shards", str(folder / "shards"), "--tokenizer", str(folder / "tokenizer.model")]
    counts = ["--samples", "30", "--raw-samples", "30", "--repeats", "1", "--sequence-length", "512"]
    fields = {"loader", "work", "samples_per_s", "ratio_to_bare_decode", "first_batch_s"}
    fields |= {"resume_s_at_0", "resume_s_at_50", "resume_s_at_99"}
    assert main(["bench", "loader", *places, *counts, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["machine"]["cores"] >= 1
    assert {(row["loader"], row["work"]) for row in result["rows"]} == {
        (loader, work) for loader in ("triweave", "webdataset", "bare") for work in ("raw", "full")
    }
    assert all(row["samples_per_s"] > 0 and row["ratio_to_bare_decode"] > 0 for row in result["rows"])
    assert all(fields <= set(row) for row in result["rows"])


def test_bench_without_shards_says_how_to_get_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "loader", "--shards", str(tmp_path / "none")]) == 2
    assert "triweave build" in capsys.readouterr().err
