"""Heartbeats: what each rank is doing, in one small file per rank that is rewritten in place at every change.

    RUN/health/rank-00000.json     {"rank", "ranks", "host", "pid", "step", "phase", "collective", "collectives",
                                    "waiting", "time_s"}
    RUN/health/rank-00000.stacks   Python stacks of all threads: after `health.stall_s` within one step, or at SIGUSR2

A beat is one write of 512 bytes that no disk is waited for. `collective` is the last one this rank entered, ours or
DeepSpeed's, `waiting` whether it is in it still, `collectives` their count: the rank whose count is lowest is the one
that the others wait for. Beats of a process without an open heartbeat (tests, evaluation) go nowhere.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from triweave.pretrain.health.events import FOLDER

RECORD_BYTES = 512
STARTING = "starting"
"""Phase of a rank before its first step."""
DONE = "done"
"""Phase of a rank that has left its run in good order."""
ENDED_BY = "ended by "
"""How the phase of a rank begins that has left its run by an error, whose class follows."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """The last sign of one rank; fields as in its file, time_s by the clock of its host."""

    rank: int
    ranks: int
    host: str
    pid: int
    step: int
    phase: str
    collective: str
    collectives: int
    waiting: bool
    time_s: float

    @property
    def ended(self) -> bool:
        """Whether the rank has said that it leaves its run."""
        return self.phase == DONE or self.phase.startswith(ENDED_BY)


class Heartbeat:
    """This rank's heartbeat from here to `close`. Attribute: `step`, optimizer steps done."""

    def __init__(self, run_dir: str | Path, *, rank: int, ranks: int, stall_s: float) -> None:
        """Open the rank's files. Raises OSError where run_dir cannot be written."""
        folder = Path(run_dir) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(_beat_path(folder, rank), os.O_WRONLY | os.O_CREAT, 0o644)
        self._stacks = _beat_path(folder, rank).with_suffix(".stacks").open("w", encoding="utf-8")
        self._head = f'{{"rank": {rank}, "ranks": {ranks}, "host": "{socket.gethostname()}", "pid": {os.getpid()}'
        self._stall_s = stall_s
        self._phase, self._collective, self._collectives, self._waiting = STARTING, "", 0, False
        self.step = 0
        faulthandler.register(signal.SIGUSR2, file=self._stacks)
        _open.append(self)
        self._write()

    def begin(self, step: int) -> None:
        """Say that the window of step `step` + 1 comes next, and let stacks be written if it takes too long."""
        self.step = step
        if self._stall_s:
            faulthandler.dump_traceback_later(self._stall_s, file=self._stacks)
        self.phase("data")

    def phase(self, name: str) -> None:
        self._phase = name
        self._write()

    def enter(self, collective: str) -> None:
        self._collective, self._collectives, self._waiting = collective, self._collectives + 1, True
        self._write()

    def leave(self) -> None:
        self._waiting = False
        self._write()

    def close(self) -> None:
        """Stop beating; the files stay."""
        _open.remove(self)
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        self._stacks.close()
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.phase(DONE if kind is None else f"{ENDED_BY}{kind.__name__}")
        self.close()

    def _write(self) -> None:
        text = (
            f'{self._head}, "step": {self.step}, "phase": "{self._phase}", "collective": "{self._collective}", '
            f'"collectives": {self._collectives}, "waiting": {"true" if self._waiting else "false"}, '
            f'"time_s": {time.time():.3f}}}'
        )
        with contextlib.suppress(OSError):  # a full disk is told of where something is lost by it
            os.pwrite(self._file, text.ljust(RECORD_BYTES).encode(), 0)


_open: list[Heartbeat] = []
"""This process's open heartbeat, or none."""


def mark_phase(name: str) -> None:
    """Say what this rank begins to do."""
    for heartbeat in _open:
        heartbeat.phase(name)


def noted(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
    """Return the collective with a beat before and after it; an asynchronous one counts as left at once.

    Only the main thread beats: what others do beside it is no sign that the training moves.
    """

    @functools.wraps(collective)
    def run(*arguments: Any, **options: Any) -> Any:
        beating = _open if threading.current_thread() is threading.main_thread() else ()
        for heartbeat in beating:
            heartbeat.enter(name)
        try:
            return collective(*arguments, **options)
        finally:
            for heartbeat in beating:
                heartbeat.leave()

    return run


def read_beats(run_dir: str | Path) -> dict[int, Beat]:
    """Return rank -> its last beat; a file that is being written for the first time is left out."""
    beats: dict[int, Beat] = {}
    for path in sorted((Path(run_dir) / FOLDER).glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            beat = Beat(**json.loads(path.read_text(encoding="utf-8")))
            beats[beat.rank] = beat
    return beats


def read_stacks(run_dir: str | Path, rank: int) -> str:
    """Return the Python stacks a rank has written of itself; empty where it has not."""
    try:
        return _beat_path(Path(run_dir) / FOLDER, rank).with_suffix(".stacks").read_text(encoding="utf-8")
    except OSError:
        return ""


def _beat_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"
