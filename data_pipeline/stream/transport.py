"""What loader worker processes need beside the data: a way to hand over large arrays, and an end with their rank.

A batch travels as a small pickle plus one block of shared memory that holds every array (pickle protocol 5,
out-of-band buffers): one file descriptor and one copy per micro-batch, whatever it holds. Where shared memory is short
(containers often have 64 MB) it goes through the pipe instead, which is slower and otherwise the same.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch

from triweave.data_pipeline.storage.client import used_in_this_process
from triweave.data_pipeline.worker_process import use_one_blas_thread

ALIGNMENT_BYTES = 64
RANK_CHECK_SECONDS = 1.0
SHARED_MEMORY = "/dev/shm"
SHARED_MARGIN = 8
"""Free shared memory must hold this many parcels of the size at hand, since other workers take from it as well."""
KEPT_FREE_BYTES = 256 << 20
"""Memory a worker's allocator may keep free instead of giving it back to the system."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


class Parcel(NamedTuple):
    """A pickled object and the buffers it refers to, one after another in `memory`: a shared uint8 tensor, or bytes."""

    pickled: bytes
    sizes: list[int]
    memory: torch.Tensor | bytearray


def wrap(content: Any) -> Parcel:
    """Return a picklable object with its arrays in one block of shared memory."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(content, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    total = sum(_aligned(view.nbytes) for view in views)
    memory: torch.Tensor | bytearray
    if _free_shared_bytes() >= SHARED_MARGIN * total:
        memory = torch.empty(total, dtype=torch.uint8).share_memory_()
    else:
        memory = bytearray(total)
    target = _bytes_of(memory)
    start = 0
    for view in views:
        target[start : start + view.nbytes] = view
        start += _aligned(view.nbytes)
    return Parcel(pickled, [view.nbytes for view in views], memory)


def unwrap(parcel: Parcel) -> Any:
    """Return the object; its arrays lie in the parcel's memory, which lives as long as one of them does."""
    source = _bytes_of(parcel.memory)
    views, start = [], 0
    for size in parcel.sizes:
        views.append(source[start : start + size])
        start += _aligned(size)
    return pickle.loads(parcel.pickled, buffers=views)


def start_worker(_worker: int) -> None:
    """Prepare a loader worker process: it ends when its rank says so or is gone, and for no other reason.

    Ctrl-C reaches the whole foreground group and launchers send SIGTERM to every process they find; the rank decides
    what either means (checkpoint and leave, say) and needs its workers until then. And a rank that is killed outright
    tells nobody. So a thread waits for the rank's own SIGTERM and looks whether the rank still lives.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before all that takes time
    sys.excepthook = _report_unless_hung_up
    threading.Thread(target=_leave_with_rank, daemon=True).start()
    tune_memory()
    use_one_blas_thread()


def tune_memory() -> None:
    """Set this process up for making batches; about a tenth of the time of decoding small pictures.

    What was there before is taken out of garbage collection, which would walk all of torch again and again and copy
    every page that a fork still shares. And glibc keeps freed memory: else each batch's arrays, freed and made again,
    cost a page fault every 4 kB.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else extension modules report all that they hold as leaked when a process ends
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, KEPT_FREE_BYTES)
        mallopt(_M_MMAP_THRESHOLD, KEPT_FREE_BYTES)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while workers start; they inherit that and never see one, this process gets it afterwards.

    Without it a worker that has not come to `start_worker` yet dies of the Ctrl-C with a traceback of its own.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def queue_depth(workers: Any) -> int:
    """Return how many parcels lie ready at the iterator of a DataLoader; 0 where the system does not count them."""
    try:
        queued = int(workers._worker_result_queue.qsize())
    except NotImplementedError:  # macOS
        return 0
    return queued + sum(len(task) > 1 for task in workers._task_info.values())


def start_method() -> str:
    """Return how worker processes are started: `fork`, unless this process has a CUDA context or an object store.

    Fork starts a worker in milliseconds, shares the plan already made, and is safe for what workers do: numpy, codecs
    and a queue, no torch operation and no collective, while glibc keeps its allocator whole over a fork from a process
    with gloo threads. A CUDA context and the registered memory of NCCL do not survive a fork, so there the workers come
    from a fork server, which costs them one import of torch. Nor do the threads of an object store's client (a request
    of the child would wait for ever); there they are spawned, at the same cost: a fork server would keep the
    credentials and the endpoint that the environment had when it was started.
    """
    methods = multiprocessing.get_all_start_methods()
    if used_in_this_process():
        return "spawn"
    if "fork" in methods and not torch.cuda.is_initialized():
        return "fork"
    return "forkserver" if "forkserver" in methods else "spawn"


def _report_unless_hung_up(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception of the thread that hands out shared memory, unless the rank was interrupted in mid-call."""
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _leave_with_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None, "start_worker belongs into a worker process"
    # Forked workers hold each other's ends of the pipes that is_alive looks at; others have the fork server as parent.
    forked = os.getppid() == rank.pid
    while os.getppid() == rank.pid if forked else rank.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, RANK_CHECK_SECONDS)
        if received is not None and received.si_pid == rank.pid:
            break
    os._exit(1)


def _bytes_of(memory: torch.Tensor | bytearray) -> memoryview:
    return memoryview(memory) if isinstance(memory, bytearray) else memory.numpy().data


def _free_shared_bytes() -> int:
    """Return the free bytes where shared memory lives; 0 on systems that keep it elsewhere."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
