"""Attention over one key interval per query row by torch's FlexAttention, with a block mask made from the intervals.

The mask's blocks are counted on the device, block by block and not pair by pair, so nothing waits for the host, and
building it costs O(B (S + blocks)) and not O(S T). On a CUDA device FlexAttention is compiled, with its own backward.
On a CPU torch has no fused kernel of it for this: it computes all S x T scores and has no backward, so there it is to
try and test. Source: Dong et al. 2024, FlexAttention; torch.nn.attention.flex_attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triweave.kernels.errors import KernelUnavailableError
from triweave.kernels.reference import accumulation_dtype

BLOCK = 128
"""Rows and keys of a block of the mask, what FlexAttention's own kernels are tuned for."""
NARROWEST_HEAD, WIDEST_HEAD = 16, 256
"""Heads that its compiled kernels take, and the widest that this project has a use for."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, kv_lo: Tensor, kv_hi: Tensor, scale: float, *, mask: Any = None
) -> tuple[Tensor, Tensor]:
    """Return (out [B, S, H, K], lse [B, H, S]) as `attention` does; the backward is FlexAttention's own.

    mask: what `block_mask` made of these very intervals, else it is made here.
    Raises KernelUnavailableError where FlexAttention cannot serve the dtype, the head width or the backward.
    """
    _check_served(q, k, v)
    if q.numel() == 0 or k.numel() == 0:
        out = q * 0.0 + (k.sum() + v.sum()) * 0.0
        lse_shape = (q.shape[0], q.shape[2], q.shape[1])
        return out, q.new_full(lse_shape, -torch.inf, dtype=accumulation_dtype(q.dtype))
    if not torch.is_grad_enabled():
        q, k, v = q.detach(), k.detach(), v.detach()  # on a CPU torch refuses what could need a gradient
    flex = _compiled() if q.device.type == "cuda" and not torch.compiler.is_compiling() else _flex
    with torch.autocast(q.device.type, enabled=False):
        out, lse = flex(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask or block_mask(kv_lo, kv_hi, k.shape[1]), scale
        )
    assert lse is not None  # asked for
    return out.transpose(1, 2).contiguous(), lse.detach().to(accumulation_dtype(q.dtype))


def block_mask(kv_lo: Tensor, kv_hi: Tensor, keys: int) -> Any:
    """Return the BlockMask of the intervals kv_lo, kv_hi [B, S] over `keys` keys, on their device."""
    from torch.nn.attention.flex_attention import BlockMask

    def interval(b: Tensor, _: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key >= kv_lo[b, row]) & (key < kv_hi[b, row])

    live, full = blocks(kv_lo, kv_hi, keys)
    return BlockMask.from_kv_blocks(
        *_ordered(live & ~full),
        *_ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=interval,
        seq_lengths=(kv_lo.shape[1], keys),
    )


def blocks(kv_lo: Tensor, kv_hi: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Return bool [B, query blocks, key blocks] twice: which blocks hold a live pair, and which hold only live pairs.

    Rows beyond S count for nothing; a block of keys that reaches beyond T is never full.
    """
    batch, rows = kv_lo.shape
    query_blocks, key_blocks = -(-rows // BLOCK), -(-keys // BLOCK)
    beyond = query_blocks * BLOCK - rows
    lo, hi = (torch.nn.functional.pad(x.long(), (0, beyond)).view(batch, query_blocks, BLOCK) for x in (kv_lo, kv_hi))
    hi = hi.clamp(max=keys)
    some = hi > lo
    live = _coverage(lo // BLOCK, (hi - 1) // BLOCK + 1, some, key_blocks) > 0
    whole_from, whole_to = (lo + BLOCK - 1) // BLOCK, hi // BLOCK
    covered = _coverage(whole_from, whole_to, some & (whole_to > whole_from), key_blocks)
    in_pack = torch.arange(query_blocks, device=lo.device).mul(-BLOCK).add(rows).clamp(max=BLOCK)
    return live, live & (covered == in_pack[:, None])


def _coverage(first: Tensor, end: Tensor, counts: Tensor, key_blocks: int) -> Tensor:
    """Count, for each (query block, key block), the rows that count and whose range [first, end) holds the latter."""
    steps = first.new_zeros((*first.shape[:2], key_blocks + 1))
    one = counts.long()
    steps.scatter_add_(2, first.clamp(0, key_blocks), one)
    steps.scatter_add_(2, end.clamp(0, key_blocks), -one)
    return steps.cumsum(2)[..., :-1]


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return (counts, indices) of the chosen key blocks of each query block, in order, for one head of many."""
    indices = torch.argsort(chosen.to(torch.int32), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], indices.to(torch.int32)[:, None].contiguous()


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> tuple[Tensor, Tensor | None]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    out, aux = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True))
    return out, aux.lse


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor, Any, float], tuple[Tensor, Tensor | None]]:
    return torch.compile(_flex, fullgraph=True)


def why_not(dtype: torch.dtype, width: int) -> str | None:
    """Return why FlexAttention's compiled kernels cannot serve heads of `width` numbers, None if they can."""
    if NARROWEST_HEAD <= width <= WIDEST_HEAD and dtype in (torch.float32, torch.float16, torch.bfloat16):
        return None
    return f"it takes heads of {NARROWEST_HEAD} to {WIDEST_HEAD} numbers, in float32, float16 and bfloat16"


def _check_served(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise KernelUnavailableError(
                "attention: impl='flex' has no backward on a CPU, torch's FlexAttention lacks it; use sdpa or reference"
            )
    elif against := why_not(q.dtype, q.shape[3]):
        raise KernelUnavailableError(
            f"attention: impl='flex' cannot serve {q.shape[3]} numbers a head in {q.dtype}: {against}; use reference"
        )
