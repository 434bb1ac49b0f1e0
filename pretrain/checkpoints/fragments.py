"""Named fragments: where DeepSpeed keeps the fp32 weights and moments of each parameter, as live views.

A checkpoint is written from these views and read into them; nothing else knows how a ZeRO stage lays its state out.
Attribute names are those of DeepSpeed 0.19.8, seen in its sources:

    stage 0            the parameters and AdamW's state, replicated
    stage 1, 2         one flat fp32 partition per group (single_partition_of_fp32_groups)
    stage 1 in bf16    the same under other names (BF16_Optimizer.fp32_groups_flat_partition)
    stage 3            one flat fp32 partition per sub-group; ceil(numel / ranks) of every parameter on each rank
    stage 3 on NVMe    the same in files, of which the views are maps (`engine.nvme`)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from triweave.pretrain.engine.nvme import file_groups, flush_state, in_files, in_memory, map_state
from triweave.pretrain.engine.optimizer import TowerAdamW
from triweave.pretrain.engine.world import World

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""What a trainable parameter's fragment holds; a frozen parameter has its weight only."""


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A contiguous piece of one parameter on this rank.

    name, shape: of the whole parameter. offset: first element of the piece in the flattened parameter.
    tensors: kind -> live 1-D view of `numel` elements; writing to it changes the training state.
    steps: live 0-D count of the optimizer steps taken, None for a frozen parameter.
    owned: [start, end) within the piece that this rank writes; pieces that other ranks hold too are split between them.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    tensors: dict[str, torch.Tensor]
    steps: torch.Tensor | None
    owned: tuple[int, int]

    @property
    def numel(self) -> int:
        return self.tensors["weight"].numel()


def fragments(engine: Any, adamw: TowerAdamW, shapes: Mapping[str, tuple[int, ...]], world: World) -> list[Fragment]:
    """Return this rank's fragments of every parameter of a DeepSpeed engine, in the model's order.

    shapes: parameter name -> shape before ZeRO-3 took the parameters apart.
    """
    found: list[Fragment] = []
    optimizer = engine.optimizer
    locate = _locator(optimizer, adamw)
    maps = {}
    for sub_group in file_groups(optimizer):
        flat = optimizer.fp32_partitioned_groups_flat[sub_group]
        maps[flat] = map_state(optimizer, sub_group, adamw.state[flat])
    for name, parameter in engine.module.named_parameters():
        shape = shapes[name]
        if not parameter.requires_grad:
            found.extend(_frozen(name, shape, parameter, world))
            continue
        piece = locate(parameter)
        if piece is None:
            continue
        flat, start, numel, offset = piece
        numel = min(numel, torch.Size(shape).numel() - offset)  # the last rank's partition is padded
        if numel <= 0:
            continue
        state = adamw.state[flat]
        tensors = maps.get(flat) or {"weight": flat, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        found.append(
            Fragment(
                name=name,
                shape=shape,
                offset=offset,
                tensors={kind: value.detach().view(-1).narrow(0, start, numel) for kind, value in tensors.items()},
                steps=state["step"],
                owned=(0, numel) if optimizer is not adamw else _share(numel, world),
            )
        )
    return found


def fill_optimizer_state(optimizer: Any, adamw: TowerAdamW) -> None:
    """Create AdamW's zero state for whatever tensors the stage really optimizes."""
    files = file_groups(optimizer)
    for sub_group, flat in enumerate(getattr(optimizer, "fp32_partitioned_groups_flat", ())):
        with in_memory(optimizer, sub_group, write=True) if sub_group in files else nullcontext():
            adamw.fill_parameter_state(flat)
    adamw.fill_state()


def publish_weights(engine: Any) -> None:
    """Derive the (low-precision, gathered) weights that the model computes with from the fp32 fragments; collective."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._partition_all_parameters()
        for sub_group in range(len(optimizer.fp16_groups)):
            if not in_files(optimizer, sub_group):
                optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
                continue
            flush_state(optimizer, sub_group)
            with in_memory(optimizer, sub_group, write=False):
                optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.invalidate_secondary_tensor()  # hpZ would gather its copy of the weights before
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def _locator(optimizer: Any, adamw: TowerAdamW) -> Any:
    """Return parameter -> (flat fp32 tensor, start in it, numel, offset in the parameter), None where it has none."""
    if optimizer is adamw:
        return lambda parameter: (parameter, 0, parameter.numel(), 0)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):

        def locate_sharded(parameter: nn.Parameter) -> tuple[torch.Tensor, int, int, int]:
            group, start, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            rank = optimizer._get_param_partition_rank(parameter)
            return optimizer.fp32_partitioned_groups_flat[group], start, numel, rank * numel

        return locate_sharded
    flat_groups = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition

    def locate_mapped(parameter: Any) -> tuple[torch.Tensor, int, int, int] | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        high, low = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
        return flat_groups[mapping.param_group_index], high.start, high.numel, low.start

    return locate_mapped


def _frozen(name: str, shape: tuple[int, ...], parameter: Any, world: World) -> Iterator[Fragment]:
    total = torch.Size(shape).numel()
    if hasattr(parameter, "ds_tensor"):
        flat = parameter.ds_tensor.detach().view(-1)
        offset = world.rank * flat.numel()
        flat = flat.narrow(0, 0, max(0, min(flat.numel(), total - offset)))
        owned = (0, flat.numel())
    else:
        flat, offset = parameter.detach().view(-1), 0
        owned = _share(total, world)
    if flat.numel():
        yield Fragment(name=name, shape=shape, offset=offset, tensors={"weight": flat}, steps=None, owned=owned)


def _share(numel: int, world: World) -> tuple[int, int]:
    return numel * world.rank // world.size, numel * (world.rank + 1) // world.size
