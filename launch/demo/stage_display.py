"""One progress display for a chain of stages, on standard error."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

SUMMARY = "summary"
"""Fact that says in a few words what a stage made."""


class StageDisplay:
    """A line per stage: its name, a bar, a few words. Without a terminal, one printed line per finished stage."""

    def __init__(self, stages: Sequence[str]) -> None:
        self._console = Console(stderr=True, soft_wrap=True)
        self._width = max(map(len, stages))
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn(f"[bold]{{task.description:<{self._width}}}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[words]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks = {name: self._progress.add_task(name, start=False, total=None, words="") for name in stages}
        self._current = next(iter(stages))

    def __enter__(self) -> StageDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, name: str) -> None:
        """Begin a stage."""
        self._current = name
        self._progress.start_task(self._tasks[name])

    def update(self, done: float, total: float | None, words: str = "") -> None:
        """Move the current stage's bar; may be called from another thread. `total`: None where nobody knows it."""
        self._progress.update(self._tasks[self._current], completed=done, total=total, words=words)

    def note(self, line: str) -> None:
        """Print a line that stays, above the bars."""
        self._progress.console.print(line, markup=False, highlight=False)

    def done(self, name: str, seconds: float, facts: dict[str, Any]) -> None:
        """End a stage."""
        self._finish(name, f"{facts[SUMMARY]}", f"{seconds:6.1f} s")

    def reused(self, name: str, facts: dict[str, Any]) -> None:
        """Show a stage that was done by an earlier run."""
        self._progress.start_task(self._tasks[name])
        self._finish(name, f"reused: {facts[SUMMARY]}", "  reused")

    def _finish(self, name: str, words: str, time_words: str) -> None:
        task = self._tasks[name]
        self._progress.update(task, completed=1, total=1, words=words)
        self._progress.stop_task(task)
        if not self._console.is_terminal:
            self._console.print(f"{name:<{self._width}} {time_words}  {words}", markup=False, highlight=False)
