"""What the benchmark compares with: torch's own functions, a loop over documents, and packages that may be missing.

`sdpa` is one call of torch's fused attention: its causal path for one causal document, else one dense S x S mask.
`documents` is a loop of it over the documents, a causal pass and then the rows of each span again, all pieces put
together by one concatenation. `flex` and `flash` are the ops' implementations of these names. `torch` is the usual
composition of torch's functions. `liger` is Liger-Kernel's function where it has one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from triweave.kernels.bench.masks import BenchMask
from triweave.kernels.errors import KernelUnavailableError

NAMES = ("sdpa", "documents", "flex", "flash", "liger", "torch")
NOTHING_COMPARABLE: dict[str, str] = {
    "sdpa": "it is attention only",
    "documents": "it is a loop of attention over documents",
    "flex": "FlexAttention is attention only",
    "flash": "flash-attn is attention only",
    "liger": "Liger-Kernel has no such op",
    "torch": "its composition in torch is the reference",
}
"""Peer -> why it has no cell where a case does not list it."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(mask: BenchMask, kv_lo: Tensor, kv_hi: Tensor) -> Attend:
    """Return one call of torch's attention; the dense mask is made beforehand and belongs to no figure."""
    if mask.kind == "causal":
        return lambda q, k, v: _attend(*map(_heads_first, (q, k, v)), is_causal=True).transpose(1, 2)
    dense: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not dense:
            key = torch.arange(k.shape[1], device=k.device)
            dense.append(((key >= kv_lo[:, :, None]) & (key < kv_hi[:, :, None]))[:, None])
        return _attend(*map(_heads_first, (q, k, v)), attn_mask=dense[0]).transpose(1, 2)

    return attend


def documents(mask: BenchMask) -> Attend:
    """Return the loop over documents."""
    lengths, runs_of = list(mask.lengths), mask.runs()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = [_heads_first(x).split(lengths, dim=2) for x in (q, k, v)]
        outs = [
            _document(queries, keys, values, runs) for queries, keys, values, runs in zip(*pieces, runs_of, strict=True)
        ]
        return torch.cat(outs, dim=2).transpose(1, 2)

    return attend


def _document(q: Tensor, k: Tensor, v: Tensor, runs: list[tuple[int, int, bool]]) -> Tensor:
    """Return one document's attention from its runs (first, end, is a span), which cover its rows."""
    causal = _attend(q, k, v, is_causal=True)
    if len(runs) == 1 and not runs[0][2]:
        return causal
    sizes = [end - first for first, end, _ in runs]
    pieces = [
        _attend(queries, k[:, :, :end], v[:, :, :end]) if is_span else piece
        for queries, piece, (_, end, is_span) in zip(q.split(sizes, 2), causal.split(sizes, 2), runs, strict=True)
    ]
    return torch.cat(pieces, dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def liger(name: str) -> Callable[..., Any]:
    """Return a call of a function of liger_kernel.transformers.functional, imported when it is first called.

    The call raises KernelUnavailableError where the package is missing or lacks the function.
    """

    def call(*arguments: Any, **options: Any) -> Any:
        try:
            function = getattr(importlib.import_module("liger_kernel.transformers.functional"), name)
        except (ImportError, AttributeError) as error:
            raise KernelUnavailableError(
                f"Liger-Kernel does not serve here ({error}); pip install liger-kernel"
            ) from error
        return function(*arguments, **options)

    return call
