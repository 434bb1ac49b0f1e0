"""Requests side by side: a bounded pool of threads, and results in the order that was asked for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from triweave.data_pipeline.storage.client import repeat_until

Result = TypeVar("Result")
CALLS_AHEAD = 2
"""Calls per thread that are handed to the pool before the first result is taken: the results held are bounded."""


class RequestThreads:
    """At most `threads` calls at a time; once it is closed, no request of theirs is repeated.

    A process that ends waits for its threads, so it must not wait for the deadline of a store that does not answer.
    """

    def __init__(self, threads: int) -> None:
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(
            threads, thread_name_prefix="object-store", initializer=repeat_until, initargs=(self._closed,)
        )

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """Have a call made."""
        return self._pool.submit(call)

    def close(self) -> None:
        """End the threads, without waiting; what is under way is given up."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


def side_by_side(calls: Iterable[Callable[[], Result]], threads: int) -> Iterator[Result]:
    """Yield what the calls return, in their order; with one thread each is made when its result is asked for.

    Raises what the first call that failed raised, in that order too, and gives the others up.
    """
    if threads <= 1:
        for call in calls:
            yield call()
        return
    pool = RequestThreads(threads)
    try:
        waiting: deque[Future[Result]] = deque()
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) >= CALLS_AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.close()
