"""`triweave demo fault`: what the README says of it, from the real launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from triweave.launch.cli import main
from triweave.pretrain.bench.fault_demo import FEATURES, RANKS, batch_of


def test_the_ranks_hold_unlike_modalities_of_equal_size() -> None:
    assert [list(batch_of(3, rank).payloads) for rank in range(RANKS)] == [["image"], ["audio"]]
    assert FEATURES["image"] == FEATURES["audio"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "fault", "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.slow
def test_deepspeed_is_silently_wrong_and_triweave_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain ZeRO 1 and 2 end well with wrong towers, 3 fails; Triweave is exact, or stops at the first step."""
    assert main(["demo", "fault", "--out", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    runs = {(run["loop"], run["zero_stage"]): run for run in result["runs"]}
    for stage in (1, 2):
        plain = runs["plain", stage]
        assert plain["exit_code"] == 0
        assert plain["loss_last"] < result["loss_first"] - 1  # nothing to see in the loss
        assert min(plain["off"]["image"], plain["off"]["audio"]) > 0.5
    assert runs["plain", 3]["exit_code"] != 0
    for stage in (0, 1, 2, 3):
        assert runs["triweave", stage]["max_abs_diff"] <= 1e-6
    for stage in (1, 2, 3):
        broken = runs["broken", stage]
        assert broken["exit_code"] == 2
        assert "module towers." in broken["error"]
        assert "at step 1, samples " in broken["error"]
