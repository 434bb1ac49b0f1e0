"""Attention over one key interval per query row, in plain torch on the strips of tiles.segments. Spec and oracle.

s_ij = scale q_i . k_j for kv_lo_i <= j < kv_hi_i; lse_i = logsumexp_j s_ij; p_ij = exp(s_ij - lse_i);
out_i = sum_j p_ij v_j.
An empty interval gives out_i = 0, lse_i = -inf and no gradient. Query head h reads key/value head h // (H / G).
Computed in fp32 for narrower inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from triweave.kernels.reference import accumulation_dtype

SCORES_PER_CHUNK = 1 << 22
"""Upper bound on the scores (query heads * rows * keys) that exist at once, unless one row alone has more."""


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Rows [row_start, row_end) of batch_row that share the keys [key_start, key_end); open_end as in tiles."""

    batch_row: int
    row_start: int
    row_end: int
    key_start: int
    key_end: int
    open_end: int

    @property
    def rows(self) -> slice:
        """Query rows of the strip."""
        return slice(self.row_start, self.row_end)

    @property
    def keys(self) -> slice:
        """Keys of the strip's window."""
        return slice(self.key_start, self.key_end)

    def hidden(self, kv_lo: Tensor, kv_hi: Tensor, keys: slice) -> Tensor:
        """Return bool [rows, keys]: which pairs are outside the mask."""
        key = torch.arange(keys.start, keys.stop, device=kv_lo.device, dtype=kv_lo.dtype)
        lo = kv_lo[self.batch_row, self.rows].unsqueeze(1)
        hi = kv_hi[self.batch_row, self.rows].unsqueeze(1)
        return (key < lo) | (key >= hi)


def strips(segments: Tensor) -> Iterator[Strip]:
    """Yield the rows of the table that tiles.segments makes."""
    for batch_row, row_start, row_end, key_start, key_end, open_end in segments.tolist():
        yield Strip(
            batch_row=batch_row,
            row_start=row_start,
            row_end=row_end,
            key_start=key_start,
            key_end=key_end,
            open_end=open_end,
        )


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, kv_lo: Tensor, kv_hi: Tensor, segments: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out [B, S, H, K], lse [B, H, S])."""
    wide = accumulation_dtype(q.dtype)
    out = q.new_zeros(q.shape)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide)
    for strip in _bounded(segments, q.shape[2]):
        scores = _scores(q, k, kv_lo, kv_hi, strip, scale)
        strip_lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - strip_lse.unsqueeze(-1))
        values = v[strip.batch_row, strip.keys].to(wide)
        heads = torch.einsum("gprc,cgk->rgpk", weights, values)
        out[strip.batch_row, strip.rows] = heads.flatten(1, 2).to(out.dtype)
        lse[strip.batch_row, :, strip.rows] = strip_lse.flatten(0, 1)
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
    """Return (dq, dk, dv) of out's gradient `grad` from the stored out and lse.

    dv_j = sum_i p_ij g_i; ds_ij = p_ij (g_i . v_j - g_i . out_i);
    dq_i = scale sum_j ds_ij k_j; dk_j = scale sum_i ds_ij q_i.
    """
    wide = accumulation_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    groups = k.shape[2]
    for strip in _bounded(segments, q.shape[2]):
        row, rows, keys = strip.batch_row, strip.rows, strip.keys
        strip_grad = grad[row, rows].to(wide).unflatten(1, (groups, -1))
        strip_lse = lse[row, :, rows].unflatten(0, (groups, -1)).unsqueeze(-1)
        weights = torch.exp(_scores(q, k, kv_lo, kv_hi, strip, scale) - strip_lse)
        delta = (strip_grad * out[row, rows].to(wide).unflatten(1, (groups, -1))).sum(-1)
        dv[row, keys] += torch.einsum("gprc,rgpk->cgk", weights, strip_grad)
        along_values = torch.einsum("rgpk,cgk->gprc", strip_grad, v[row, keys].to(wide))
        score_grad = weights * (along_values - delta.permute(1, 2, 0).unsqueeze(-1)) * scale
        dq[row, rows] = torch.einsum("gprc,cgk->rgpk", score_grad, k[row, keys].to(wide)).flatten(1, 2)
        dk[row, keys] += torch.einsum("gprc,rgpk->cgk", score_grad, q[row, rows].to(wide).unflatten(1, (groups, -1)))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _bounded(segments: Tensor, heads: int) -> Iterator[Strip]:
    """Yield the strips, those with too many scores cut into fewer rows each."""
    for strip in strips(segments):
        step = max(1, SCORES_PER_CHUNK // (heads * (strip.key_end - strip.key_start)))
        for start in range(strip.row_start, strip.row_end, step):
            yield replace(strip, row_start=start, row_end=min(start + step, strip.row_end))


def _scores(q: Tensor, k: Tensor, kv_lo: Tensor, kv_hi: Tensor, strip: Strip, scale: float) -> Tensor:
    """Return the strip's scores [G, H/G, rows, keys], -inf outside the mask."""
    wide = accumulation_dtype(q.dtype)
    queries = q[strip.batch_row, strip.rows].to(wide).unflatten(1, (k.shape[2], -1))
    scores = torch.einsum("rgpk,cgk->gprc", queries, k[strip.batch_row, strip.keys].to(wide)).mul_(scale)
    if strip.open_end < strip.key_end:
        scores.masked_fill_(strip.hidden(kv_lo, kv_hi, strip.keys), -torch.inf)
    return scores
