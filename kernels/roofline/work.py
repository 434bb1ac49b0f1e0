"""The least work an op's formula asks for: exact FLOPs of the live mask, bytes that must move, exponentials.

These are properties of the formula and the shape, not of an implementation: `roofline.limit` turns them into the time
that no kernel on a chip can beat, and benchmarks count their TFLOP/s and bytes/s with them. A multiply-add is two
FLOPs; elementwise arithmetic is not counted. Every input is read once and every output written once. As is usual the
backward of attention counts 5 products, though a deterministic one without atomics computes 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DIRECTIONS = ("fwd", "bwd")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one call of an op costs at least."""

    matrix_flops: float
    """FLOPs of matrix products, 0 for an op without any."""
    moved_bytes: float
    """Bytes read and written."""
    exponentials: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes of an attention call; `pairs` is the exact mask area of all batch rows (`tiles.mask_area`)."""

    batch: int
    rows: int
    keys: int
    heads: int
    key_heads: int
    width: int
    pairs: int
    number_bytes: int = 2

    @property
    def query_numbers(self) -> int:
        """Numbers of q, and of out."""
        return self.batch * self.rows * self.heads * self.width

    @property
    def key_numbers(self) -> int:
        """Numbers of k, and of v."""
        return self.batch * self.keys * self.key_heads * self.width


ATTENTION_PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4, "fwd": 2, "bwd": 5}
"""Kernel or direction -> matrix products over the mask area."""


def attention(direction: str, shape: AttentionShape) -> Work:
    """Return the work of `fwd` or `bwd`, or of one kernel: `forward`, `dq`, `dkv`.

    fwd: 4 pairs H K FLOPs; reads q, k, v, writes out and lse. bwd: 10 pairs H K; reads g, q, k, v, out, lse, writes dq,
    dk, dv. One exponential per pair and head either way.
    """
    queries, keys = shape.query_numbers, shape.key_numbers
    rows = shape.batch * shape.rows * shape.heads
    numbers = {
        "forward": 2 * queries + 2 * keys,
        "dq": 4 * queries + 2 * keys,
        "dkv": 2 * queries + 4 * keys,
        "bwd": 4 * queries + 4 * keys,
    }["forward" if direction == "fwd" else direction]
    row_numbers = {"forward": 1, "fwd": 1, "dq": 2, "dkv": 2, "bwd": 1}[direction]
    return Work(
        matrix_flops=2.0 * ATTENTION_PRODUCTS[direction] * shape.pairs * shape.heads * shape.width,
        moved_bytes=numbers * shape.number_bytes + 4 * row_numbers * rows + 8 * shape.batch * shape.rows,
        exponentials=float(shape.pairs) * shape.heads,
    )


def linear_cross_entropy(
    *, supervised: int, width: int, vocabulary: int, number_bytes: int = 2, gradients: bool = True
) -> Work:
    """Return the work of the whole op: 2 N D V FLOPs, 6 N D V with both gradients, which the forward makes."""
    hidden, weight = supervised * width, vocabulary * width
    moved = (hidden + weight) * number_bytes + 4 * supervised
    if gradients:
        moved += hidden * number_bytes + 4 * weight
    return Work(
        matrix_flops=(6.0 if gradients else 2.0) * supervised * width * vocabulary,
        moved_bytes=moved,
        exponentials=float(supervised) * vocabulary,
    )


def product(*, rows: int, columns: int, inner: int, number_bytes: int = 2, out_bytes: int = 2) -> Work:
    """Return the work of one plain matrix product [rows, inner] x [inner, columns]."""
    read = (rows + columns) * inner * number_bytes
    return Work(matrix_flops=2.0 * rows * columns * inner, moved_bytes=read + rows * columns * out_bytes)


def qk_norm_rope(direction: str, *, tokens: int, heads: int, key_heads: int, width: int, number_bytes: int = 2) -> Work:
    """Return the work of one pass over q and k: read and written; the backward reads their gradients too."""
    numbers = tokens * (heads + key_heads) * width
    passes = {"fwd": 2, "bwd": 3}[direction]
    return Work(matrix_flops=0, moved_bytes=passes * numbers * number_bytes + 12 * tokens)


def rms_norm(direction: str, *, rows: int, width: int, residual: bool = False, number_bytes: int = 2) -> Work:
    """Return the work: x read and y written; with the residual that is read and the sum written; bwd reads g and x."""
    passes = {"fwd": 2, "bwd": 3}[direction] + residual * {"fwd": 2, "bwd": 1}[direction]
    return Work(matrix_flops=0, moved_bytes=passes * rows * width * number_bytes + 4 * width)


def swiglu(direction: str, *, numbers: int, number_bytes: int = 2) -> Work:
    """Return the work: two read and one written, three read and two written in the backward."""
    passes = {"fwd": 3, "bwd": 5}[direction]
    return Work(matrix_flops=0, moved_bytes=passes * numbers * number_bytes, exponentials=float(numbers))


def low_rank_fusion(
    direction: str, *, rows: int, widths: Sequence[int], out_width: int, rank: int, number_bytes: int = 2
) -> Work:
    """Return the work of y = sum_r prod_m [x_m; 1] W_m^r: 2 N R E sum(D_m + 1) FLOPs, twice that in the backward."""
    inputs = rows * sum(widths)
    factors = rank * out_width * sum(width + 1 for width in widths)
    passes = {"fwd": 1, "bwd": 2}[direction]
    return Work(
        matrix_flops=2.0 * passes * rows * factors,
        moved_bytes=(passes * (inputs + factors) + rows * out_width) * number_bytes,
    )
