"""Training with many objectives inside rank processes, and beside it the plain torch trainer that loops over rows.

A step is always the same 12 plan rows, whatever the ranks and the accumulation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from siblings import load_sibling
from torch.nn import functional

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.config import PackingConfig
from triweave.pretrain.batch import OBJECTIVE_ROWS, to_device
from triweave.pretrain.config import RunConfig
from triweave.pretrain.engine.zero import Engine
from triweave.pretrain.model.config import ContrastiveConfig
from triweave.pretrain.model.model import MultimodalTransformer
from triweave.pretrain.objectives.config import (
    ClassificationConfig,
    JointLossConfig,
    MaskedConfig,
    MatchingConfig,
    RegressionConfig,
    TasksConfig,
)
from triweave.pretrain.objectives.rows import ObjectiveStage

ROWS, LENGTH, STEPS, SEED = 12, 112, 3, 5
CLASSES = ["animals", "food", "town"]
ALL = {
    "language_model": 1.0,
    "matching": 0.5,
    "masked_tokens": 0.8,
    "masked_media": 0.3,
    "classification": 0.7,
    "regression": 0.4,
}
THREE = {"language_model": 1.0, "contrastive": 0.7, "classification": 0.5}


def documents(step: int, row: int) -> list[Any]:
    """Return a row's documents: two or three with media, the parts of one of them alone; the last row is empty."""
    if row == ROWS - 1:
        return []
    synthetic, tasks = load_sibling("synthetic"), load_sibling("engine_tasks")
    generator = np.random.default_rng(1000 * step + row)
    found = []
    for number in range(2 + row % 2):
        labels = {"category": CLASSES[(row + number) % 3], "stars": float(row - number)} if number < 2 else {}
        modality = "image" if (row // 6 + number // 2) % 2 == 0 else "audio"
        grid = (1, 1, 2) if modality == "image" else (2, 1, 1)
        media = synthetic.random_media(generator, modality, tasks.FEATURES[modality])
        values = np.resize(media.values, (2, tasks.FEATURES[modality]))
        parts = [[int(token) for token in generator.integers(16, 64, 4)],
                 synthetic.Media(modality=modality, grid=grid, values=values)]  # fmt: skip
        found.append(synthetic.Document(parts=parts, labels=labels))
        if number == 0 or row % 3 == 0:
            found.append(synthetic.Document(parts=parts, alone=True, labels=labels))
    return found


def window(model: Any, step: int, *, rank: int, ranks: int, accumulation: int) -> list[PackedBatch]:
    """Return a rank's micro-batches with their tables: its part of the rows in order, cut evenly."""
    size = ROWS // (ranks * accumulation)
    starts = [(rank * accumulation + micro) * size for micro in range(accumulation)]
    stage = ObjectiveStage(model=model, seed=SEED)
    return [
        stage.prepare(load_sibling("synthetic").pack(
            [documents(step, row) for row in range(start, start + size)], LENGTH,
            first_plan_row=ROWS * step + start, group_rows=6,
        ))
        for start in starts
    ]  # fmt: skip


def model_config(objectives: dict[str, float], weighting: str = "fixed", **options: Any) -> Any:
    """Return the engine tests' model with these objectives."""
    return replace(
        load_sibling("engine_tasks").MODEL,
        objectives=objectives,
        contrastive=ContrastiveConfig(width=16),
        matching=MatchingConfig(exchanged=0.4),
        masked=MaskedConfig(items=0.6, tokens=0.4),
        classification=ClassificationConfig(label="category", classes=CLASSES, **options),
        regression=RegressionConfig(label="stars", centre=4.0, scale=3.0),
        joint_loss=JointLossConfig(weighting=weighting, window_steps=1),
    )


def config(model: Any, zero_stage: int, *, tasks: TasksConfig = TasksConfig(), **options: Any) -> RunConfig:  # noqa: B008
    """Return the engine tests' run config with these objectives."""
    made = load_sibling("engine_tasks").config(zero_stage, **options)
    packing = PackingConfig(contrastive_group_rows=6, contrastive_share=1.0)
    return replace(
        made,
        model=model,
        tasks=tasks,
        data=replace(made.data, packing=packing, labels=["category", "stars"], seed=SEED),
        train=replace(made.train, global_batch_rows=ROWS),
    )


def build_model(model: Any) -> MultimodalTransformer:
    """Return the tiny model with its heads."""
    return MultimodalTransformer(
        model, vocab_size=load_sibling("synthetic").VOCAB_SIZE, media_features=load_sibling("engine_tasks").FEATURES,
        seed=3,
    )  # fmt: skip


def train_case(world: Any, *, weighting: str, zero_stage: int, accumulation: int) -> dict[str, list[Any]]:
    """Train a few steps with all objectives; return figures, objectives, norms and a snapshot per step."""
    model = model_config(ALL, weighting)
    engine = Engine(build_model(model), config(model, zero_stage), world, accumulation=accumulation)
    answer: dict[str, list[Any]] = {"tasks": [], "objectives": [], "norms": [], "snapshots": []}
    for step in range(STEPS):
        result = engine.train_window(window(model, step, rank=world.rank, ranks=world.size, accumulation=accumulation))
        answer["tasks"].append({name: (figure.loss, figure.count) for name, figure in result.tasks.items()})
        answer["objectives"].append(result.objective)
        answer["norms"].append(result.grad_norm)
        answer["snapshots"].append(load_sibling("engine_tasks").snapshot(engine))
    engine.close()
    return answer


def naive_losses(model: Any, batch: PackedBatch) -> dict[str, torch.Tensor]:
    """Return objective -> sum over the batch's rows, one by one; in double, where their order does not matter."""
    device = to_device(batch, "cpu")
    hidden = model.hidden(device).flatten(0, 1).double()
    sums = {name: hidden.sum() * 0 for name in ALL}
    doubled = {name: parameter.double() for name, parameter in model.heads.named_parameters()}
    z_loss = model.heads["language_model"].z_loss
    for place, target, weight in zip(batch.row_index, batch.targets, batch.row_weight, strict=True):
        logits = doubled["language_model.weight"] @ hidden[place]
        log_partition = logits.logsumexp(0)
        sums["language_model"] = sums["language_model"] + float(weight) * (
            log_partition - logits[target] + z_loss * log_partition**2
        )
    for name, rows in batch.extra[OBJECTIVE_ROWS].items():
        objective, _, modality = name.partition("/")
        start = 0
        for number, length in enumerate(rows.lengths):
            state = hidden[rows.index[start : start + length]].mean(0)
            start += length
            target = rows.targets[number]
            sums[objective] = sums[objective] + _naive(doubled, objective, state, target, modality)
    return sums


def _naive(weights: Any, objective: str, state: torch.Tensor, target: Any, modality: str) -> torch.Tensor:
    def of(name: str) -> torch.Tensor:
        found: torch.Tensor = weights[f"{objective}.{name}"]
        return found

    if objective == "masked_tokens":
        logits = of("weight") @ functional.gelu(of("transform") @ state)
        return -logits.log_softmax(0)[int(target)]
    if objective == "masked_media":
        guess = of(f"weight_{modality}") @ state + of(f"offset_{modality}")
        return ((guess - torch.from_numpy(target)) ** 2).mean()
    output = of("weight") @ state + of("bias")
    if objective == "classification":
        return -output.log_softmax(0)[int(target)]
    if objective == "regression":
        return (output[0] - float(target)) ** 2 / 2
    return -functional.logsigmoid(output[0] if target else -output[0])


def reference_case(*, weighting: str, ranks: int, accumulation: int) -> dict[str, list[Any]]:
    """Train one plain torch process; the order of the sums is that of engine_tasks.reference_case."""
    tasks = load_sibling("engine_tasks")
    settings = model_config(ALL, weighting)
    model = build_model(settings)
    options = config(settings, 0).optimizer
    decay = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decay, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=options.betas, eps=options.eps)
    answer: dict[str, list[Any]] = {"tasks": [], "objectives": [], "norms": [], "states": []}
    history: list[dict[str, float]] = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * tasks._scheduled(step + 1)
        mine = [window(settings, step, rank=rank, ranks=ranks, accumulation=accumulation) for rank in range(ranks)]
        factors = _loss_rates(history) if weighting == "loss_rate" else dict.fromkeys(ALL, 1.0)
        weights = {name: ALL[name] * factors[name] for name in ALL}
        means, counts, objective = _reference_gradients(model, mine, weights, learnt=weighting == "uncertainty")
        history.append(means)
        answer["tasks"].append({name: (means[name], counts[name]) for name in ALL})
        answer["objectives"].append(objective)
        answer["norms"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))))
        optimizer.step()
        answer["states"].append(tasks._reference_state(model, optimizer))
    return answer


def _loss_rates(history: list[dict[str, float]]) -> dict[str, float]:
    """Dynamic weight averaging over windows of one step, written out anew: 1 until there are two of them."""
    if len(history) < 2:
        return dict.fromkeys(ALL, 1.0)
    powers = {name: np.exp(history[-1][name] / history[-2][name] / 2.0) for name in ALL}
    return {name: len(ALL) * power / sum(powers.values()) for name, power in powers.items()}


def _reference_gradients(
    model: Any, windows: list[list[PackedBatch]], weights: dict[str, float], *, learnt: bool
) -> tuple[dict[str, float], dict[str, float], float]:
    ranks, batches = len(windows), [batch for mine in windows for batch in mine]
    counts = dict.fromkeys(ALL, 0.0)
    for batch in batches:
        counts["language_model"] += float(batch.row_weight.astype(np.float64).sum())
        for name, rows in batch.extra[OBJECTIVE_ROWS].items():
            counts[name.split("/")[0]] += len(rows.weights)
    means = dict.fromkeys(ALL, 0.0)
    objective, whole = 0.0, {}
    for rank, mine in enumerate(windows):
        model.zero_grad(set_to_none=True)
        for micro, batch in enumerate(mine):
            sums = naive_losses(model, batch)
            spreads = model.joint_loss.log_variances if learnt else torch.zeros(len(ALL))
            total = sum(
                weights[name] * ranks / counts[name] * torch.exp(-spread) * sums[name]
                for name, spread in zip(ALL, spreads, strict=True)
            )
            if (rank, micro) == (0, 0):
                total = total + ranks * sum(weights[name] * s for name, s in zip(ALL, spreads, strict=True))
            total.backward()
            objective += float(total.detach()) / ranks
            for name in ALL:
                means[name] += float(sums[name].detach()) / counts[name]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                part = parameter.grad / ranks
                whole[name] = whole[name] + part if name in whole else part
    for name, parameter in model.named_parameters():
        parameter.grad = whole.get(name)
    return means, counts, objective
