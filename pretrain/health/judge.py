"""The judge of steps: update, skip, roll back or stop, from figures that are equal on all ranks.

A figure x of a step (its loss, its gradient norm) is a spike where

    x > mean + k max(std, |mean| / 100)        over the last healthy steps, k = health.spike_deviations

as in OLMo-core's SkipStepOptimizer, with a floor for runs whose figures hardly vary. One bad step is blamed on its
data: its update is left out. Several in a row are blamed on the weights: those of an earlier checkpoint come back, and
the data in between is not seen again (Chowdhery et al. 2022, PaLM, section 5.1). Both are counted, and end the run at
last.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any, Literal

from triweave.pretrain.health.settings import HealthConfig

Action = Literal["update", "skip", "roll_back", "stop"]
LEAST_DEVIATION = 0.01
"""Smallest standard deviation that counts, as a share of the mean."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What becomes of a step.

    action: only `update` changes the weights. reason: what is wrong, in words; empty for `update`. finite: whether loss
    and gradient are. samples: what the ranks at fault held, for a bad step.
    """

    action: Action = "update"
    reason: str = ""
    finite: bool = True
    samples: str = ""


HEALTHY = Verdict()


class StepJudge:
    """Judges one step after the other. Equal figures give equal verdicts, so that no rank decides alone."""

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._healthy: deque[tuple[float, float]] = deque(maxlen=config.spike_window)
        self._row: list[int] = []
        self._skipped = self._rolled_back = 0

    @property
    def first_bad_step(self) -> int | None:
        """The first of the bad steps that came one after the other up to now; None after a healthy one."""
        return self._row[0] if self._row else None

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """Return what becomes of a step and remember it.

        loss: the step's objective; 0 where it has no supervised token, which is then no sign of health. grad_norm:
        global L2 norm before clipping; below 0 counts as not finite, as DeepSpeed writes it.
        """
        finite = math.isfinite(loss) and math.isfinite(grad_norm) and grad_norm >= 0
        reason = self._complaint(step, loss, grad_norm)
        if not reason:
            self._row.clear()
            if loss:
                self._healthy.append((loss, grad_norm))
            return HEALTHY
        self._row.append(step)
        self._skipped += 1
        return Verdict(action=self._action(), reason=reason, finite=finite)

    def rolled_back(self) -> None:
        """Count a roll-back: the weights are others now, so that the next bad step is again the first one."""
        self._rolled_back += 1
        self._row.clear()

    def advice(self) -> str:
        """Return what a user can do where the last verdict was `stop`."""
        limits = self._config
        if limits.bad_step == "stop":
            return "set health.bad_step=skip to leave such steps out, or lower optimizer.lr"
        if self._skipped > limits.skips:
            spent = f"health.skips={limits.skips} steps have been skipped"
        else:
            spent = f"{len(self._row)} bad steps in a row, and health.rollbacks={limits.rollbacks} are spent"
        return f"{spent}; look at these samples, lower optimizer.lr, or raise that limit and resume"

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON; floats survive it to the bit."""
        return {
            "healthy": [list(figures) for figures in self._healthy],
            "row": self._row,
            "skipped": self._skipped,
            "rolled_back": self._rolled_back,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self._healthy.clear()
        self._healthy.extend((loss, norm) for loss, norm in state["healthy"])
        self._row = list(state["row"])
        self._skipped, self._rolled_back = state["skipped"], state["rolled_back"]

    def _action(self) -> Action:
        if self._config.bad_step == "stop" or self._skipped > self._config.skips:
            return "stop"
        if len(self._row) < self._config.skips_in_a_row:
            return "skip"
        return "roll_back" if self._rolled_back < self._config.rollbacks else "stop"

    def _complaint(self, step: int, loss: float, grad_norm: float) -> str:
        if not math.isfinite(loss):
            return f"the loss of step {step} is not finite"
        if not math.isfinite(grad_norm) or grad_norm < 0:
            return f"the gradient of step {step} is not finite"
        if not self._config.spike_deviations or 2 * len(self._healthy) < self._config.spike_window:
            return ""
        losses, norms = zip(*self._healthy, strict=True)
        spikes = [self._spike("loss", loss, losses)] if loss else []
        spikes.append(self._spike("gradient norm", grad_norm, norms))
        return " and ".join(f"the {spike} at step {step}" for spike in spikes if spike)

    def _spike(self, what: str, value: float, healthy: Sequence[float]) -> str:
        mean = fmean(healthy)
        deviations = (value - mean) / max(pstdev(healthy, mean), LEAST_DEVIATION * abs(mean))
        if deviations <= self._config.spike_deviations:
            return ""
        return f"{what} is {value:.4g}, {deviations:.1f} deviations above the mean {mean:.4g} of {len(healthy)} steps,"
