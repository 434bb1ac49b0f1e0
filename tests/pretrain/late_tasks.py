"""Training with objectives over items inside rank processes, and the plain torch trainer beside it.

Steps and documents are those of objective_tasks: ranks hold pictures or sounds, and no item has both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from siblings import load_sibling

from triweave.data_pipeline.batch import PackedBatch
from triweave.pretrain.batch import OBJECTIVE_ROWS, to_device
from triweave.pretrain.engine.zero import Engine
from triweave.pretrain.fusion.config import FusionConfig
from triweave.pretrain.late.config import LateConfig
from triweave.pretrain.objectives.config import TasksConfig

OBJECTIVES = {"language_model": 1.0, "classification": 0.7, "regression": 0.4}
STEPS = 3


def model_config(operator: str) -> Any:
    """Return the engine tests' model with a classification over items by this operator, and a regression beside it.

    operator: its name; or name/kind with a text encoder of that kind.
    """
    operator, _, text = operator.partition("/")
    late = LateConfig(operator=operator, width=4, rank=2, text_encoder=text or "trunk", text_width=16, text_heads=2)
    made = load_sibling("objective_tasks").model_config(
        {"language_model": 1.0, "classification": OBJECTIVES["classification"]}
    )
    return replace(
        made,
        objectives=OBJECTIVES,
        classification=replace(made.classification, over="items"),
        fusion=FusionConfig(kind="late", late=late),
    )


def train_case(
    world: Any, *, operator: str, zero_stage: int, accumulation: int, from_step: int = 1
) -> dict[str, list[Any]]:
    """Train a few steps, the classification from a step on; return objectives, norms and a snapshot per step."""
    tasks, model = load_sibling("objective_tasks"), model_config(operator)
    schedule = TasksConfig(schedule="curriculum", from_step={"classification": from_step})
    config = tasks.config(model, zero_stage, tasks=schedule if from_step > 1 else TasksConfig())
    engine = Engine(tasks.build_model(model), config, world, accumulation=accumulation)
    answer: dict[str, list[Any]] = {"objectives": [], "norms": [], "snapshots": []}
    for step in range(STEPS):
        result = engine.train_window(
            tasks.window(model, step, rank=world.rank, ranks=world.size, accumulation=accumulation)
        )
        answer["objectives"].append(result.objective)
        answer["norms"].append(result.grad_norm)
        answer["snapshots"].append(load_sibling("engine_tasks").snapshot(engine))
    engine.close()
    return answer


def reference_case(*, operator: str, ranks: int, accumulation: int) -> dict[str, list[Any]]:
    """Train one plain torch process over the same rows; the order of the sums is that of engine_tasks."""
    tasks, settings = load_sibling("objective_tasks"), model_config(operator)
    engine_tasks = load_sibling("engine_tasks")
    model, options = tasks.build_model(settings), tasks.config(settings, 0).optimizer
    decay = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decay, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=options.betas, eps=options.eps)
    answer: dict[str, list[Any]] = {"objectives": [], "norms": [], "states": []}
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * engine_tasks._scheduled(step + 1)
        windows = [
            tasks.window(settings, step, rank=rank, ranks=ranks, accumulation=accumulation) for rank in range(ranks)
        ]
        answer["objectives"].append(_gradients(model, windows))
        answer["norms"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))))
        optimizer.step()
        answer["states"].append(engine_tasks._reference_state(model, optimizer))
    return answer


def _gradients(model: Any, windows: list[list[PackedBatch]]) -> float:
    ranks = len(windows)
    counts = dict.fromkeys(OBJECTIVES, 0.0)
    for batch in (batch for mine in windows for batch in mine):
        counts["language_model"] += float(batch.row_weight.sum())
        for name, rows in batch.extra[OBJECTIVE_ROWS].items():
            counts[name] += len(rows.weights)
    objective, whole = 0.0, {}
    for mine in windows:
        model.zero_grad(set_to_none=True)
        for batch in mine:
            device = to_device(batch, "cpu")
            hidden = model.hidden(device)
            total = sum(
                weight * ranks / counts[name] * model.heads[name](hidden, device).total
                for name, weight in OBJECTIVES.items()
            )
            total.backward()
            objective += float(total.detach()) / ranks
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                part = parameter.grad / ranks
                whole[name] = whole[name] + part if name in whole else part
    for name, parameter in model.named_parameters():
        parameter.grad = whole.get(name)
    return objective
