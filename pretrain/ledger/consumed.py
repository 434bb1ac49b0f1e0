"""The ledger of consumed samples: what each optimizer step really trained on, written after the step.

    RUN/consumed/attempt-0001/lineage.json         {"attempt", "parent", "resumed_step"}
    RUN/consumed/attempt-0001/rank-00000.jsonl     one line per plan row: step, row, ids, hashes, maybe skipped
    RUN/consumed/attempt-0001/roll_backs.jsonl     one line per roll-back: {"step", "to"}
    RUN/consumed/attempt-0001/decisions.jsonl      one line per step: the weight of each objective that it trained

A row whose step's update was left out is `skipped`, and so are all rows of steps that a roll-back has undone: steps
after `to`, up to `step`. Every start of a run is an attempt; one that resumes names the attempt whose checkpoint it
continues. An audit follows that chain back from the newest attempt and counts of each one only the steps that the next
had not overtaken. It knows nothing of the plan: ids and token hashes come from the batches themselves.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from triweave.data_pipeline.batch import PackedBatch
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.objectives.balance import Decision

FOLDER = "consumed"
LINEAGE = "lineage.json"
DECISIONS = "decisions.jsonl"
ROLL_BACKS = "roll_backs.jsonl"


@dataclass(frozen=True, kw_only=True)
class ConsumedRow:
    """One plan row of one optimizer step.

    row: absolute plan row. ids: `source:key:first_token:end_token` per piece, `:filler` where it was corrupt. hashes:
    xxh3 of each piece's tokens. attempt: the start of the run that trained on it. skipped: why no weight has seen the
    row, empty where one has.
    """

    step: int
    row: int
    ids: tuple[str, ...]
    hashes: tuple[int, ...]
    attempt: int
    skipped: str = ""


class ConsumedLedger:
    """This rank's part of the ledger of one attempt."""

    def __init__(self, run_dir: str | Path, attempt: int, rank: int, *, writes_rows: bool = True) -> None:
        """writes_rows: whether this rank is the one that tells of its rows, where several share them."""
        folder = _attempt_folder(run_dir, attempt)
        folder.mkdir(parents=True, exist_ok=True)
        self.attempt, self._writes_rows = attempt, writes_rows
        self._roll_backs = folder / ROLL_BACKS if rank == 0 else None
        self._decisions = (folder / DECISIONS).open("a", encoding="utf-8") if rank == 0 else None
        self._file = (folder / f"rank-{rank:05d}.jsonl").open("a", encoding="utf-8")

    def write(self, step: int, micro_batches: Sequence[PackedBatch], *, skipped: str = "") -> None:
        """Append the rows of a finished step; handed to the operating system at once, so a kill loses none.

        skipped: why its update was left out.
        """
        for batch in micro_batches if self._writes_rows else ():
            for row, ids, hashes in zip(batch.plan_rows.tolist(), batch.sample_ids, batch.sample_hashes, strict=True):
                if row >= 0:
                    entry = {"step": step, "row": row, "ids": ids, "hashes": [int(value) for value in hashes]}
                    if skipped:
                        entry["skipped"] = skipped
                    self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def write_decision(self, decision: Decision) -> None:
        """Append what a finished step has trained; by rank 0, the same on all."""
        if self._decisions is not None:
            self._decisions.write(json.dumps(decision.to_json()) + "\n")
            self._decisions.flush()

    def roll_back(self, step: int, *, to: int) -> None:
        """Record that after `step` the weights of step `to` came back; by rank 0."""
        if self._roll_backs is not None:
            with self._roll_backs.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "to": to}) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._decisions is not None:
            self._decisions.close()


def next_attempt(run_dir: str | Path) -> int:
    """Return the number of the attempt that starts now, from 1."""
    return max(_attempts(run_dir), default=0) + 1


def begin_attempt(run_dir: str | Path, attempt: int, *, parent: int | None, resumed_step: int) -> None:
    """Record where an attempt continues: its parent's checkpoint, or nowhere; by rank 0, before the first step."""
    folder = _attempt_folder(run_dir, attempt)
    folder.mkdir(parents=True, exist_ok=True)
    lineage = {"attempt": attempt, "parent": parent, "resumed_step": resumed_step}
    temporary = folder / f".{LINEAGE}"
    temporary.write_text(json.dumps(lineage), encoding="utf-8")
    temporary.rename(folder / LINEAGE)


def read_consumed(run_dir: str | Path) -> list[ConsumedRow]:
    """Return every row of the surviving lineage, by step and row.

    A line cut off by a kill is left out; it belongs to a step that no checkpoint holds yet. Raises PretrainError when
    the run has no ledger or an attempt of the lineage is missing.
    """
    attempts = _attempts(run_dir)
    if not attempts:
        raise PretrainError(f"{Path(run_dir) / FOLDER} has no attempts; name the run_dir of a run that has trained")
    rows: list[ConsumedRow] = []
    undone: list[tuple[int, int]] = []
    attempt: int | None = max(attempts)
    until: float = float("inf")
    while attempt is not None:
        path = _attempt_folder(run_dir, attempt) / LINEAGE
        try:
            lineage = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PretrainError(f"{path} of the surviving lineage cannot be read: {error}") from error
        rows += [row for row in _read_attempt(run_dir, attempt) if lineage["resumed_step"] < row.step <= until]
        undone += [(to, step) for to, step in _read_roll_backs(run_dir, attempt) if step <= until]
        until = min(until, lineage["resumed_step"])
        attempt = lineage["parent"]
    rows = [
        replace(row, skipped=row.skipped or "rolled back") if any(to < row.step <= end for to, end in undone) else row
        for row in rows
    ]
    return sorted(rows, key=lambda row: (row.step, row.row))


def read_decisions(run_dir: str | Path, attempt: int) -> list[Decision]:
    """Return what the steps of one attempt have trained, in order; a line that a kill cut off is left out."""
    path = _attempt_folder(run_dir, attempt) / DECISIONS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [Decision(**json.loads(line)) for line in lines if line.endswith("\n")]


def decisions_behind(run_dir: str | Path, attempt: int, step: int) -> list[Decision]:
    """Return what the steps behind the checkpoint of a step have trained, in the attempt that wrote it or one since."""
    found: dict[int, Decision] = {}
    for number in sorted(_attempts(run_dir)):
        with contextlib.suppress(OSError, ValueError):
            path = _attempt_folder(run_dir, number) / LINEAGE
            lineage = json.loads(path.read_text(encoding="utf-8"))
            if number == attempt or (lineage["parent"], lineage["resumed_step"]) == (attempt, step):
                found |= {each.step: each for each in read_decisions(run_dir, number) if each.step > step}
    return list(found.values())


def read_attempts(run_dir: str | Path) -> list[ConsumedRow]:
    """Return the rows of every attempt, those that a later one has overtaken included."""
    return [row for attempt in sorted(_attempts(run_dir)) for row in _read_attempt(run_dir, attempt)]


def world_sizes(run_dir: str | Path) -> dict[int, int]:
    """Return attempt -> ranks that wrote a ledger in it."""
    return {attempt: len(_rank_files(run_dir, attempt)) for attempt in _attempts(run_dir)}


def _read_roll_backs(run_dir: str | Path, attempt: int) -> list[tuple[int, int]]:
    """Return (step whose weights came back, last step that was undone) of an attempt."""
    path = _attempt_folder(run_dir, attempt) / ROLL_BACKS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(entry["to"], entry["step"]) for entry in entries]


def _read_attempt(run_dir: str | Path, attempt: int) -> list[ConsumedRow]:
    rows = []
    for path in _rank_files(run_dir, attempt):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                entry = json.loads(line)
                rows.append(
                    ConsumedRow(
                        step=entry["step"],
                        row=entry["row"],
                        ids=tuple(entry["ids"]),
                        hashes=tuple(entry["hashes"]),
                        attempt=attempt,
                        skipped=entry.get("skipped", ""),
                    )
                )
    return rows


def _rank_files(run_dir: str | Path, attempt: int) -> list[Path]:
    return sorted(_attempt_folder(run_dir, attempt).glob("rank-*.jsonl"))


def _attempts(run_dir: str | Path) -> list[int]:
    folders = (Path(run_dir) / FOLDER).glob("attempt-*")
    return [int(folder.name.removeprefix("attempt-")) for folder in folders if (folder / LINEAGE).is_file()]


def _attempt_folder(run_dir: str | Path, attempt: int) -> Path:
    return Path(run_dir) / FOLDER / f"attempt-{attempt:04d}"
