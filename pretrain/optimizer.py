"""The optimizer: AdamW over parameter groups of one tower and one decay rule each.

Groups are per tower x decay so that a tower nobody holds in a step can be left out whole: no step, no decay, no moment
update. Everything that is not under `towers.` is the trunk.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from triweave.pretrain.errors import PretrainError

TRUNK = "trunk"
"""Name of the part of the model that every step trains."""
TOWER_PREFIX = "towers."


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) and the clipping before it."""

    lr: float = 1e-3
    """Peak learning rate; the schedule multiplies it by a factor in [0, 1]."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and other 1-D parameters are never decayed."""
    clip_norm: float = 1.0
    """Largest global L2 norm of the gradient; 0 never clips."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise PretrainError(f"optimizer.lr is {self.lr}; it must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise PretrainError(f"optimizer.betas is {list(self.betas)}; both must be in [0, 1)")
        if not self.eps > 0:  # at 0 a weight that never had a gradient becomes 0 / 0
            raise PretrainError(f"optimizer.eps is {self.eps}; it must be above 0")
        for name in ("weight_decay", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise PretrainError(f"optimizer.{name} is {getattr(self, name)}; it must be 0 or above")


@dataclass(frozen=True, kw_only=True)
class GroupKey:
    """What a parameter group holds: one tower (or the trunk), decayed or not."""

    tower: str
    decay: bool

    @property
    def name(self) -> str:
        return f"{self.tower}.{'decay' if self.decay else 'no_decay'}"


def tower_of(parameter_name: str) -> str:
    """Return the modality whose tower owns a parameter, or TRUNK."""
    if parameter_name.startswith(TOWER_PREFIX):
        return parameter_name.split(".")[1]
    return TRUNK


def group_parameters(parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return optimizer groups, one per (tower, decay) that has trainable parameters, trunk first, then by name.

    Each group carries `name`, `tower` and `parameter_names` besides torch's keys. The order depends on names only, so
    it is the same on all ranks and at all ZeRO stages.
    """
    groups: dict[GroupKey, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            groups.setdefault(GroupKey(tower=tower_of(name), decay=len(shape) > 1), []).append((name, parameter))
    ordered = sorted(groups, key=lambda key: (key.tower != TRUNK, key.tower, not key.decay))
    return [
        {
            "params": [parameter for _, parameter in groups[key]],
            "weight_decay": config.weight_decay if key.decay else 0.0,
            "name": key.name,
            "tower": key.tower,
            "parameter_names": [name for name, _ in groups[key]],
        }
        for key in ordered
    ]


class TowerAdamW(torch.optim.AdamW):
    """AdamW that leaves out the groups of the towers in `absent`: their weights, moments and step counts stay as is.

    DeepSpeed steps all groups at once (ZeRO 0, bf16 at 1), group by group (1, 2) or sub-group by sub-group (3), always
    through `step` of this client optimizer, so this one place serves every stage. Nothing is compiled at first use.
    """

    absent: frozenset[str] = frozenset()

    def step(self, closure: Any = None) -> Any:
        """Update the groups of all present towers."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["tower"] not in self.absent]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def fill_state(self) -> None:
        """Create zero moments and a zero step count for every parameter, what AdamW would do at its first step.

        With them in place from the start a checkpoint has one form, also for towers that were never seen.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                self.fill_parameter_state(parameter)

    def fill_parameter_state(self, parameter: torch.Tensor) -> None:
        """Create the zero state of one (flat) parameter; DeepSpeed's stage 3 keeps them outside of param_groups."""
        self.state[parameter] = {
            "step": torch.tensor(0.0, dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }


def build_adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> TowerAdamW:
    """Return the client optimizer of every ZeRO stage over the groups of `group_parameters`."""
    return TowerAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0)
