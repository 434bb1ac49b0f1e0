"""Stages with markers: a chain of work that continues where it was interrupted and repeats nothing that is done.

A stage's key is a hash of its options and of the key before it, so a change in one stage redoes everything after it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triweave.data_pipeline.shards.manifest import write_atomically
from triweave.launch.demo.stage_display import StageDisplay


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What a finished stage left.

    seconds: what it took when it was done, not when it was reused.
    facts: JSON values that later stages and the result use.
    """

    key: str
    seconds: float
    facts: dict[str, Any]


class StageChain:
    """Runs stages in order, with a marker file for each in `folder`."""

    def __init__(self, folder: Path, display: StageDisplay, *, key: Any) -> None:
        """`key`: JSON value of everything all stages depend on, say the version of their code."""
        self._folder = folder
        self._display = display
        self._key = _hash(key)
        self._rebuilding = False
        self.records: dict[str, StageRecord] = {}

    def run(
        self,
        name: str,
        options: Any,
        work: Callable[[], dict[str, Any]],
        *,
        outputs: tuple[Path, ...] | Callable[[dict[str, Any]], tuple[Path, ...]] = (),
        discard: Path | None = None,
    ) -> dict[str, Any]:
        """Return the facts of a stage: from its marker where options and outputs are as they were, else by working.

        options: JSON value the stage depends on, beyond the stages before it.
        work: does it and returns the facts; it must be able to continue its own interrupted work.
        outputs: what must still be there for the marker to count, or a function of the facts that says it.
        discard: folder of unfinished work, removed before work of another key begins in it.

        An interrupted stage counts the seconds of its last try only.
        """
        self._key = _hash([self._key, name, options])
        marker = self._folder / f"{name}.json"
        record = None if self._rebuilding else self._read(marker)
        if record is not None and _all_exist(outputs, record.facts):
            self._display.reused(name, record.facts)
        else:
            self._rebuilding = True  # what follows was made from the old output
            marker.unlink(missing_ok=True)
            self._claim(name, discard)
            self._display.start(name)
            started = time.monotonic()
            facts = work()
            record = StageRecord(key=self._key, seconds=round(time.monotonic() - started, 2), facts=facts)
            self._write(marker, record)
            self._display.done(name, record.seconds, facts)
        self.records[name] = record
        return record.facts

    @property
    def key(self) -> str:
        """What everything so far depends on, for a chain that goes on from here."""
        return self._key

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> seconds it took."""
        return {name: record.seconds for name, record in self.records.items()}

    def _claim(self, name: str, folder: Path | None) -> None:
        """Note that work of this key has begun; remove what work of another key left unfinished or finished."""
        note = self._folder / f"{name}.begun"
        if folder is not None and folder.exists() and not (note.exists() and note.read_text() == self._key):
            shutil.rmtree(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        note.write_text(self._key)

    def _read(self, marker: Path) -> StageRecord | None:
        try:
            record = StageRecord(**json.loads(marker.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return record if record.key == self._key else None

    def _write(self, marker: Path, record: StageRecord) -> None:
        write_atomically(marker, json.dumps(record.__dict__, indent=1).encode() + b"\n")


def _all_exist(outputs: tuple[Path, ...] | Callable[[dict[str, Any]], tuple[Path, ...]], facts: dict[str, Any]) -> bool:
    paths = outputs(facts) if callable(outputs) else outputs
    return all(path.exists() for path in paths)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
