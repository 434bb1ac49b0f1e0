"""What the Triton kernels over heads share: heads in two parts, and one tile's turn of the inner loops of attention.

Heads are loaded in two parts, K0 + K1 wide, both powers of two: a head of 72, 80 or 96 numbers costs 80, 80 or 96 and
not 128. Arguments that end in 0 and 1 are those parts. Scores are taken to base 2, for exp2 is the one instruction that
the hardware has. Used by attention_triton.py, which has the formulas, and mmca_triton.py.
"""

# Triton itself types a kernel's arguments, at launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_offset(head, stride, HEAD_UNIT: tl.constexpr):
    """Return where a head's numbers begin, a multiple of HEAD_UNIT numbers.

    Triton notices strides that are multiples of 16 and no others: without this a head of 72 is loaded number by number.
    """
    return tl.multiple_of(head * stride, HEAD_UNIT)


@triton.jit
def turn(table_ptr, SECTION: tl.constexpr, b):
    """Return the tile of this program, the first of a grid: those of batch row b with most to visit come first."""
    order = table_ptr + tl.load(table_ptr + 9 + SECTION)
    return tl.load(order + b * tl.num_programs(0) + tl.program_id(0))


@triton.jit
def run_start(table_ptr, first, end):
    """Return what an entry of the tiles without a mask is to be added to, to give the tile: they are one run."""
    return tl.load(table_ptr + first, mask=first < end, other=0) - first


@triton.jit
def visited_tile(table_ptr, entry, run, MASKED: tl.constexpr):
    """Return the tile of an entry; of the run it is computed, so that no load of a tile waits for another load."""
    if MASKED:
        tile = tl.load(table_ptr + entry)
    else:
        tile = run + entry
    return tile


@triton.jit
def load_head(rows, inside, WIDTH: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """Load both parts of the heads that `rows` [N, 1] points to; 0 beyond WIDTH, and outside where CHECK_ROWS."""
    columns = tl.arange(0, K0)
    if K0 > WIDTH:
        x0 = tl.load(rows + columns[None, :], mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)
    elif CHECK_ROWS:
        x0 = tl.load(rows + columns[None, :], mask=inside[:, None], other=0.0)
    else:
        x0 = tl.load(rows + columns[None, :])
    x1 = x0
    if K1 > 0:
        others = K0 + tl.arange(0, K1)
        if K0 + K1 > WIDTH:
            x1 = tl.load(rows + others[None, :], mask=inside[:, None] & (others < WIDTH)[None, :], other=0.0)
        elif CHECK_ROWS:
            x1 = tl.load(rows + others[None, :], mask=inside[:, None], other=0.0)
        else:
            x1 = tl.load(rows + others[None, :])
    return x0, x1


@triton.jit
def store_head(rows, inside, x0, x1, WIDTH: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr):
    """Store both parts, rounded to the type of the tensor that `rows` [N, 1] points to."""
    columns = tl.arange(0, K0)
    element = rows.dtype.element_ty
    tl.store(rows + columns[None, :], x0.to(element), mask=inside[:, None] & (columns < WIDTH)[None, :])
    if K1 > 0:
        others = K0 + tl.arange(0, K1)
        tl.store(rows + others[None, :], x1.to(element), mask=inside[:, None] & (others < WIDTH)[None, :])


@triton.jit
def along_head(a0, a1, b0, b1, K1: tl.constexpr):
    """Return a b^T, summed over the head width."""
    product = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if K1 > 0:
        product = tl.dot(a1, tl.trans(b1), product, input_precision="ieee")
    return product


@triton.jit
def add_product(sum0, sum1, weights, b0, b1, K1: tl.constexpr):
    """Return sum + weights b, the weights rounded to b's type."""
    rounded = weights.to(b0.dtype)
    sum0 = tl.dot(rounded, b0, sum0, input_precision="ieee")
    if K1 > 0:
        sum1 = tl.dot(rounded, b1, sum1, input_precision="ieee")
    return sum0, sum1


@triton.jit
def base_2(lse):
    """Return a log-sum-exp to base 2, +inf for an empty row: its weights are then 0, where -inf would make them inf."""
    return tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)


@triton.jit
def attend_to_keys(
    peak, total, sum0, sum1, q0, q1, k_rows, v_rows, keys, in_keys, lo, hi, scale,
    WIDTH: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return (peak, total, sum0, sum1) of the running softmax after a tile of keys; peak is of q . k, without `scale`.

    scale > 0: the peak is taken before it, so that scaling and shifting a score are one instruction.
    """
    k0, k1 = load_head(k_rows, in_keys, WIDTH, K0, K1, MASKED)
    scores = along_head(q0, q1, k0, k1, K1)
    if MASKED:
        seen = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    to_base_2 = scale * 1.4426950408889634
    shift = new_peak * to_base_2
    if MASKED:  # a row that has seen no key yet
        shift = tl.where(new_peak == float("-inf"), 0.0, shift)
    weights = tl.exp2(scores * to_base_2 - shift[:, None])
    decay = tl.exp2(peak * to_base_2 - shift)
    total = total * decay + tl.sum(weights, 1)
    sum0 = sum0 * decay[:, None]
    if K1 > 0:
        sum1 = sum1 * decay[:, None]
    v0, v1 = load_head(v_rows, in_keys, WIDTH, K0, K1, MASKED)
    sum0, sum1 = add_product(sum0, sum1, weights, v0, v1, K1)
    return new_peak, total, sum0, sum1


@triton.jit
def score_gradients(
    q0, q1, g0, g1, k0, k1, v0, v1, lse, delta, keys, lo, hi, scale, K1: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Return p (g . v - delta) of a tile of keys, by row; without the subtraction where delta is None."""
    scores = along_head(q0, q1, k0, k1, K1) * (scale * 1.4426950408889634)
    weights = tl.exp2(scores - lse[:, None])
    dscores = along_head(g0, g1, v0, v1, K1)
    if delta is not None:
        dscores = dscores - delta[:, None]
    dscores = weights * dscores
    if MASKED:
        seen = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
        dscores = tl.where(seen, dscores, 0.0)
    return dscores


@triton.jit
def add_queries(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_rows, grad_rows, lse_at, delta_at, opening, lo_at, hi_at,
    keys, in_rows, scale,
    WIDTH: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return (dk0, dk1, dv0, dv1) after a tile of queries; dk without the factor `scale`.

    lse_at, delta_at, lo_at, hi_at: pointers, one per query. opening: the head's gate, or None.
    """
    q0, q1 = load_head(q_rows, in_rows, WIDTH, K0, K1, MASKED)
    g0, g1 = load_head(grad_rows, in_rows, WIDTH, K0, K1, MASKED)
    if MASKED:
        lse = base_2(tl.load(lse_at, mask=in_rows, other=float("-inf")))
        delta = tl.load(delta_at, mask=in_rows, other=0.0)
    else:  # a row that sees a whole tile of keys is not empty
        lse = tl.load(lse_at) * 1.4426950408889634
        delta = tl.load(delta_at)
    scores = along_head(k0, k1, q0, q1, K1) * (scale * 1.4426950408889634)
    weights = tl.exp2(scores - lse[None, :])
    if opening is not None:
        weights = weights * opening
    dscores = weights * (along_head(v0, v1, g0, g1, K1) - delta[None, :])
    if MASKED:
        lo = tl.load(lo_at, mask=in_rows, other=0)
        hi = tl.load(hi_at, mask=in_rows, other=0)
        seen = (keys[:, None] >= lo[None, :]) & (keys[:, None] < hi[None, :])
        weights = tl.where(seen, weights, 0.0)
        dscores = tl.where(seen, dscores, 0.0)
    dv0, dv1 = add_product(dv0, dv1, weights, g0, g1, K1)
    dk0, dk1 = add_product(dk0, dk1, dscores, q0, q1, K1)
    return dk0, dk1, dv0, dv1
