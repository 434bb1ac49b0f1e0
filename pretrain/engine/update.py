"""The optimizer step that the judge of the run's health may refuse, with the samples of a bad one by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from triweave.data_pipeline.batch import PackedBatch
from triweave.pretrain.engine.loss_scale import LossScale
from triweave.pretrain.engine.nvme import fill_gradients
from triweave.pretrain.engine.optimizer import TowerAdamW
from triweave.pretrain.engine.participation import name_samples
from triweave.pretrain.engine.world import World
from triweave.pretrain.errors import HealthError, NonFiniteError
from triweave.pretrain.health.judge import StepJudge, Verdict

NAMED_RANKS = 4
"""A verdict on a bad step names the samples of at most so many ranks."""


@dataclass(frozen=True, kw_only=True)
class TowerNorms:
    """Global L2 norms of one tower, or of the trunk: of its gradient before clipping, of the change of its weights."""

    gradient: float
    update: float


class JudgedUpdate:
    """DeepSpeed's last step of a window: clip, ask the judge, update or leave everything as it is."""

    def __init__(
        self,
        deepspeed_engine: Any,
        adamw: TowerAdamW,
        model: nn.Module,
        judge: StepJudge,
        world: World,
        *,
        zero_stage: int,
        clip_norm: float,
        norms_every_steps: int,
        loss_scale: LossScale | None,
    ) -> None:
        """clip_norm: largest global L2 norm of the gradients, 0 clips nothing; at stage 0 it is applied here.

        norms_every_steps: steps between two of which the towers' norms are taken; 0: none.
        loss_scale: of fp16; it hears here whether gradients overflowed.
        """
        self._deepspeed, self._adamw, self._model = deepspeed_engine, adamw, model
        self._judge, self._world = judge, world
        self._zero_stage, self._clip_norm, self._norms_every_steps = zero_stage, clip_norm, norms_every_steps
        self._loss_scale = loss_scale

    def __call__(
        self, objective: float, finite_here: bool, micro_batches: Sequence[PackedBatch], *, step: int
    ) -> tuple[float, Verdict, dict[str, TowerNorms]]:
        """Take the optimizer step unless the judge objects; return gradient norm, verdict and towers' norms.

        Collective. There are towers' norms of updates only, and of those only in steps that `norms_every_steps` names.

        objective: level of the losses of step `step`, NaN where they are not finite. finite_here: whether this rank's
        are. Raises NonFiniteError or HealthError on all ranks where the judge ends the run.

        The judge is asked by the client optimizer, which DeepSpeed calls behind its norm and before any weight changes;
        where it does not call it, it has found an overflow and dropped the gradients itself. One that a lower loss
        scale may cure is no sign of bad health, and the judge does not hear of it.
        """
        norms: list[float] = []
        verdicts: list[Verdict] = []

        def allowed() -> bool:
            if not verdicts:
                norms.append(self._gradient_norm(clipped))
                verdicts.append(self._verdict(step, objective, norms[0]))
            return verdicts[0].action == "update"

        clipped = math.nan
        if self._zero_stage == 0:
            clipped = float(nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm or math.inf))
        measures = self._norms_every_steps and step % self._norms_every_steps == 0
        self._adamw.allowed, self._adamw.norms = allowed, {} if measures else None
        fill_gradients(self._deepspeed.optimizer)
        self._deepspeed.step()
        if not verdicts:
            self._forget_gradients()
            norms.append(math.nan)
            verdicts.append(self._cured_by_scale(step, objective) or self._verdict(step, objective, math.nan))
        elif self._loss_scale is not None:
            self._loss_scale.held()
        verdict = verdicts[0]
        if verdict.action != "update":
            verdict = self._with_samples(verdict, finite_here, micro_batches)
        towers = self._tower_norms(norms[0]) if measures and verdict.action == "update" else {}
        return norms[0], verdict, towers

    def _forget_gradients(self) -> None:
        """Drop the sums of a step that overflowed.

        DeepSpeed 0.19.8 keeps those of groups in host memory whose gradients are wider than the weights; the gradients
        of all later steps would be added to them.
        """
        kept: dict[int, Any] = getattr(self._deepspeed.optimizer, "averaged_gradients", {})
        for group in kept:
            kept[group] = None

    def _tower_norms(self, grad_norm: float) -> dict[str, TowerNorms]:
        """Add up what all ranks have of the towers; clipping has left the shares of the gradients as they were."""
        found = self._adamw.norms or {}
        names = sorted({group["tower"] for group in self._adamw.param_groups})
        own = np.stack([found.get(name, np.zeros(2)) for name in names])
        ranks = self._world.gather(own.ravel()).reshape(-1, len(names), 2)
        sums = ranks[0] if self._zero_stage == 0 else ranks.sum(axis=0)  # every rank has all of them at stage 0
        whole = sums[:, 0].sum() or 1.0
        return {
            name: TowerNorms(gradient=grad_norm * math.sqrt(gradient / whole), update=math.sqrt(change))
            for name, (gradient, change) in zip(names, sums.tolist(), strict=True)
            if name not in self._adamw.absent
        }

    def _gradient_norm(self, clipped: float) -> float:
        """Return the global norm that DeepSpeed has just computed; `clipped` at stage 0, where we did."""
        return clipped if self._zero_stage == 0 else float(self._deepspeed.optimizer._global_grad_norm)

    def _verdict(self, step: int, objective: float, grad_norm: float) -> Verdict:
        figures = self._world.gather([objective, grad_norm]).max(axis=0)  # NaN of any rank stays
        return self._judge.judge(step, *figures.tolist())

    def _cured_by_scale(self, step: int, objective: float) -> Verdict | None:
        """Return the verdict on gradients that overflowed fp16 while every rank's loss was finite; None for others."""
        scale = self._loss_scale
        if scale is None or not np.isfinite(self._world.gather([objective])).all():
            return None
        before, curable = scale.scale, scale.can_fall
        scale.overflowed()
        if not curable:
            return None
        reason = f"the gradient of step {step} overflows fp16 at loss scale {before:g}, which is {scale.scale:g} now"
        return Verdict(action="skip", reason=reason, finite=False)

    def _with_samples(self, verdict: Verdict, finite_here: bool, micro_batches: Sequence[PackedBatch]) -> Verdict:
        """Return the verdict with the samples of the ranks at fault, of all where none is; raise `stop` on all."""
        mine = "; ".join(name_samples(batch) for batch in micro_batches)
        faults = [flag == 0 for flag in self._world.gather([float(finite_here)])[:, 0]]
        held = [
            f"rank {rank} held samples {text}"
            for rank, text in enumerate(self._world.texts(mine))
            if faults[rank] or not any(faults)
        ]
        samples = "; ".join(held[:NAMED_RANKS]) + (f"; and {len(held) - NAMED_RANKS} more" * (len(held) > NAMED_RANKS))
        if verdict.action == "stop":
            kind = HealthError if verdict.finite else NonFiniteError
            self._world.agree(kind(f"{verdict.reason}; {samples}; {self._judge.advice()}"))
        return dataclasses.replace(verdict, samples=samples)
