"""How long each stage of a build takes: read, decode, encode, filter, one stage per document step, write."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageClock:
    """Sum the time of stages; a stage inside another one is not counted twice.

    seconds: stage -> wall-clock seconds of this process since the last `take`.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner_s = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the `with` block, less that of the stages inside it, whether it raises or not."""
        outer_s, self._inner_s = self._inner_s, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            whole_s = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + whole_s - self._inner_s
            self._inner_s = outer_s + whole_s

    def take(self) -> dict[str, float]:
        """Return the sums and begin again at zero."""
        taken, self.seconds = self.seconds, {}
        return taken
