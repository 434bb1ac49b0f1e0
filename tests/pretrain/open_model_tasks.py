"""What the tests of open models run inside rank processes: freezing, rates by group, and training from a folder."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from siblings import load_sibling

from triweave.pretrain.engine.optimizer import GroupConfig
from triweave.pretrain.engine.zero import Engine


def groups_config(zero_stage: int, groups: dict[str, GroupConfig]) -> Any:
    """Return the engine tests' config with `optimizer.groups`."""
    config = load_sibling("engine_tasks").config(zero_stage)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, groups=groups))


def train_groups(
    world: Any, *, zero_stage: int, accumulation: int, groups: dict[str, GroupConfig], case: str, steps: int
) -> dict[str, Any]:
    """Train a few steps with groups; return losses and a snapshot at the end."""
    tasks = load_sibling("engine_tasks")
    torch.manual_seed(0)
    engine = Engine(tasks.build_model(), groups_config(zero_stage, groups), world, accumulation=accumulation)
    losses = []
    for step in range(steps):
        window = [tasks.micro_batch(case, step, world.rank, micro) for micro in range(accumulation)]
        losses.append(engine.train_window(window).loss)
    taken = tasks.snapshot(engine)
    engine.close()
    return {"losses": losses, "snapshot": taken}


def reference_groups(
    *, ranks: int, accumulation: int, groups: dict[str, GroupConfig], case: str, steps: int
) -> dict[str, Any]:
    """Train one plain torch process on the same windows, each parameter with its own rate and decay or not at all."""
    tasks = load_sibling("engine_tasks")
    model, settings = tasks.build_model(), groups_config(0, groups).optimizer
    trained = []
    for name, parameter in model.named_parameters():
        fitting = [prefix for prefix in groups if name.startswith(f"{prefix}.")]
        group = groups[max(fitting, key=len)] if fitting else GroupConfig()
        if group.frozen:
            parameter.requires_grad_(requires_grad=False)
            continue
        decay = settings.weight_decay if group.weight_decay is None else group.weight_decay
        rate = settings.lr if group.lr is None else group.lr
        trained.append({"params": [parameter], "peak": rate, "weight_decay": decay if parameter.ndim > 1 else 0.0})
    optimizer = torch.optim.AdamW(trained, betas=settings.betas, eps=settings.eps)
    losses = []
    for step in range(steps):
        for entry in optimizer.param_groups:
            entry["lr"] = entry["peak"] * tasks._scheduled(step + 1)
        losses.append(_gradients(tasks, model, case, step, ranks, accumulation))
        optimizer.step()
    weights = {name: parameter.detach().flatten().numpy().copy() for name, parameter in model.named_parameters()}
    return {"losses": losses, "weights": weights}


def _gradients(tasks: Any, model: torch.nn.Module, case: str, step: int, ranks: int, accumulation: int) -> float:
    """As engine_tasks' reference, but a micro-batch that trains nothing has no backward."""
    batches = [[tasks.micro_batch(case, step, rank, micro) for micro in range(accumulation)] for rank in range(ranks)]
    weight = sum(float(batch.row_weight.astype(np.float64).sum()) for mine in batches for batch in mine)
    loss = 0.0
    model.zero_grad(set_to_none=True)
    for mine in batches:
        for batch in mine:
            total = model(tasks.to_device(batch, "cpu")).total
            loss += float(total.detach()) / weight
            if total.requires_grad:
                (total / weight).backward()
    return loss
