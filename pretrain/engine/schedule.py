"""The learning-rate schedule: a pure function from the step to a factor, so a resumed run needs no state for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from triweave.pretrain.errors import PretrainError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warm-up, then cosine decay or warm-up-stable-decay (WSD)."""

    kind: Literal["cosine", "wsd"] = "cosine"
    """cosine: half a cosine from 1 to final_fraction; wsd: constant 1, then linear to final_fraction."""
    warmup_steps: int = 100
    """Steps of linear rise from 0 to 1."""
    total_steps: int | None = None
    """Step at which final_fraction is reached; null means train.steps."""
    final_fraction: float = 0.1
    """Factor at total_steps and after (wsd: where decay_steps is above 0)."""
    decay_steps: int = 0
    """Length of the linear fall at the end, wsd only; it starts after the warm-up at the earliest, 0 never falls."""

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) < 0:
                raise PretrainError(f"schedule.{name} is {getattr(self, name)}; it must be 0 or above")
        if self.total_steps is not None and self.total_steps < 1:
            raise PretrainError(f"schedule.total_steps is {self.total_steps}; it must be at least 1, or null")
        if not 0 <= self.final_fraction <= 1:
            raise PretrainError(f"schedule.final_fraction is {self.final_fraction}; it must be in [0, 1]")


def learning_rate_factor(config: ScheduleConfig, step: int, train_steps: int) -> float:
    """Return the factor of the peak rate for the update that makes `step` steps complete (the first is step 1).

        warm-up   step / warmup_steps                                        for step <= warmup_steps
        cosine    f + (1 - f) (1 + cos(pi x)) / 2                            x = share of the way to total_steps
        wsd       1, then 1 - (1 - f) y                                      y = share of the last decay_steps

    train_steps is used where `total_steps` is null. Beyond the total the factor stays at f.
    """
    total = train_steps if config.total_steps is None else config.total_steps
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.kind == "cosine":
        share = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
        return config.final_fraction + (1 - config.final_fraction) * (1 + math.cos(math.pi * share)) / 2
    start = max(config.warmup_steps, total - config.decay_steps)
    share = min(1.0, max(0.0, (step - start) / max(1, total - start))) if config.decay_steps else 0.0
    return 1 - (1 - config.final_fraction) * share
