"""Rank processes for tests: W workers per world size, started once, each task run on all ranks of one process group.

Every worker is forked from one nursery process that has imported torch, DeepSpeed and our training program: 4 s of a
processor once a session, not once a rank. Loaded by path, from the tests by the fixture `rank_pool` and as a script by
the nursery:

    python rank_pool.py      forks a worker for each line on stdin: JSON of its address, authkey and environment

A worker connects back, then runs the (module path, function, arguments) that it is sent.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import traceback
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any
from unittest.mock import patch

from siblings import load_path as load

from triweave.launch.machine import free_port

TASK_TIMEOUT_S = 240
PRELOADED = ["triweave.pretrain.train", "deepspeed", "torch._inductor.compile_fx", "torch.utils.tensorboard"]
"""What a rank imports before its first step, the last two only when DeepSpeed and the telemetry begin."""


class RankError(AssertionError):
    """A task raised on some rank; carries every rank's traceback."""


class Nursery:
    """The process that workers are forked from; it ends when this process does."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    def fork(self, address: str, authkey: str, environment: dict[str, str]) -> None:
        """Start a worker that connects back to the address."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([address, authkey, environment]) + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End it, once its workers have been told to."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class RankPool:
    """`size` worker processes joined in one gloo group."""

    def __init__(self, nursery: Nursery, size: int) -> None:
        self.size = size
        authkey = secrets.token_hex(16)
        port = free_port()
        listener = Listener(("127.0.0.1", 0), authkey=authkey.encode())
        address = f"127.0.0.1:{listener.address[1]}"
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        for rank in range(size):
            nursery.fork(address, authkey, {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        links = [(*link.recv(), link) for link in (listener.accept() for _ in range(size))]
        self._pids = [pid for _, pid, _ in links]
        self._connections: list[Connection] = [link for _, _, link in sorted(links)]
        listener.close()

    def run(self, module: str | Path, function: str, **arguments: Any) -> list[Any]:
        """Return `function(world, **arguments)` of the module at that path from every rank, by rank."""
        for connection in self._connections:
            connection.send((str(module), function, arguments))
        deadline = time.monotonic() + TASK_TIMEOUT_S
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(max(0.1, deadline - time.monotonic())):
                self.close()
                raise RankError(f"rank {rank} gave no answer to {function} in {TASK_TIMEOUT_S} s")
            try:
                answers.append(connection.recv())
            except EOFError:
                answers.append((False, f"died in {function}"))
        failures = [f"rank {rank}:\n{answer}" for rank, (done, answer) in enumerate(answers) if not done]
        if failures:
            raise RankError("\n".join(failures))
        return [answer for _, answer in answers]

    @property
    def alive(self) -> bool:
        return all(Path(f"/proc/{pid}").exists() for pid in self._pids)

    def close(self) -> None:
        """End the workers."""
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + 5
        for pid in self._pids:
            while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


_POOLS: dict[int, RankPool] = {}
_NURSERIES: list[Nursery] = []


def pool(size: int) -> RankPool:
    """Return the session's pool of that size; a pool that lost a worker is replaced."""
    if size in _POOLS and not _POOLS[size].alive:
        _POOLS.pop(size).close()
    if size not in _POOLS:
        if not _NURSERIES:
            _NURSERIES.append(Nursery())
        _POOLS[size] = RankPool(_NURSERIES[0], size)
    return _POOLS[size]


@atexit.register
def close_all() -> None:
    """End every worker of this process."""
    for started in _POOLS.values():
        started.close()
    for nursery in _NURSERIES:
        nursery.close()


def work(address: str, authkey: str) -> None:
    """Serve tasks until the other side hangs up."""
    from triweave.pretrain.engine.world import open_world

    host, port = address.split(":")
    connection = Client((host, int(port)), authkey=authkey.encode())
    connection.send((int(os.environ["RANK"]), os.getpid()))
    world = open_world("cpu", torch_threads=1)
    while True:
        try:
            module, function, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            with patch.dict(os.environ):  # what a task sets there is not for the next one
                answer = (True, getattr(load(module), function)(world, **arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        connection.send(answer)


def serve_forks() -> None:
    """Fork a worker for each line on stdin; return when it ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no worker, and no process that one starts, walks all of torch again
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system takes the ended workers away
    while line := sys.stdin.readline():
        if os.fork() == 0:
            address, authkey, environment = json.loads(line)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(environment)
            os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())  # the lines are the nursery's
            work(address, authkey)
            os._exit(0)  # gloo's teardown waits for peers that may be gone already


if __name__ == "__main__":
    serve_forks()
    os._exit(0)  # without the reports of leaks that extension modules make of what is frozen
