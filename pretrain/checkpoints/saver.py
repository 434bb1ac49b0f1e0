"""Saving while training goes on.

    step N ends     save(): note what is to be written, start a thread             blocked: milliseconds
    thread          copy the fragments to host memory                              beside the next forward and backward
    step N + 1      before its update: wait until that copy is whole               blocked: what is left of it
    thread          checksum, write, gather what all ranks wrote, commit, prune    beside the next steps

Weights and moments change in the optimizer's update only, so the copy need not be whole earlier. The thread talks to
its peers through a process group of its own. One save is under way at a time. Lazy copies: CheckFreq (Mohan et al.
2021, FAST) and DataStates-LLM (Maurya et al. 2024, HPDC).
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from triweave.data_pipeline.storage.location import shown
from triweave.pretrain.checkpoints.blocks import block_digests
from triweave.pretrain.checkpoints.config import CheckpointConfig
from triweave.pretrain.checkpoints.fragments import Fragment
from triweave.pretrain.checkpoints.manifest import FORMAT, seal
from triweave.pretrain.checkpoints.peers import Peers
from triweave.pretrain.checkpoints.retention import prune
from triweave.pretrain.checkpoints.snapshot import Snapshot, rng_states
from triweave.pretrain.checkpoints.stores import open_store
from triweave.pretrain.engine.world import World
from triweave.pretrain.errors import CheckpointError

if TYPE_CHECKING:
    from triweave.pretrain.engine.zero import Engine

DYING_WAIT_S = 30.0
"""How long a rank that ends in an error of its own waits for its save, which may wait for ranks that are gone."""


@dataclass(frozen=True, kw_only=True)
class SaveTimes:
    """What one save took on this rank, seconds; bytes that all ranks wrote (0 until it is committed).

    blocked_s: training stood still, in `save` and before the next update. background_s: from `save` to the commit.
    cpu_s: processor time of the thread.
    """

    step: int
    blocked_s: float
    background_s: float
    cpu_s: float
    bytes: int


@dataclass(kw_only=True)
class _Task:
    """A save under way."""

    step: int
    token: str
    fragments: list[Fragment]
    rng: dict[str, torch.Tensor]
    note: dict[str, Any]
    began: float
    after: Any
    blocked_s: float = 0.0
    background_s: float = 0.0
    cpu_s: float = 0.0
    bytes: int = 0


class CheckpointSaver:
    """Writes the checkpoints of one engine; every rank has one.

    `failure`: the error of a save in the background, to be handed to `World.agree` at the next step. `times`: of the
    saves that are done.
    """

    def __init__(self, engine: Engine, config: CheckpointConfig, run_dir: str | Path) -> None:
        """Open a process group for the threads of all ranks; collective."""
        self._engine, self._config, self._world = engine, config, engine.world
        self._store = open_store(config.root(run_dir))
        self._peers = Peers(self._world)
        self._snapshot: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._task: _Task | None = None
        self._copied = threading.Event()
        self._copied.set()
        self.failure: CheckpointError | None = None
        self.times: list[SaveTimes] = []
        self._told = 0
        engine.before_update = self._wait_for_the_copy

    def save(self, *, state: dict[str, Any], config_yaml: str) -> Path:
        """Save the engine's present step and return where the checkpoint will be; collective.

        state: JSON to keep beside the engine's own, taken as it is now. Waits for a save before it. Raises
        CheckpointError on all ranks where that one failed, or without `background` where this one does.
        """
        self.finish()
        began = time.perf_counter()
        step = self._engine.step
        token = int(self._world.gather([secrets.randbits(48)])[0, 0])
        fragments = self._engine.fragments()
        self._task = _Task(
            step=step,
            token=f"{token:012x}",
            fragments=fragments,
            rng=rng_states(),
            note={
                "steps": {part.name: float(part.steps) for part in fragments if part.steps is not None},
                "state": json.loads(json.dumps(state)),
                "config": config_yaml,
            },
            began=began,
            after=_device_event(self._world),
        )
        self._copied.clear()
        self._thread = threading.Thread(target=self._work, args=(self._task,), name="checkpoint", daemon=True)
        self._thread.start()
        self._task.blocked_s += time.perf_counter() - began
        if not self._config.background:
            self.finish()
        return self._store.folder(step)

    @property
    def busy(self) -> bool:
        """Whether this rank's thread still works."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait until no save is under way; collective. Raises CheckpointError on all ranks where it failed on any."""
        self._join()
        if self._world.size > 1 or self.failure:
            self._world.agree(self.failure)

    def news(self) -> SaveTimes | None:
        """Return the times of a save that is done, once."""
        if not self.busy:
            self._join()
        if self._told == len(self.times):
            return None
        self._told = len(self.times)
        return self.times[-1]

    def __enter__(self) -> Self:
        """Save within the block; its end waits for what is under way."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for what is under way, in vain at most a while where this rank is leaving its peers."""
        try:
            if kind is None:
                self.finish()
            elif self._thread is not None:
                self._thread.join(DYING_WAIT_S)
        finally:
            self._engine.before_update = _nothing
            if kind is None:
                self._peers.close()

    def _wait_for_the_copy(self) -> None:
        if not self._copied.is_set():
            began = time.perf_counter()
            self._copied.wait()
            if self._task is not None:
                self._task.blocked_s += time.perf_counter() - began

    def _join(self) -> None:
        if self._thread is not None:
            began = time.perf_counter()
            self._thread.join()
            self._thread = None
            assert self._task is not None
            self._task.blocked_s += time.perf_counter() - began
            self._note_times(self._task)

    def _note_times(self, task: _Task) -> None:
        if self.failure is None:
            self.times.append(
                SaveTimes(
                    step=task.step,
                    blocked_s=task.blocked_s,
                    background_s=task.background_s,
                    cpu_s=task.cpu_s,
                    bytes=task.bytes,
                )
            )

    def _work(self, task: _Task) -> None:
        """Copy, write and commit; in the thread."""
        try:
            try:
                self._copy(task)
            finally:
                self._copied.set()
            self._write(task)
        except CheckpointError as error:
            self.failure = error
        except Exception as error:  # of any kind: nobody else would hear of it
            where = f"step {task.step} in {shown(self._store.root)} on rank {self._world.rank}"
            self.failure = CheckpointError(f"cannot save {where}: {type(error).__name__}: {error}")
            self.failure.__cause__ = error
        task.background_s, task.cpu_s = time.perf_counter() - task.began, time.thread_time()

    def _copy(self, task: _Task) -> None:
        if self._snapshot is None or not self._snapshot.fits(task.fragments, task.rng):
            self._snapshot = None  # the old memory goes first
            self._snapshot = Snapshot(task.fragments, task.rng)
        with _beside_the_device(self._world, task.after):
            self._snapshot.copy(task.fragments, task.rng)

    def _write(self, task: _Task) -> None:
        assert self._snapshot is not None
        files: dict[str, Any] = {}
        snapshot, rank = self._snapshot, self._world.rank

        def begin() -> None:
            if rank == 0:
                self._store.begin(task.step, task.token)

        def write() -> None:
            for number, (data, note) in enumerate(snapshot.files):
                name = f"rank-{rank:05d}-{number:03d}.safetensors"
                size = note["bytes"]
                stored = self._store.write(task.step, task.token, name, data, size)
                files[stored] = {**note, "rank": rank, "blocks": block_digests(data[:size])}

        def commit() -> None:
            if rank == 0:
                self._store.commit(task.step, task.token, seal(self._manifest(task, notes)))
                prune(self._store, self._config.keep, step=task.step, keep_every_steps=self._config.keep_every_steps)

        for action in (begin, write):
            self._together(action)
        notes = self._peers.to_first(json.dumps({"files": files, "steps": task.note["steps"]}))
        self._together(commit)
        task.bytes = self._peers.sum(sum(entry["bytes"] for entry in files.values()))

    def _together(self, action: Callable[[], None]) -> None:
        def act() -> None:
            try:
                action()
            except OSError as error:
                raise CheckpointError(
                    f"cannot write {shown(self._store.root)} on rank {self._world.rank}: {error}; free space or change "
                    f"{'checkpoint.location' if self._config.location else 'run_dir'}"
                ) from error

        self._peers.together(act)

    def _manifest(self, task: _Task, notes: list[str]) -> dict[str, Any]:
        told = [json.loads(note) for note in notes]
        steps = {name: count for note in told for name, count in note["steps"].items()}
        return {
            "format": FORMAT,
            "step": task.step,
            "world_size": self._world.size,
            "parameters": {
                name: {"shape": list(shape), "steps": steps.get(name, 0.0)}
                for name, shape in self._engine.shapes.items()
            },
            "files": {name: entry for note in told for name, entry in note["files"].items()},
            "state": task.note["state"],
            "config": task.note["config"],
        }


def _nothing() -> None:
    pass


def _device_event(world: World) -> Any:
    """Return an event behind all work that the device has been given, None on CPU."""
    return torch.cuda.current_stream().record_event() if world.device.type == "cuda" else None


@contextlib.contextmanager
def _beside_the_device(world: World, after: Any) -> Any:
    """Copy on a stream of this thread, after that event; on CPU as it is."""
    if after is None:
        yield
        return
    with torch.cuda.device(world.device), torch.cuda.stream(torch.cuda.Stream()) as stream:
        torch.cuda.current_stream().wait_event(after)
        yield stream
