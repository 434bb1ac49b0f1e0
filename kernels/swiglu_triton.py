"""SwiGLU's elementwise half in Triton: every number is read once and written once, halves of one projection in place.

One program takes BLOCK neighbouring numbers of one row; contiguous tensors are one long row. Limit: memory bandwidth,
3 numbers moved for each of the output forward, 5 backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triweave.kernels.rows_triton import LAUNCH, as_rows, widen

CONFIGS: dict[str, dict[str, int]] = {
    "swiglu_forward_kernel": {"BLOCK": 1024, "num_warps": 4},
    "swiglu_backward_kernel": {"BLOCK": 1024, "num_warps": 4},
}
"""Kernel -> tile and warps, for every dtype: a thread has 8 numbers of each tensor, one 16-byte access in 16 bit."""


@triton.jit
def swiglu_forward_kernel(
    gate: tl.pointer_type,
    up: tl.pointer_type,
    out: tl.pointer_type,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    columns: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Write out = gate sigmoid(gate) up for one block; `blocks` of them make a row."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = column < columns
    a = widen(tl.load(gate + row * gate_stride + column, mask=live, other=0.0))
    b = widen(tl.load(up + row * up_stride + column, mask=live, other=0.0))
    value = a * sigmoid(a) * b
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=live)


@triton.jit
def swiglu_backward_kernel(
    grad: tl.pointer_type,
    gate: tl.pointer_type,
    up: tl.pointer_type,
    gate_grad: tl.pointer_type,
    up_grad: tl.pointer_type,
    grad_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    columns: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Write dgate = g up s (1 + gate (1 - s)) and dup = g gate s, s = sigmoid(gate), for one block."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = column < columns
    g = widen(tl.load(grad + row * grad_stride + column, mask=live, other=0.0))
    a = widen(tl.load(gate + row * gate_stride + column, mask=live, other=0.0))
    b = widen(tl.load(up + row * up_stride + column, mask=live, other=0.0))
    s = sigmoid(a)
    place = row * columns + column
    gate_value = g * b * s * (1.0 + a * (1.0 - s))
    tl.store(gate_grad + place, gate_value.to(gate_grad.dtype.element_ty), mask=live)
    tl.store(up_grad + place, (g * a * s).to(up_grad.dtype.element_ty), mask=live)


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """Return 1 / (1 + exp(-x)) by the exponential of -|x|, which cannot overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return gate sigmoid(gate) up, as reference.swiglu_forward does."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    a, b = _matrices(gate, up)
    config = CONFIGS["swiglu_forward_kernel"]
    rows, columns = a.shape
    blocks = triton.cdiv(columns, config["BLOCK"])
    with torch.cuda.device_of(gate):
        swiglu_forward_kernel[(rows * blocks,)](
            a, b, out, a.stride(0), b.stride(0), columns, blocks, **config, **LAUNCH
        )
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dgate, dup), as reference.swiglu_backward does."""
    gate_grad, up_grad = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))
    if gate.numel() == 0:
        return gate_grad, up_grad
    matrices = _matrices(grad, gate, up)
    config = CONFIGS["swiglu_backward_kernel"]
    rows, columns = matrices[0].shape
    blocks = triton.cdiv(columns, config["BLOCK"])
    strides = [x.stride(0) for x in matrices]
    with torch.cuda.device_of(gate):
        swiglu_backward_kernel[(rows * blocks,)](
            *matrices, gate_grad, up_grad, *strides, columns, blocks, **config, **LAUNCH
        )
    return gate_grad, up_grad


def _matrices(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors as one row each if all are contiguous, else as rows of their last dimension."""
    if all(x.is_contiguous() for x in tensors):
        return [x.reshape(1, -1) for x in tensors]
    return [as_rows(x) for x in tensors]
