"""Pairs of numbers of a head in Triton: read, written and turned by the angles of M-RoPE, for qk_norm_rope_triton.py.

A pair is two tiles [N, BLOCK] of the first and the second numbers of N heads, whatever the layout in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triweave.kernels.rows_triton import widen


@triton.jit
def token_angles(
    positions: tl.pointer_type,
    axes: tl.pointer_type,
    frequencies: tl.pointer_type,
    token: tl.tensor,
    half: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return (cos, sin) [1, BLOCK] of one token's angles: the position on the pair's axis times its frequency."""
    pair = tl.arange(0, BLOCK)
    live = pair < half
    axis = tl.load(axes + pair, mask=live, other=0)
    frequency = tl.load(frequencies + pair, mask=live, other=0.0)
    position = tl.load(positions + token * 3 + axis, mask=live, other=0)
    angle = position.to(frequency.dtype) * frequency
    cos, sin = cos_sin(angle)
    return cos[None, :], sin[None, :]


@triton.jit
def cos_sin(angle: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return (cos, sin), at any angle as good as fp32's own, by whole quarter turns and the series of the rest.

    tl.cos would do but for the local memory that its reduction of large angles takes on NVIDIA. Here the reduction is
    one multiplication and one subtraction in fp64; on the rest, at most pi/4, the series end at r^9 and r^10.
    """
    if angle.dtype == tl.float64:
        cos = tl.cos(angle)
        sin = tl.sin(angle)
    else:
        quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
        r = (angle.to(tl.float64) - quarters.to(tl.float64) * 1.5707963267948966).to(tl.float32)
        z = r * r
        s = r * (1 + z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880)))))
        c = 1 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * (-1 / 3628800)))))
        quadrant = quarters.to(tl.int32) & 3
        cos = tl.where(quadrant % 2 == 0, c, s)
        sin = tl.where(quadrant % 2 == 0, s, c)
        cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)
        sin = tl.where(quadrant >= 2, -sin, sin)
    return cos, sin


@triton.jit
def load_pairs(
    at: tl.tensor, live: tl.tensor, half: tl.tensor, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the first and the second number of every pair [N, BLOCK] of N heads that start at `at`, widened."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)
        x = tl.load(at[:, None] + column[None, :], mask=live[:, None] & (column < 2 * half)[None, :], other=0.0)
        first, second = tl.split(tl.reshape(x, [at.shape[0], BLOCK, 2]))
    else:
        column = tl.arange(0, BLOCK)
        mask = live[:, None] & (column < half)[None, :]
        first = tl.load(at[:, None] + column[None, :], mask=mask, other=0.0)
        second = tl.load(at[:, None] + half + column[None, :], mask=mask, other=0.0)
    return widen(first), widen(second)


@triton.jit
def store_pairs(
    to: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    live: tl.tensor,
    half: tl.tensor,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write what load_pairs reads: pairs of N heads that start at `to`."""
    first = first.to(to.dtype.element_ty)
    second = second.to(to.dtype.element_ty)
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)
        x = tl.reshape(tl.join(first, second), [to.shape[0], 2 * BLOCK])
        tl.store(to[:, None] + column[None, :], x, mask=live[:, None] & (column < 2 * half)[None, :])
    else:
        column = tl.arange(0, BLOCK)
        mask = live[:, None] & (column < half)[None, :]
        tl.store(to[:, None] + column[None, :], first, mask=mask)
        tl.store(to[:, None] + half + column[None, :], second, mask=mask)


@triton.jit
def load_weight(
    weight: tl.pointer_type, half: tl.tensor, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the weight [1, BLOCK] of the first and of the second numbers of the pairs."""
    first, second = load_pairs(weight + tl.arange(0, 1), tl.arange(0, 1) == 0, half, INTERLEAVED, BLOCK)
    return first, second
