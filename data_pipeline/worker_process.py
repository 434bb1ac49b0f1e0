"""What worker processes do first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait

from threadpoolctl import threadpool_limits


def prepare_worker() -> None:
    """Leave interrupts to the parent, and never outlive it.

    After `kill -9` of the parent the pool's pipes alone would keep this process waiting forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def use_one_blas_thread() -> None:
    """Keep numpy's matrix products of this process on one thread, for as long as it lives.

    Workers share the cores with each other and with what they work for, and the matrices of a spectrogram are small:
    with two BLAS threads on a busy machine of two cores a clip took 30 ms instead of 2.
    """
    import numpy  # noqa: F401  the limit reaches the libraries that are loaded

    threadpool_limits(limits=1, user_api="blas")


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "prepare_worker belongs into a worker process"
    wait([parent.sentinel])
    os._exit(1)
