"""Attention over key intervals by torch's own fused CPU kernel, strip by strip of tiles.segments: the fast CPU path.

A strip is a few dozen to a few hundred query rows and the window of keys they share. A mask exists only for the part of
the window in which the rows differ, and not if that is a triangle, for torch has a causal path; the open part is a call
of its own where it is large, merged by its lse. Strips that together are one long causal triangle at the start of a
document are one call. Heads that share a key/value head are a batch dimension of stride 0, so keys are never repeated.
Spec: reference_attention.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from triweave.kernels.reference import accumulation_dtype
from triweave.kernels.reference_attention import Strip, strips

CAUSAL_ROWS = 2048
"""Fewest rows of a causal triangle that one call of torch's causal path does faster than the strips."""

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True, kw_only=True)
class Part:
    """Keys that the rows of a strip see in one call of the fused kernel.

    bias: what to add to their scores, 0 or -inf [1, 1, rows, keys]; None for nothing. causal: row i of the strip sees
    the first i + 1 keys.
    """

    keys: slice
    bias: Tensor | None = None
    causal: bool = False


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, kv_lo: Tensor, kv_hi: Tensor, segments: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out [B, S, H, K], lse [B, H, S])."""
    groups, per_group = k.shape[2], q.shape[2] // k.shape[2]
    out = q.new_zeros(q.shape)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=accumulation_dtype(q.dtype))
    out_heads, lse_heads = _by_group(out, groups), lse.unflatten(1, (groups, per_group))
    q_heads, k_heads, v_heads = _by_group(q, groups), _shared(k, per_group), _shared(v, per_group)
    for row, rows, parts in _calls(segments, kv_lo, kv_hi, q.dtype):
        partial = [
            _fused(
                q_heads[row, :, :, rows],
                k_heads[row, :, :, part.keys],
                v_heads[row, :, :, part.keys],
                0.0,
                part.causal,
                attn_mask=part.bias,
                scale=scale,
            )
            for part in parts
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
    for row, rows, parts in _calls(segments, kv_lo, kv_hi, q.dtype):
        for part in parts:
            strip_dq, strip_dk, strip_dv = _fused_backward(
                grad_heads[row, :, :, rows],
                q_heads[row, :, :, rows],
                k_heads[row, :, :, part.keys],
                v_heads[row, :, :, part.keys],
                out_heads[row, :, :, rows],
                lse_heads[row, :, :, rows],
                0.0,
                part.causal,
                attn_mask=part.bias,
                scale=scale,
            )
            dq_heads[row, :, :, rows].add_(strip_dq)
            dk_heads[row, :, part.keys].add_(_over_group(strip_dk, wide))
            dv_heads[row, :, part.keys].add_(_over_group(strip_dv, wide))
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


def _calls(
    segments: Tensor, kv_lo: Tensor, kv_hi: Tensor, dtype: torch.dtype
) -> Iterator[tuple[int, slice, Iterator[Part]]]:
    """Yield (batch row, query rows, their parts), every strip of the table in order, a long causal start as one."""
    offsets = _diagonals(segments, kv_lo, kv_hi)
    pairs = zip(strips(segments), offsets, strict=True)
    for (batch_row, key_start), group in groupby(pairs, lambda pair: (pair[0].batch_row, pair[0].key_start)):
        document = list(group)
        row_start = row_end = document[0][0].row_start
        for strip, offset in document:
            if strip.row_start != row_end or offset != key_start + 1 - row_start:
                break
            row_end = strip.row_end
        if row_end - row_start >= CAUSAL_ROWS:
            keys = slice(key_start, key_start + row_end - row_start)
            yield batch_row, slice(row_start, row_end), iter([Part(keys=keys, causal=True)])
            document = [(strip, offset) for strip, offset in document if strip.row_start >= row_end]
        for strip, offset in document:
            yield batch_row, strip.rows, _parts(strip, offset, kv_lo, kv_hi, dtype)


def _diagonals(segments: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> list[int | None]:
    """Return for each strip the n for which every row i sees [key_start, i + n), None if there is none."""
    if segments.shape[0] == 0:
        return []
    batch_row, row_start, row_end, key_start = segments[:, :4].numpy().T
    bounds = (np.stack([row_start, row_end], axis=1) + batch_row[:, None] * kv_lo.shape[1]).reshape(-1)
    # One more element, because reduceat takes no bound equal to the length; every second result is a strip's.
    lo = np.append(kv_lo.reshape(-1).numpy(), 0)
    offset = np.append((kv_hi - torch.arange(kv_hi.shape[1], dtype=kv_hi.dtype)).reshape(-1).numpy(), 0)
    least, most = (function.reduceat(offset, bounds)[::2] for function in (np.minimum, np.maximum))
    straight = (least == most) & (np.maximum.reduceat(lo, bounds)[::2] == key_start)
    return [int(n) if is_straight else None for n, is_straight in zip(least, straight, strict=True)]


def _parts(strip: Strip, offset: int | None, kv_lo: Tensor, kv_hi: Tensor, dtype: torch.dtype) -> Iterator[Part]:
    """Yield the keys that all rows of the strip see, then those of which they see different ones."""
    if strip.open_end > strip.key_start:
        yield Part(keys=slice(strip.key_start, strip.open_end))
    if strip.open_end < strip.key_end:
        keys = slice(strip.open_end, strip.key_end)
        if offset == strip.open_end + 1 - strip.row_start:
            yield Part(keys=keys, causal=True)
            return
        hidden = strip.hidden(kv_lo, kv_hi, keys)
        yield Part(keys=keys, bias=torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)[None, None])


def _merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return attention over both sets of keys from the (out, lse) of each."""
    lse = torch.logaddexp(first[1], second[1])
    shares = (torch.exp(part[1] - lse).unsqueeze(-1) for part in (first, second))
    return torch.add(*(part[0] * share for part, share in zip((first, second), shares, strict=True))), lse
