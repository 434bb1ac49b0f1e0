"""Head: what turns hidden states into the loss sum of one objective."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from triweave.pretrain.batch import DeviceBatch
from triweave.pretrain.objectives.losses import HeadSums


class Head(nn.Module, ABC):
    """A head owns its parameters directly: under ZeRO-3 they are whole only in its own forward."""

    def forward(self, hidden: Tensor, batch: DeviceBatch, *, idle: bool = False) -> HeadSums:
        """Return the sums over the batch's rows of the objective, from hidden [B, S, D].

        idle: compute nothing, but take part: a sum of 0 that gives every parameter a gradient of exactly 0.
        """
        if idle:
            return HeadSums.of(torch.stack([(parameter.float() * 0).sum() for parameter in self.parameters()]).sum())
        return self.sums(hidden, batch)

    @abstractmethod
    def sums(self, hidden: Tensor, batch: DeviceBatch) -> HeadSums:
        """Return the unnormalised sums of a micro-batch; without rows 0, and gradients of exactly 0."""


def mean_states(hidden: Tensor, index: Tensor, lengths: Tensor) -> Tensor:
    """Return fp32 [C, D], the mean of hidden [B, S, D] over each run of flat positions; index [sum(lengths)]."""
    states = hidden.flatten(0, 1)[index].float()
    summed = torch.segment_reduce(states, "sum", lengths=lengths, axis=0, unsafe=True)
    return summed / lengths[:, None]
