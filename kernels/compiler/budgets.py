"""The committed table of what every compiled kernel costs, and what has changed against it.

`budgets.json` holds one row per line, as `triweave kernels compile --write` made them: without the seconds, but with
the digest of the source they were compiled from, by which `missing` finds what has to be compiled anew. A fresh row
may not spill more, touch local memory in an inner loop more often, take more shared memory, hold fewer warps or lose
its matrix instruction; any other change is shown and is no failure, since registers move with the assembler's version.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("budgets.json")

KEY = ("op", "kernel", "arch", "dtype", "head_dim", "config")
CEILINGS = ("spill_bytes", "inner_loop_local_accesses", "shared_bytes")
"""Figures that may only fall."""
FIGURES = ("registers", *CEILINGS, "occupancy", "matrix_instruction")

BudgetRow = Mapping[str, Any]
Name = tuple[Any, ...]
"""The values of KEY, in order."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure of one row that differs from the table; `figure` is "row" for a row the table lacks."""

    row: Name
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


def key(row: BudgetRow) -> Name:
    """Return what names a row."""
    return tuple(row[name] for name in KEY)


def version(path: Path = TABLE) -> str | None:
    """Return the version of Triton that compiled the table; None without one."""
    return str(json.loads(path.read_text(encoding="utf-8"))["triton"]) if path.exists() else None


def load(path: Path = TABLE) -> dict[Name, BudgetRow]:
    """Return the table's rows by their key; none without a file."""
    if not path.exists():
        return {}
    return {key(row): row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def changes(rows: Iterable[BudgetRow], table: Mapping[Name, BudgetRow]) -> list[Change]:
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


def missing(wanted: Mapping[Name, str], table: Mapping[Name, BudgetRow]) -> list[Name]:
    """Return which of `wanted`, name -> digest of its source, have no row or one of another source."""
    return [name for name, source in wanted.items() if name not in table or table[name]["source"] != source]


def write(
    rows: Iterable[BudgetRow], *, triton: str, shipped: Collection[Name] | None = None, path: Path = TABLE
) -> None:
    """Put `rows`, which have a `source` beside the figures, into the table, in one step that a reader never sees half.

    An older row of the same kernel, chip, dtype and width goes, and one that is not in `shipped`.
    triton: the version that compiled them; a table of another version is not mixed with it but begun anew.
    """
    fresh = {key(row): {name: row[name] for name in (*KEY, *FIGURES, "source")} for row in rows}
    replaced = {name[:-1] for name in fresh}
    kept = load(path) if version(path) == triton else {}
    merged = {
        name: row for name, row in kept.items() if name[:-1] not in replaced and (shipped is None or name in shipped)
    } | fresh
    lines = ",\n".join(f"  {json.dumps(row)}" for row in sorted(merged.values(), key=_order))
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(f'{{\n "triton": {json.dumps(triton)},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    new.replace(path)


def _order(row: BudgetRow) -> tuple[Any, ...]:
    """Return the row's place: sm_90 before sm_100, and widths as numbers."""
    return row["op"], row["kernel"], len(row["arch"]), row["arch"], row["dtype"], row["head_dim"] or 0, row["config"]
