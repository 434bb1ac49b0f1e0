"""The progress bar of data commands, on stderr so that stdout holds only results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_UPDATE_SAMPLES = 256


@contextmanager
def sample_progress(description: str, samples: int) -> Iterator[Callable[[int], None]]:
    """Show a bar over `samples` on stderr; the yielded function advances it by a number of samples.

    Nothing is drawn where stderr is no terminal.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display:
        task = display.add_task(description, total=samples)
        waiting = 0

        def advance(number: int) -> None:
            # One call a sample is common; a redraw lock for each would cost more than the sample.
            nonlocal waiting
            waiting += number
            if waiting >= _UPDATE_SAMPLES:
                display.advance(task, waiting)
                waiting = 0

        yield advance
        display.advance(task, waiting)
