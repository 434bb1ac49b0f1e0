"""Proof from the ledger of consumed samples alone that a run trained on every planned row once, in the plan's order.

A plan numbers its rows from 0 and every step takes the next global batch of them, so a run that was stopped, killed and
resumed on any number of ranks has trained on rows 0, 1, 2, ... R-1, in this order, each in one step. That is what is
checked, on the lineage of attempts that survived; what others trained on and a later one did again is compared with it,
ids and token hashes. Where `data.schedule` changed the plan on the way, a document may be cut at other tokens, so its
spans are compared by their tokens. No shard, plan or checkpoint is opened.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from triweave.pretrain.ledger.consumed import ConsumedRow, read_attempts, read_consumed, world_sizes

FILLER = ":filler"
"""End of the id of a piece that could not be read and was trained on as zeros with no loss."""
ALONE = ":alone"
"""End of the id of a one-span segment, which repeats a part of its document on purpose."""
NAMED = 5
"""Problems of one kind that are spelled out."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What a ledger says.

    consumed: pieces (source, epoch, sample, token span) trained on. rows, steps: of the surviving lineage, skipped ones
    included. lost: plan rows before the last one that no step had.
    repeated: rows trained on by two steps, pieces that are in two rows, and pieces that share tokens with another one.
    skipped: rows whose step the run's health left out or rolled back; neither lost nor seen by the weights.
    filled: pieces that were fillers. replayed: rows trained on again, after a kill, by the lineage that survived.
    order_equal: the rows came in the plan's order, and every replay, and `same_as`, had the same pieces in it.
    world_sizes: ranks of each attempt of the lineage, in order. problems: what is wrong, in words.
    """

    rows: int
    steps: int
    consumed: int
    lost: int
    repeated: int
    skipped: int
    filled: int
    replayed: int
    order_equal: bool
    world_sizes: tuple[int, ...]
    problems: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Return whether everything came once and in order."""
        return not self.lost and not self.repeated and self.order_equal


def audit(run_dir: str | Path, same_as: str | Path | None = None) -> Audit:
    """Audit the ledger of a run.

    same_as: another run of the same plan, on other ranks for one; rows that both have trained on must be alike.

    Raises PretrainError where a run has no ledger or a part of it is missing.
    """
    rows = read_consumed(run_dir)
    problems: list[str] = []
    numbers = [row.row for row in rows]
    lost = sorted(set(range(max(numbers, default=-1) + 1)) - set(numbers))
    _tell(problems, "no step trained on row", lost)
    twice = sorted(number for number, count in Counter(numbers).items() if count > 1)
    _tell(problems, "two steps trained on row", twice)
    pieces = Counter(_piece(name) for row in rows for name in row.ids)
    copies = sorted(name for name, count in pieces.items() if count > 1)
    _tell(problems, "came more than once:", copies)
    overlaps = _overlaps(pieces)
    _tell(problems, "shares tokens with another piece:", overlaps)
    disordered = [late for early, late in pairwise(rows) if late.row < early.row]
    _tell(problems, "came after a later row: row", [row.row for row in disordered])
    survived = {row.row: row for row in rows}
    own = {row.attempt for row in rows}
    replays = [row for row in read_attempts(run_dir) if row.row in survived and row != survived[row.row]]
    differing = _differing(replays, survived)
    _tell(problems, "was trained on again with other pieces: row", differing)
    others = {} if same_as is None else {row.row: row for row in read_consumed(same_as)}
    foreign = _differing([row for row in rows if row.row in others], others)
    _tell(problems, f"differs from {same_as}: row", foreign)
    if same_as is not None and not others.keys() & survived.keys():
        problems.append(f"{same_as} has trained on no row that this run has")
    return Audit(
        rows=len(rows),
        steps=len({row.step for row in rows}),
        consumed=sum(len(row.ids) for row in rows if not row.skipped),
        lost=len(lost),
        repeated=len(twice) + len(copies) + len(overlaps),
        skipped=sum(bool(row.skipped) for row in rows),
        filled=sum(name.endswith(FILLER) for row in rows for name in row.ids),
        replayed=len({row.row for row in replays}),
        order_equal=not disordered and not differing and not foreign,
        world_sizes=tuple(size for attempt, size in sorted(world_sizes(run_dir).items()) if attempt in own),
        problems=tuple(problems),
    )


def _differing(rows: Sequence[ConsumedRow], wanted: dict[int, ConsumedRow]) -> list[int]:
    """Return the numbers of the rows whose pieces are not those of the wanted row of that number."""
    return sorted({row.row for row in rows if (row.ids, row.hashes) != (wanted[row.row].ids, wanted[row.row].hashes)})


def _overlaps(names: Iterable[str]) -> list[str]:
    """Return the pieces whose token span begins before that of another piece of their sample and epoch has ended."""
    spans: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for name in names:
        if not name.endswith(ALONE):
            sample, *span = name.rsplit(":", 2)
            spans[sample].append((int(span[0]), int(span[1])))
    found = []
    for sample, held in spans.items():
        reached = 0
        for first, end in sorted(held):
            if first < reached:
                found.append(f"{sample}:{first}:{end}")
            reached = max(reached, end)
    return sorted(found)


def _piece(name: str) -> str:
    """Return what a piece is, whether it could be read or not."""
    return name.removesuffix(FILLER)


def _tell(problems: list[str], what: str, found: Sequence[object]) -> None:
    if found:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        problems.append(f"{what} {', '.join(map(str, found[:NAMED]))}{more}")
