"""Low-rank fusion in Triton: projections that are multiplied and summed over r before anything is written.

    p_m = [x_m; 1] W_m^r;  y = sum_r prod_m p_m;  dp_m = dy prod_{n != m} p_n
    mfb: z = sign(y) sqrt(|y|); out = z / |z|_2; dy = (g - out (out . g)) / (2 |z| |z|_2)

Forward: a tile of y [ROWS, COLUMNS] a program, over all r; the M R E projected numbers of a row stay in registers.
Backward: the projections are made again, dp_m is written in x's dtype, a chunk of rows at a time, and multiplied with
factors and inputs by torch (`reference_low_rank_fusion.gradients`: dx_m and dW_m are plain matrix products). The
epilogue is a kernel of its own over whole rows, before the rounding to x's dtype. No atomics: the same bits every time.
Projections, products and sums are in fp32.
"""

# Triton itself types a kernel's arguments, at launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from triweave.kernels import reference_low_rank_fusion
from triweave.kernels.errors import KernelUnavailableError
from triweave.kernels.rows_triton import LAUNCH, as_rows, widen

CONFIGS: dict[str, dict[int, dict[str, int]]] = {
    "fusion_forward_kernel": {
        2: {"ROWS": 128, "COLUMNS": 64, "DEPTH": 32, "num_warps": 8, "num_stages": 3},
        4: {"ROWS": 32, "COLUMNS": 32, "DEPTH": 32, "num_warps": 4, "num_stages": 2},
    },
    "fusion_gradient_kernel": {
        2: {"ROWS": 128, "COLUMNS": 64, "DEPTH": 32, "num_warps": 8, "num_stages": 3},
        4: {"ROWS": 32, "COLUMNS": 32, "DEPTH": 32, "num_warps": 4, "num_stages": 2},
    },
    "mfb_forward_kernel": {size: {"ROWS": 4, "BLOCK": 256, "num_warps": 4} for size in (2, 4)},
    "mfb_backward_kernel": {size: {"ROWS": 4, "BLOCK": 256, "num_warps": 4} for size in (2, 4)},
}
"""Kernel -> bytes of a number -> tile and how it is compiled; products are summed DEPTH at a time."""

SMALLEST = tl.constexpr(1.1754943508222875e-38)
"""What is below fp32's smallest normal number counts as 0: square roots flush it, and the backward divides by them."""


# Kernels


@triton.jit
def _projection(
    x_ptr, w_ptr, stride_x, n, in_rows, e, in_columns, r, D, E,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Return [x; 1] W^r [ROWS, COLUMNS]; the last of the D + 1 rows of W^r is what every sum begins with."""
    depth = tl.arange(0, DEPTH)
    x_rows = x_ptr + n.to(tl.int64)[:, None] * stride_x
    first = tl.cast(r, tl.int64) * (D + 1)
    w_columns = w_ptr + first * E + e[None, :]
    bias = tl.load(w_ptr + (first + D) * E + e[None, :], mask=in_columns[None, :], other=0.0)
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32) + bias.to(tl.float32)
    for start in range(0, D, DEPTH):
        d = start + depth
        x = tl.load(x_rows + d[None, :], mask=in_rows[:, None] & (d < D)[None, :], other=0.0)
        w = tl.load(w_columns + d.to(tl.int64)[:, None] * E, mask=(d < D)[:, None] & in_columns[None, :], other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    return total


@triton.jit
def fusion_forward_kernel(
    x0_ptr, x1_ptr, x2_ptr, w0_ptr, w1_ptr, w2_ptr, out_ptr, stride_x0, stride_x1, stride_x2,
    N, R, E, D0, D1, D2, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write one tile of y = sum_r prod_m p_m, rounded to out's type; grid (row tiles, column tiles)."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = n < N, e < E
    fused = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for r in range(R):
        product = _projection(x0_ptr, w0_ptr, stride_x0, n, in_rows, e, in_columns, r, D0, E, ROWS, COLUMNS, DEPTH)
        product *= _projection(x1_ptr, w1_ptr, stride_x1, n, in_rows, e, in_columns, r, D1, E, ROWS, COLUMNS, DEPTH)
        if x2_ptr is not None:
            product *= _projection(x2_ptr, w2_ptr, stride_x2, n, in_rows, e, in_columns, r, D2, E, ROWS, COLUMNS, DEPTH)
        fused += product
    place = n.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(out_ptr + place, fused.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def fusion_gradient_kernel(
    dy_ptr, x0_ptr, x1_ptr, x2_ptr, w0_ptr, w1_ptr, w2_ptr, dp0_ptr, dp1_ptr, dp2_ptr,
    stride_dy, stride_x0, stride_x1, stride_x2,
    N, R, E, D0, D1, D2, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write dp_m = dy prod_{n != m} p_n of every input for one tile and one r; grid (row tiles, column tiles, R)."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.program_id(2)
    in_rows, in_columns = n < N, e < E
    live = in_rows[:, None] & in_columns[None, :]
    p0 = _projection(x0_ptr, w0_ptr, stride_x0, n, in_rows, e, in_columns, r, D0, E, ROWS, COLUMNS, DEPTH)
    p1 = _projection(x1_ptr, w1_ptr, stride_x1, n, in_rows, e, in_columns, r, D1, E, ROWS, COLUMNS, DEPTH)
    dy = widen(tl.load(dy_ptr + n.to(tl.int64)[:, None] * stride_dy + e[None, :], mask=live, other=0.0))
    place = (n.to(tl.int64)[:, None] * R + r) * E + e[None, :]
    element = dp0_ptr.dtype.element_ty
    if x2_ptr is not None:
        p2 = _projection(x2_ptr, w2_ptr, stride_x2, n, in_rows, e, in_columns, r, D2, E, ROWS, COLUMNS, DEPTH)
        tl.store(dp2_ptr + place, (dy * p0 * p1).to(element), mask=live)
        dy = dy * p2
    tl.store(dp0_ptr + place, (dy * p1).to(element), mask=live)
    tl.store(dp1_ptr + place, (dy * p0).to(element), mask=live)


@triton.jit
def _signed_root(y):
    """Return sign(y) sqrt(|y|), 0 below SMALLEST."""
    root = tl.where(tl.abs(y) < SMALLEST, 0.0, tl.sqrt(tl.abs(y)))
    return tl.where(y < 0, -root, root)


@triton.jit
def mfb_forward_kernel(y_ptr, out_ptr, N, E, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write z / |z|_2 of ROWS rows of y [N, E], contiguous."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = n.to(tl.int64)[:, None] * E + tl.arange(0, BLOCK)[None, :]
    square = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    for start in range(0, E, BLOCK):
        live = (n < N)[:, None] & (start + tl.arange(0, BLOCK) < E)[None, :]
        z = _signed_root(tl.load(y_ptr + place + start, mask=live, other=0.0))
        square += z * z
    norm = tl.sqrt(tl.sum(square, 1))
    norm = tl.where(norm == 0.0, 1.0, norm)
    for start in range(0, E, BLOCK):
        live = (n < N)[:, None] & (start + tl.arange(0, BLOCK) < E)[None, :]
        z = _signed_root(tl.load(y_ptr + place + start, mask=live, other=0.0))
        tl.store(out_ptr + place + start, (z / norm[:, None]).to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def mfb_backward_kernel(
    grad_ptr, y_ptr, dy_ptr, stride_grad, N, E, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dy = (g - out (out . g)) / (2 |z| |z|_2) of ROWS rows, 0 where z = 0."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    place = n.to(tl.int64)[:, None] * E + column[None, :]
    grads = grad_ptr + n.to(tl.int64)[:, None] * stride_grad + column[None, :]
    square = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    along = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    for start in range(0, E, BLOCK):
        live = (n < N)[:, None] & (start + column < E)[None, :]
        z = _signed_root(tl.load(y_ptr + place + start, mask=live, other=0.0))
        square += z * z
        along += z * widen(tl.load(grads + start, mask=live, other=0.0))
    norm = tl.sqrt(tl.sum(square, 1))
    norm = tl.where(norm == 0.0, 1.0, norm)[:, None]
    cosine = tl.sum(along, 1)[:, None] / norm
    for start in range(0, E, BLOCK):
        live = (n < N)[:, None] & (start + column < E)[None, :]
        z = _signed_root(tl.load(y_ptr + place + start, mask=live, other=0.0))
        g = widen(tl.load(grads + start, mask=live, other=0.0))
        slope = 0.5 / (tl.where(z == 0.0, 1.0, tl.abs(z)) * norm)
        dy = tl.where(z == 0.0, 0.0, (g - z / norm * cosine) * slope)
        tl.store(dy_ptr + place + start, dy, mask=live)


# Launchers


def low_rank_fusion_forward(xs: Sequence[Tensor], factors: Sequence[Tensor], epilogue: str) -> tuple[Tensor, Tensor]:
    """Return (out, fused), as reference_low_rank_fusion.low_rank_fusion_forward does."""
    _check_served(xs[0])
    rows, width = xs[0].shape[0], factors[0].shape[2]
    out = torch.empty(rows, width, dtype=xs[0].dtype, device=xs[0].device)
    fused = torch.empty_like(out, dtype=torch.float32) if epilogue == "mfb" else out.new_empty(0, dtype=torch.float32)
    if rows == 0:
        return out, fused
    config = CONFIGS["fusion_forward_kernel"][out.element_size()]
    grid = (triton.cdiv(rows, config["ROWS"]), triton.cdiv(width, config["COLUMNS"]))
    inputs, strides, sizes = _arguments(xs, factors)
    with torch.cuda.device_of(out):
        fusion_forward_kernel[grid](
            *inputs, out if epilogue == "none" else fused, *strides, rows, *sizes, **config, **LAUNCH
        )
        if epilogue == "mfb":
            config = CONFIGS["mfb_forward_kernel"][out.element_size()]
            mfb_forward_kernel[(triton.cdiv(rows, config["ROWS"]),)](fused, out, rows, width, **config, **LAUNCH)
    return out, fused


def low_rank_fusion_backward(
    grad: Tensor, xs: Sequence[Tensor], factors: Sequence[Tensor], fused: Tensor, epilogue: str
) -> list[Tensor]:
    """Return [dx_1, ..., dW_1, ...], as reference_low_rank_fusion.low_rank_fusion_backward does."""
    _check_served(xs[0])
    product_grad = as_rows(grad)
    if epilogue == "mfb" and fused.numel():
        product_grad = torch.empty_like(fused)
        config = CONFIGS["mfb_backward_kernel"][grad.element_size()]
        rows, width = fused.shape
        grads = as_rows(grad)
        with torch.cuda.device_of(grad):
            mfb_backward_kernel[(triton.cdiv(rows, config["ROWS"]),)](
                grads, fused, product_grad, grads.stride(0), rows, width, **config, **LAUNCH
            )
    return reference_low_rank_fusion.gradients(product_grad, xs, factors, _product_gradients)


def _product_gradients(product_grad: Tensor, xs: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """Return dp_m [n, R, E] of every input for a chunk of rows."""
    rows, (rank, _, width) = xs[0].shape[0], factors[0].shape
    found = [torch.empty(rows, rank, width, dtype=x.dtype, device=x.device) for x in xs]
    if rows == 0:
        return found
    config = CONFIGS["fusion_gradient_kernel"][xs[0].element_size()]
    grid = (triton.cdiv(rows, config["ROWS"]), triton.cdiv(width, config["COLUMNS"]), rank)
    inputs, strides, sizes = _arguments(xs, factors)
    outputs = [*found, None][:3]
    with torch.cuda.device_of(product_grad):
        fusion_gradient_kernel[grid](
            product_grad, *inputs, *outputs, product_grad.stride(0), *strides, rows, *sizes, **config, **LAUNCH
        )
    return found


def _arguments(
    xs: Sequence[Tensor], factors: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[int], tuple[int, ...]]:
    """Return what both kernels take of two or three inputs: tensors, row strides, and R, E, D0, D1, D2."""
    rank, _, width = factors[0].shape
    matrices = [x if x.stride(1) == 1 or x.shape[1] < 2 else x.contiguous() for x in xs]
    narrow = [factor.to(xs[0].dtype).contiguous() for factor in factors]
    missing = [None] * (3 - len(xs))
    strides = [matrix.stride(0) for matrix in matrices] + [0] * len(missing)
    depths = [x.shape[1] for x in xs] + [0] * len(missing)
    return [*matrices, *missing, *narrow, *missing], strides, (rank, width, *depths)


def _check_served(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise KernelUnavailableError(
            f"low_rank_fusion: impl='triton' cannot serve {x.dtype}, only float32, float16 and bfloat16; use reference"
        )
