"""`triweave bench kernels` from the outside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from triweave.launch.cli import main

FORM = [
    "op", "impl", "direction", "shape", "dtype", "device", "ms", "tflops", "percent_of_limit", "limit_kind",
    "peak_bytes", "error_vs_fp64", "status",
]  # fmt: skip
TINY = ["--device", "cpu", "--sequence-length", "200", "--heads", "2", "--head-width", "32", "--repeats", "1"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bench(*arguments: str) -> int:
    return main(["bench", "kernels", *TINY, *arguments])


def test_rows_are_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    masks = ["--mask", "interleaved,causal", "--span-percent", "0,50", "--documents", "2"]
    assert bench(*masks, "--compare", "documents,flash", "--chips", "h100", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(list(row)[: len(FORM)] == FORM for row in rows)
    measured = [row for row in rows if row["compiled"] is None]
    assert len(measured) == 3 * 3 * 2  # masks, contenders, directions
    assert {(row["mask"], row["shape"]) for row in measured} == {
        ("interleaved", "B1 S200 H2 K32, 2 documents, 0 % in spans"),
        ("interleaved", "B1 S200 H2 K32, 2 documents, 50 % in spans"),
        ("causal", "B1 S200 H2 K32, 1 document"),
    }
    for row in measured:
        if row["impl"] == "flash":
            assert row["ms"] is None
            assert row["status"].startswith("unsupported: ")
        else:
            assert row["status"] == "measured"
            assert row["ms"] > 0
            assert row["error_vs_fp64"] < 1e-5
            assert row["device"].endswith(", 1 thread")
    compiled = [row for row in rows if row["compiled"] is not None]
    assert {row["device"] for row in compiled} == {"h100 (sm_90)"}
    assert all(row["ms"] is None and "not executed" in row["status"] for row in compiled)


def test_files_and_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("60\n90\n", encoding="utf-8")
    files = [tmp_path / name for name in ("rows.json", "rows.csv", "rows.png")]
    written = [f"--{option}={path}" for option, path in zip(("json", "csv", "plot"), files, strict=True)]
    assert bench("--mask", "documents", "--lengths", str(lengths), "--compare", "liger", *written) == 0
    rows = json.loads(files[0].read_text(encoding="utf-8"))
    assert rows[0]["shape"] == "B1 S200 H2 K32, 3 documents"
    assert len(files[1].read_text(encoding="utf-8").splitlines()) == 1 + len(rows)
    assert files[2].stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "triweave:sdpa" in shown
    assert "[1] unsupported: Liger-Kernel has no such op" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "softmax"], "there is no op 'softmax'"),
        (["--mask", "ring"], "there is no mask 'ring'"),
        (["--compare", "xformers"], "there is no peer 'xformers'"),
        (["--direction", "up"], "--direction up"),
        (["--span-percent", "many"], "--span-percent many"),
        (["--kv-heads", "3"], "--heads 2 is no multiple"),
        (["--repeats", "0"], "must be 1 or more"),
        (["--lengths", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("triweave bench: ")
    assert message in error[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--device", "cuda"]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err
