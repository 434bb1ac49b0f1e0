"""Rank processes for tests: W workers per world size, started once, each task run on all ranks of one process group.

A 2-rank start costs about 10 s of imports; tests that share the workers pay it once. Loaded by path, from the tests by
the fixture `ranks` and as a script by the workers themselves:

    python rank_pool.py ADDRESS AUTHKEY      connects back, then runs (module path, function, arguments) it is sent
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import secrets
import socket
import subprocess
import sys
import time
import traceback
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import ModuleType
from typing import Any

TASK_TIMEOUT_S = 240


class RankError(AssertionError):
    """A task raised on some rank; carries every rank's traceback."""


class RankPool:
    """`size` worker processes joined in one gloo group."""

    def __init__(self, size: int) -> None:
        self.size = size
        authkey = secrets.token_hex(16)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        listener = Listener(("127.0.0.1", 0), authkey=authkey.encode())
        address = f"127.0.0.1:{listener.address[1]}"
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        self._processes = [
            subprocess.Popen(
                [sys.executable, __file__, address, authkey],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(size)
        ]
        connections = [listener.accept() for _ in range(size)]
        self._connections: list[Connection] = [link for _, link in sorted((link.recv(), link) for link in connections)]
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
        return all(process.poll() is None for process in self._processes)

    def close(self) -> None:
        """End the workers."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()


_POOLS: dict[int, RankPool] = {}


def pool(size: int) -> RankPool:
    """Return the session's pool of that size; a pool that lost a worker is replaced."""
    if size in _POOLS and not _POOLS[size].alive:
        _POOLS.pop(size).close()
    if size not in _POOLS:
        _POOLS[size] = RankPool(size)
    return _POOLS[size]


@atexit.register
def close_all() -> None:
    """End every worker of this process."""
    for started in _POOLS.values():
        started.close()


def load(path: str | Path) -> ModuleType:
    """Import a module by its path, once per process."""
    name = f"triweave_test_{Path(path).stem}"
    if name not in sys.modules:
        specification = importlib.util.spec_from_file_location(name, path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module
        try:
            specification.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def work(address: str, authkey: str) -> None:
    """Serve tasks until the other side hangs up."""
    from triweave.pretrain.engine.world import open_world

    host, port = address.split(":")
    connection = Client((host, int(port)), authkey=authkey.encode())
    connection.send(int(os.environ["RANK"]))
    world = open_world("cpu", torch_threads=1)
    while True:
        try:
            module, function, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = (True, getattr(load(module), function)(world, **arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        connection.send(answer)


if __name__ == "__main__":
    work(*sys.argv[1:])
    os._exit(0)  # gloo's teardown waits for peers that may be gone already
