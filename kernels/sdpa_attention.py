"""Attention over key intervals by torch's own fused CPU kernel, strip by strip of tiles.segments: the fast CPU path.

A strip is a few dozen to a few hundred query rows and the window of keys they share. A mask exists only for the part of
the window in which the rows differ; the open part is a call of its own where it is large, merged by its lse. Heads that
share a key/value head are a batch dimension of stride 0, so keys are never repeated. Spec: reference_attention.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from triweave.kernels.reference import accumulation_dtype
from triweave.kernels.reference_attention import Strip, strips

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, kv_lo: Tensor, kv_hi: Tensor, segments: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out [B, S, H, K], lse [B, H, S])."""
    groups, per_group = k.shape[2], q.shape[2] // k.shape[2]
    out = q.new_zeros(q.shape)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=accumulation_dtype(q.dtype))
    out_heads, lse_heads = _by_group(out, groups), lse.unflatten(1, (groups, per_group))
    q_heads, k_heads, v_heads = _by_group(q, groups), _shared(k, per_group), _shared(v, per_group)
    for strip in strips(segments):
        row, rows = strip.batch_row, strip.rows
        partial = [
            _fused(
                q_heads[row, :, :, rows],
                k_heads[row, :, :, keys],
                v_heads[row, :, :, keys],
                0.0,
                False,
                attn_mask=bias,
                scale=scale,
            )
            for keys, bias in _pieces(strip, kv_lo, kv_hi, q.dtype)
        ]
        strip_out, strip_lse = partial[0] if len(partial) == 1 else _merged(*partial)
        out_heads[row, :, :, rows] = strip_out
        lse_heads[row, :, :, rows] = strip_lse
    return out, lse


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_lo: Tensor,
    kv_hi: Tensor,
    segments: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv); a key's contributions are added in the order of the strips, in fp32 for narrower inputs."""
    groups, per_group = k.shape[2], q.shape[2] // k.shape[2]
    wide = accumulation_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    grad_heads, out_heads, dq_heads = (_by_group(x, groups) for x in (grad, out, dq))
    lse_heads = lse.unflatten(1, (groups, per_group))
    q_heads, k_heads, v_heads = _by_group(q, groups), _shared(k, per_group), _shared(v, per_group)
    dk_heads, dv_heads = dk.transpose(1, 2), dv.transpose(1, 2)
    for strip in strips(segments):
        row, rows = strip.batch_row, strip.rows
        for keys, bias in _pieces(strip, kv_lo, kv_hi, q.dtype):
            strip_dq, strip_dk, strip_dv = _fused_backward(
                grad_heads[row, :, :, rows],
                q_heads[row, :, :, rows],
                k_heads[row, :, :, keys],
                v_heads[row, :, :, keys],
                out_heads[row, :, :, rows],
                lse_heads[row, :, :, rows],
                0.0,
                False,
                attn_mask=bias,
                scale=scale,
            )
            dq_heads[row, :, :, rows] += strip_dq
            dk_heads[row, :, keys] += _over_group(strip_dk, wide)
            dv_heads[row, :, keys] += _over_group(strip_dv, wide)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """View [B, S, H, K] as [B, G, H/G, S, K]."""
    return x.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)


def _shared(x: Tensor, per_group: int) -> Tensor:
    """View [B, T, G, K] as [B, G, H/G, T, K], the heads of a group sharing memory."""
    return x.transpose(1, 2).unsqueeze(2).expand(-1, -1, per_group, -1, -1)


def _over_group(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum [G, H/G, T, K] over the heads of each group."""
    return x.squeeze(1) if x.shape[1] == 1 else x.sum(1, dtype=dtype)


def _pieces(strip: Strip, kv_lo: Tensor, kv_hi: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor | None]]:
    """Yield (keys, what to add to their scores): None for the open part, 0 or -inf [1, 1, rows, keys] for the rest."""
    if strip.open_end > strip.key_start:
        yield slice(strip.key_start, strip.open_end), None
    if strip.open_end < strip.key_end:
        keys = slice(strip.open_end, strip.key_end)
        hidden = strip.hidden(kv_lo, kv_hi, keys)
        yield keys, torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)[None, None]


def _merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return attention over both sets of keys from the (out, lse) of each."""
    lse = torch.logaddexp(first[1], second[1])
    shares = (torch.exp(part[1] - lse).unsqueeze(-1) for part in (first, second))
    return torch.add(*(part[0] * share for part, share in zip((first, second), shares, strict=True))), lse
