"""What the checkpoint and spine tests run inside rank processes."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from triweave.pretrain import fragment_files
from triweave.pretrain.checkpoint import (
    CheckpointConfig,
    list_checkpoints,
    newest_whole_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from triweave.pretrain.config import load_config
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.train import train
from triweave.pretrain.zero import Engine


def _engine_tasks() -> ModuleType:
    key = "triweave_test_engine_tasks"
    if key not in sys.modules:
        specification = importlib.util.spec_from_file_location(key, Path(__file__).with_name("engine_tasks.py"))
        assert specification is not None
        assert specification.loader is not None
        sys.modules[key] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(sys.modules[key])
    return sys.modules[key]


def _train(engine: Engine, world: Any, case: str, steps: range) -> list[float]:
    tasks = _engine_tasks()
    return [
        engine.train_window(
            [tasks.micro_batch(case, step, world.rank, micro) for micro in range(engine.accumulation)]
        ).loss
        for step in steps
    ]


def _engine(world: Any, stage: int, precision: str = "fp32") -> Engine:
    tasks = _engine_tasks()
    return Engine(tasks.build_model(), tasks.config(stage, precision=precision), world, accumulation=1)


def save_after(
    world: Any, *, run_dir: str, stage: int, steps: int, more: int = 0, case: str = "nobody_has_audio",
    precision: str = "fp32", keep: int = 2,
) -> dict[str, Any]:  # fmt: skip
    """Train, checkpoint, train on; return a snapshot at the checkpoint, one at the end, and the later losses."""
    engine = _engine(world, stage, precision)
    _train(engine, world, case, range(steps))
    save_checkpoint(run_dir, engine, CheckpointConfig(keep=keep), state={"stream": "here"}, config_yaml="seed: 0\n")
    saved = _engine_tasks().snapshot(engine)
    rng = torch.rand(3).tolist()
    losses = _train(engine, world, case, range(steps, steps + more))
    last = _engine_tasks().snapshot(engine)
    engine.close()
    return {"saved": saved, "rng": rng, "losses": losses, "last": last}


def load_and_go_on(
    world: Any, *, run_dir: str, stage: int, more: int = 0, case: str = "nobody_has_audio", precision: str = "fp32"
) -> dict[str, Any]:
    """Load the newest whole checkpoint into a new engine and train on; the mirror of save_after."""
    told: list[str] = []
    engine = _engine(world, stage, precision)
    checkpoint = newest_whole_checkpoint(run_dir, world, tell=told.append)
    assert checkpoint is not None
    checkpoint.load_into(engine)
    saved = _engine_tasks().snapshot(engine)
    rng = torch.rand(3).tolist()
    losses = _train(engine, world, case, range(engine.step, engine.step + more))
    last = _engine_tasks().snapshot(engine)
    engine.close()
    return {"saved": saved, "rng": rng, "losses": losses, "last": last, "told": told, "state": checkpoint.state}


def save_where_rank_1_cannot(world: Any, *, run_dir: str) -> tuple[str, str]:
    """Save with something in the way of rank 1's file; return the class and text of the error."""
    engine = _engine(world, 1)
    fragments = engine.fragments

    def obstruct() -> Any:
        if world.rank == 1:
            (Path(run_dir) / "checkpoints" / ".writing-step-0000000" / "rank-00001.safetensors").mkdir()
        return fragments()

    engine.fragments = obstruct
    try:
        save_checkpoint(run_dir, engine, CheckpointConfig(), state={}, config_yaml="")
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        engine.close()
    return "", ""


def killed_while_saving(world: Any, *, run_dir: str) -> list[tuple[int, list[str], bool]]:
    """Kill a forked copy of this process at each flush to disk of a second save; return what was left each time.

    One tuple per kill: which flush, the names of complete checkpoints, whether the newest of them is whole.
    """
    engine = _engine(world, 1)
    config = CheckpointConfig(keep=2)
    _train(engine, world, "all", range(1))
    save_checkpoint(run_dir, engine, config, state={}, config_yaml="")
    _train(engine, world, "all", range(1, 2))
    outcomes = []
    for flush_number in range(1, 100):
        child = os.fork()
        if child == 0:
            _kill_at_flush(flush_number)
            save_checkpoint(run_dir, engine, config, state={}, config_yaml="")
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        names = [folder.name for folder in list_checkpoints(run_dir)]
        whole = True
        try:
            read_checkpoint(list_checkpoints(run_dir)[-1]).verify()
        except PretrainError:
            whole = False
        outcomes.append((flush_number, names, whole))
        if status == 0:
            break
    engine.close()
    return outcomes


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
    assert fragment_files.os.fsync is flush


def run_spine(world: Any, *, config: str, overrides: Sequence[str], resume: bool) -> str:  # noqa: ARG001
    """Run the real training program on this rank inside the shared process group; return an error's text or ''."""
    try:
        train(load_config(config, list(overrides)), resume=resume)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
