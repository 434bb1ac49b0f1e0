"""The committed table of what every compiled kernel costs, and what has changed against it.

`budgets.json` holds one row per line, as `triweave kernels compile --write` made them, without the seconds. A fresh row
may not spill more, touch local memory in an inner loop more often, take more shared memory, hold fewer warps or lose
its matrix instruction; any other change is shown and is no failure, since registers move with the assembler's version.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("budgets.json")

KEY = ("op", "kernel", "arch", "dtype", "head_dim", "config")
CEILINGS = ("spill_bytes", "inner_loop_local_accesses", "shared_bytes")
"""Figures that may only fall."""
FIGURES = ("registers", *CEILINGS, "occupancy", "matrix_instruction")

BudgetRow = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure of one row that differs from the table; `figure` is "row" for a row the table lacks."""

    row: tuple[Any, ...]
    figure: str
    before: Any
    now: Any
    broken: bool
    """Whether it breaks the budget."""

    def __str__(self) -> str:
        """Return one line of a diff."""
        name = " ".join(str(part) for part in self.row if part is not None)
        if self.figure == "row":
            return f"{name}: not in the table; run the command with --write and commit the table"
        return f"{name}: {self.figure} {self.before} -> {self.now}{' (over budget)' if self.broken else ''}"


def key(row: BudgetRow) -> tuple[Any, ...]:
    """Return what names a row."""
    return tuple(row[name] for name in KEY)


def load(path: Path = TABLE) -> dict[tuple[Any, ...], BudgetRow]:
    """Return the committed rows by their key."""
    return {key(row): row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def changes(rows: Iterable[BudgetRow], table: Mapping[tuple[Any, ...], BudgetRow]) -> list[Change]:
    """Return every figure of `rows` that is not the table's."""
    found = []
    for row in rows:
        budget = table.get(key(row))
        if budget is None:
            found.append(Change(row=key(row), figure="row", before=None, now=None, broken=True))
            continue
        for figure in FIGURES:
            before, now = budget[figure], row[figure]
            if before != now:
                broken = _breaks(figure, before, now)
                found.append(Change(row=key(row), figure=figure, before=before, now=now, broken=broken))
    return found


def _breaks(figure: str, before: Any, now: Any) -> bool:
    if figure in CEILINGS:
        return bool(now > before)
    if figure == "occupancy":
        return bool(now < before)
    return figure == "matrix_instruction"


def write(rows: Iterable[BudgetRow], *, triton: str, path: Path = TABLE) -> None:
    """Put `rows` into the table; older rows of the same op, chip, dtype and width go, all others stay.

    triton: the version that compiled them.
    """
    fresh = {key(row): {name: row[name] for name in (*KEY, *FIGURES)} for row in rows}
    replaced = {_cell(row) for row in fresh.values()}
    kept = load(path) if path.exists() else {}
    merged = {name: row for name, row in kept.items() if _cell(row) not in replaced} | fresh
    lines = ",\n".join(f"  {json.dumps(row)}" for row in sorted(merged.values(), key=_order))
    path.write_text(f'{{\n "triton": {json.dumps(triton)},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def _cell(row: BudgetRow) -> tuple[Any, ...]:
    return row["op"], row["arch"], row["dtype"], row["head_dim"]


def _order(row: BudgetRow) -> tuple[Any, ...]:
    """Return the row's place: sm_90 before sm_100, and widths as numbers."""
    return row["op"], row["kernel"], len(row["arch"]), row["arch"], row["dtype"], row["head_dim"] or 0, row["config"]
