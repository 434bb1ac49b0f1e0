"""RMS norm in Triton: plain, with the residual added, with one weight per modality; forward and backward.

A program holds whole rows. Forward: one tile of ROWS rows each. Backward: consecutive rows, a tile at a time; the row
gradients are written as they come, the weight gradient is summed in registers and written once, as the program's own
slice of `partial`. The slices are then added in their order: no atomics, the same bits every time. How many programs
there are depends on the shape alone, never on the chip. Limit: memory bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triweave.kernels.errors import KernelInputError
from triweave.kernels.reference import accumulation_dtype
from triweave.kernels.rows_triton import LAUNCH, as_rows, widen

CONFIGS: dict[str, dict[int, dict[str, int]]] = {
    "rms_norm_forward_kernel": {
        64: {"ROWS": 32, "BLOCK": 64, "num_warps": 4},
        128: {"ROWS": 16, "BLOCK": 128, "num_warps": 4},
        256: {"ROWS": 8, "BLOCK": 256, "num_warps": 4},
        512: {"ROWS": 4, "BLOCK": 512, "num_warps": 4},
        1024: {"ROWS": 2, "BLOCK": 1024, "num_warps": 4},
        2048: {"ROWS": 1, "BLOCK": 2048, "num_warps": 4},
        4096: {"ROWS": 1, "BLOCK": 4096, "num_warps": 8},
        8192: {"ROWS": 1, "BLOCK": 8192, "num_warps": 16},
        16384: {"ROWS": 1, "BLOCK": 16384, "num_warps": 16},
    },
    "rms_norm_backward_kernel": {
        64: {"ROWS": 16, "BLOCK": 64, "num_warps": 4},
        128: {"ROWS": 8, "BLOCK": 128, "num_warps": 4},
        256: {"ROWS": 4, "BLOCK": 256, "num_warps": 4},
        512: {"ROWS": 1, "BLOCK": 512, "num_warps": 4},
        1024: {"ROWS": 1, "BLOCK": 1024, "num_warps": 4},
        2048: {"ROWS": 1, "BLOCK": 2048, "num_warps": 4},
        4096: {"ROWS": 1, "BLOCK": 4096, "num_warps": 16},
        8192: {"ROWS": 1, "BLOCK": 8192, "num_warps": 16},
        16384: {"ROWS": 1, "BLOCK": 16384, "num_warps": 32},
    },
}
"""Kernel -> widest D -> tile and warps, for every dtype."""

BACKWARD_PROGRAMS = 256
"""At most so many programs, each with a slice of weight gradient: at D=4096 and one weight 4 MiB of them."""


@triton.jit
def rms_norm_forward_kernel(
    x: tl.pointer_type,
    residual: tl.pointer_type,
    weight: tl.pointer_type,
    modality: tl.pointer_type,
    out: tl.pointer_type,
    total: tl.pointer_type,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    modalities: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write out = v / sqrt(mean(v^2) + eps) weight for ROWS rows; v is x, or x + residual, which goes to `total`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    live_row = row < rows
    live = live_row[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    value = widen(tl.load(x + row[:, None] * x_stride + column[None, :], mask=live, other=0.0))
    if residual is not None:
        value += widen(tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=live, other=0.0))
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=live)
        value = widen(rounded)
    reciprocal = tl.rsqrt(tl.sum(value * value, axis=1) / columns + eps)
    kind = row_modality(modality, row, live_row)
    scale = row_weight(weight, kind, modality, modalities, columns, column).to(value.dtype)
    tl.store(out + place, (value * reciprocal[:, None] * scale).to(out.dtype.element_ty), mask=live)


@triton.jit
def rms_norm_backward_kernel(
    grad: tl.pointer_type,
    x: tl.pointer_type,
    weight: tl.pointer_type,
    modality: tl.pointer_type,
    residual_grad: tl.pointer_type,
    x_grad: tl.pointer_type,
    partial: tl.pointer_type,
    grad_stride: tl.tensor,
    x_stride: tl.tensor,
    residual_grad_stride: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    modalities: tl.tensor,
    rows_each: tl.tensor,
    eps: tl.tensor,
    KINDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write dx = r (g w - x^ mean(g w x^)) + residual_grad of rows_each rows, and partial = sum of g x^ by modality.

    rows_each is a multiple of ROWS, KINDS a power of two from `modalities` on.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    kinds = tl.arange(0, KINDS)
    live_column = column < columns
    weight_grad = tl.zeros([KINDS, BLOCK], dtype=partial.dtype.element_ty)
    for start in range(0, rows_each, ROWS):
        row = program * rows_each + start + tl.arange(0, ROWS)
        live_row = row < rows
        live = live_row[:, None] & live_column[None, :]
        value = widen(tl.load(x + row[:, None] * x_stride + column[None, :], mask=live, other=0.0))
        g = widen(tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=live, other=0.0))
        reciprocal = tl.rsqrt(tl.sum(value * value, axis=1) / columns + eps)
        normed = value * reciprocal[:, None]
        kind = row_modality(modality, row, live_row)
        scaled = g * row_weight(weight, kind, modality, modalities, columns, column).to(value.dtype)
        mean = tl.sum(scaled * normed, axis=1) / columns
        result = (scaled - normed * mean[:, None]) * reciprocal[:, None]
        if residual_grad is not None:
            place = row[:, None] * residual_grad_stride + column[None, :]
            result += widen(tl.load(residual_grad + place, mask=live, other=0.0))
        place = row[:, None] * columns + column[None, :]
        tl.store(x_grad + place, result.to(x_grad.dtype.element_ty), mask=live)
        product = g * normed
        for one in tl.static_range(KINDS):
            share = tl.sum(tl.where((kind == one)[:, None], product, 0.0), axis=0)
            weight_grad += tl.where((kinds == one)[:, None], share[None, :], 0.0)
    place = (program * modalities + kinds)[:, None] * columns + column[None, :]
    tl.store(partial + place, weight_grad, mask=(kinds < modalities)[:, None] & live_column[None, :])


@triton.jit
def row_modality(modality: tl.pointer_type, row: tl.tensor, live_row: tl.tensor) -> tl.tensor:
    """Return int64 [ROWS]: which weight each row takes, 0 for padding and where there is only one."""
    kind = row * 0
    if modality is not None:
        kind = tl.maximum(tl.load(modality + row, mask=live_row, other=0).to(tl.int64), 0)
    return kind


@triton.jit
def row_weight(
    weight: tl.pointer_type,
    kind: tl.tensor,
    modality: tl.pointer_type,
    modalities: tl.tensor,
    columns: tl.tensor,
    column: tl.tensor,
) -> tl.tensor:
    """Return each row's weight [ROWS or 1, BLOCK]; NaN, not a stray read, for a modality from `modalities` on."""
    live = (column < columns)[None, :]
    if modality is None:
        scale = tl.load(weight + column[None, :], mask=live, other=0.0)
    else:
        known = (kind < modalities)[:, None]
        scale = tl.load(weight + kind[:, None] * columns + column[None, :], mask=live & known, other=0.0)
        scale = tl.where(known, widen(scale), float("nan"))
    return scale


def rms_norm_forward(x: Tensor, weight: Tensor, modality: Tensor | None, eps: float) -> Tensor:
    """Return y, as reference.rms_norm_forward does. x [..., D]; weight [D], or [M, D] with modality int [...]."""
    return _forward(x, None, weight, modality, eps)[0]


def rms_norm_residual_forward(
    x: Tensor, residual: Tensor, weight: Tensor, modality: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (y of x + residual, x + residual rounded to x's dtype) in one pass over both."""
    out, total = _forward(x, residual, weight, modality, eps)
    assert total is not None
    return out, total


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, modality: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(out)
    if out.numel() == 0:
        return out, total
    config = _config("rms_norm_forward_kernel", x.shape[-1])
    matrix = as_rows(x)
    added = None if residual is None else as_rows(residual)
    rows, columns = matrix.shape
    with torch.cuda.device_of(x):
        rms_norm_forward_kernel[(triton.cdiv(rows, config["ROWS"]),)](
            matrix,
            added,
            weight.contiguous(),
            None if modality is None else modality.contiguous(),
            out,
            total,
            matrix.stride(0),
            0 if added is None else added.stride(0),
            rows,
            columns,
            1 if modality is None else weight.shape[0],
            eps,
            **config,
            **LAUNCH,
        )
    return out, total


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, modality: Tensor | None, eps: float, residual_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (dx, dweight), as reference.rms_norm_backward does; residual_grad is added to dx before it rounds."""
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return x_grad, torch.zeros_like(weight)
    config = _config("rms_norm_backward_kernel", x.shape[-1])
    matrix, grad_matrix = as_rows(x), as_rows(grad)
    added = None if residual_grad is None else as_rows(residual_grad)
    rows, columns = matrix.shape
    tiles = triton.cdiv(rows, config["ROWS"])
    rows_each = triton.cdiv(tiles, BACKWARD_PROGRAMS) * config["ROWS"]
    programs = triton.cdiv(rows, rows_each)
    modalities = 1 if modality is None else weight.shape[0]
    partial = torch.empty(programs, modalities, columns, dtype=accumulation_dtype(x.dtype), device=x.device)
    with torch.cuda.device_of(x):
        rms_norm_backward_kernel[(programs,)](
            grad_matrix,
            matrix,
            weight.contiguous(),
            None if modality is None else modality.contiguous(),
            added,
            x_grad,
            partial,
            grad_matrix.stride(0),
            matrix.stride(0),
            0 if added is None else added.stride(0),
            rows,
            columns,
            modalities,
            rows_each,
            eps,
            KINDS=triton.next_power_of_2(modalities),
            **config,
            **LAUNCH,
        )
    return x_grad, partial.sum(0).reshape(weight.shape).to(weight.dtype)


def _config(kernel: str, width: int) -> dict[str, int]:
    table = CONFIGS[kernel]
    for widest, config in table.items():
        if width <= widest:
            return config
    raise KernelInputError(f"rms_norm: impl='triton' takes rows of at most {max(table)} numbers, not {width}; use auto")
