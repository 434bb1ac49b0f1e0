"""The loss scale of fp16: small gradients underflow there, so the backward pass starts from  scale x loss.

    overflow (a gradient is inf or NaN)     no update, scale / 2, not below the least
    `grow_every` updates without one        scale x 2
    the gradient that clipping and AdamW see is divided by the scale

Micikevicius et al. 2018, Mixed Precision Training. Powers of two, so that scaling rounds nothing. The rule is ours and
DeepSpeed 0.19.8 is told the scale between two steps: its own scaler doubles it before it divides the gradients of that
step by it, which makes those half of what they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from triweave.pretrain.errors import PretrainError

FACTOR = 2.0
LARGEST = 2.0**24
"""No scale is above it: a scaled loss is fp32, and gradients overflow fp16 long before."""


@dataclass(frozen=True, kw_only=True)
class LossScaleConfig:
    """The scale of the loss with train.precision=fp16."""

    initial: float = 65536.0
    """Scale of the first step; each overflow halves it, and its step is left out."""
    least: float = 1.0
    """No overflow brings the scale below it; one that happens there is a bad step (`health`)."""
    grow_every: int = 1000
    """Updates in a row without an overflow that double the scale."""

    def __post_init__(self) -> None:
        for name in ("initial", "least"):
            value = getattr(self, name)
            if not 0 < value <= LARGEST or math.frexp(value)[0] != 1 / FACTOR:
                raise PretrainError(
                    f"train.loss_scale.{name} is {value:g}; it must be a power of two, at most {LARGEST:g}"
                )
        if self.least > self.initial:
            raise PretrainError(
                f"train.loss_scale.least is {self.least:g}, above train.loss_scale.initial={self.initial:g}; lower it"
            )
        if self.grow_every < 1:
            raise PretrainError(f"train.loss_scale.grow_every is {self.grow_every}; it must be at least 1")


class LossScale:
    """The scale of the next step. Equal overflows give equal scales, so that no rank decides alone.

    scale: a power of two.
    """

    def __init__(self, config: LossScaleConfig) -> None:
        self._config = config
        self.scale = config.initial
        self._without_overflow = 0

    @property
    def can_fall(self) -> bool:
        """Whether a smaller scale may cure an overflow."""
        return self.scale > self._config.least

    def overflowed(self) -> None:
        """Count a step whose gradients were not finite at this scale."""
        self.scale = max(self.scale / FACTOR, self._config.least)
        self._without_overflow = 0

    def held(self) -> None:
        """Count a step whose gradients were finite at this scale."""
        self._without_overflow += 1
        if self._without_overflow == self._config.grow_every:
            self.scale = min(self.scale * FACTOR, LARGEST)
            self._without_overflow = 0

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps, as JSON."""
        return {"scale": self.scale, "without_overflow": self._without_overflow}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take over what `state` returned."""
        self.scale, self._without_overflow = float(state["scale"]), int(state["without_overflow"])
