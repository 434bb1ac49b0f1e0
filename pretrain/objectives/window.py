"""The objectives of one optimizer step: their factors before, their figures after, the same for any split of its rows.

    sum over ranks and micro-batches of  w_k S_k / N_k  =  w_k times the mean of objective k over the step's N_k rows

N_k is announced before the first forward. DeepSpeed averages gradients over the ranks, so factors are multiplied by
their number. What is there once a step (the terms of learnt weights, and the contrastive loss) is put on rank 0's first
micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from triweave.pretrain.engine.world import World
from triweave.pretrain.objectives.balance import Decision, TaskBalance
from triweave.pretrain.objectives.contrastive_window import ContrastiveFigures
from triweave.pretrain.objectives.losses import LossSums

LANGUAGE_MODEL, CONTRASTIVE = "language_model", "contrastive"
"""Objectives whose rows are not those of `objectives.rows`: supervised tokens, and pairs of the whole step."""


@dataclass(frozen=True, kw_only=True)
class TaskFigures:
    """One objective in one step, the same on every rank.

    loss: mean over its rows, before any weight. count: sum of its rows' weights: tokens, pairs, documents, labels.
    weight: what the loss is multiplied by in the objective. accuracy: weighted share of right predictions, None where a
    prediction is not right or wrong. log_variance: the learnt s, None with other weightings.
    """

    loss: float
    count: float
    weight: float
    accuracy: float | None = None
    log_variance: float | None = None


class TaskWindow:
    """Factors and figures of one step. Attributes: `decision`."""

    def __init__(
        self, names: Sequence[str], decision: Decision, counts: Mapping[str, float], world: World, *, learnt: bool
    ) -> None:
        """names: all objectives of the model, in its order. counts: N_k; that of the contrastive is not asked for."""
        self.decision, self._names, self._counts = decision, tuple(names), dict(counts)
        self._world, self._learnt = world, learnt
        self._log_variances: list[float] | None = None

    @property
    def only(self) -> tuple[str, ...] | None:
        """Heads that compute; None: all of them."""
        weightless = [name for name in self._names if name not in self.decision.weights]
        return tuple(name for name in self._names if name not in weightless) if weightless else None

    @property
    def factors(self) -> dict[str, float]:
        """What each head's sum is multiplied by."""
        return {
            name: self.weight(name) * self._world.size / self._counts[name] if self._counts[name] else 0.0
            for name in self._names
        }

    def weight(self, name: str) -> float:
        """Return the decided weight of an objective, 0 in a step that does not train it."""
        return self.decision.weights.get(name, 0.0)

    def precision(self, found: LossSums, name: str) -> Tensor | float:
        """Return exp(-s) of an objective, without gradient; 1 where weights are not learnt."""
        if found.log_variances is None:
            return 1.0
        return torch.exp(-found.log_variances[self._names.index(name)]).detach()

    def once(self, found: LossSums, contrastive: ContrastiveFigures | None, micro_batch: int) -> Tensor | float:
        """Return what a micro-batch adds for the learnt weights: their terms in rank 0's first one, 0 in all others.

        All have it, since ZeRO-3 wants the same modules in the same order in every rank's backward pass.
        """
        if found.log_variances is None:
            return 0.0
        self._log_variances = found.log_variances.detach().double().tolist()
        term = (found.log_variances * 0).sum()
        if self._world.rank or micro_batch:
            return term
        for place, name in enumerate(self._names):
            if self._trained(name, contrastive):
                term = term + self.weight(name) * found.log_variances[place]
        if contrastive is not None:
            share = torch.exp(-found.log_variances[self._names.index(CONTRASTIVE)])
            term = term + self.weight(CONTRASTIVE) * contrastive.loss * share
        return term * self._world.size

    def sums(self, found: LossSums) -> Tensor:
        """Return [2 T]: the sum of each head, then its hits."""
        nothing = found.total.detach().new_zeros(())
        parts = [found.heads.get(name, nothing) for name in self._names]
        hits = [found.hits.get(name, nothing) for name in self._names]
        return torch.stack([part.float() for part in (*parts, *hits)])

    def figures(
        self, sums: Sequence[float], accurate: Sequence[str], contrastive: ContrastiveFigures | None
    ) -> dict[str, TaskFigures]:
        """Return the figures of the objectives that this step has trained and that had rows in it.

        sums: [2 T] over all ranks and micro-batches. accurate: objectives whose hits mean something.
        """
        figures = {}
        for place, name in enumerate(self._names):
            if not self._trained(name, contrastive):
                continue
            count, loss, accuracy = self._counts[name], 0.0, None
            if name == CONTRASTIVE:
                assert contrastive is not None
                count, loss, accuracy = float(contrastive.pairs), contrastive.loss, contrastive.accuracy
            else:
                loss = sums[place] / count
                accuracy = sums[len(self._names) + place] / count if name in accurate else None
            learnt = None if self._log_variances is None else self._log_variances[place]
            precision = 1.0 if learnt is None else math.exp(-learnt)
            figures[name] = TaskFigures(
                loss=loss, count=count, weight=self.weight(name) * precision, accuracy=accuracy, log_variance=learnt
            )
        return figures

    def objective(self, figures: Mapping[str, TaskFigures]) -> float:
        """Return what the step minimises: the weighted losses, and w s of each learnt weight."""
        weighted = [figure.weight * figure.loss for figure in figures.values()]
        learnt = [self.weight(name) * (figure.log_variance or 0.0) for name, figure in figures.items()]
        return math.fsum(weighted + learnt)

    def _trained(self, name: str, contrastive: ContrastiveFigures | None) -> bool:
        if not self.weight(name):
            return False
        return bool(contrastive and contrastive.pairs) if name == CONTRASTIVE else self._counts[name] > 0


def decide(balance: TaskBalance, step: int, world: World) -> Decision:
    """Return what a step does; collective where that follows from losses, which only rank 0 is asked for then."""
    decision = balance.decide(step)
    if world.size == 1 or not balance.follows_losses:
        return decision
    names = list(balance.objectives)
    mine = np.asarray([decision.weights.get(name, math.nan) for name in names])
    decided = world.gather(mine)[0].tolist()
    chosen = {name: weight for name, weight in zip(names, decided, strict=True) if not math.isnan(weight)}
    return Decision(step=step, weights=chosen)
