"""Gated cross-attention in plain torch, on top of attention over intervals. Spec, CPU path and oracle.

A_i = attention of q_i over media_lo_i <= j < media_hi_i; t_h = tanh(gate_h); out_i = t_h A_i.
dA_i = t_h g_i; dgate_h = (1 - t_h^2) sum_i g_i . A_i, the sum over all rows of all packs.
A_i is kept beside out_i, for a closed gate (0, where training starts) makes out_i 0 and still has a gradient.
`attend` and `differentiate` are forward and backward of an attention on the strips of tiles.segments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from triweave.kernels.reference import accumulation_dtype


def cross_attention_forward(
    attend: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    media_lo: Tensor,
    media_hi: Tensor,
    gate: Tensor,
    segments: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out [B, S, H, K], A [B, S, H, K], its lse [B, H, S]), A rounded to q's dtype and then gated."""
    attended, lse = attend(q, k, v, media_lo, media_hi, segments, scale)
    return (attended * _opening(gate, q.dtype)).to(q.dtype), attended, lse


def cross_attention_backward(
    differentiate: Callable[..., tuple[Tensor, Tensor, Tensor]],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    lse: Tensor,
    media_lo: Tensor,
    media_hi: Tensor,
    gate: Tensor,
    segments: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv, dgate [H]) of out's gradient `grad` from the stored A and lse."""
    opening = _opening(gate, q.dtype)
    gated_grad = (grad * opening).to(q.dtype)
    dq, dk, dv = differentiate(gated_grad, q, k, v, attended, lse, media_lo, media_hi, segments, scale)
    delta = torch.linalg.vecdot(grad.to(opening.dtype), attended.to(opening.dtype))
    delta = delta.masked_fill(lse.transpose(1, 2) == -torch.inf, 0)  # what sees no key has no gradient, whatever it is
    return dq, dk, dv, gate_gradient(gate, delta.sum((0, 1)))


def gate_gradient(gate: Tensor, delta_sums: Tensor) -> Tensor:
    """Return dgate [H], in gate's dtype, of the sums of g . A over all rows of each head."""
    opening = torch.tanh(gate.to(delta_sums.dtype))
    return ((1 - opening.square()) * delta_sums).to(gate.dtype)


def _opening(gate: Tensor, dtype: torch.dtype) -> Tensor:
    """Return tanh(gate) [H, 1] in the dtype that sums over inputs of `dtype` are taken in."""
    return torch.tanh(gate.to(accumulation_dtype(dtype))).unsqueeze(-1)
