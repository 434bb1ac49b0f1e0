"""What the state of training takes on one rank: by formula, and counted from the tensors that are there.

    fp32   ZeRO 0   4 w + 4 g + 8 m                weights, gradients, two moments, all replicated
           ZeRO 1   4 w + 4 g + (4 + 8) / N        a partition of the weights beside the whole ones
           ZeRO 2   4 w +      (4 + 4 + 8) / N     and ZeRO 1 with one micro-batch a step
           ZeRO 3              (4 + 4 + 4 + 8) / N the partition that is gathered, and its fp32 copy
    bf16   the whole weights, and at ZeRO 3 the gathered partition, take 2 instead of 4; gradients stay fp32

in bytes a parameter, N ranks (Rajbhandari et al. 2020, section 5, for fp32 gradients and no fp16). Activations, padding
and what a bucket holds while it is reduced come on top.
"""

from __future__ import annotations

import gc
from typing import Any, Literal

import torch
from torch import nn

MASTER, GRADIENT, MOMENTS = 4, 4, 8
"""Bytes a parameter of the fp32 weights, of the fp32 gradient, of AdamW's two moments."""


def state_bytes_per_parameter(
    stage: int, ranks: int, precision: Literal["fp32", "bf16"] = "fp32", *, accumulation: int = 1
) -> float:
    """Return the bytes of weights, gradients and optimizer state per parameter of the model on one of `ranks` ranks.

    accumulation: micro-batches of a step; ZeRO 1 keeps whole gradients until the last one.
    """
    weight = 2 if precision == "bf16" else MASTER
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
