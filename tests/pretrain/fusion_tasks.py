"""The engine tests of `engine_tasks` with models of other fusions: same cases, same plain torch trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from siblings import load_sibling

from triweave.pretrain.batch import kernel_tables
from triweave.pretrain.fusion.config import FusionConfig

OPEN_GATE = 0.5
"""Gates start open here, else the attention behind them would learn nothing in the first step."""


@contextmanager
def fused(fusion: dict[str, Any]) -> Iterator[ModuleType]:
    """Make engine_tasks build models with a fusion and batches as their loader hands them over."""
    engine = load_sibling("engine_tasks")
    plain = engine.MODEL, engine.build_model, engine.micro_batch
    engine.MODEL = replace(engine.MODEL, fusion=FusionConfig(**fusion))
    tables = kernel_tables(engine.MODEL, torch.device("cpu"), torch.float32)

    def build_model() -> Any:
        model = plain[1]()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gate"):
                    parameter.fill_(OPEN_GATE)
        return model

    def micro_batch(*cell: Any) -> Any:
        batch = plain[2](*cell)
        return replace(batch, extra=tables(batch))

    engine.build_model, engine.micro_batch = build_model, micro_batch
    try:
        yield engine
    finally:
        engine.MODEL, engine.build_model, engine.micro_batch = plain


def train_fused(world: Any, *, fusion: dict[str, Any], **cell: Any) -> dict[str, Any]:
    """Return what engine_tasks.train_case does for a model of this fusion."""
    with fused(fusion) as engine:
        answer: dict[str, Any] = engine.train_case(world, **cell)
        return answer


def train_beside_frozen(world: Any, *, fusion: dict[str, Any], groups: dict[str, Any], zero_stage: int) -> Any:
    """Train three steps with `optimizer.groups`; return the losses, and name -> how far this rank's weights moved."""
    with fused(fusion) as engine_module:
        settings = engine_module.config(zero_stage)
        settings = replace(settings, optimizer=replace(settings.optimizer, groups=groups))
        start = {name: value.detach().flatten() for name, value in engine_module.build_model().named_parameters()}
        engine = engine_module.Engine(engine_module.build_model(), settings, world, accumulation=1)
        cells = [("image_against_audio", step, world.rank, 0) for step in range(3)]
        losses = [engine.train_window([engine_module.micro_batch(*cell)]).loss for cell in cells]
        moved: dict[str, float] = {}
        for fragment in engine.fragments():
            weight = fragment.tensors["weight"].float().cpu()
            before = start[fragment.name][fragment.offset : fragment.offset + weight.numel()]
            moved[fragment.name] = max(moved.get(fragment.name, 0.0), float((weight - before).abs().max()))
        engine.close()
        return losses, moved
