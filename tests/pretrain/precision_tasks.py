"""What the tests of fp16 run inside rank processes: DeepSpeed's own fp16 engine, told that this CPU has fp16."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from siblings import load_sibling

from triweave.pretrain.engine.loss_scale import LossScaleConfig
from triweave.pretrain.engine.zero import Engine
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.health.settings import HealthConfig


@contextmanager
def cpu_with_fp16() -> Iterator[None]:
    """DeepSpeed asks the processor for fp16 matrix instructions; torch computes without them too, only slower."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        del accelerator.is_fp16_supported


def _engine(world: Any, stage: int, scale: dict[str, Any], *, clip_norm: float = 0.0, **options: Any) -> Engine:
    tasks = load_sibling("engine_tasks")
    torch.manual_seed(0)
    config = tasks.config(
        stage,
        precision="fp16",
        loss_scale=LossScaleConfig(**scale),
        clip_norm=clip_norm,
        lr=1e-4,
        health=HealthConfig(skips=2, skips_in_a_row=5),
        **options,
    )
    return Engine(tasks.build_model(), config, world, accumulation=1)


def _step(engine: Engine, step: int, *, poison: bool = False) -> dict[str, Any]:
    tasks = load_sibling("engine_tasks")
    batch = tasks.micro_batch("nobody_has_audio", step, engine.world.rank, 0)
    if poison and engine.world.rank == 1:
        weights = batch.row_weight.copy()
        weights[0] = float("nan")
        batch = dataclasses.replace(batch, row_weight=weights)
    before = tasks.snapshot(engine)
    result = engine.train_window([batch])
    after = tasks.snapshot(engine)
    return {
        "loss": result.loss,
        "norm": result.grad_norm,
        "scale": result.loss_scale,
        "action": result.verdict.action,
        "reason": result.verdict.reason,
        "samples": result.verdict.samples,
        "unchanged": all((before["pieces"][key] == values).all() for key, values in after["pieces"].items()),
        "snapshot": after,
        "state": engine.loss_scale.state(),
        "judge": engine.judge.state(),
    }


def train(world: Any, *, stage: int, scale: dict[str, Any], steps: int, **options: Any) -> list[dict[str, Any]]:
    """Train in fp16; return what each step did."""
    with cpu_with_fp16():
        engine = _engine(world, stage, scale, **options)
        found = [_step(engine, step) for step in range(steps)]
        engine.close()
    return found


def break_a_loss(world: Any, *, stage: int) -> dict[str, Any]:
    """Train one good step and one whose loss is NaN on rank 1."""
    with cpu_with_fp16():
        engine = _engine(world, stage, {"initial": 1024.0})
        _step(engine, 0)
        broken = _step(engine, 1, poison=True)
        engine.close()
    return broken


def overflow_at_the_least(world: Any, *, stage: int) -> tuple[list[str], str]:
    """Train at a scale that always overflows and may not fall; return the reasons, and the error that ends it."""
    reasons: list[str] = []
    with cpu_with_fp16():
        engine = _engine(world, stage, {"initial": 2.0**24, "least": 2.0**24})
        try:
            reasons.extend(_step(engine, step)["reason"] for step in range(4))
        except PretrainError as error:
            return reasons, f"{type(error).__name__}: {error}"
    return reasons, ""


def run_program(world: Any, **arguments: Any) -> str:
    """Run the whole training program on this rank; return an error's text or ''."""
    with cpu_with_fp16():
        answer: str = load_sibling("checkpoint_tasks").run_spine(world, **arguments)
    return answer
