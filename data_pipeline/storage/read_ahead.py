"""Ask for the bytes of what comes next while the present is worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(items: Iterable[Item], ask: Callable[[Item], None], depth: int) -> Iterator[Item]:
    """Yield the items in order; `ask` is called with each when it is `depth` items ahead of the one yielded."""
    waiting: deque[Item] = deque()
    for item in items:
        ask(item)
        waiting.append(item)
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting
