"""MMCA, multi-modal causal attention, in plain torch: two attentions on the strips of each class. Spec and CPU path.

out_i = [query i is text] A_text(i) + A_media(i); A_c(i) = sum_j softmax_j(scale q_i . k_j) v_j over the keys j of class
c with kv_lo_i <= j < kv_hi_i, 0 if there are none.
Queries and keys are put in the order of their class (mmca_tiles.layout), where each A_c is an attention over intervals;
`attention` is the module that computes those: reference_attention or sdpa_attention. No tensor has S * T numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from triweave.kernels.mmca_tiles import CLASSES


@dataclass(frozen=True, kw_only=True)
class Layout:
    """mmca_tiles.layout in its parts: orders int64 [B, T] and [B, S]; lo and hi int32 [2, B, S], text's first."""

    keys: Tensor
    queries: Tensor
    lo: Tensor
    hi: Tensor


def split_layout(made: Tensor, keys: int, device: torch.device) -> Layout:
    """Return the parts of a layout with `keys` keys, on `device`."""
    made = made.to(device)
    rows = (made.shape[1] - keys) // 5
    bounds = made[:, keys + rows :].unflatten(1, (CLASSES, 2, rows))
    lo, hi = bounds.permute(2, 1, 0, 3).contiguous()
    return Layout(keys=made[:, :keys].long(), queries=made[:, keys : keys + rows].long(), lo=lo, hi=hi)


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """Return [B, N, ...] with x[b, order[b, n]] at position n."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], order]


def out_of_order(x: Tensor, order: Tensor) -> Tensor:
    """Undo in_order."""
    result = torch.empty_like(x)
    result[torch.arange(x.shape[0], device=x.device)[:, None], order] = x
    return result


def mmca_forward(
    attention: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Tensor,
    segments: Tensor,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out [B, S, H, K], A_text of the same shape, lse [2, B, H, S]).

    lse is by position in the layout's order, text's first. A_text has no numbers unless `keep`: the backward reads it.
    """
    split = split_layout(layout, k.shape[1], q.device)
    q, k, v = in_order(q, split.queries), in_order(k, split.keys), in_order(v, split.keys)
    parts = [
        attention.attention_forward(q, k, v, split.lo[c], split.hi[c], _of_class(segments, c, q.shape[0]), scale)
        for c in range(CLASSES)
    ]
    (text, text_lse), (media, media_lse) = parts
    out = out_of_order(text + media, split.queries)
    kept = out_of_order(text, split.queries) if keep else q.new_empty(0)
    return out, kept, torch.stack([text_lse, media_lse])


def mmca_backward(
    attention: ModuleType,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    text: Tensor,
    lse: Tensor,
    layout: Tensor,
    segments: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv): those of both attentions; out's gradient `grad` is that of A_text and that of A_media."""
    split = split_layout(layout, k.shape[1], q.device)
    grad, q, out, text = (in_order(x, split.queries) for x in (grad, q, out, text))
    k, v = in_order(k, split.keys), in_order(v, split.keys)
    of_class = (text, out - text)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for c in range(CLASSES):
        table = _of_class(segments, c, q.shape[0])
        gradients = attention.attention_backward(
            grad, q, k, v, of_class[c], lse[c], split.lo[c], split.hi[c], table, scale
        )
        for total, part in zip((dq, dk, dv), gradients, strict=True):
            total += part
    return out_of_order(dq, split.queries), out_of_order(dk, split.keys), out_of_order(dv, split.keys)


def _of_class(segments: Tensor, c: int, batch: int) -> Tensor:
    """Return the strips of one class, their batch rows counted from 0."""
    own = segments[segments[:, 0] // batch == c] if batch else segments
    return torch.cat([own[:, :1] - c * batch, own[:, 1:]], dim=1)
