"""Faulty models and data for the participation tests, run inside rank processes."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from siblings import load_sibling

from triweave.pretrain.batch import DeviceBatch
from triweave.pretrain.engine.participation import announce
from triweave.pretrain.engine.work import Work
from triweave.pretrain.engine.world import AGREED, open_world
from triweave.pretrain.engine.zero import Engine
from triweave.pretrain.model.model import MultimodalTransformer
from triweave.pretrain.objectives.losses import LossSums


class Disobedient(MultimodalTransformer):
    """At its third forward does one thing that its rank has not announced; `target` is the tower it does it to."""

    fault = ""
    target = ""
    calls = 0

    def forward(self, batch: DeviceBatch, guards: Any = frozenset(), *others: Any) -> LossSums:
        self.calls += 1
        if self.calls != 3 or not self.fault:
            return super().forward(batch, guards, *others)
        tower, device = self.towers[self.target], torch.device("cpu")
        payloads = {name: payload for name, payload in batch.payloads.items() if name != self.target}
        without = dataclasses.replace(batch, payloads=payloads)
        if self.fault == "forgets a tower":
            return super().forward(without, guards - {self.target}, *others)
        if self.fault == "calls a tower early":
            tower(*tower.zero_payload(device))
        if self.fault == "calls a tower twice":
            hook = tower.register_forward_hook(lambda module, arguments, output: (hook.remove(), module(*arguments))[1])  # noqa: ARG005
        if self.fault == "calls an absent tower":
            return super().forward(batch, frozenset({*guards, self.target}), *others)
        if self.fault == "uses a weight past its tower":
            sums = super().forward(batch, guards, *others)
            return sums._replace(total=sums.total + tower.project.bias.sum())
        if self.fault == "drops a tower's output":
            hook = tower.register_forward_hook(lambda module, arguments, output: output.detach())  # noqa: ARG005
            sums = super().forward(batch, guards, *others)
            hook.remove()
            return sums
        return super().forward(batch, guards, *others)


def disobey(
    world: Any,
    *,
    stage: int,
    fault: str,
    tower: str,
    case: str,
    guilty: int = 1,
    run_dir: str = "unused",
    compile: bool = False,
    sequence_parallel: int = 1,
) -> tuple[int, str, float]:
    """Train on a case of engine_tasks until a rank's third forward, which breaks the contract.

    Every parameter is gathered where it is used at stage 3. Return (steps that were taken, the error on this rank,
    seconds the faulty step took).
    """
    tasks = load_sibling("engine_tasks")
    model = tasks.build_model()
    model.__class__ = Disobedient
    model.fault, model.target = fault if world.rank == guilty else "", tower
    gathered = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else None
    train = {"compile": compile, "sequence_parallel": sequence_parallel}
    config = replace(tasks.config(stage, deepspeed=gathered, **train), run_dir=run_dir)
    engine = Engine(model, config, world, accumulation=1)
    for step in range(5):
        started = time.perf_counter()
        try:
            engine.train_window([tasks.micro_batch(case, step, world.rank // sequence_parallel, 0)])
        except Exception as error:
            shared = " (all ranks)" if AGREED in getattr(error, "__notes__", ()) else ""
            return engine.step, f"{type(error).__name__}: {error}{shared}", time.perf_counter() - started
    return engine.step, "", 0.0


def disobey_and_leave(*, rank: int, ranks: int, port: int, folder: str, **arguments: Any) -> None:
    """Be one rank of a world of its own: write what `disobey` returns to a file and end, as the program would."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    answer = disobey(open_world("cpu", torch_threads=1), run_dir=folder, **arguments)
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(answer))
    os._exit(2)


def announced(world: Any) -> dict[str, Any]:
    """Announce two micro-batches that differ by rank; return what every rank then knows."""
    contents = [[[("image",), ()], [(), ()]], [[(), ()], [("image",), ()]]][world.rank]
    batches = [_batch(rows, seed=7 * world.rank + index) for index, rows in enumerate(contents)]
    if world.rank == 1:
        batches[1] = _with_segments(batches[1])
    counted = [np.bincount(batch.modality_ids[batch.modality_ids >= 0], minlength=8) for batch in batches]
    work = Work(flops=1.0 + world.rank, tokens=np.sum(counted, axis=0).astype(float))
    window = announce(world, ("image", "audio"), batches, step=1, data_wait_s=1.5 * world.rank, work=work)
    return {
        "guards": [sorted(window.guards(world.rank, index)) for index in range(2)],
        "held": [sorted(window.held(world.rank, index)) for index in range(2)],
        "absent": sorted(window.absent),
        "segments": window.segments.tolist(),
        "weights": window.weights.tolist(),
        "tokens": window.tokens,
        "rank_imbalance": window.rank_imbalance,
        "data_wait_s": window.data_wait_s,
        "mine": (
            sum(float(batch.row_weight.sum()) for batch in batches),
            sum(int((batch.modality_ids >= 0).sum()) for batch in batches),
        ),
    }


def _with_segments(batch: Any) -> Any:
    """Return a batch with the same payload names and three segments that take part among five."""
    synthetic = load_sibling("synthetic")
    item = synthetic.Document(parts=[[20], [21]], alone=True)
    single, filler = synthetic.Document(parts=[[20]], alone=True), synthetic.with_weight([item], 0.0)[0]
    return dataclasses.replace(synthetic.pack([[item, filler], [single]], 48), payloads=batch.payloads)


def unknown_modality(world: Any) -> str:
    """Rank 1 holds a modality without a tower; return this rank's error."""
    try:
        announce(world, ("image",), [_batch([("audio",) if world.rank == 1 else (), ()], seed=1)], step=7)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def misaligned(world: Any, *, stage: int) -> list[str]:
    """With absent_modality=align: a step all ranks hold alike, one nobody holds audio in, one rank 1 lacks image in."""
    tasks = load_sibling("engine_tasks")
    engine = Engine(tasks.build_model(), tasks.config(stage, absent_modality="align"), world, accumulation=1)
    said = []
    for step, rows in enumerate(
        [[("image", "audio"), ()], [("image",), ()], [("image",) if world.rank == 0 else (), ()]]
    ):
        try:
            engine.train_window([_batch(rows, seed=step)])
            said.append("")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def not_finite(world: Any, *, stage: int, where: str) -> tuple[int, str]:
    """Poison rank 1's third step; return (steps that were taken, the error on this rank)."""
    tasks = load_sibling("engine_tasks")
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
    tasks = load_sibling("engine_tasks")
    return load_sibling("synthetic").make_batch(rows, length=48, seed=seed, features=tasks.FEATURES)


if __name__ == "__main__":  # run by a fork server, which hands the arguments over as a global
    disobey_and_leave(**globals()["JOB"])
