"""What the state of training takes on one rank: by formula, and counted from the tensors that are there.

    fp32   ZeRO 0   4 w + 4 g + 8 m                weights, gradients, two moments, all replicated
           ZeRO 1   4 w + 4 g + (4 + 8) / N        a partition of the weights beside the whole ones
           ZeRO 2   4 w +      (4 + 4 + 8) / N     and ZeRO 1 with one micro-batch a step
           ZeRO 3              (4 + 4 + 4 + 8) / N the partition that is gathered, and its fp32 copy
    bf16, fp16: the whole weights, and at ZeRO 3 the gathered partition, take 2 instead of 4; gradients stay fp32

in bytes a parameter, N ranks (Rajbhandari et al. 2020, section 5, for fp32 gradients and no fp16). Activations, padding
and what a bucket holds while it is reduced come on top; so do, at ZeRO 1 and 2 with one micro-batch a step, whole
gradients of the matrices that a partition ends in (`straddling_bytes`), at most two matrices a group.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from triweave.pretrain.engine.config import Precision

MASTER, GRADIENT, MOMENTS = 4, 4, 8
"""Bytes a parameter of the fp32 weights, of the fp32 gradient, of AdamW's two moments."""
PARTITION_ALIGNMENT = 2
"""Elements whose multiples DeepSpeed makes partitions of."""


def state_bytes_per_parameter(stage: int, ranks: int, precision: Precision = "fp32", *, accumulation: int = 1) -> float:
    """Return the bytes of weights, gradients and optimizer state per parameter of the model on one of `ranks` ranks.

    accumulation: micro-batches of a step; ZeRO 1 keeps whole gradients until the last one.
    """
    weight = MASTER if precision == "fp32" else 2
    if stage == 0:
        return MASTER + GRADIENT + MOMENTS
    sharded = MASTER + MOMENTS
    whole = weight
    if stage == 1 and accumulation > 1:
        whole += GRADIENT
    else:
        sharded += GRADIENT
    if stage == 3:
        whole, sharded = 0, sharded + weight
    return whole + sharded / ranks


def straddling_bytes(groups: Sequence[Sequence[int]], ranks: int, rank: int) -> int:
    """Return the bytes of gradient that a rank holds beside its partitions at ZeRO 1 and 2, one micro-batch a step.

    DeepSpeed 0.19.8 keeps the gradient of a parameter whole where any of it is in the partition. A partition is
    ceil(elements of the group / 2 N) * 2 of the group's flat elements, in order.

    groups: elements of each parameter of each optimizer group.
    """
    beside = 0
    for sizes in groups:
        length = -(-sum(sizes) // (PARTITION_ALIGNMENT * ranks)) * PARTITION_ALIGNMENT
        first, end, place = rank * length, (rank + 1) * length, 0
        for size in sizes:
            inside = min(place + size, end) - max(place, first)
            beside += size - inside if inside > 0 else 0
            place += size
    return GRADIENT * beside


def tensor_bytes(*roots: Any) -> int:
    """Return the bytes of all tensors that Python holds now, gradients included, each storage once.

    roots: modules whose parameters' gradients count too, which only the parameters themselves know.
    """
    storages: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # a wrapper (of vmap's, say): the tensor inside has the bytes
            return
        storages[storage.data_ptr()] = storage.nbytes()

    gc.collect()
    for found in gc.get_objects():
        # By type: isinstance asks objects for __class__, at which some of torch's own warn; subclasses hold no bytes
        # themselves (fake ones none at all).
        if type(found) in (torch.Tensor, nn.Parameter) and found.layout is torch.strided and not found.is_meta:
            count(found)
    for root in roots:
        assert isinstance(root, nn.Module)
        for parameter in root.parameters():
            if parameter.grad is not None:
                count(parameter.grad)
    return sum(storages.values())
