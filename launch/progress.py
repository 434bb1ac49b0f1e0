"""The progress of data commands, on stderr so that stdout holds only results: a bar, or lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG_EVERY_S = 30
"""How often a line goes to a stderr that is no terminal, as a batch job's log; the first so long after the start."""
SPEED_WINDOW_S = 600
"""What the time that remains is estimated from; a chunk of large rows can take a minute."""

_UPDATE_SAMPLES = 256


@contextmanager
def work_progress(description: str, unit: str = "") -> Iterator[Callable[..., None]]:
    """Show how far work is; the yielded `show(done, total, note="")` says it.

    `unit` names what is counted. On a terminal a bar with rate and time left, gone in the end; else a line every
    `LOG_EVERY_S` seconds. What is done at the first call, by an earlier run, does not count into the rate.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *((MofNCompleteColumn(),) if unit else (TaskProgressColumn(),)),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    log = _Log(description, unit)
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=SPEED_WINDOW_S,
    ) as display:

        def show(done: int, total: int, note: str = "") -> None:
            rate = log.rate(done)
            if not console.is_terminal:
                log.say(done, total, rate, note)
                return
            if not display.tasks:
                display.add_task(description, completed=done, total=total, note="")
            text = " · ".join(filter(None, (f"{rate:,.0f} {unit}/s" if unit else "", note)))
            display.update(display.tasks[0].id, completed=done, total=total, note=text)

        yield show


class _Log:
    """Lines of a progress, and its rate since the first call."""

    def __init__(self, description: str, unit: str) -> None:
        self._description = description
        self._unit = unit
        self._first: int | None = None
        self._started = self._said = time.monotonic()

    def rate(self, done: int) -> float:
        """Return how much was done a second since the first call; 0 in it."""
        if self._first is None:
            self._first, self._started = done, time.monotonic()
        return (done - self._first) / max(time.monotonic() - self._started, 1e-9)

    def say(self, done: int, total: int, rate: float, note: str) -> None:
        """Print a line where the latest one is long enough ago."""
        if time.monotonic() - self._said < LOG_EVERY_S:
            return
        self._said = time.monotonic()
        share = f"{done / max(1, total):.0%}"
        facts = [f"{done:,} of {total:,} {self._unit} ({share}), {rate:,.0f} {self._unit}/s" if self._unit else share]
        facts.append(note)
        if rate > 0:
            facts.append(f"about {_duration((total - done) / rate)} left")
        print(f"{self._description}: {', '.join(filter(None, facts))}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def sample_progress(description: str, samples: int) -> Iterator[Callable[[int], None]]:
    """Show how many of `samples` are done; the yielded function advances it by a number of samples."""
    with work_progress(description, "samples") as show:
        show(0, samples)
        done = waiting = 0

        def advance(number: int) -> None:
            # One call a sample is common; a redraw lock for each would cost more than the sample.
            nonlocal done, waiting
            done += number
            waiting += number
            if waiting >= _UPDATE_SAMPLES:
                waiting = 0
                show(done, samples)

        yield advance
        show(done, samples)
