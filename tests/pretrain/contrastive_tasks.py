"""Training with the contrastive objective inside rank processes, and the naive plain torch trainer beside it.

A step is always the same 12 plan rows in two groups of 6, whatever the ranks and the accumulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from siblings import load_sibling
from torch.nn import functional

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.config import PackingConfig
from triweave.pretrain.batch import to_device
from triweave.pretrain.config import RunConfig
from triweave.pretrain.engine.zero import Engine
from triweave.pretrain.model.config import ContrastiveConfig
from triweave.pretrain.model.model import MultimodalTransformer

ROWS, GROUP_ROWS, LENGTH = 12, 6, 80
STEPS = 3
"""Rounding grows with every step of this fast start: after 3 moments differ by up to 7e-7 of their maximum, after 4 by
1.2e-6 in the gains of queries and keys."""
WEIGHT = 0.7
EMPTY_STEP = 1
"""Step (0-based) of the case `few` in which nobody holds segments."""


def _kinds(case: str, step: int, row: int) -> tuple[list[str], list[list[str]]]:
    """Return the media of the row's ordinary document and of each item beside it."""
    if case == "all":
        return (["image", "audio"] if row % 3 else []), [["image"], ["audio"], ["image", "audio"]][: 1 + row % 3]
    if case == "image_against_audio":  # of 2 ranks one holds no sound, the other no picture
        kind = "image" if row < ROWS // 2 else "audio"
        return [kind], [[kind], [kind]]
    if case == "few":  # the last ranks hold no segments, and in one step nobody does
        return ["image"], [["image"], ["audio"]] if row < 4 and step != EMPTY_STEP else []
    raise KeyError(case)


def documents(case: str, step: int) -> list[list[Any]]:
    """Return the documents of a step's rows: false negatives of each kind among them, a filler and an empty row."""
    synthetic, tasks = load_sibling("synthetic"), load_sibling("engine_tasks")
    rows: list[list[Any]] = []
    for row in range(ROWS):
        generator = np.random.default_rng(1000 * step + row)
        media, items = _kinds(case, step, row)
        found = [synthetic.random_document(generator, media, tasks.FEATURES, text_tokens=3)]
        for number, names in enumerate(items):
            text = [int(token) for token in generator.integers(16, 64, 4)]
            parts = [text, *(synthetic.random_media(generator, name, tasks.FEATURES[name]) for name in names)]
            # a concept of several rows, and a caption that two rows of a group share
            found.append(synthetic.Document(
                parts=parts, alone=True, group_key=7 if (row + number) % 5 == 0 else 0,
                weight=0.0 if (row, number) == (2, 0) else 1.0,
            ))  # fmt: skip
        rows.append(found)
    if len(rows[0]) > 1 and len(rows[1]) > 1:
        rows[1][1] = replace(rows[1][1], parts=[rows[0][1].parts[0], *rows[1][1].parts[1:]])
    rows[ROWS - 1] = []
    return rows


def window(case: str, step: int, *, rank: int, ranks: int, accumulation: int) -> list[PackedBatch]:
    """Return a rank's micro-batches: its part of the rows in order, cut evenly."""
    rows = documents(case, step)
    size = ROWS // (ranks * accumulation)
    starts = [(rank * accumulation + micro) * size for micro in range(accumulation)]
    return [
        load_sibling("synthetic").pack(
            rows[start : start + size], LENGTH, first_plan_row=ROWS * step + start, group_rows=GROUP_ROWS
        )
        for start in starts
    ]


def config(zero_stage: int, loss: str, **options: Any) -> RunConfig:
    """Return the engine tests' run config with the contrastive objective."""
    made = load_sibling("engine_tasks").config(zero_stage, **options)
    return replace(
        made,
        model=model_config(loss),
        data=replace(made.data, packing=PackingConfig(contrastive_group_rows=GROUP_ROWS, contrastive_share=1.0)),
        train=replace(made.train, global_batch_rows=ROWS),
    )


def model_config(loss: str) -> Any:
    """Return the engine tests' model with the contrastive head."""
    return replace(
        load_sibling("engine_tasks").MODEL,
        objectives={"language_model": 1.0, "contrastive": WEIGHT},
        contrastive=ContrastiveConfig(loss=loss, width=16),
    )


def build_model(loss: str) -> MultimodalTransformer:
    """Return the tiny model with the contrastive head."""
    return MultimodalTransformer(
        model_config(loss),
        vocab_size=load_sibling("synthetic").VOCAB_SIZE,
        media_features=load_sibling("engine_tasks").FEATURES,
        seed=3,
    )


def train_case(world: Any, *, case: str, loss: str, zero_stage: int, accumulation: int, **options: Any) -> Any:
    """Train a few steps; return losses, contrastive figures, gradient norms and a snapshot per step."""
    engine = Engine(build_model(loss), config(zero_stage, loss, **options), world, accumulation=accumulation)
    answer: dict[str, list[Any]] = {"losses": [], "figures": [], "norms": [], "snapshots": [], "objectives": []}
    for step in range(STEPS):
        result = engine.train_window(window(case, step, rank=world.rank, ranks=world.size, accumulation=accumulation))
        assert result.contrastive is not None
        answer["losses"].append(result.loss)
        answer["objectives"].append(result.objective)
        answer["figures"].append((result.contrastive.loss, result.contrastive.pairs, result.contrastive.accuracy))
        answer["norms"].append(result.grad_norm)
        answer["snapshots"].append(load_sibling("engine_tasks").snapshot(engine))
    engine.close()
    return answer


def naive_contrastive(embeddings: torch.Tensor, segments: Sequence[dict[str, Any]], scale: torch.Tensor,
                      bias: torch.Tensor, loss: str) -> tuple[torch.Tensor, int, int]:  # fmt: skip
    """Return (sum, positives, hits) by loops over single pairs; segments carry group, item, modality and keys."""
    total, positives, hits = (embeddings.sum() + scale + bias) * 0, 0, 0
    for a, one in enumerate(segments):
        partners: dict[int, list[tuple[int, bool]]] = {}
        for b, other in enumerate(segments):
            if one["group"] != other["group"] or one["modality"] == other["modality"]:
                continue
            same = one["item"] == other["item"]
            if same or not _share_a_key(one["item"], other["item"], segments):
                partners.setdefault(other["modality"], []).append((b, same))
                if loss == "sigmoid" and a < b:
                    logit = scale * (embeddings[a] * embeddings[b]).sum() + bias
                    total = total + functional.softplus(-logit if same else logit)
        for candidates in partners.values():
            matches = [place for place, (_, same) in enumerate(candidates) if same]
            if not matches:
                continue
            cosines = torch.stack([(embeddings[a] * embeddings[b]).sum() for b, _ in candidates])
            hits += int(cosines.argmax()) == matches[0]
            positives += 1
            if loss == "infonce":
                total = total - (scale * cosines).log_softmax(0)[matches[0]] / 2
    return total, positives // 2, hits


def _share_a_key(item: Any, other: Any, segments: Sequence[dict[str, Any]]) -> bool:
    mine = [segment for segment in segments if segment["item"] == item]
    theirs = [segment for segment in segments if segment["item"] == other]
    return any(
        x["content"] == y["content"] or (x["concept"] and x["concept"] == y["concept"]) for x in mine for y in theirs
    )


def describe(batch: PackedBatch) -> list[dict[str, Any]]:
    """Return a batch's segments one by one, with their place in it; those of weight 0 left out."""
    table = batch.segments
    return [
        {
            "place": place,
            "group": int(batch.contrastive_group[row]),
            "item": (int(batch.plan_rows[row]), int(table.items[place])),
            "modality": int(table.modality[place]),
            "content": int(table.content_keys[place]),
            "concept": int(table.group_keys[place]),
        }
        for place, row in enumerate(table.rows)
        if table.weights[place] > 0
    ]


def reference_case(*, case: str, loss: str, ranks: int, accumulation: int) -> dict[str, Any]:
    """Train one plain torch process: embeddings of the whole step, the loss by loops in double, torch's chain rule.

    The language model's mean is taken as in engine_tasks.reference_case.
    """
    tasks = load_sibling("engine_tasks")
    model = build_model(loss)
    settings = config(0, loss).optimizer
    decay = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)
    answer: dict[str, list[Any]] = {"losses": [], "figures": [], "norms": [], "states": []}
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * tasks._scheduled(step + 1)
        mine = [window(case, step, rank=rank, ranks=ranks, accumulation=accumulation) for rank in range(ranks)]
        lm_loss, figures = _reference_gradients(model, mine, loss)
        answer["losses"].append(lm_loss)
        answer["figures"].append(figures)
        answer["norms"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))))
        optimizer.step()
        answer["states"].append(tasks._reference_state(model, optimizer))
    return answer


def _reference_gradients(model: Any, windows: Sequence[Sequence[PackedBatch]], loss: str) -> tuple[float, Any]:
    ranks = len(windows)
    weight = sum(float(batch.row_weight.astype(np.float64).sum()) for mine in windows for batch in mine)
    found = [[model(to_device(batch, "cpu")) for batch in mine] for mine in windows]
    known = [describe(batch) for mine in windows for batch in mine]
    outputs = [sums for mine in found for sums in mine]
    head = model.heads["contrastive"]
    chosen = [sums.embeddings[[entry["place"] for entry in mine]] for sums, mine in zip(outputs, known, strict=True)]
    scale, bias = head.log_scale.exp().double()[0], head.offset.double()[0]
    total, pairs, hits = naive_contrastive(
        torch.cat(chosen).double(), [entry for mine in known for entry in mine], scale, bias, loss
    )
    mean = total / max(pairs, 1) if pairs else total * 0
    leaves = [sums.embeddings for sums in outputs]
    by_embedding = torch.autograd.grad(mean * WEIGHT, leaves, retain_graph=True, allow_unused=True)
    by_head = torch.autograd.grad(mean * WEIGHT, [head.log_scale, head.offset], allow_unused=True)
    by_embedding = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, by_embedding, strict=True)]
    whole: dict[str, torch.Tensor] = {}
    lm_loss, place = 0.0, 0
    for mine in found:
        model.zero_grad(set_to_none=True)
        for sums in mine:
            torch.autograd.backward(
                [sums.total * (ranks / weight), sums.embeddings], [None, by_embedding[place] * ranks]
            )
            lm_loss += float(sums.total.detach()) / weight
            place += 1
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                part = parameter.grad / ranks
                whole[name] = whole[name] + part if name in whole else part
    for name, gradient in zip(("log_scale", "offset"), by_head, strict=True):
        whole[f"heads.contrastive.{name}"] = torch.zeros(1) if gradient is None else gradient.float()
    for name, parameter in model.named_parameters():
        parameter.grad = whole.get(name)
    return lm_loss, (float(mean.detach()), pairs, hits / (2 * pairs) if pairs else 0.0)
