"""What the late family fuses: one pooled feature per part of a document that was encoded alone.

    feature   x_c = mean over the segment c's final hidden states                        [C, D]
    modality  X[n, m] = mean over the features of item n's parts of modality m           [N, M, D], 0 where it has none

An item is the set of segments of one document (`data_pipeline.batch.Segments`). Features of an absent modality are
exactly 0, whatever else the batch holds, and `present` says so.

C segments, N items, M fused modalities, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class PartFeatures(NamedTuple):
    """Parts of items as vectors; a named tuple so that ZeRO-3 can look inside.

    features: [C, D]. slots: int64 [C] place of the part's modality among the fused ones, -1 for parts that are not
    fused. items: int64 [C] item of the part, from 0. number: items N.
    """

    features: Tensor
    slots: Tensor
    items: Tensor
    number: int


class ModalityFeatures(NamedTuple):
    """Items by modality: values [N, M, D] and present, bool [N, M]."""

    values: Tensor
    present: Tensor


def matrix(*shape: int, fan_in: int) -> nn.Parameter:
    """Return a parameter that `model.initialise` draws with deviation 1 / sqrt(fan_in).

    Products of several factors vanish when each of them starts small.
    """
    parameter = nn.Parameter(torch.empty(shape))
    parameter.initial_std = fan_in**-0.5  # type: ignore[attr-defined]
    return parameter


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear map without bias whose weight is a `matrix`."""
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.weight = matrix(outputs, inputs, fan_in=inputs)
    return layer


def membership(parts: PartFeatures, modalities: int) -> Tensor:
    """Return [N * M, C]: 1 where the part is of that item and modality, in the features' dtype.

    Sums over parts are products with it: that order of additions is fixed, on a GPU too.
    """
    rows = torch.arange(parts.number * modalities, device=parts.slots.device)
    own = torch.where(parts.slots >= 0, parts.items * modalities + parts.slots, -1)
    return (rows[:, None] == own[None, :]).to(parts.features.dtype)


def by_modality(parts: PartFeatures, modalities: int) -> ModalityFeatures:
    """Return the mean feature of every item and modality."""
    of = membership(parts, modalities)
    counts = of.sum(1)
    used = parts.features.masked_fill((parts.slots < 0)[:, None], 0)  # 0 x NaN would spread from parts left out
    means = (of @ used) / counts.clamp_min(1)[:, None]
    width = parts.features.shape[1]
    return ModalityFeatures(means.view(parts.number, modalities, width), (counts > 0).view(parts.number, modalities))
