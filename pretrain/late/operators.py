"""Operators of the late family that add, weigh or pass on features; `late.bilinear` has those that multiply them.

x_m is item n's feature of modality m (`late.features.by_modality`), p_m is 1 where the item has one, else 0. Every
operator maps to the width D that heads read, and an item's result depends on the modalities it has only:

    concatenation  z = B silu(A [p_1 x_1; ...; p_M x_M])                                   A: D x M D, B: D x D
    vote           z = sum_m v_m W_m x_m,  v = softmax over the present m of a             W_m: D x D, a: M numbers
    hybrid         the same vote with one more member, the concatenation's z               a: M + 1 numbers
    attention      z = sum_m v_m V_m x_m,  v = softmax over the present m of u . tanh(W_m x_m)
    graph          nodes are the parts, edges join all parts of a document, L rounds of
                   h_i <- h_i + silu(S h_i + sum_m mean over the neighbours j of modality m of R_m h_j)
                   z = mean over the nodes of T h_i

A linear head C after `vote` gives  C z = sum_m v_m (C W_m x_m):  a weighted mean of one vote of logits per modality.
An item without any fused part becomes 0.

Concatenation, vote and hybrid are the three ways of Baltrusaitis, Ahuja, Morency 2018 (Multimodal Machine Learning,
section 4) and of facebookresearch MMF; attention is that of Hori et al. 2017 (Attention-Based Multimodal Fusion for
Video Description); the graph is a relational graph convolution, Schlichtkrull et al. 2018, with a residual. MMF and
MultiBench (Liang et al. 2021) were the lists of what belongs here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from triweave.pretrain.late.config import LateConfig
from triweave.pretrain.late.features import PartFeatures, by_modality, linear, matrix, membership


class Concatenation(nn.Module):
    """z = B silu(A [p_1 x_1; ...; p_M x_M])."""

    def __init__(self, config: LateConfig, width: int) -> None:
        super().__init__()
        self.modalities = len(config.modalities)
        self.joined = linear(self.modalities * width, width)
        self.out = linear(width, width)

    def forward(self, parts: PartFeatures) -> Tensor:
        """Return [N, D]."""
        return self.join(by_modality(parts, self.modalities).values)

    def join(self, values: Tensor) -> Tensor:
        """Map values [N, M, D], 0 where absent, to [N, D]."""
        joined: Tensor = self.out(nn.functional.silu(self.joined(values.flatten(1))))
        return joined


class Vote(nn.Module):
    """z = sum_m v_m W_m x_m,  v = softmax over the present m of a; a starts at 0, the plain mean."""

    def __init__(self, config: LateConfig, width: int) -> None:
        super().__init__()
        self.modalities = len(config.modalities)
        self.members = matrix(self.modalities, width, width, fan_in=width)
        self.votes = nn.Parameter(torch.zeros(self.modalities))

    def forward(self, parts: PartFeatures) -> Tensor:
        """Return [N, D]."""
        values, present = by_modality(parts, self.modalities)
        return weighted(torch.einsum("nmd,mde->nme", values, self.members), self.votes.expand(present.shape), present)


class Hybrid(nn.Module):
    """The vote of every modality and of their concatenation."""

    def __init__(self, config: LateConfig, width: int) -> None:
        super().__init__()
        self.modalities = len(config.modalities)
        self.members = matrix(self.modalities, width, width, fan_in=width)
        self.votes = nn.Parameter(torch.zeros(self.modalities + 1))
        self.concatenation = Concatenation(config, width)

    def forward(self, parts: PartFeatures) -> Tensor:
        """Return [N, D]."""
        values, present = by_modality(parts, self.modalities)
        alone = torch.einsum("nmd,mde->nme", values, self.members)
        members = torch.cat([alone, self.concatenation.join(values)[:, None]], dim=1)
        votes = torch.cat([present, present.any(1, keepdim=True)], dim=1)
        return weighted(members, self.votes.expand(votes.shape), votes)


class ModalityAttention(nn.Module):
    """z = sum_m v_m V_m x_m,  v = softmax over the present m of u . tanh(W_m x_m)."""

    def __init__(self, config: LateConfig, width: int) -> None:
        super().__init__()
        self.modalities = len(config.modalities)
        self.keys = matrix(self.modalities, width, width, fan_in=width)
        self.values = matrix(self.modalities, width, width, fan_in=width)
        self.query = matrix(1, width, fan_in=width)

    def forward(self, parts: PartFeatures) -> Tensor:
        """Return [N, D]."""
        values, present = by_modality(parts, self.modalities)
        scores = torch.tanh(torch.einsum("nmd,mde->nme", values, self.keys)) @ self.query[0]
        return weighted(torch.einsum("nmd,mde->nme", values, self.values), scores, present)


class SpanGraph(nn.Module):
    """Rounds of messages between all parts of a document, by the modality they come from; then the nodes' mean."""

    def __init__(self, config: LateConfig, width: int) -> None:
        super().__init__()
        self.modalities = len(config.modalities)
        self.own = matrix(config.layers, width, width, fan_in=width)
        self.relations = matrix(config.layers, self.modalities, width, width, fan_in=width)
        self.out = linear(width, width)

    def forward(self, parts: PartFeatures) -> Tensor:
        """Return [N, D]."""
        fused = parts.slots >= 0
        of = membership(parts, self.modalities)
        nodes = parts.features.masked_fill(~fused[:, None], 0)
        slots = torch.arange(self.modalities, device=parts.slots.device)
        itself = (parts.slots[:, None] == slots).to(nodes.dtype)
        shape = (parts.number, self.modalities, nodes.shape[1])
        neighbours = of.sum(1).view(shape[:2])[parts.items] - itself
        for own, relations in zip(self.own, self.relations, strict=True):
            sums = (of @ nodes).view(shape)[parts.items] - itself[:, :, None] * nodes[:, None]
            means = sums / neighbours.clamp_min(1)[:, :, None]
            # a lone part's own sum minus itself may round to a last bit that is not 0
            means = means * (neighbours > 0)[:, :, None]
            heard = nn.functional.silu(nodes @ own + torch.einsum("cmd,mde->ce", means, relations))
            nodes = (nodes + heard).masked_fill(~fused[:, None], 0)
        whole = of.view(*shape[:2], len(nodes)).sum(1)
        mean = (whole @ nodes) / whole.sum(1).clamp_min(1)[:, None]
        result: Tensor = self.out(mean)
        return result


def weighted(members: Tensor, scores: Tensor, present: Tensor) -> Tensor:
    """Return sum_m softmax(scores)_m members_m over the present m, 0 where none is: [N, M, D], [N, M] -> [N, D].

    Absent members have weight 0 exactly and give no gradient to their scores.
    """
    lowest = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(~present, lowest).softmax(1) * present
    return torch.einsum("nm,nmd->nd", weights.to(members.dtype), members)
