"""The engine's tests with rows that several ranks share: batches and models of their own, run inside rank processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from siblings import load_sibling

from triweave.pretrain.batch import kernel_tables, to_device
from triweave.pretrain.engine.slices import slice_rows
from triweave.pretrain.engine.zero import Engine
from triweave.pretrain.errors import PretrainError

LENGTH = 49
"""Positions of a row, no multiple of 2 or 3."""


@contextmanager
def shared(
    *,
    heads: tuple[int, int] = (6, 3),
    length: int = LENGTH,
    encoder: str = "",
    fusion: dict[str, Any] | None = None,
    sharing: int = 1,
    **model: Any,
) -> Iterator[ModuleType]:
    """Make engine_tasks train on rows of odd length, each the same for `sharing` ranks, whose loaders make tables.

    heads: H and G. encoder, fusion: as in encoder_tasks and fusion_tasks. model: more of that section.
    """
    with ExitStack() as stack:
        if encoder:
            module = load_sibling("encoder_tasks").engine(encoder)
        else:
            module = stack.enter_context(load_sibling("fusion_tasks").fused(fusion or {"kind": "sequence"}))
        plain = module.MODEL, module.micro_batch
        module.MODEL = dataclasses.replace(module.MODEL, heads=heads[0], kv_heads=heads[1], **model)
        tables = kernel_tables(module.MODEL, torch.device("cpu"), torch.float32)

        def micro_batch(case: str, step: int, rank: int, micro: int) -> Any:
            group = rank // sharing
            batch = load_sibling("synthetic").make_batch(
                module.CASES[case](step, group, micro),
                length=length,
                seed=1000 * step + 10 * group + micro,
                features=module.FEATURES,
            )
            return dataclasses.replace(batch, extra=tables(batch))

        module.micro_batch = micro_batch
        try:
            yield module
        finally:
            module.MODEL, module.micro_batch = plain


def train_shared(world: Any, *, sharing: int, settings: dict[str, Any], **cell: Any) -> dict[str, Any]:
    """Return what engine_tasks.train_case does where `sharing` ranks hold slices of the same rows."""
    with shared(sharing=sharing, **settings) as engine:
        answer: dict[str, Any] = engine.train_case(world, sequence_parallel=sharing, **cell)
        return answer


def exact_gradients(world: Any, *, case: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return how far all ranks' slices together are from the whole, without DeepSpeed.

    float64: name -> distance of the gradients over the largest element. loss: distance of the sums. media: tokens this
    rank encodes. float32: the largest distance to the whole in float64 of the whole, and of the slices.
    """
    with shared(sharing=world.size, **settings) as engine:
        config = engine.config(0, sequence_parallel=world.size)
        batch = engine.micro_batch(case, 0, 0, 0)
        whole, sliced = {}, {}
        for dtype in (torch.float64, torch.float32):
            model, part = engine.build_model().to(dtype), engine.build_model().to(dtype)
            whole[dtype] = _gradients(model, batch)
            piece = slice_rows(part, config, world)(batch)
            sliced[dtype] = {name: value.clone() for name, value in _gradients(part, piece).items()}
            for value in sliced[dtype].values():
                dist.all_reduce(value)
        truth = whole[torch.float64]
        loss = float((sliced[torch.float64].pop("loss") - truth.pop("loss")).abs())
        return {
            "float64": _distances(sliced[torch.float64], truth),
            "float32": [max(_distances(found[torch.float32], truth).values()) for found in (whole, sliced)],
            "loss": loss,
            "media": {name: int(payload.lengths.sum()) for name, payload in piece.payloads.items()},
        }


def _gradients(model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    """Return every parameter's gradient, zeros where it has none, and the loss sum."""
    total = model(to_device(batch, "cpu")).total
    total.backward()
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    return {**found, "loss": total.detach()}


def _distances(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        name: float((found[name] - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
        for name, wanted in truth.items()
    }


def other_samples(world: Any) -> list[str]:
    """Train a step on the same rows and one on rows that differ by rank; return what each step said."""
    engine_tasks = load_sibling("engine_tasks")
    engine = Engine(engine_tasks.build_model(), engine_tasks.config(1, sequence_parallel=2), world, accumulation=1)
    said = []
    for seed in (0, world.rank):
        batch = load_sibling("synthetic").make_batch(
            [("image",), ()], length=LENGTH, seed=seed, features=engine_tasks.FEATURES, first_plan_row=seed
        )
        try:
            engine.train_window([batch])
            said.append("")
        except PretrainError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def kept_bytes(world: Any, *, sharing: int, length: int) -> int:
    """Return what one forward pass of this rank keeps for its backward pass, parameters and batch apart."""
    with shared(sharing=sharing, length=length, d_model=96, objectives={"language_model": 1.0}) as engine:
        model = engine.build_model()
        batch = engine.micro_batch("text_only", 0, 0, 0)
        slicer = slice_rows(model, engine.config(0, sequence_parallel=sharing), world)
        piece = to_device(slicer(batch) if slicer else batch, "cpu")
        known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if tensor.is_floating_point() and storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = model(piece).total
        total.backward()
        return sum(kept.values())
