"""What the engine tests run inside rank processes, and the plain torch trainer they are compared with."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from siblings import load_sibling

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.pretrain.batch import to_device
from triweave.pretrain.config import RunConfig
from triweave.pretrain.engine.config import TrainConfig
from triweave.pretrain.engine.optimizer import OptimizerConfig
from triweave.pretrain.engine.schedule import ScheduleConfig
from triweave.pretrain.engine.zero import Engine
from triweave.pretrain.health.settings import HealthConfig
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.model import MultimodalTransformer

FEATURES = {"image": 12, "audio": 12}
"""Towers of equal size: mixed-up reductions then go unnoticed unless their values are compared."""
MODEL = ModelConfig(d_model=32, layers=2, heads=2, kv_heads=1, head_width=16, ffn_multiple=1.0, attention="reference")
STEPS = 5
ABSENT_FROM = 2
"""First step (0-based) in which nobody holds audio, in the case of that name."""

GOLDEN_CASE: dict[str, Any] = {"case": "image_against_audio", "ranks": 2, "accumulation": 1}
GOLDEN_STEPS = 50

Parameters = dict[str, np.ndarray]


def _all(step: int, rank: int, micro: int) -> list[tuple[str, ...]]:  # noqa: ARG001
    return [("image", "audio"), ("audio", "image")]


def _image_against_audio(step: int, rank: int, micro: int) -> list[tuple[str, ...]]:  # noqa: ARG001
    return [("image",), ("image",)] if (rank + micro) % 2 == 0 else [("audio",), ()]


def _text_only_ranks(step: int, rank: int, micro: int) -> list[tuple[str, ...]]:
    return [("image",), ("audio",)] if (rank + micro + step) % 2 == 0 else [(), ()]


def _nobody_has_audio(step: int, rank: int, micro: int) -> list[tuple[str, ...]]:
    if step < ABSENT_FROM:
        return _all(step, rank, micro)
    return [("image",), ()] if rank == 0 else [(), ()]


def _text_only(step: int, rank: int, micro: int) -> list[tuple[str, ...]]:  # noqa: ARG001
    return [(), ()]


CASES: dict[str, Callable[[int, int, int], list[tuple[str, ...]]]] = {
    "all": _all,
    "image_against_audio": _image_against_audio,
    "text_only_ranks": _text_only_ranks,
    "text_only": _text_only,
    "nobody_has_audio": _nobody_has_audio,
}
"""What each rank holds, of modalities: all; media on one rank of two, in turns; one modality each; none; one only."""


def micro_batch(case: str, step: int, rank: int, micro: int) -> PackedBatch:
    """Return one synthetic micro-batch of a case."""
    rows = CASES[case](step, rank, micro)
    batch: PackedBatch = load_sibling("synthetic").make_batch(
        rows, length=48, seed=1000 * step + 10 * rank + micro, features=FEATURES
    )
    return batch


def config(
    zero_stage: int,
    *,
    precision: str = "fp32",
    clip_norm: float = 0.0,
    eps: float = 1e-5,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.95),
    health: HealthConfig | None = None,
    deepspeed: dict[str, Any] | None = None,
    **train: Any,
) -> RunConfig:
    """Return the run config of an engine test; optimizer settings as in training.md. train: more of that section."""
    return RunConfig(
        run_dir="unused",
        data=DataConfig(sources=[SourceConfig(name="none", shards="none")], tokenizer="none"),
        model=MODEL,
        optimizer=OptimizerConfig(lr=lr, eps=eps, clip_norm=clip_norm, betas=betas),
        schedule=ScheduleConfig(warmup_steps=2, total_steps=10),
        train=TrainConfig(
            steps=10, global_batch_rows=4, micro_batch_rows=2, zero_stage=zero_stage, precision=precision, device="cpu",
            **train,
        ),
        health=health or HealthConfig(bad_step="stop"),
        deepspeed=deepspeed or {},
    )  # fmt: skip


def build_model() -> MultimodalTransformer:
    """Return the tiny model every engine test starts from."""
    return MultimodalTransformer(
        MODEL, vocab_size=load_sibling("synthetic").VOCAB_SIZE, media_features=FEATURES, seed=3
    )


def snapshot(engine: Engine) -> dict[str, Any]:
    """Return copies of this rank's fragments: (name, kind, offset) -> values, and name -> steps."""
    pieces, steps = {}, {}
    for fragment in engine.fragments():
        for kind, values in fragment.tensors.items():
            pieces[fragment.name, kind, fragment.offset] = values.to("cpu", torch.float32, copy=True).numpy()
        steps[fragment.name] = float(fragment.steps) if fragment.steps is not None else 0.0
    return {"pieces": pieces, "steps": steps}


def train_case(world: Any, *, case: str, zero_stage: int, accumulation: int, steps: int = STEPS,
               **options: Any) -> dict[str, Any]:  # fmt: skip
    """Train a few steps; return losses, gradient norms and a snapshot per step."""
    torch.manual_seed(0)
    engine = Engine(build_model(), config(zero_stage, **options), world, accumulation=accumulation)
    losses, norms, snapshots = [], [], []
    for step in range(steps):
        window = [micro_batch(case, step, world.rank, micro) for micro in range(accumulation)]
        result = engine.train_window(window)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        snapshots.append(snapshot(engine))
    engine.close()
    return {"losses": losses, "norms": norms, "snapshots": snapshots}


def assemble(
    snapshots: Sequence[dict[str, Any]], model: MultimodalTransformer | None = None
) -> tuple[dict[str, Parameters], dict[str, float]]:
    """Return kind -> name -> flat array from all ranks' fragments, every element of every parameter covered."""
    shapes = {name: parameter.numel() for name, parameter in (model or build_model()).named_parameters()}
    whole = {kind: {name: np.full(numel, np.nan, np.float32) for name, numel in shapes.items()}
             for kind in ("weight", "exp_avg", "exp_avg_sq")}  # fmt: skip
    steps: dict[str, float] = {}
    for taken in snapshots:
        for (name, kind, offset), values in taken["pieces"].items():
            whole[kind][name][offset : offset + len(values)] = values
        for name, count in taken["steps"].items():
            assert steps.setdefault(name, count) == count, name
    assert not any(np.isnan(values).any() for parameters in whole.values() for values in parameters.values())
    return whole, steps


def reference_case(
    *,
    case: str,
    ranks: int,
    accumulation: int,
    steps: int = STEPS,
    clip_norm: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    absent_modality: str = "skip",
    loss_norm: str = "global_tokens",
) -> dict[str, Any]:
    """Train one plain torch process over the same global batches: no DeepSpeed, nothing of the engine.

    A parameter without gradient is left alone by AdamW, which is what an absent tower must look like; where absent
    towers are guarded instead, their gradient is 0. The mean is taken
    as (ranks / weight) x sums, averaged over ranks: any other order of the same arithmetic changes last bits, which
    sums with cancellation (the gradients of the query and key norms) amplify to 1.4e-6 of their largest element.
    """
    model = build_model()
    settings = config(0).optimizer
    decay, plain = [], []
    for parameter in model.parameters():
        (decay if parameter.ndim > 1 else plain).append(parameter)
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=settings.eps)
    losses, norms, states = [], [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _scheduled(step + 1)
        losses.append(_reference_gradients(model, case, step, ranks, accumulation, loss_norm))
        if absent_modality == "guard":
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm or float("inf"))))
        optimizer.step()
        states.append(_reference_state(model, optimizer))
    return {"losses": losses, "norms": norms, "states": states}


def _scheduled(step: int) -> float:
    """Two steps of warm-up, half a cosine to a tenth at step 10 and behind it, written out anew."""
    return step / 2 if step <= 2 else 0.1 + 0.9 * (1 + float(np.cos(np.pi * (min(step, 10) - 2) / 8))) / 2


def _reference_weights(batch: PackedBatch, loss_norm: str) -> PackedBatch:
    """Return the batch with the weights of a loss norm, token by token."""
    length = batch.tokens.shape[1]
    documents = [(int(i) // length, int(batch.document_ids.flat[i])) for i in batch.row_index]
    counts, whole = Counter(documents), float(batch.row_weight.astype(np.float64).sum())
    divisor = {
        "global_tokens": lambda document: 1.0,  # noqa: ARG005
        "global_square_root": lambda document: counts[document] ** 0.5,
        "global_documents": lambda document: float(counts[document]),
        "micro_batch_tokens": lambda document: whole,  # noqa: ARG005
    }[loss_norm]
    weights = [float(weight) / divisor(key) for weight, key in zip(batch.row_weight, documents, strict=True)]
    return dataclasses.replace(batch, row_weight=np.array(weights, np.float32))


def _reference_gradients(
    model: torch.nn.Module, case: str, step: int, ranks: int, accumulation: int, loss_norm: str
) -> float:
    batches = [
        [_reference_weights(micro_batch(case, step, rank, micro), loss_norm) for micro in range(accumulation)]
        for rank in range(ranks)
    ]
    weight = sum(float(batch.row_weight.astype(np.float64).sum()) for mine in batches for batch in mine)
    loss = 0.0
    whole: dict[str, torch.Tensor] = {}
    for mine in batches:
        model.zero_grad(set_to_none=True)
        for batch in mine:
            total = model(to_device(batch, "cpu")).total
            (total * (ranks / weight)).backward()
            loss += float(total.detach()) / weight
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                part = parameter.grad / ranks
                whole[name] = whole[name] + part if name in whole else part
    for name, parameter in model.named_parameters():
        parameter.grad = whole.get(name)
    return loss


def _reference_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    whole: dict[str, Parameters] = {"weight": {}, "exp_avg": {}, "exp_avg_sq": {}}
    steps = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        steps[name] = float(state["step"]) if state else 0.0
        whole["weight"][name] = parameter.detach().flatten().numpy().copy()
        for kind in ("exp_avg", "exp_avg_sq"):
            moment = state[kind] if state else torch.zeros_like(parameter)
            whole[kind][name] = moment.flatten().numpy().copy()
    return {"whole": whole, "steps": steps}


if __name__ == "__main__":
    torch.set_num_threads(1)
    losses = reference_case(steps=GOLDEN_STEPS, **GOLDEN_CASE)["losses"]
    Path(__file__).with_name("golden_losses.json").write_text(json.dumps(losses, indent=0) + "\n")
