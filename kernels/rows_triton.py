"""What the elementwise Triton kernels share: a tensor as rows, and numbers widened before any arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LAUNCH = {"enable_fp_fusion": True}
"""Options of every launch: a b + c is one rounding. Pinned, for Triton's default changes between versions."""


def as_rows(x: Tensor) -> Tensor:
    """Return x [..., D] as [R, D] with neighbouring numbers of a row side by side; copied only where strides need it.

    Halves of one projection are not copied: the rows of the result may be further apart than D.
    """
    if x.dim() == 0:
        return x.reshape(1, 1)
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(-1, x.shape[-1])


@triton.jit
def widen(x: tl.tensor) -> tl.tensor:
    """Return x in the dtype sums are taken in: fp64 for fp64, fp32 for everything narrower."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x
