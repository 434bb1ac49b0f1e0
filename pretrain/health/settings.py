"""What is done about steps that are not healthy and about ranks that stand still: the `health` section of a config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from triweave.pretrain.errors import PretrainError


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Limits of a run's health. A step is bad where its loss or gradient is not finite, or is a spike."""

    bad_step: Literal["skip", "stop"] = "skip"
    """skip leaves the update of a bad step out and goes on with the next one's data; stop ends the run."""
    spike_deviations: float = 0.0
    """A loss or gradient norm above mean + so many standard deviations of healthy steps is a spike; 0: nothing is."""
    spike_window: int = 128
    """Latest healthy steps that mean and deviation are taken of; judged as soon as there are half as many."""
    skips: int = 20
    """Bad steps that may be skipped in the whole run; the next one ends it."""
    skips_in_a_row: int = 3
    """So many bad steps in a row put the weights of an earlier checkpoint back, past all data since."""
    rollbacks: int = 2
    """Roll-backs of the whole run; where one more is needed the run ends."""
    stall_s: float = 600.0
    """Seconds without a sign of any rank until `triweave launch` reports where each stands and ends them; 0: never."""

    def __post_init__(self) -> None:
        if not (self.spike_deviations == 0 or 1 <= self.spike_deviations < math.inf):
            raise PretrainError(
                f"health.spike_deviations is {self.spike_deviations}; it must be 0 (no spikes) or at least 1, such as 6"
            )
        for name, least in (("spike_window", 4), ("skips", 0), ("skips_in_a_row", 1), ("rollbacks", 0)):
            if getattr(self, name) < least:
                raise PretrainError(f"health.{name} is {getattr(self, name)}; it must be at least {least}")
        if not (self.stall_s == 0 or 1 <= self.stall_s < math.inf):
            raise PretrainError(f"health.stall_s is {self.stall_s}; it must be 0 (never) or at least 1 second")
