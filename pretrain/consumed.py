"""The ledger of consumed samples: what each optimizer step really trained on, written after the step.

    RUN/consumed/attempt-0001/lineage.json         {"attempt", "parent", "resumed_step"}
    RUN/consumed/attempt-0001/rank-00000.jsonl     one line per plan row: step, row, ids, hashes

Every start of a run is an attempt; one that resumes names the attempt whose checkpoint it continues. An audit follows
that chain back from the newest attempt and counts of each one only the steps that the next had not overtaken. It knows
nothing of the plan: ids and token hashes come from the batches themselves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from triweave.data_pipeline.batch import PackedBatch
from triweave.pretrain.errors import PretrainError

FOLDER = "consumed"
LINEAGE = "lineage.json"


@dataclass(frozen=True, kw_only=True)
class ConsumedRow:
    """One plan row of one optimizer step.

    row: absolute plan row. ids: `source:key:first_token:end_token` per piece, `:filler` where it was corrupt. hashes:
    xxh3 of each piece's tokens. attempt: the start of the run that trained on it.
    """

    step: int
    row: int
    ids: tuple[str, ...]
    hashes: tuple[int, ...]
    attempt: int


class ConsumedLedger:
    """This rank's part of the ledger of one attempt."""

    def __init__(self, run_dir: str | Path, attempt: int, rank: int) -> None:
        folder = _attempt_folder(run_dir, attempt)
        folder.mkdir(parents=True, exist_ok=True)
        self.attempt = attempt
        self._file = (folder / f"rank-{rank:05d}.jsonl").open("a", encoding="utf-8")

    def write(self, step: int, micro_batches: Sequence[PackedBatch]) -> None:
        """Append the rows of a finished step; handed to the operating system at once, so a kill loses none."""
        for batch in micro_batches:
            for row, ids, hashes in zip(batch.plan_rows.tolist(), batch.sample_ids, batch.sample_hashes, strict=True):
                if row >= 0:
                    entry = {"step": step, "row": row, "ids": ids, "hashes": [int(value) for value in hashes]}
                    self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


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
    attempt: int | None = max(attempts)
    until: float = float("inf")
    while attempt is not None:
        path = _attempt_folder(run_dir, attempt) / LINEAGE
        try:
            lineage = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PretrainError(f"{path} of the surviving lineage cannot be read: {error}") from error
        rows += [row for row in _read_attempt(run_dir, attempt) if lineage["resumed_step"] < row.step <= until]
        until = min(until, lineage["resumed_step"])
        attempt = lineage["parent"]
    return sorted(rows, key=lambda row: (row.step, row.row))


def read_attempts(run_dir: str | Path) -> list[ConsumedRow]:
    """Return the rows of every attempt, those that a later one has overtaken included."""
    return [row for attempt in sorted(_attempts(run_dir)) for row in _read_attempt(run_dir, attempt)]


def world_sizes(run_dir: str | Path) -> dict[int, int]:
    """Return attempt -> ranks that wrote a ledger in it."""
    return {attempt: len(_rank_files(run_dir, attempt)) for attempt in _attempts(run_dir)}


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
