"""Gated cross-attention in Triton: the kernels of attention_triton.py with the gate in their epilogues.

    out_i = t_h A_i;  delta_i = g_i . A_i = sum_j p_ij (g_i . v_j);  dgate_h = (1 - t_h^2) sum_i delta_i
    ds_ij = t_h p_ij (g_i . v_j - delta_i);  dv_j = sum_i t_h p_ij g_i

The forward writes out once and A never: the kernel for dq sums delta in a pass of its own over the tiles, so that a
closed gate (t = 0) has its gradient all the same. Counted in bytes and products, to read the few media tokens of a
query twice costs less than to store and read A; no time has been measured. t = tanh(gate) [H] is made by torch.
Sources: Alayrac et al. 2022, Flamingo (tanh-gated cross-attention); Dao 2023, FlashAttention-2 (delta).
"""

from __future__ import annotations

import torch
from torch import Tensor

from triweave.kernels.attention_triton import launch_backward, launch_forward
from triweave.kernels.reference_cross_attention import gate_gradient


def cross_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    media_lo: Tensor,
    media_hi: Tensor,
    gate: Tensor,
    lists: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out [B, S, H, K], nothing [0], lse [B, H, S]); `lists` is what tile_lists returned, or made here."""
    opening = torch.tanh(gate.float())
    out, lse = launch_forward("cross_attention", q, k, v, media_lo, media_hi, lists, scale, opening)
    return out, q.new_empty(0), lse


def cross_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _: Tensor,
    lse: Tensor,
    media_lo: Tensor,
    media_hi: Tensor,
    gate: Tensor,
    lists: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv, dgate), contiguous, of out's gradient `grad` from the stored lse alone."""
    opening = torch.tanh(gate.float())
    dq, dk, dv, delta = launch_backward(
        "cross_attention", grad, q, k, v, None, lse, media_lo, media_hi, lists, scale, opening
    )
    return dq, dk, dv, gate_gradient(gate, delta.sum((0, 2)))
