"""Faulty models and data for the participation tests, run inside rank processes."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from triweave.pretrain.batch import DeviceBatch
from triweave.pretrain.losses import LossSums
from triweave.pretrain.model import MultimodalTransformer
from triweave.pretrain.participation import announce
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


class Disobedient(MultimodalTransformer):
    """On rank 1, at its third forward, does one thing that it has not announced."""

    fault = ""
    calls = 0

    def forward(self, batch: DeviceBatch, guards: Any = frozenset(), only: Any = None) -> LossSums:
        assert only is None
        self.calls += 1
        if self.calls != 3:
            return super().forward(batch, guards)
        if self.fault == "forgets a guard":
            return super().forward(batch, frozenset())
        if self.fault == "calls a tower twice":
            self.towers["image"](*self.towers["image"].zero_payload(torch.device("cpu")))
        if self.fault == "calls an absent tower":
            return super().forward(batch, frozenset({*guards, "audio"}))
        if self.fault == "uses a weight past its tower":
            sums = super().forward(batch, guards)
            return sums._replace(total=sums.total + self.towers["audio"].project.bias.sum())
        if self.fault == "drops a tower's output":
            self.towers["image"](*self.towers["image"].zero_payload(torch.device("cpu")))
            return super().forward(dataclasses.replace(batch, payloads={}), frozenset())
        return super().forward(batch, guards)


def disobey(world: Any, *, stage: int, fault: str) -> tuple[int, str, float]:
    """Train until the fault; return (steps that were taken, the error on this rank, seconds the faulty step took)."""
    tasks = _engine_tasks()
    model = tasks.build_model()
    model.__class__ = Disobedient
    model.fault = fault if world.rank == 1 else ""
    engine = Engine(model, tasks.config(stage), world, accumulation=1)
    for step in range(5):
        started = time.perf_counter()
        rows = [("image",), ()] if world.rank == 0 or fault != "forgets a guard" else [(), ()]
        try:
            engine.train_window([_batch(rows, seed=step)])
        except Exception as error:
            return engine.step, f"{type(error).__name__}: {error}", time.perf_counter() - started
    return engine.step, "", 0.0


def disobey_and_leave(world: Any, *, stage: int, fault: str, note: str) -> tuple[int, str, float]:
    """Do as `disobey`; the rank at fault writes its error to a file and ends, as the program would."""
    answer = disobey(world, stage=stage, fault=fault)
    if world.rank == 1:
        Path(note).write_text(answer[1])
        os._exit(2)
    return answer


def announced(world: Any) -> dict[str, Any]:
    """Announce two micro-batches that differ by rank; return what every rank then knows."""
    contents = [[[("image",), ()], [(), ()]], [[(), ()], [("image",), ()]]][world.rank]
    batches = [_batch(rows, seed=7 * world.rank + index) for index, rows in enumerate(contents)]
    if world.rank == 1:
        batches[1] = _with_segments(batches[1])
    window = announce(world, ("image", "audio"), batches, data_wait_s=1.5 * world.rank)
    return {
        "guards": [sorted(window.guards(world.rank, index)) for index in range(2)],
        "held": [sorted(window.held(world.rank, index)) for index in range(2)],
        "absent": sorted(window.absent),
        "segments": window.segments.tolist(),
        "weights": window.weights.tolist(),
        "tokens": window.tokens,
        "data_wait_s": window.data_wait_s,
        "mine": (
            sum(float(batch.row_weight.sum()) for batch in batches),
            sum(int((batch.modality_ids >= 0).sum()) for batch in batches),
        ),
    }


def _with_segments(batch: Any) -> Any:
    """Return a batch with the same payload names and three segments that take part among five."""
    synthetic = _engine_tasks()._load_sibling("synthetic")
    item = synthetic.Document(parts=[[20], [21]], alone=True)
    single, filler = synthetic.Document(parts=[[20]], alone=True), synthetic.with_weight([item], 0.0)[0]
    return dataclasses.replace(synthetic.pack([[item, filler], [single]], 48), payloads=batch.payloads)


def unknown_modality(world: Any) -> str:
    """Rank 1 holds a modality without a tower; return this rank's error."""
    try:
        announce(world, ("image",), [_batch([("audio",) if world.rank == 1 else (), ()], seed=1)])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def not_finite(world: Any, *, stage: int, where: str) -> tuple[int, str]:
    """Poison rank 1's third step; return (steps that were taken, the error on this rank)."""
    tasks = _engine_tasks()
    engine = Engine(tasks.build_model(), tasks.config(stage), world, accumulation=1)
    for step in range(5):
        batch = _batch([("audio",), ("image",)], seed=step)
        if step == 2 and world.rank == 1:
            if where == "loss":
                batch.payloads["audio"].values[:] = float("nan")
            else:
                engine.model.towers["audio"].project.weight.register_hook(lambda gradient: gradient * float("inf"))
        try:
            engine.train_window([batch])
        except Exception as error:
            return engine.step, f"{type(error).__name__}: {error}"
    return engine.step, ""


def _batch(rows: Any, *, seed: int) -> Any:
    tasks = _engine_tasks()
    return tasks._load_sibling("synthetic").make_batch(rows, length=48, seed=seed, features=tasks.FEATURES)
