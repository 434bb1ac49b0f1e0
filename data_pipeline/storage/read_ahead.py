"""Ask for the bytes of what comes next while the present is worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(items: Iterable[Item], ask: Callable[[Item], None], depth: int) -> Iterator[Item]:
    """Yield the items in order; `ask` is called with each when it is `depth` items ahead of the one yielded.

    At the start it is one item, then one more with every item yielded: the first does not share the link with what is
    needed much later.
    """
    waiting: deque[Item] = deque()
    ahead = 1
    for item in items:
        ask(item)
        waiting.append(item)
        if len(waiting) > min(ahead, depth):
            yield waiting.popleft()
            ahead += 1
    yield from waiting
