"""Train one contender on the task and ask it about what is held out: one process, the same budget for all.

    loss = cross-entropy of the category + InfoNCE between queries and captions of the batch, per pair

AdamW with warm-up and half a cosine, the same settings for every fusion, none of them tuned per fusion. Pairs of
different documents that share a text or a concept are no negatives, as in `pretrain.contrastive`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from triweave.data_pipeline.shards.schema import TEXT
from triweave.pretrain.bench.fusion.model import Contender, FusionModel, InputMaker
from triweave.pretrain.bench.fusion.task import FusionTask, RememberingDecoder
from triweave.pretrain.engine.optimizer import OptimizerConfig, build_adamw, group_parameters
from triweave.pretrain.engine.schedule import ScheduleConfig, learning_rate_factor
from triweave.pretrain.evaluation.documents import EvaluationDocument, keyed_hash
from triweave.pretrain.evaluation.metrics import Ranks, best_ranks
from triweave.pretrain.objectives.contrastive import SegmentTable, contrastive_sums, pair_blocks

EVALUATION_DOCUMENTS = 64
OPTIMIZER = OptimizerConfig(lr=3e-3, weight_decay=0.1, clip_norm=1.0)
WARMUP_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every contender gets: optimizer steps, and documents of one step."""

    steps: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one trained contender said about the held-out documents.

    right: [n] 1 where the category was right. ranks: [q] of the right caption of every query, pool by pool; None for a
    contender that asks for nothing. parameters: trainable ones that the task reaches. losses: the first and last
    tenth's mean. cpu_s: processor seconds of training and asking, decoding of media not seen before included.
    """

    right: npt.NDArray[np.float64]
    ranks: Ranks | None
    parameters: int
    losses: tuple[float, float]
    cpu_s: float

    def save(self, path: Path) -> None:
        """Write the answers, atomically."""
        temporary = path.with_suffix(".tmp.npz")
        given = dataclasses.asdict(self)
        given["ranks"] = np.empty(0, np.int64) if self.ranks is None else self.ranks
        np.savez(temporary, **given)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Answers:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(
                right=stored["right"],
                ranks=stored["ranks"] if len(stored["ranks"]) else None,
                parameters=int(stored["parameters"]),
                losses=(float(stored["losses"][0]), float(stored["losses"][1])),
                cpu_s=float(stored["cpu_s"]),
            )


def train_and_ask(
    contender: Contender, task: FusionTask, decode: RememberingDecoder, budget: Budget, *, seed: int
) -> Answers:
    """Return the answers of a contender trained from the seed; deterministic on one machine with one thread."""
    started = time.process_time()
    model = FusionModel(contender, vocab_size=task.tokenizer.vocab_size, classes=len(task.categories), seed=seed)
    optimizer = build_adamw(group_parameters(model.named_parameters(), OPTIMIZER), OPTIMIZER)
    schedule = ScheduleConfig(warmup_steps=min(WARMUP_STEPS, budget.steps))
    make = InputMaker(contender, task, decode)
    losses = []
    for step, documents in enumerate(task.batches(budget.batch, steps=budget.steps, seed=seed), start=1):
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER.lr * learning_rate_factor(schedule, step, budget.steps)
        loss = _loss(model, make, task, documents)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    reached = sum(parameter.numel() for parameter in model.parameters() if parameter.grad is not None)
    tenth = max(1, len(losses) // 10)
    right, ranks = _ask(model, make, task, seed=seed)
    return Answers(
        right=right,
        ranks=ranks,
        parameters=reached,
        losses=(float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))),
        cpu_s=time.process_time() - started,
    )


def _loss(model: FusionModel, make: InputMaker, task: FusionTask, documents: Sequence[EvaluationDocument]) -> Tensor:
    outputs = model(make(documents))
    loss = functional.cross_entropy(outputs.logits, torch.from_numpy(task.classes(documents)))
    if outputs.query is None:
        return loss
    scale = model.log_scale.exp()[0]
    blocks = pair_blocks(document_table(documents))
    sums = contrastive_sums(
        torch.cat([outputs.query, outputs.target]), scale, torch.zeros_like(scale), blocks, "infonce"
    )
    return loss + sums.loss / sums.pairs


def document_table(documents: Sequence[EvaluationDocument]) -> SegmentTable:
    """Return the table of N queries, as modality 1, and their N captions, as modality 0."""
    count = len(documents)
    items = np.tile(np.arange(count), 2)
    texts = [keyed_hash(0, "text", document.key(TEXT)) for document in documents]
    queries = [keyed_hash(0, "query", document.corpus, document.id) for document in documents]
    groups = [keyed_hash(0, "group", document.group) for document in documents]
    return SegmentTable(
        plan_rows=items,
        items=np.zeros(2 * count, np.int64),
        modalities=np.repeat([1, 0], count),
        groups=np.zeros(2 * count, np.int64),
        content_keys=np.asarray(queries + texts, np.uint64),
        group_keys=np.asarray(groups * 2, np.uint64),
    )


@torch.inference_mode()
def _ask(
    model: FusionModel, make: InputMaker, task: FusionTask, *, seed: int
) -> tuple[npt.NDArray[np.float64], Ranks | None]:
    model.eval()
    order = sorted(range(len(task.held_out)), key=lambda number: len(task.held_out[number].text))
    logits: dict[int, npt.NDArray[Any]] = {}
    queries: dict[int, npt.NDArray[Any]] = {}
    targets: dict[int, npt.NDArray[Any]] = {}
    for first in range(0, len(order), EVALUATION_DOCUMENTS):
        places = order[first : first + EVALUATION_DOCUMENTS]
        outputs = model(make([task.held_out[place] for place in places]))
        logits |= dict(zip(places, outputs.logits.numpy(), strict=True))
        if outputs.query is not None:
            queries |= dict(zip(places, outputs.query.numpy(), strict=True))
            targets |= dict(zip(places, outputs.target.numpy(), strict=True))
    guesses = np.asarray([logits[place].argmax() for place in range(len(order))])
    right = (guesses == task.classes(task.held_out)).astype(np.float64)
    if not queries:
        return right, None
    ranks = []
    number = {(document.corpus, document.id): place for place, document in enumerate(task.held_out)}
    for _, asked in task.pools:
        rows = np.stack([queries[number[document.corpus, document.id]] for document in asked.queries])
        columns = np.stack([targets[number[document.corpus, document.id]] for document in asked.candidates])
        ranks.append(best_ranks(rows @ columns.T, asked.correct, seed=seed))
    return right, np.concatenate(ranks)
