"""Attention by the flash-attn package where its mask suffices: packed causal documents, and padding between them.

flash-attn 4 (`flash_attn.cute`) serves on Hopper and newer where it is installed, else flash-attn 2 (2.6 or newer). Of
the intervals both can say only [document start, i + 1): text in packed documents. A bidirectional span, a sliding
window, a prefix or a media axis they cannot, and the rows concerned are named in the error. Padding rows are taken out
before the call and put back after it, so nothing of them is read. The intervals are read on the host, which waits for
the device at every call. The backward is flash-attn's own, in its deterministic form.

This project has not executed it: the H100 it was lent had no flash-attn package, and it is tested against a stand-in of
the package's interface.
Sources: Dao 2023, FlashAttention-2; the interfaces of flash_attn and flash_attn.cute (Dao-AILab).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triweave.kernels.errors import KernelUnavailableError
from triweave.kernels.tiles import Intervals

WIDEST_HEAD = 256
HEAD_MULTIPLE = 8
ROWS_NAMED = 3
"""Rows of an unsuitable mask that the error names."""


@dataclass(frozen=True, kw_only=True)
class PackedDocuments:
    """The documents of a batch as flash-attn takes them.

    live: int64 [L], flat positions b S + i of the rows that see something. starts: int32 [documents + 1], where each
    document begins among these. longest: tokens of the longest document.
    """

    live: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int32]
    longest: int


def packed_documents(kv_lo: Intervals, kv_hi: Intervals) -> PackedDocuments:
    """Return the documents of intervals that are causal within packed documents.

    Raises KernelUnavailableError naming rows that are not [document start, i + 1) in a document without gaps.
    """
    rows = kv_lo.shape[1]
    lo, hi = kv_lo.reshape(-1).astype(np.int64), kv_hi.reshape(-1).astype(np.int64)
    live = hi > lo
    row = np.tile(np.arange(rows), kv_lo.shape[0])
    first = live & (lo == row)
    follows = live & np.roll(live, 1) & (row > 0) & (np.roll(lo, 1) == lo)
    wrong = np.flatnonzero(live & ~((hi == row + 1) & (first | follows)))
    if wrong.size:
        named = ", ".join(f"row {i % rows} of {i // rows} sees [{lo[i]}, {hi[i]})" for i in wrong[:ROWS_NAMED].tolist())
        raise KernelUnavailableError(
            f"attention: impl='flash' can only say [document start, row + 1) of packed documents; {wrong.size} of "
            f"{live.sum()} rows are not that ({named}); use auto, flex or reference"
        )
    positions = np.flatnonzero(live)
    starts = np.append(np.flatnonzero(first[positions]), positions.size).astype(np.int32)
    return PackedDocuments(live=positions, starts=starts, longest=int(np.diff(starts).max(initial=0)))


def attention(q: Tensor, k: Tensor, v: Tensor, kv_lo: Tensor, kv_hi: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (out [B, S, H, K], lse [B, H, S]) as `attention` does; differentiable through flash-attn's own backward.

    Raises KernelUnavailableError where the package, the mask, the dtype or the head width does not allow it.
    """
    _check_served(q, k)
    documents = packed_documents(kv_lo.cpu().numpy(), kv_hi.cpu().numpy())
    live = torch.from_numpy(documents.live).to(q.device)
    starts = torch.from_numpy(documents.starts).to(q.device)
    lse = q.new_full((q.shape[0] * q.shape[1], q.shape[2]), -torch.inf, dtype=torch.float32)
    out = q.new_zeros((q.shape[0] * q.shape[1], *q.shape[2:]))
    if documents.live.size:
        with torch.autocast(q.device.type, enabled=False):
            queries, keys, values = (x.flatten(0, 1).index_select(0, live) for x in (q, k, v))
            part, part_lse = _varlen()(queries, keys, values, starts, documents.longest, scale)
        out = out.index_copy(0, live, part)
        lse = lse.index_copy(0, live, part_lse.detach().T.to(lse.dtype))
    return out.view(q.shape), lse.view(q.shape[:3]).transpose(1, 2)


@functools.cache
def _varlen() -> Callable[[Tensor, Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor]]:
    """Return the installed package's attention of packed causal documents: (out [L, H, K], lse [H, L])."""
    newer = _imported("flash_attn.cute") if torch.cuda.get_device_capability() >= (9, 0) else None
    if newer is not None:

        def run(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
            out, lse = newer(
                q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest,
                softmax_scale=scale, causal=True, deterministic=True, return_lse=True,
            )  # fmt: skip
            return out, lse

        return run
    older = _imported("flash_attn")
    if older is None:
        raise KernelUnavailableError(
            "attention: impl='flash' needs the flash-attn package (pip install flash-attn, or flash-attn-4 on Hopper "
            "and newer), which is not installed here; use auto, flex or reference"
        )

    def run_older(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, _ = older(
            q, k, v, starts, starts, longest, longest,
            softmax_scale=scale, causal=True, deterministic=True, return_attn_probs=True,
        )  # fmt: skip
        if lse.shape != (q.shape[1], q.shape[0]):
            raise KernelUnavailableError(
                "attention: impl='flash' needs flash-attn 2.6 or newer, whose log-sum-exp is [H, tokens]; upgrade it"
            )
        return out, lse

    return run_older


def _imported(package: str) -> Callable[..., tuple[Tensor, ...]] | None:
    """Return the package's `flash_attn_varlen_func`, None where it is not installed or does not load."""
    try:
        function: Callable[..., tuple[Tensor, ...]] = importlib.import_module(package).flash_attn_varlen_func
    except (ImportError, AttributeError, OSError):
        return None
    return function


def _check_served(q: Tensor, k: Tensor) -> None:
    width = q.shape[3]
    if q.dtype not in (torch.float16, torch.bfloat16) or width > WIDEST_HEAD or width % HEAD_MULTIPLE:
        raise KernelUnavailableError(
            f"attention: impl='flash' cannot serve heads of {width} numbers in {q.dtype}; it takes multiples of "
            f"{HEAD_MULTIPLE} up to {WIDEST_HEAD} in float16 and bfloat16; use auto or reference"
        )
    if k.shape[1] != q.shape[1]:
        raise KernelUnavailableError(
            f"attention: impl='flash' serves self-attention, but there are {q.shape[1]} rows and {k.shape[1]} keys; "
            "use auto or reference"
        )
