"""The optimizer: AdamW over parameter groups of one tower and one decay rule each.

Groups are per tower x decay so that a tower nobody holds in a step can be left out whole: no step, no decay, no moment
update. Everything that is not under `towers.` is the trunk.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from triweave.pretrain.errors import PretrainError

TRUNK = "trunk"
"""Name of the part of the model that every step trains."""
TOWER_PREFIX = "towers."


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """How the parameters whose names begin with one prefix are trained; null takes the optimizer's own value."""

    frozen: bool = False
    """Leave them as they are: no gradient, no moments, no update."""
    lr: float | None = None
    """Peak learning rate."""
    weight_decay: float | None = None
    """Decoupled decay of matrices."""


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
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    """Beginning of parameter names, such as towers.image, towers.image.encoder, decoder.blocks.0 or trunk (all that is
    in no tower) -> how these are trained; of several that fit the longest counts."""

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
        for prefix, group in self.groups.items():
            if group.lr is not None and not group.lr > 0:
                raise PretrainError(f"optimizer.groups.{prefix}.lr is {group.lr}; use one above 0, or frozen=true")
            if group.weight_decay is not None and not group.weight_decay >= 0:
                raise PretrainError(
                    f"optimizer.groups.{prefix}.weight_decay is {group.weight_decay}; it must be 0 or above"
                )

    def group_of(self, parameter_name: str) -> str:
        """Return the key of `groups` that a parameter falls under, "" where none does."""
        fitting = [
            prefix
            for prefix in self.groups
            if parameter_name == prefix
            or parameter_name.startswith(f"{prefix}.")
            or (prefix == TRUNK and tower_of(parameter_name) == TRUNK)
        ]
        # "trunk" says less than the name of a part of it
        return max(fitting, key=lambda prefix: (prefix != TRUNK, len(prefix)), default="")


@dataclass(frozen=True, kw_only=True)
class GroupKey:
    """What a parameter group holds: one tower (or the trunk), one entry of `optimizer.groups`, decayed or not."""

    tower: str
    entry: str
    decay: bool

    @property
    def name(self) -> str:
        part = f"{self.tower}[{self.entry}]" if self.entry else self.tower
        return f"{part}.{'decay' if self.decay else 'no_decay'}"


def tower_of(parameter_name: str) -> str:
    """Return the modality whose tower owns a parameter, or TRUNK."""
    if parameter_name.startswith(TOWER_PREFIX):
        return parameter_name.split(".")[1]
    return TRUNK


def group_parameters(parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return optimizer groups, one per (tower, entry, decay) that has trainable parameters, trunk first, then by name.

    Each group carries `name`, `tower`, `peak_lr` and `parameter_names` besides torch's keys. The order depends on names
    only, so it is the same on all ranks and at all ZeRO stages.
    """
    groups: dict[GroupKey, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            key = GroupKey(tower=tower_of(name), entry=config.group_of(name), decay=len(shape) > 1)
            groups.setdefault(key, []).append((name, parameter))
    ordered = sorted(groups, key=lambda key: (key.tower != TRUNK, key.tower, key.entry, not key.decay))
    own = {key: config.groups.get(key.entry, GroupConfig()) for key in ordered}
    decays = {key: group.weight_decay for key, group in own.items()}
    rates = {key: config.lr if group.lr is None else group.lr for key, group in own.items()}
    return [
        {
            "params": [parameter for _, parameter in groups[key]],
            "lr": rates[key],
            "peak_lr": rates[key],
            "weight_decay": (config.weight_decay if decays[key] is None else decays[key]) if key.decay else 0.0,
            "name": key.name,
            "tower": key.tower,
            "parameter_names": [name for name, _ in groups[key]],
        }
        for key in ordered
    ]


def freeze(model: nn.Module, config: OptimizerConfig) -> None:
    """Take the gradient from the parameters that `optimizer.groups` freezes.

    Raises PretrainError for an entry that fits no parameter, and where nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    used = {config.group_of(name) for name in names}
    for prefix in config.groups:
        if prefix not in used:
            parts = sorted({*(".".join(name.split(".")[: 1 + prefix.count(".")]) for name in names), TRUNK})
            near = difflib.get_close_matches(prefix, parts, n=1, cutoff=0.0)
            raise PretrainError(
                f"optimizer.groups.{prefix}: no parameter is left to it; did you mean {near[0]}? Names begin as in "
                f"{names[0]}"
            )
    for name, parameter in model.named_parameters():
        group = config.groups.get(config.group_of(name))
        if group is not None and group.frozen:
            parameter.requires_grad = False
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PretrainError("optimizer.groups freezes every parameter; leave something to train")


class TowerAdamW(torch.optim.AdamW):
    """AdamW that leaves out the groups of the towers in `absent`: their weights, moments and step counts stay as is.

    `allowed` is asked before every update, once for each group; while it returns False nothing changes at all.

    Where `norms` is a dict, an update adds each tower's sums of squares to it: [gradient, change of weights].

    DeepSpeed steps all groups at once (ZeRO 0, bf16 at 1), group by group (1, 2) or sub-group by sub-group (3), always
    through `step` of this client optimizer, so this one place serves every stage. Nothing is compiled at first use.
    """

    absent: frozenset[str] = frozenset()
    allowed: Callable[[], bool] = staticmethod(lambda: True)
    norms: dict[str, npt.NDArray[np.float64]] | None = None

    def step(self, closure: Any = None) -> Any:
        """Update the groups of all present towers, if it is allowed."""
        if not self.allowed():
            return None
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["tower"] not in self.absent]
        try:
            if self.norms is None:
                return super().step(closure)
            return self._measured_step(closure, self.norms)
        finally:
            self.param_groups = groups

    def _measured_step(self, closure: Any, norms: dict[str, npt.NDArray[np.float64]]) -> Any:
        """Update one tensor after the other, so that no more than one is held to see how far it moves."""
        answer = None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient, before = parameter.grad.square().sum(dtype=torch.float64), parameter.detach().clone()
                self.param_groups = [{**group, "params": [parameter]}]
                answer = super().step(closure)
                change = (parameter.detach() - before).square().sum(dtype=torch.float64)
                norms[group["tower"]] = norms.get(group["tower"], np.zeros(2)) + np.array([gradient, change], float)
        return answer

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
