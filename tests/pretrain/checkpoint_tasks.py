"""What the checkpoint and spine tests run inside rank processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from siblings import load_sibling

from triweave.data_pipeline.storage.client import ObjectClient
from triweave.pretrain.checkpoints.checkpoint import (
    CheckpointConfig,
    CheckpointSaver,
    list_checkpoints,
    newest_whole_checkpoint,
    read_checkpoint,
    save_checkpoint,
    step_of,
)
from triweave.pretrain.checkpoints.snapshot import Snapshot
from triweave.pretrain.config import load_config
from triweave.pretrain.engine.zero import Engine
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.train import train


def _train(engine: Engine, world: Any, case: str, steps: range) -> list[float]:
    tasks = load_sibling("engine_tasks")
    return [
        engine.train_window(
            [tasks.micro_batch(case, step, world.rank, micro) for micro in range(engine.accumulation)]
        ).loss
        for step in steps
    ]


def _engine(world: Any, stage: int, precision: str = "fp32") -> Engine:
    tasks = load_sibling("engine_tasks")
    return Engine(tasks.build_model(), tasks.config(stage, precision=precision), world, accumulation=1)


def save_after(
    world: Any, *, run_dir: str, stage: int, steps: int, more: int = 0, case: str = "nobody_has_audio",
    precision: str = "fp32", keep: int = 2,
) -> dict[str, Any]:  # fmt: skip
    """Train, checkpoint, train on; return a snapshot at the checkpoint, one at the end, and the later losses."""
    engine = _engine(world, stage, precision)
    _train(engine, world, case, range(steps))
    save_checkpoint(run_dir, engine, CheckpointConfig(keep=keep), state={"stream": "here"}, config_yaml="seed: 0\n")
    saved = load_sibling("engine_tasks").snapshot(engine)
    rng = torch.rand(3).tolist()
    losses = _train(engine, world, case, range(steps, steps + more))
    last = load_sibling("engine_tasks").snapshot(engine)
    engine.close()
    return {"saved": saved, "rng": rng, "losses": losses, "last": last}


def load_and_go_on(
    world: Any, *, run_dir: str, stage: int, more: int = 0, case: str = "nobody_has_audio", precision: str = "fp32",
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Load the newest whole checkpoint into a new engine and train on; the mirror of save_after."""
    os.environ.update(environment or {})
    told: list[str] = []
    engine = _engine(world, stage, precision)
    checkpoint = newest_whole_checkpoint(run_dir, world, tell=told.append)
    assert checkpoint is not None
    checkpoint.load_into(engine)
    saved = load_sibling("engine_tasks").snapshot(engine)
    rng = torch.rand(3).tolist()
    losses = _train(engine, world, case, range(engine.step, engine.step + more))
    last = load_sibling("engine_tasks").snapshot(engine)
    engine.close()
    return {"saved": saved, "rng": rng, "losses": losses, "last": last, "told": told, "state": checkpoint.state}


def save_where_rank_1_cannot(world: Any, *, run_dir: str) -> list[tuple[str, str]]:
    """Save in the background where rank 1 may write no file; return class and text of the errors that follow.

    One of a step after the save, as the training program asks for it, and one of waiting for the save.
    """
    engine = _engine(world, 1)
    errors = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    saver = CheckpointSaver(engine, CheckpointConfig(), run_dir)
    try:
        saver.save(state={}, config_yaml="")
        _train(engine, world, "all", range(1))
        while saver.busy:
            time.sleep(0.01)
        for ask in (lambda: world.agree(saver.failure), saver.finish):
            try:
                ask()
            except PretrainError as error:
                errors.append((type(error).__name__, str(error)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        engine.close()
    return errors


def save_in_the_background(
    world: Any, *, run_dir: str, stage: int, precision: str = "fp32", environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Save while two more steps are trained, with a copy that takes longer than they do; load into another engine.

    Return the state when the save was called, at the end of the steps, and in the other engine, and the times.
    """
    os.environ.update(environment or {})
    engine = _engine(world, stage, precision)
    _train(engine, world, "all", range(2))
    snapshot = load_sibling("engine_tasks").snapshot
    real = Snapshot.copy

    def slow(self: Snapshot, *arguments: Any) -> None:
        time.sleep(0.5)
        real(self, *arguments)

    config = CheckpointConfig(location=run_dir if run_dir.startswith("s3:") else "")
    Snapshot.copy = slow  # type: ignore[method-assign]
    try:
        with CheckpointSaver(engine, config, run_dir) as saver:
            saver.save(state={}, config_yaml="")
            saved = snapshot(engine)
            losses = _train(engine, world, "all", range(2, 4))
            later = snapshot(engine)
    finally:
        Snapshot.copy = real  # type: ignore[method-assign]
    engine.close()
    loaded = load_and_go_on(world, run_dir=run_dir, stage=stage, precision=precision, case="all", more=2)
    return {"saved": saved, "later": later, "losses": losses, "loaded": loaded, "times": saver.times[0]}


def in_a_child(action: Callable[[], Any]) -> Any:
    """Return `action()` of a forked copy of this process, None where it was killed.

    A process that has used an object store cannot be forked into one that does, so those that do are all children.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writing, json.dumps(action()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def killed_while_saving(
    world: Any, *, run_dir: str, environment: dict[str, str] | None = None
) -> list[tuple[int, list[int], bool]]:
    """Kill a forked copy of this process at each moment that matters of a second save; return what was left each time.

    The moments are the flushes to disk, or the requests to an object store, where a kill comes before or behind the
    request. One tuple per kill: which one, the steps of complete checkpoints, whether the newest of them is whole.
    """
    os.environ.update(environment or {})
    engine = _engine(world, 1)
    remote = run_dir.startswith("s3:")
    config = CheckpointConfig(keep=2, location=run_dir if remote else "")

    def save() -> bool:
        save_checkpoint(run_dir, engine, config, state={}, config_yaml="")
        return True

    def left() -> tuple[list[int], bool]:
        folders = list_checkpoints(run_dir)
        try:
            read_checkpoint(folders[-1]).verify()
        except PretrainError:
            return [step_of(folder) for folder in folders], False
        return [step_of(folder) for folder in folders], True

    def save_and_die(number: int) -> bool:
        (_kill_at_request if remote else _kill_at_flush)(number)
        return save()

    _train(engine, world, "all", range(1))
    assert in_a_child(save)
    _train(engine, world, "all", range(1, 2))
    outcomes = []
    for number in range(1, 100):
        done = in_a_child(partial(save_and_die, number))
        steps, whole = in_a_child(left)
        outcomes.append((number, steps, whole))
        if done:
            break
    engine.close()
    return outcomes


def _kill_at_request(number: int) -> None:
    """Die before request (number + 1) // 2, or right behind it where `number` is even."""
    count = 0
    real = ObjectClient._repeat

    def repeat(self: ObjectClient, done: str, key: str, request: Callable[[], Any]) -> Any:
        nonlocal count
        count += 1
        if 2 * count - 1 == number:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = real(self, done, key, request)
        if 2 * count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    ObjectClient._repeat = repeat  # type: ignore[method-assign]


def _kill_at_flush(number: int) -> None:
    count = 0
    real = os.fsync

    def flush(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = flush


def hear_spine(world: Any, **arguments: Any) -> tuple[str, str]:
    """Run the training program on this rank; return an error's text or '', and what it has said."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return run_spine(world, **arguments), said.getvalue()


def run_spine(
    world: Any,  # noqa: ARG001
    *,
    config: str,
    overrides: Sequence[str],
    resume: bool,
    environment: dict[str, str] | None = None,
) -> str:
    """Run the real training program on this rank inside the shared process group; return an error's text or ''."""
    os.environ.update(environment or {})
    try:
        train(load_config(config, list(overrides)), resume=resume)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
