"""What a worker process of a data command does first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait


def prepare_worker() -> None:
    """Leave interrupts to the parent, and never outlive it.

    After `kill -9` of the parent the pool's pipes alone would keep this process waiting forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "prepare_worker belongs into a worker process"
    wait([parent.sentinel])
    os._exit(1)
