"""`triweave audit`: what a whole ledger gives, and that each kind of damage is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triweave.launch.cli import main
from triweave.pretrain.ledger.audit import audit
from triweave.pretrain.ledger.consumed import begin_attempt, read_consumed

Row = tuple[int, int, list[str]]
"""Step, plan row, ids."""


def rows_of(steps: range, *, epoch: int = 0) -> list[Row]:
    """Return two rows a step, two pieces a row."""
    return [
        (step, row, [f"a:{epoch}:k{row}:{span}" for span in ("0:5", "5:9")])
        for step in steps
        for row in (2 * step - 2, 2 * step - 1)
    ]


@pytest.fixture
def ledger(tmp_path: Path) -> Callable[..., Path]:
    """Write one attempt of a run, its rows dealt to the ranks in turns."""

    def write(
        rows: list[Row],
        *,
        name: str = "run",
        number: int = 1,
        parent: int | None = None,
        resumed: int = 0,
        ranks: int = 1,
    ) -> Path:
        run = tmp_path / name
        begin_attempt(run, number, parent=parent, resumed_step=resumed)
        files: list[list[str]] = [[] for _ in range(ranks)]
        for place, (step, row, ids) in enumerate(rows):
            hashes = [sum(map(ord, name)) for name in ids]
            files[place % ranks].append(json.dumps({"step": step, "row": row, "ids": ids, "hashes": hashes}) + "\n")
        for rank, lines in enumerate(files):
            path = run / "consumed" / f"attempt-{number:04d}" / f"rank-{rank:05d}.jsonl"
            path.write_text("".join(lines), encoding="utf-8")
        return run

    return write


def test_a_run_killed_and_resumed_on_other_ranks_is_exact(ledger: Callable[..., Path]) -> None:
    ledger(rows_of(range(1, 6)), ranks=3)
    run = ledger(rows_of(range(4, 9)), number=2, parent=1, resumed=3, ranks=2)
    found = audit(run)
    assert found.exact
    assert (found.rows, found.steps, found.consumed) == (16, 8, 32)
    assert (found.lost, found.repeated, found.filled, found.replayed) == (0, 0, 0, 4)
    assert found.world_sizes == (3, 2)
    assert found.problems == ()


def test_a_filler_is_counted_and_is_no_loss(ledger: Callable[..., Path]) -> None:
    rows = rows_of(range(1, 3))
    rows[1][2][0] += ":filler"
    found = audit(ledger(rows))
    assert (found.filled, found.exact) == (1, True)


def damaged(kind: str) -> list[Row]:
    rows = rows_of(range(1, 5))
    if kind == "lost":
        del rows[3]
    elif kind == "row twice":
        rows.append((5, 2, ["a:0:other:0:3"]))
    elif kind == "piece twice":
        rows[5][2][0] = rows[0][2][0]
    elif kind == "overlap":
        rows[5][2][0] = "a:0:k0:8:12"
    elif kind == "order":
        rows[0], rows[6] = (1, 6, rows[6][2]), (4, 0, rows[0][2])
    return rows


@pytest.mark.parametrize(
    ("kind", "figures", "says"),
    [
        ("lost", (1, 0, True), "no step trained on row 3"),
        ("row twice", (0, 1, False), "two steps trained on row 2"),
        ("piece twice", (0, 1, True), "came more than once: a:0:k0:0:5"),
        ("overlap", (0, 1, True), "shares tokens with another piece: a:0:k0:8:12"),
        ("order", (0, 0, False), "came after a later row: row 2, 0"),
    ],
)
def test_each_damage_is_found_and_named(
    ledger: Callable[..., Path], kind: str, figures: tuple[Any, ...], says: str
) -> None:
    found = audit(ledger(damaged(kind)))
    assert (found.lost, found.repeated, found.order_equal) == figures
    assert not found.exact
    assert says in found.problems


def test_the_same_sample_in_another_epoch_is_no_repetition(ledger: Callable[..., Path]) -> None:
    second = [(step + 2, row + 4, ids) for step, row, ids in rows_of(range(1, 3), epoch=1)]
    assert audit(ledger([*rows_of(range(1, 3)), *second])).exact


def test_rows_that_health_left_out_are_skipped_and_neither_lost_nor_consumed(ledger: Callable[..., Path]) -> None:
    """Attempt 1 is overtaken after step 3, its roll-back of step 5 with it; attempt 2 rolls step 6 back to 4."""
    run = ledger(rows_of(range(1, 6)))
    (run / "consumed" / "attempt-0001" / "roll_backs.jsonl").write_text('{"step": 5, "to": 1}\n')
    ledger(rows_of(range(4, 8)), number=2, parent=1, resumed=3)
    (run / "consumed" / "attempt-0002" / "roll_backs.jsonl").write_text('{"step": 6, "to": 4}\n{"step": 7, "t')
    path = run / "consumed" / "attempt-0002" / "rank-00000.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps(line | ({"skipped": "NaN"} if line["step"] == 6 else {})) + "\n" for line in lines)
    )
    rows = read_consumed(run)
    assert {row.step: row.skipped for row in rows if row.skipped} == {5: "rolled back", 6: "NaN"}
    found = audit(run)
    assert found.exact, found.problems
    assert (found.rows, found.steps, found.skipped, found.consumed) == (14, 7, 4, 2 * 10)


def test_a_replay_with_other_tokens_is_found(ledger: Callable[..., Path]) -> None:
    wrong = rows_of(range(3, 4))
    wrong[0][2][1] = "a:0:k4:5:8"
    ledger([*rows_of(range(1, 3)), *wrong])
    found = audit(ledger(rows_of(range(3, 5)), number=2, parent=1, resumed=2))
    assert not found.order_equal
    assert found.problems == ("was trained on again with other pieces: row 4",)


def test_a_segment_of_a_part_alone_repeats_nothing(ledger: Callable[..., Path]) -> None:
    rows = rows_of(range(1, 3))
    rows[2][2].append("a:0:k0:1:4:alone")
    assert audit(ledger(rows)).exact


def test_two_runs_of_one_plan_are_compared(ledger: Callable[..., Path]) -> None:
    one = ledger(rows_of(range(1, 5)), name="one")
    three = ledger(rows_of(range(1, 4)), name="three", ranks=3)
    assert audit(three, same_as=one).exact
    other = ledger(rows_of(range(1, 4), epoch=1), name="other")
    assert audit(other, same_as=one).problems[0].endswith("one: row 0, 1, 2, 3, 4 and 1 more")


def test_the_command_prints_and_exits_with_one_on_loss(
    ledger: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole, broken = ledger(rows_of(range(1, 3))), ledger(damaged("lost"), name="broken")
    assert main(["audit", str(whole), "--json"]) == 0
    names = ("consumed", "lost", "repeated", "skipped", "filled", "replayed", "order_equal", "world_sizes")
    printed = json.loads(capsys.readouterr().out)
    assert [printed[name] for name in names] == [8, 0, 0, 0, 0, 0, True, [1]]
    assert main(["audit", str(broken)]) == 1
    assert "no step trained on row 3" in capsys.readouterr().out
    assert main(["audit", str(tmp_path / "none")]) == 2
    assert "has no attempts" in capsys.readouterr().err
