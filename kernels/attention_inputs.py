"""What the three attention ops ask of their inputs before any implementation sees them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from triweave.kernels.errors import KernelInputError

Tables = Mapping[str, Tensor | np.ndarray]
"""What a loader worker made for an op, by name; it may hold those of several implementations."""


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise KernelInputError unless q is [B, S, H, K] and k and v [B, T, G, K], H a multiple of G, all of one dtype."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise KernelInputError(
            f"{op}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; they must be "
            "[B, S, H, K], [B, T, G, K], [B, T, G, K]"
        )
    if q.shape[2] % k.shape[2]:
        raise KernelInputError(
            f"{op}: {q.shape[2]} query heads over {k.shape[2]} key/value heads; H must be a multiple of G"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise KernelInputError(f"{op}: q is {q.dtype}, k {k.dtype}, v {v.dtype}; cast them to one dtype")


def check_intervals(op: str, q: Tensor, **bounds: Tensor) -> None:
    """Raise KernelInputError unless both ends of the intervals, given under their names, are [B, S]."""
    if any(bound.shape != q.shape[:2] for bound in bounds.values()):
        shapes = " and ".join(f"{name} {tuple(bound.shape)}" for name, bound in bounds.items())
        raise KernelInputError(f"{op}: {shapes} must be [B, S], {tuple(q.shape[:2])}")


def unit_stride(x: Tensor) -> Tensor:
    """Return x, copied if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def table_of(tables: Tables | None, name: str) -> Tensor | None:
    """Return the table `name` as a tensor, None where there is none."""
    table = None if tables is None else tables.get(name)
    return None if table is None else torch.as_tensor(table)
