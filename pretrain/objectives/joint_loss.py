"""The objectives' sums joined into one loss, with learnt weights where `model.joint_loss` asks for them.

    fixed, loss_rate   sum_k f_k S_k
    uncertainty        sum_k f_k exp(-s_k) S_k  +  sum_k w_k s_k,  s_k learnt, 0 at first

S_k is the sum of objective k over a micro-batch and f_k its factor: weight w_k over the count of the whole step, so
that the sums of all micro-batches and ranks add up to w_k times the mean. For Gaussian noise this is twice the loss of
Kendall, Gal and Cipolla (2018), s = log sigma^2; it is least at s_k = log of the mean. The term w_k s_k comes once a
step, from `Engine`, and only for objectives that the step has trained: else s_k would fall for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class JointLoss(nn.Module):
    """Joins sums; with `learnt` it owns log_variances [T], one for each objective in the order of `objectives`."""

    def __init__(self, objectives: Sequence[str], *, learnt: bool) -> None:
        super().__init__()
        self.objectives = tuple(objectives)
        if learnt:
            self.log_variances = nn.Parameter(torch.zeros(len(self.objectives)))
        self.learnt = learnt

    def forward(self, sums: Mapping[str, Tensor], factors: Mapping[str, float]) -> tuple[Tensor, Tensor | None]:
        """Return the scalar sum over the objectives in `sums`, and a copy of the log-variances [T], fp32 with gradient.

        Without learnt weights the latter is None.
        """
        if not self.learnt:
            return torch.stack([total * factors[name] for name, total in sums.items()]).sum(), None
        log_variances = self.log_variances.float() * 1  # a copy: the parameter itself is only whole in here
        precisions = torch.exp(-log_variances)
        parts = [
            total.float() * factors[name] * precisions[self.objectives.index(name)] for name, total in sums.items()
        ]
        return torch.stack(parts).sum(), log_variances
