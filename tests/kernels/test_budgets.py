"""The comparison with the committed table of compiled costs, on made-up rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from triweave.kernels.compiler import budgets

ROW: dict[str, Any] = {
    "op": "attention",
    "kernel": "forward",
    "arch": "sm_90",
    "dtype": "bf16",
    "head_dim": 64,
    "config": "a",
    "registers": 168,
    "spill_bytes": 8,
    "inner_loop_local_accesses": 2,
    "shared_bytes": 4096,
    "occupancy": 0.25,
    "matrix_instruction": "HGMMA",
    "compile_s": 1.5,
    "source": "0123456789ab",
}


def compared(**now: Any) -> list[budgets.Change]:
    return budgets.changes([ROW | now], {budgets.key(ROW): ROW})


def test_equal_rows_are_no_change_whatever_the_seconds() -> None:
    assert compared(compile_s=99.0) == []


@pytest.mark.parametrize(
    ("figure", "now", "broken"),
    [
        ("registers", 255, False),
        ("spill_bytes", 12, True),
        ("spill_bytes", 0, False),
        ("inner_loop_local_accesses", 3, True),
        ("inner_loop_local_accesses", 0, False),
        ("shared_bytes", 8192, True),
        ("occupancy", 0.125, True),
        ("occupancy", 0.5, False),
        ("matrix_instruction", "HMMA", True),
        ("matrix_instruction", None, True),
    ],
)
def test_a_figure_breaks_its_budget_in_the_bad_direction_only(figure: str, now: Any, broken: bool) -> None:
    (change,) = compared(**{figure: now})
    assert (change.figure, change.before, change.now, change.broken) == (figure, ROW[figure], now, broken)
    assert ("over budget" in str(change)) == broken
    assert "attention forward sm_90 bf16 64 a" in str(change)


def test_a_row_the_table_lacks_breaks_it() -> None:
    (change,) = compared(config="b")
    assert change.broken
    assert "--write" in str(change)


def test_writing_replaces_the_rows_of_what_was_compiled_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    other = ROW | {"op": "swiglu", "kernel": "swiglu", "head_dim": None, "matrix_instruction": None}
    budgets.write([ROW, other], triton="3.9.0", path=path)
    new = ROW | {"config": "b", "spill_bytes": 0}
    budgets.write([new], triton="3.9.0", path=path)
    table = budgets.load(path)
    assert set(table) == {budgets.key(new), budgets.key(other)}
    assert budgets.changes([new, other], table) == []
    assert all("compile_s" not in row for row in table.values())
    lines = [line for line in path.read_text().splitlines() if '"op"' in line]
    assert [line.count('"op"') for line in lines] == [1, 1], "one row a line, so that a change is one line of a diff"


def test_other_kernels_of_the_same_op_and_width_stay(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    backward = ROW | {"kernel": "dq"}
    for row in (backward, ROW):
        budgets.write([row], triton="3.9.0", path=path)
    assert set(budgets.load(path)) == {budgets.key(ROW), budgets.key(backward)}
    assert [one.name for one in tmp_path.iterdir()] == ["budgets.json"], "nothing but the table is left behind"


def test_rows_of_what_no_longer_ships_go(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    gone = ROW | {"op": "gone"}
    budgets.write([gone], triton="3.9.0", path=path)
    budgets.write([ROW], triton="3.9.0", shipped={budgets.key(ROW)}, path=path)
    assert set(budgets.load(path)) == {budgets.key(ROW)}


def test_rows_of_two_versions_of_triton_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    budgets.write([ROW | {"op": "other"}], triton="3.8.0", path=path)
    budgets.write([ROW], triton="3.9.0", path=path)
    assert budgets.version(path) == "3.9.0"
    assert set(budgets.load(path)) == {budgets.key(ROW)}


def test_missing_is_what_has_no_row_or_one_of_another_source() -> None:
    changed, absent = budgets.key(ROW | {"kernel": "dq"}), budgets.key(ROW | {"kernel": "dkv"})
    table = {budgets.key(ROW): ROW, changed: ROW | {"kernel": "dq"}}
    wanted = {budgets.key(ROW): ROW["source"], changed: "another", absent: ROW["source"]}
    assert budgets.missing(wanted, table) == [changed, absent]
