"""Operators of the late family that multiply the features of modalities: MFB, MUTAN, LMF and TFN.

x_m is an item's feature of modality m, y_m = P_m x_m its projection to width d (P_m: D x d), R the rank, * the product
number by number, O D x d or D x (d + 1)^M:

    mfb    z = O n(sum over R of prod*_m (U_m x_m))      U_m: D x d R, pooled R by R; n(s) = t / |t|, t = s / sqrt|s|
    mutan  z = O sum_r prod*_m (A_mr tanh(y_m))          A_mr: d x d; a Tucker tensor whose core has rank R
    tfn    z = O flatten([1; y_1] outer ... outer [1; y_M])
    lmf    z = sum_r prod*_m (F_mr [1; y_m])             F_mr: (d + 1) x D; tfn with O = sum_r F_1r outer ... outer F_Mr

A modality that an item lacks is left out of the product: its factor is 1 in mfb and mutan, and its vector is [1; 0] in
lmf and tfn, which leaves the terms that do not speak of it. So one modality alone still gives a result, linear or
nearly so, and an absent one gets gradients of exactly 0. n has 1e-6 under both roots, so that it is smooth at 0. The
result of an item without any fused part is 0.

Yu et al. 2017 (Multi-modal Factorized Bilinear Pooling); Ben-younes et al. 2017 (MUTAN, equation 8); Liu et al. 2018
(Efficient Low-rank Multimodal Fusion); Zadeh et al. 2017 (Tensor Fusion Network). The papers of the first two fuse two
modalities; the product over M is theirs for M = 2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from triweave.pretrain.late.config import LateConfig
from triweave.pretrain.late.features import ModalityFeatures, PartFeatures, by_modality, linear, matrix

SMOOTH = 1e-6
"""Under the square roots of MFB's two normalisations."""


class Bilinear(nn.Module, ABC):
    """What the four have in common: features by modality in, a product of M factors, [N, D] out."""

    def __init__(self, config: LateConfig, width: int) -> None:  # noqa: ARG002 - operators are made alike
        super().__init__()
        self.modalities = len(config.modalities)

    def forward(self, parts: PartFeatures) -> Tensor:
        """Return [N, D], 0 for an item without fused parts."""
        found = by_modality(parts, self.modalities)
        return self.fuse(found) * found.present.any(1, keepdim=True)

    @abstractmethod
    def fuse(self, found: ModalityFeatures) -> Tensor:
        """Return [N, D] of values [N, M, D] and present [N, M]."""


class FactorizedBilinear(Bilinear):
    """MFB: the product of two (or M) projections, sum-pooled, with power and L2 normalisation."""

    def __init__(self, config: LateConfig, width: int) -> None:
        super().__init__(config, width)
        self.rank = config.rank
        self.factors = matrix(self.modalities, width, config.width * config.rank, fan_in=width)
        self.out = linear(config.width, width)

    def fuse(self, found: ModalityFeatures) -> Tensor:
        """Return O n(pooled product)."""
        factors = torch.einsum("nmd,mde->nme", found.values, self.factors)
        pooled = present_product(factors, found.present).unflatten(1, (-1, self.rank)).sum(2)
        powered = pooled * (pooled.abs() + SMOOTH).rsqrt()
        result: Tensor = self.out(powered * (powered.square().sum(1, keepdim=True) + SMOOTH).rsqrt())
        return result


class Mutan(Bilinear):
    """MUTAN: projections to d, then R products of d x d maps of them, summed."""

    def __init__(self, config: LateConfig, width: int) -> None:
        super().__init__(config, width)
        self.projections = matrix(self.modalities, width, config.width, fan_in=width)
        self.terms = matrix(config.rank, self.modalities, config.width, config.width, fan_in=config.width)
        self.out = linear(config.width, width)

    def fuse(self, found: ModalityFeatures) -> Tensor:
        """Return O sum_r prod_m A_mr tanh(P_m x_m)."""
        projected = torch.tanh(torch.einsum("nmd,mde->nme", found.values, self.projections))
        factors = torch.einsum("nmd,rmde->rnme", projected, self.terms)
        result: Tensor = self.out(sum_of_products(factors, found.present))
        return result


class LowRankTensor(Bilinear):
    """LMF: TFN whose weight is a sum of R outer products, never built."""

    def __init__(self, config: LateConfig, width: int) -> None:
        super().__init__(config, width)
        self.projections = matrix(self.modalities, width, config.width, fan_in=width)
        self.factors = matrix(config.rank, self.modalities, 1 + config.width, width, fan_in=1 + config.width)

    def fuse(self, found: ModalityFeatures) -> Tensor:
        """Return sum_r prod_m F_mr [1; P_m x_m]."""
        extended = with_one(torch.einsum("nmd,mde->nme", found.values, self.projections))
        return torch.einsum("nmd,rmde->rnme", extended, self.factors).prod(2).sum(0)


class FullTensor(Bilinear):
    """TFN: one weight for every product of at most one number of each modality."""

    def __init__(self, config: LateConfig, width: int) -> None:
        super().__init__(config, width)
        self.projections = matrix(self.modalities, width, config.width, fan_in=width)
        self.out = linear((1 + config.width) ** self.modalities, width)

    def fuse(self, found: ModalityFeatures) -> Tensor:
        """Return O flatten(outer product of all [1; P_m x_m])."""
        extended = with_one(torch.einsum("nmd,mde->nme", found.values, self.projections))
        outer = extended[:, 0]
        for modality in range(1, self.modalities):
            outer = torch.einsum("na,nb->nab", outer, extended[:, modality]).flatten(1)
        result: Tensor = self.out(outer)
        return result


def present_product(factors: Tensor, present: Tensor) -> Tensor:
    """Return the product over the present modalities: [..., N, M, E] and bool [N, M] -> [..., N, E]."""
    return factors.masked_fill(~present[:, :, None], 1).prod(-2)


def sum_of_products(factors: Tensor, present: Tensor) -> Tensor:
    """Return sum over r of the product over the present m: [R, N, M, E] -> [N, E]."""
    return present_product(factors, present).sum(0)


def with_one(projected: Tensor) -> Tensor:
    """Return [..., 1 + E]: a one before the numbers of the last axis."""
    return torch.cat([torch.ones_like(projected[..., :1]), projected], dim=-1)
