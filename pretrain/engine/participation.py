"""The participation contract: every rank knows, before its first forward, which towers every rank calls when.

DeepSpeed matches collectives by order. A tower that one rank calls and another does not makes ZeRO 1, 2 and 3 reduce
the wrong tensors with each other, silently when the sizes agree. So each window
    announces  which towers each micro-batch calls, exchanged by all ranks before the first forward,
    guards     a tower that some other rank calls in that micro-batch: it runs on one zero token, with zero gradients,
    skips      a tower that nobody calls in the whole window: its weights, moments and step counts stay as they are,
and checks that what the forward really did is what was announced, before any gradient is reduced.

`train.absent_modality` chooses, with the plain torch process that each equals:
    skip   as above; parameters of a tower nobody calls have grad None
    guard  also a tower nobody calls runs, in every micro-batch of every rank; its parameters have grad 0, so weight
           decay and old momentum move it. Every step has the same collectives.
    align  as skip, but a modality that some ranks hold in a micro-batch and others lack there is an error before the
           forward pass: nothing is ever guarded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from triweave.data_pipeline.batch import PackedBatch
from triweave.pretrain.engine.config import AbsentModality
from triweave.pretrain.engine.work import WORK_FIGURES, Work
from triweave.pretrain.engine.world import World
from triweave.pretrain.errors import ParticipationError
from triweave.pretrain.objectives.contrastive import live_segments
from triweave.pretrain.objectives.losses import weight_by_slot

NAMED_SAMPLES = 8
"""An error names at most this many samples of a micro-batch."""


class _TieZero(torch.autograd.Function):
    """hidden -> hidden; backward gives the tower exact zeros, whatever the incoming gradient is."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, tower_output: torch.Tensor) -> torch.Tensor:
        ctx.shape, ctx.options = tower_output.shape, {"dtype": tower_output.dtype, "device": tower_output.device}
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradients[0], torch.zeros(ctx.shape, **ctx.options)


def tie_zero(hidden: torch.Tensor, tower_output: torch.Tensor) -> torch.Tensor:
    """Return hidden unchanged, with an absent tower's output in its graph.

    The tower's backward then runs (its hooks fire, its gradients are reduced) with gradients of exactly 0: they are
    made, not multiplied, so an inf or NaN in hidden's gradient or in the tower's output cannot come in. The tower's
    own derivative at its zero token must be finite.
    """
    result: torch.Tensor = _TieZero.apply(hidden, tower_output)
    return result


@dataclass(frozen=True, kw_only=True)
class Window:
    """What all ranks announced for one optimizer step.

    towers: names in the model's order.
    calls: bool [ranks, micro-batches, towers].
    weights: float64 [MODALITY_SLOTS] supervised weight of the step by what the target follows, over all ranks.
    segments: int64 [ranks, micro-batches] one-span segments that take part in a contrastive loss.
    data_wait_s: longest wait for data of any rank.
    work: of the step, all ranks' together; nothing where nobody counted. rank_flops: float64 [ranks] each one's share.
    source_weights: float64 [sources] supervised weight of the step by source, over all ranks.
    absent_modality: what becomes of towers that are not called, see the module.
    task_weights: float64 [T] sum of the weights of each objective's rows (`objectives.rows`), over all ranks.
    """

    towers: tuple[str, ...]
    calls: npt.NDArray[np.bool_]
    weights: npt.NDArray[np.float64]
    segments: npt.NDArray[np.int64]
    data_wait_s: float
    work: Work = field(default_factory=Work)
    rank_flops: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    source_weights: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    absent_modality: AbsentModality = "skip"
    task_weights: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    @property
    def tokens(self) -> int:
        """Positions of the step that are no padding, over all ranks."""
        return int(self.work.tokens.sum())

    @property
    def rank_imbalance(self) -> float:
        """The most FLOPs of any rank over their mean; of sequence-parallel groups over the mean of the groups."""
        own = self.rank_flops[self.rank_flops > 0]
        return float(own.max() / own.mean()) if own.size else 1.0

    @property
    def supervised(self) -> float:
        """The step's normaliser: global sum of the loss weights."""
        return float(self.weights.sum())

    @property
    def absent(self) -> frozenset[str]:
        """Towers nobody calls with a payload in any micro-batch."""
        return frozenset(name for index, name in enumerate(self.towers) if not self.calls[:, :, index].any())

    @property
    def skipped(self) -> frozenset[str]:
        """Towers that the optimizer leaves as they are."""
        return frozenset() if self.absent_modality == "guard" else self.absent

    @property
    def present(self) -> frozenset[str]:
        """Towers that some rank calls in some micro-batch."""
        return frozenset(self.towers) - self.absent

    def held(self, rank: int, micro_batch: int) -> frozenset[str]:
        """Towers a rank calls with real payloads in one micro-batch."""
        return frozenset(name for index, name in enumerate(self.towers) if self.calls[rank, micro_batch, index])

    def guards(self, rank: int, micro_batch: int) -> frozenset[str]:
        """Towers a rank must run without payload: those another rank holds in that micro-batch, or all by `guard`."""
        if self.absent_modality == "guard":
            return frozenset(self.towers) - self.held(rank, micro_batch)
        anyone = [self.held(other, micro_batch) for other in range(len(self.calls))]
        return frozenset().union(*anyone) - self.held(rank, micro_batch)


def announce(
    world: World,
    towers: Sequence[str],
    micro_batches: Sequence[PackedBatch],
    *,
    step: int,
    absent_modality: AbsentModality = "skip",
    data_wait_s: float = 0.0,
    task_weights: Sequence[float] = (),
    work: Work | None = None,
    sources: int = 1,
) -> Window:
    """Exchange the coming window's tower calls, weights and segments; collective, once per optimizer step.

    work: what this rank has of the step, to be added up. sources: of the run.

    Raises ParticipationError on all ranks when a rank holds a modality the model has no tower for, or, with
    absent_modality=align, lacks one that another rank holds in the same micro-batch.
    """
    calls = np.zeros((len(micro_batches), len(towers)))
    unknown = sorted({name for batch in micro_batches for name in batch.payloads} - set(towers))
    for index, batch in enumerate(micro_batches):
        calls[index] = [name in batch.payloads for name in towers]
    weights = np.sum([weight_by_slot(batch, sources) for batch in micro_batches], axis=0)
    segments = [np.count_nonzero(live_segments(batch)) for batch in micro_batches]
    own = [[len(unknown), data_wait_s], (work or Work()).row, weights.ravel(), segments, task_weights, calls.ravel()]
    rows = world.gather(np.concatenate(own))
    if rows[:, 0].any():
        world.agree(_without_tower(world, towers, micro_batches, unknown, step) if unknown else None)
    ends = np.cumsum([2, WORK_FIGURES, weights.size, len(micro_batches), len(task_weights)])
    _, works, all_weights, all_segments, tasks, all_calls = np.split(rows, ends, axis=1)
    totals = all_weights.sum(axis=0).reshape(weights.shape)
    window = Window(
        towers=tuple(towers),
        calls=all_calls.reshape(world.size, len(micro_batches), len(towers)).astype(bool),
        weights=totals.sum(axis=0),
        source_weights=totals.sum(axis=1),
        segments=all_segments.astype(np.int64),
        task_weights=tasks.sum(axis=0),
        data_wait_s=float(rows[:, 1].max()),
        work=Work.of_row(works.sum(axis=0)),
        rank_flops=works[:, 0],
        absent_modality=absent_modality,
    )
    if absent_modality == "align" and (window.calls.any(axis=0) != window.calls.all(axis=0)).any():
        world.agree(_misaligned(world, window, micro_batches, step))
    return window


def _without_tower(
    world: World, towers: Sequence[str], micro_batches: Sequence[PackedBatch], unknown: Sequence[str], step: int
) -> ParticipationError:
    batch = next(batch for batch in micro_batches if unknown[0] in batch.payloads)
    return ParticipationError(
        f"rank {world.rank} holds {', '.join(unknown)} at step {step}, samples {name_samples(batch)}, the model has "
        f"towers for {', '.join(towers) or 'none'}; train a model with that modality, or leave it out of the data"
    )


def _misaligned(
    world: World, window: Window, micro_batches: Sequence[PackedBatch], step: int
) -> ParticipationError | None:
    """Return what this rank lacks in the first micro-batch where it lacks something that another rank holds."""
    for index, batch in enumerate(micro_batches):
        for number, name in enumerate(window.towers):
            holders = np.flatnonzero(window.calls[:, index, number]).tolist()
            if holders and world.rank not in holders:
                return ParticipationError(
                    f"rank {world.rank}: module towers.{name} has nothing to do in micro-batch {index} at step {step}, "
                    f"samples {name_samples(batch)}, while rank {holders[0]} holds {name}, and "
                    "train.absent_modality=align asks for it on every rank; set train.absent_modality=skip, which "
                    "guards it, or raise train.micro_batch_rows"
                )
    return None


class TowerWatch:
    """Compares what a forward pass does with what its rank announced.

    Must be made before DeepSpeed wraps the model: its hooks then run first, so a call that nobody announced is refused
    before ZeRO-3 gathers for it.
    """

    def __init__(self, model: nn.Module, towers: Sequence[str], world: World) -> None:
        self._world = world
        self._towers = {name: model.get_submodule(f"towers.{name}") for name in towers}
        self._parameters = {
            name: {
                id(parameter): parameter_name
                for parameter_name, parameter in tower.named_parameters()
                if parameter.requires_grad
            }
            for name, tower in self._towers.items()
        }
        self._entered: Counter[str] = Counter()
        self._inside: set[str] = set()
        self._expected: frozenset[str] | None = None  # None outside of `forward_of`: evaluation is not watched
        self._where = ""
        for name, tower in self._towers.items():
            tower.register_forward_pre_hook(self._entry_hook(name))
            tower.register_forward_hook(self._exit_hook(name), always_call=True)
        # It runs before the towers: of a rank that calls one earlier every gather would meet another one of its peers.
        first = getattr(model, "token_embedding", None)
        self._begins = isinstance(first, nn.Module)
        self._begun = False
        if isinstance(first, nn.Module):
            first.register_forward_pre_hook(self._begin)
        decoder = getattr(model, "decoder", None)  # what reads the towers: they must be done when it begins
        if isinstance(decoder, nn.Module):
            decoder.register_forward_pre_hook(self._refuse_forgotten)

    @contextmanager
    def forward_of(self, expected: frozenset[str], *, step: int, batch: PackedBatch) -> Iterator[None]:
        """Watch one micro-batch's forward; raises ParticipationError when a tower's calls differ from `expected`.

        Wrong calls are refused at the tower's entry, forgotten ones where the next tower or the decoder begins: before
        ZeRO-3 gathers for a module that peers do not gather for.
        """
        self._expected, self._where = expected, f"at step {step}, samples {name_samples(batch)}"
        self._entered.clear()
        self._begun = False
        self._inside.clear()
        try:
            yield
        finally:
            self._expected = None
        for name in self._towers:
            if self._entered[name] != int(name in expected):
                raise self._miscount(name, expected)

    def refuse_lone_gathers(self) -> None:
        """Under ZeRO-3, refuse the gather by which DeepSpeed serves a tower's parameter used outside of its tower.

        A rank that does so gathers alone. What modules gather for themselves goes through `all_gather_coalesced`.
        """
        for name, tower in self._towers.items():
            for key, parameter in tower.named_parameters():
                if hasattr(parameter, "all_gather"):
                    parameter.all_gather = self._watched_gather(name, key, parameter.all_gather)

    def _watched_gather(self, name: str, key: str, gather: Any) -> Any:
        def refuse_outside(*arguments: Any, **options: Any) -> Any:
            if self._expected is not None and name not in self._inside:
                raise self._violation(f"{name}.{key}", "is used outside of its tower, so this rank gathers alone")
            return gather(*arguments, **options)

        return refuse_outside

    def check_gradients(self, outputs: Sequence[torch.Tensor], expected: frozenset[str]) -> None:
        """Raise ParticipationError unless the outputs give gradients to exactly the expected towers' parameters.

        Walks the autograd graph, a few microseconds per node, so the answer is there before any backward hook reduces.
        """
        reached = gradient_parameters(*outputs)
        for name, parameters in self._parameters.items():
            for key, parameter_name in parameters.items():
                if (key in reached) != (name in expected):
                    state = "gets a gradient but was not announced" if key in reached else "gets no gradient"
                    raise self._violation(f"{name}.{parameter_name}", state)

    def _entry_hook(self, name: str) -> Any:
        def refuse_unannounced(module: nn.Module, arguments: Any) -> None:  # noqa: ARG001 - torch's hook signature
            self._entered[name] += 1
            if self._expected is None:
                return
            if self._entered[name] > int(name in self._expected):
                raise self._miscount(name, self._expected)
            if self._begins and not self._begun:
                raise self._violation(name, "entered before the token embedding, out of its turn")
            self._check_done(before=name)
            self._inside.add(name)

        return refuse_unannounced

    def _exit_hook(self, name: str) -> Any:
        def leave(module: nn.Module, arguments: Any, output: Any) -> None:  # noqa: ARG001 - torch's hook signature
            self._inside.discard(name)

        return leave

    def _begin(self, module: nn.Module, arguments: Any) -> None:  # noqa: ARG002 - torch's hook signature
        self._begun = True

    def _refuse_forgotten(self, module: nn.Module, arguments: Any) -> None:  # noqa: ARG002 - torch's hook signature
        if self._expected is not None:
            self._check_done(before=None)

    def _check_done(self, *, before: str | None) -> None:
        """Raise unless every announced tower ahead of one in the model's order, or every one, has been entered."""
        assert self._expected is not None
        for name in self._towers:
            if name == before:
                return
            if name in self._expected and not self._entered[name]:
                raise self._miscount(name, self._expected)

    def _miscount(self, name: str, expected: frozenset[str]) -> ParticipationError:
        return self._violation(name, f"entered {self._entered[name]} times, announced {int(name in expected)}")

    def _violation(self, module: str, what: str) -> ParticipationError:
        return ParticipationError(f"rank {self._world.rank}: module towers.{module} {what}, {self._where}")


def gradient_parameters(*outputs: torch.Tensor) -> set[int]:
    """Return the ids of the leaf tensors that a backward pass from the outputs will give a gradient."""
    found: set[int] = set()
    stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return found


def name_samples(batch: PackedBatch) -> str:
    """Return the first sample ids of a micro-batch, for an error message."""
    samples = [sample for row in batch.sample_ids for sample in row]
    more = f" and {len(samples) - NAMED_SAMPLES} more" if len(samples) > NAMED_SAMPLES else ""
    return (", ".join(samples[:NAMED_SAMPLES]) or "none (padding)") + more
