"""The numeric suite for a CUDA device: attention's masks, shapes and layouts, larger than those of the self-check.

Every check compares with the reference in fp64 on the same device: an error of at most twice that of the reference in
the inputs' own dtype, plus one rounding of the largest number, and a root mean square below 0.005. The other ops are
checked by the self-check (self_check.py) with the same rule. The checks take the implementation as an argument, so that
they are themselves tested on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from triweave.kernels import tiles
from triweave.kernels.attention import attention

ROWS = 517
"""Rows of a mask: several tiles of every pinned size and a part of one."""
WINDOW = 200
RMS_RATIO = 0.005
FP32_FLOOR = 1e-5
"""Share of its largest number by which an fp32 result may be off: another order of additions, the hardware's exp2."""
HEAD_WIDTHS = (32, 72, 80, 96, 128, 256)
BEYOND_INT32 = 1 << 31

Mask = tuple[Tensor, Tensor]
"""kv_lo and kv_hi."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that must hold; `worst` returns the largest error as a share of what is allowed, at most 1."""

    name: str
    worst: Callable[[], float]


def _intervals(pairs: list[tuple[int, int]]) -> Mask:
    bounds = torch.tensor(pairs, dtype=torch.int32)
    return bounds[None, :, 0].contiguous(), bounds[None, :, 1].contiguous()


def _documents(lengths: list[int], **spans: int) -> Mask:
    lo, hi = tiles.document_intervals(np.array(lengths), **spans)
    return torch.from_numpy(lo), torch.from_numpy(hi)


def masks(rows: int = ROWS) -> dict[str, Mask]:
    """Return the structures of masks, each kv_lo and kv_hi [1, rows] of as many keys."""
    third = rows // 3
    generator = torch.Generator().manual_seed(0)
    wild = [torch.randint(0, rows + 1, (1, rows), generator=generator, dtype=torch.int32) for _ in range(2)]
    return {
        "one causal document": _documents([rows]),
        "packed documents, empty ones among them": _documents([third, 1, 0, third, rows - 2 * third - 1]),
        "spans": _documents([third, rows - third], span_tokens=64, span_every_tokens=100),
        "a span at the pack's end": _intervals([(0, i + 1) for i in range(third)] + [(0, rows)] * (rows - third)),
        "prefix": _intervals([(0, third)] * third + [(0, i + 1) for i in range(third, rows)]),
        "sliding window": _intervals([(max(0, i + 1 - WINDOW), i + 1) for i in range(rows)]),
        "padding rows": _intervals([(0, i + 1) for i in range(third)] + [(0, 0)] * (rows - third)),
        "backwards": _intervals([(i, rows) for i in range(rows)]),
        "any intervals, crossed ones among them": (wild[0], wild[1]),
        "all empty": _intervals([(5, 5)] * rows),
    }


def attention_checks(
    dtype: torch.dtype, device: torch.device, impl: str, *, rows: int = ROWS, widths: Sequence[int] = HEAD_WIDTHS
) -> Iterator[Check]:
    """Yield the checks of attention in one dtype."""
    structures = masks(rows)
    spans = structures["spans"]

    def check(name: str, mask: Mask, heads: int, groups: int, width: int) -> Check:
        return Check(name=name, worst=lambda: _share(_draw(mask, heads, groups, width, dtype, device), mask, impl))

    for name, mask in structures.items():
        yield check(name, mask, 4, 2, 64)
    for width in widths:
        yield check(f"heads of {width}", spans, 2, 1, width)
    for heads, groups in ((8, 1), (3, 3)):
        yield check(f"{heads} query heads over {groups}", spans, heads, groups, 64)
    yield Check(name="views of one projection", worst=lambda: _views(spans, dtype, device, impl))
    yield Check(name="the same bits twice", worst=lambda: _twice(spans, dtype, device, impl))


def _draw(mask: Mask, heads: int, groups: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return q, k, v and an incoming gradient."""
    rows = mask[0].shape[1]
    generator = torch.Generator().manual_seed(1)
    sizes = [(1, rows, count, width) for count in (heads, groups, groups, heads)]
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


def _run(drawn: list[Tensor], mask: Mask, impl: str) -> list[Tensor]:
    """Return out, dq, dk and dv."""
    inputs = [x.detach().requires_grad_() for x in drawn[:3]]
    q, k, v = inputs
    lo, hi = (bound.to(q.device) for bound in mask)
    out, _ = attention(q, k, v, lo, hi, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, inputs, drawn[3])]


def _share(drawn: list[Tensor], mask: Mask, impl: str) -> float:
    got = _run(drawn, mask, impl)
    peer = _run(drawn, mask, "reference")
    exact = _run([x.double() for x in drawn], mask, "reference")
    return max(map(share_of_allowed, got, peer, exact))


def share_of_allowed(got: Tensor, peer: Tensor, exact: Tensor) -> float:
    """Return the error of `got` as a share of what is allowed, infinity if a number is not finite."""
    error, theirs = got.double() - exact, peer.double() - exact
    largest = exact.abs().max().item()
    floor = FP32_FLOOR if got.dtype == torch.float32 else torch.finfo(got.dtype).eps
    allowed = 2 * theirs.abs().max().item() + floor * largest
    worst = error.abs().max().item()
    if not math.isfinite(worst):
        return math.inf
    if largest == 0:
        return 0.0 if worst == 0 else math.inf
    ratio = (error.square().mean().sqrt() / exact.square().mean().sqrt()).item()
    return max(worst / allowed, ratio / RMS_RATIO)


def _views(mask: Mask, dtype: torch.dtype, device: torch.device, impl: str) -> float:
    """Check q, k and v that are cut out of one tensor [B, S, 3, H, K]."""
    rows = mask[0].shape[1]
    generator = torch.Generator().manual_seed(2)
    packed = torch.randn((1, rows, 3, 4, 64), generator=generator).to(device, dtype)
    grad = torch.randn((1, rows, 4, 64), generator=generator).to(device, dtype)
    return _share([*packed.unbind(2), grad], mask, impl)


def _twice(mask: Mask, dtype: torch.dtype, device: torch.device, impl: str) -> float:
    drawn = _draw(mask, 8, 2, 64, dtype, device)
    same = all(map(torch.equal, _run(drawn, mask, impl), _run(drawn, mask, impl)))
    return 0.0 if same else math.inf


def far_offsets_check(device: torch.device, impl: str, *, apart: int = BEYOND_INT32) -> Check:
    """Return the check of batch rows that lie `apart` numbers from each other; needs 2 bytes for each of them."""

    def worst() -> float:
        rows, heads, width = 130, 2, 64
        lo, hi = _documents([rows])
        mask = torch.cat([lo, lo]), torch.cat([hi, hi])
        held = torch.zeros(apart + rows * heads * width, dtype=torch.bfloat16, device=device)
        strides = (apart, heads * width, width, 1)
        q = held.as_strided((2, rows, heads, width), strides)
        drawn = [torch.randn(q.shape, generator=torch.Generator().manual_seed(n)) for n in range(4)]
        near = [x.to(device, torch.bfloat16) for x in drawn]
        q.copy_(near[0])
        pairs = zip(_run([q, *near[1:]], mask, impl), _run(near, mask, impl), strict=True)
        return 0.0 if all(torch.equal(far, close) for far, close in pairs) else math.inf

    return Check(name="offsets beyond 2^31", worst=worst)
