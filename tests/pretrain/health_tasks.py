"""What the health tests run inside rank processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from siblings import load_sibling

from triweave.pretrain.config import load_config
from triweave.pretrain.engine.zero import Engine
from triweave.pretrain.health.settings import HealthConfig
from triweave.pretrain.health.signals import NAN_AT_STEP, poison_if_asked
from triweave.pretrain.train import train

BAD = 2
"""The step (0-based) that is bad."""


def skip_a_step(
    world: Any, *, stage: int, fault: str, precision: str = "fp32", accumulation: int = 1, offload: bool = False
) -> dict[str, Any]:
    """Train five steps; return the verdict on the third one and a snapshot of what came of it all.

    fault: `loss` or `gradient` of rank 1 is not finite, `spike`: rank 1's gradient is a thousand times too large, or
    `left out`: nobody is given the third window at all.
    """
    tasks = load_sibling("engine_tasks")
    limits = HealthConfig(spike_deviations=50.0 if fault == "spike" else 0.0, spike_window=4)
    os.environ[NAN_AT_STEP] = f"{BAD + 1}:1" if fault == "loss" else ""
    engine = Engine(
        tasks.build_model(),
        tasks.config(
            stage,
            precision=precision,
            clip_norm=1.0,
            health=limits,
            deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}} if offload else None,
        ),
        world,
        accumulation=accumulation,
    )
    poison_if_asked(engine)
    results = []
    for step in range(5):
        if fault == "left out" and step == BAD:
            engine.step += 1
            continue
        factor = {"gradient": float("inf"), "spike": 1e3}.get(fault) if step == BAD and world.rank == 1 else None
        hook = None
        if factor is not None:
            weight = engine.model.towers["audio"].project.weight
            hook = weight.register_hook(lambda gradient, factor=factor: gradient * factor)
        window = [tasks.micro_batch("all", step, world.rank, micro) for micro in range(accumulation)]
        results.append(engine.train_window(window))
        if hook is not None:
            hook.remove()
    end = {
        "verdicts": [(result.verdict.action, result.verdict.reason, result.verdict.samples) for result in results],
        "norms": [result.grad_norm for result in results],
        "last": tasks.snapshot(engine),
        "step": engine.step,
    }
    engine.close()
    return end


def run_spine(
    world: Any,  # noqa: ARG001
    *,
    config: str,
    overrides: Sequence[str],
    resume: bool = False,
    bad_steps: str = "",
) -> str:
    """Run the training program on this rank; return an error's text, or 'finished' or 'stopped'."""
    os.environ[NAN_AT_STEP] = bad_steps
    try:
        return "finished" if train(load_config(config, list(overrides)), resume=resume) else "stopped"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
