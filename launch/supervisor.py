"""Watch over the ranks of a launch: report and end a stall, pass a request to stop on, start again within a budget.

Each rank keeps its last sign in a file of its own (`pretrain/health/heartbeat.py`). A launch stands still when no sign
of any rank has changed for `health.stall_s`: ranks that wait for each other all stop moving, whichever is to blame.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from triweave.launch.deepspeed_launcher import LaunchCommand
from triweave.launch.hostfile import Place
from triweave.launch.processes import Outcome, run_to_end
from triweave.launch.stall_report import behind, process_state, stall_report
from triweave.pretrain.health.events import Event, record_event
from triweave.pretrain.health.heartbeat import STARTING, Beat, read_beats
from triweave.pretrain.health.signals import REQUEUE

LOOK_S = 1.0
"""Seconds between two looks at the heartbeats."""
STACKS_S = 1.0
"""Seconds that ranks get to write their stacks."""
START_S = 300.0
"""Least seconds without a sign that end a launch before all its ranks have come to their first step."""
STALLED = 124
"""Exit code of a launch that stood still and was ended, as of timeout(1)."""
FINAL_CODES = (0, 2, REQUEUE)
"""Exit codes behind which starting again would change nothing, or is not ours to do."""
RESTART_PAUSE_S = 3.0
"""Seconds between the end of the ranks and their next start."""


class RankWatch:
    """What `run_to_end` asks again and again while the ranks of one start work."""

    def __init__(self, run_dir: Path, *, ranks: int, stall_s: float, asked: list[int]) -> None:
        """ranks: how many were started. stall_s: as in HealthConfig, 0 never ends anything.

        asked: not empty as soon as the ranks shall write a checkpoint and end after the step they are in.
        """
        self._run_dir, self._ranks, self._stall_s, self._asked = run_dir, ranks, stall_s, asked
        self._old = read_beats(run_dir)
        self._seen: dict[int, Beat] = {}
        self._gone_first: set[int] = set()
        self._behind: list[int] = []
        self._moved = self._looked = time.monotonic()

    def stalled(self) -> bool:
        """Return whether the launch is to be ended because it stands still; the report has been shown then."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return False
        self._looked = now
        beats = self._beats()
        if not self._gone_first:
            self._gone_first = {rank for rank, beat in beats.items() if process_state(beat) in ("gone", "dead")}
        if beats != self._seen:
            self._seen, self._moved = beats, now
        if self._asked and self._signal(signal.SIGUSR1):  # before they have a heartbeat there is nobody to ask yet
            self._asked.clear()
        if not self._stall_s or now - self._moved < self._limit_s:
            return False
        self._signal(signal.SIGUSR2)
        time.sleep(STACKS_S)
        report = stall_report(self._run_dir, self._seen, ranks=self._ranks, still_s=now - self._moved)
        tell(report)
        _note(self._run_dir, "stall", self._seen, report)
        self._behind = behind(self._seen)
        return True

    def failed_rank(self) -> int | None:
        """Return the rank that has made this start fail, None where its signs do not tell.

        Of a stall the one that the others wait for. Else the only one that ended without a sign of it, as killed ones
        do; of several the first that was gone. Where all have said that they end, by an error, the first of them.
        """
        if self._behind:
            return self._behind[0] if len(self._behind) == 1 else None
        beats = self._beats()
        silent = {rank for rank, beat in beats.items() if not beat.ended}
        if len(silent) > 1:
            silent &= self._gone_first
        if any(not beat.ended for beat in beats.values()):
            return next(iter(silent)) if len(silent) == 1 else None
        return min(beats, key=lambda rank: beats[rank].time_s, default=None)

    def _beats(self) -> dict[int, Beat]:
        """Return the last signs that are of this start."""
        return {rank: beat for rank, beat in read_beats(self._run_dir).items() if beat != self._old.get(rank)}

    @property
    def _limit_s(self) -> float:
        """Seconds without a sign that are too long now; imports and a first compilation take their time."""
        at_work = sum(beat.phase != STARTING for beat in self._seen.values())
        return self._stall_s if at_work == self._ranks else max(self._stall_s, START_S)

    def _signal(self, number: signal.Signals) -> int:
        """Send a signal to every rank of this machine that has a heartbeat; return how many there were."""
        sent = 0
        for beat in self._seen.values():
            if beat.host == socket.gethostname():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat.pid, number)
                    sent += 1
        return sent


class LostPlaces:
    """Places whose rank has failed in two starts running; `elastic`: whether they are left out of the next start."""

    def __init__(self, *, elastic: bool) -> None:
        self._elastic = elastic
        self._suspect: Place | None = None
        self.places: tuple[Place, ...] = ()

    def judge(self, command: LaunchCommand, failed_rank: int | None) -> None:
        """Take in which rank has made a start fail, None where nobody knows."""
        place = None
        if self._elastic and failed_rank is not None and failed_rank < len(command.places):
            place = command.places[failed_rank]
        if place is not None and place == self._suspect:
            tell(
                f"rank {failed_rank}, in slot {place.slot} of {place.machine}, has failed twice in a row: its slot is "
                "left out from here on"
            )
            self.places += (place,)
        self._suspect = place


def supervise(
    command: LaunchCommand,
    again: Callable[[Sequence[Place]], LaunchCommand],
    *,
    run_dir: Path,
    log: IO[bytes],
    stall_s: float,
    restarts: int,
    elastic: bool = False,
) -> Outcome:
    """Run the ranks to their end, starting them again up to `restarts` times, and return how the last start ended.

    again: returns the command that goes on from the newest checkpoint without the places it is given. elastic: whether
    places are given up at all; `again` may then start fewer ranks, or raise LaunchError where too few are left.

    A start that is stopped by a signal, is done, or ends in a user's error is the last one. SIGUSR1 to this process has
    the ranks end with a checkpoint and REQUEUE.
    """
    asked: list[int] = []
    lost = LostPlaces(elastic=elastic)
    with _noted(signal.SIGUSR1, asked):
        for left in range(restarts, -1, -1):
            watch = RankWatch(run_dir, ranks=command.ranks, stall_s=stall_s, asked=asked)
            outcome = run_to_end(command, log=log, ended=watch.stalled)
            if outcome.cut_short:
                outcome = Outcome(exit_code=STALLED)
            if outcome.stopped_by is not None or outcome.exit_code in FINAL_CODES or not left:
                break
            text = f"exit code {outcome.exit_code}; starting again from the newest checkpoint, {left - 1} restarts left"
            tell(text)
            _note(run_dir, "restart", read_beats(run_dir), text)
            lost.judge(command, watch.failed_rank())
            time.sleep(RESTART_PAUSE_S)
            before, command = command, again(lost.places)
            if command.ranks != before.ranks:
                tell(text := f"going on with {command.ranks} ranks instead of {before.ranks}")
                _note(run_dir, "restart", read_beats(run_dir), text)
    return outcome


def tell(text: str) -> None:
    """Show a person a text."""
    print(f"triweave launch: {text}", file=sys.stderr, flush=True)


def _note(run_dir: Path, event: Event, beats: dict[int, Beat], text: str) -> None:
    with contextlib.suppress(OSError):
        record_event(run_dir, event, step=max((beat.step for beat in beats.values()), default=0), text=text)


@contextlib.contextmanager
def _noted(number: signal.Signals, received: list[int]) -> Iterator[None]:
    """Append the signal to `received` instead of acting on it."""

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = signal.signal(number, note)
    try:
        yield
    finally:
        signal.signal(number, before)
