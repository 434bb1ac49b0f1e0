"""RMS norm of query and key heads and their rotation in Triton, one pass over both, forward and backward.

A program takes whole tokens: it makes the K/2 cosines and sines of a token once, from its three positions, and turns
the query and then the key heads with them, HEADS at a time. The two numbers of every pair are two tiles, so the split
and the interleaved layout are one kernel. Weight gradients are summed over a program's consecutive tokens in registers,
written as its own slice, and the slices added in their order: no atomics. Limit: memory bandwidth, q and k read once
and written once (the backward reads their gradients too).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from triweave.kernels.errors import KernelInputError
from triweave.kernels.pairs_triton import load_pairs, load_weight, store_pairs, token_angles
from triweave.kernels.reference import accumulation_dtype, rotary_table
from triweave.kernels.rows_triton import LAUNCH

CONFIGS: dict[str, dict[int, dict[str, int]]] = {
    "qk_norm_rope_forward_kernel": {
        32: {"HEADS": 32, "BLOCK": 16, "num_warps": 4},
        64: {"HEADS": 32, "BLOCK": 32, "num_warps": 4},
        128: {"HEADS": 16, "BLOCK": 64, "num_warps": 4},
        256: {"HEADS": 8, "BLOCK": 128, "num_warps": 4},
    },
    "qk_norm_rope_backward_kernel": {
        32: {"HEADS": 32, "BLOCK": 16, "num_warps": 4},
        64: {"HEADS": 16, "BLOCK": 32, "num_warps": 4},
        128: {"HEADS": 8, "BLOCK": 64, "num_warps": 4},
        256: {"HEADS": 4, "BLOCK": 128, "num_warps": 4},
    },
}
"""Kernel -> widest head -> at most so many heads at once, pairs of a tile, warps; for every dtype."""

BACKWARD_PROGRAMS = 1024
"""At most so many programs, each with 2 K numbers of weight gradient."""


@triton.jit
def qk_norm_rope_forward_kernel(
    q: tl.pointer_type,
    k: tl.pointer_type,
    positions: tl.pointer_type,
    axes: tl.pointer_type,
    frequencies: tl.pointer_type,
    q_weight: tl.pointer_type,
    k_weight: tl.pointer_type,
    q_out: tl.pointer_type,
    k_out: tl.pointer_type,
    q_row: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    length: tl.tensor,
    q_heads: tl.tensor,
    k_heads: tl.tensor,
    half: tl.tensor,
    eps: tl.tensor,
    INTERLEAVED: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the normalised and turned heads of one token. Strides are in numbers; out is contiguous."""
    token = tl.program_id(0).to(tl.int64)
    row = token // length
    place = token % length
    cos, sin = token_angles(positions, axes, frequencies, token, half, BLOCK)
    q_from = q + row * q_row + place * q_token
    turn_heads(q_from, q_weight, q_out, q_head, token, q_heads, cos, sin, half, eps, INTERLEAVED, Q_HEADS, BLOCK)
    k_from = k + row * k_row + place * k_token
    turn_heads(k_from, k_weight, k_out, k_head, token, k_heads, cos, sin, half, eps, INTERLEAVED, K_HEADS, BLOCK)


@triton.jit
def qk_norm_rope_backward_kernel(
    q_grad: tl.pointer_type,
    k_grad: tl.pointer_type,
    q: tl.pointer_type,
    k: tl.pointer_type,
    positions: tl.pointer_type,
    axes: tl.pointer_type,
    frequencies: tl.pointer_type,
    q_weight: tl.pointer_type,
    k_weight: tl.pointer_type,
    q_out: tl.pointer_type,
    k_out: tl.pointer_type,
    q_partial: tl.pointer_type,
    k_partial: tl.pointer_type,
    q_grad_row: tl.tensor,
    q_grad_token: tl.tensor,
    q_grad_head: tl.tensor,
    k_grad_row: tl.tensor,
    k_grad_token: tl.tensor,
    k_grad_head: tl.tensor,
    q_row: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    tokens: tl.tensor,
    tokens_each: tl.tensor,
    length: tl.tensor,
    q_heads: tl.tensor,
    k_heads: tl.tensor,
    half: tl.tensor,
    eps: tl.tensor,
    INTERLEAVED: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write dq and dk of tokens_each tokens, and their shares of the weight gradients."""
    program = tl.program_id(0).to(tl.int64)
    first = program * tokens_each
    q_first = tl.zeros([Q_HEADS, BLOCK], dtype=frequencies.dtype.element_ty)
    q_second = tl.zeros([Q_HEADS, BLOCK], dtype=frequencies.dtype.element_ty)
    k_first = tl.zeros([K_HEADS, BLOCK], dtype=frequencies.dtype.element_ty)
    k_second = tl.zeros([K_HEADS, BLOCK], dtype=frequencies.dtype.element_ty)
    for step in range(tl.minimum(tokens_each, tokens - first)):
        token = first + step
        row = token // length
        place = token % length
        cos, sin = token_angles(positions, axes, frequencies, token, half, BLOCK)
        grad_from = q_grad + row * q_grad_row + place * q_grad_token
        from_ = q + row * q_row + place * q_token
        q_first, q_second = turn_heads_back(
            grad_from,
            from_,
            q_weight,
            q_out,
            q_grad_head,
            q_head,
            token,
            q_heads,
            cos,
            sin,
            q_first,
            q_second,
            half,
            eps,
            INTERLEAVED,
            Q_HEADS,
            BLOCK,
        )
        grad_from = k_grad + row * k_grad_row + place * k_grad_token
        from_ = k + row * k_row + place * k_token
        k_first, k_second = turn_heads_back(
            grad_from,
            from_,
            k_weight,
            k_out,
            k_grad_head,
            k_head,
            token,
            k_heads,
            cos,
            sin,
            k_first,
            k_second,
            half,
            eps,
            INTERLEAVED,
            K_HEADS,
            BLOCK,
        )
    if q_partial is not None:
        store_share(q_partial + program * 2 * half, q_first, q_second, half, INTERLEAVED, BLOCK)
    if k_partial is not None:
        store_share(k_partial + program * 2 * half, k_first, k_second, half, INTERLEAVED, BLOCK)


@triton.jit
def turn_heads(
    x: tl.pointer_type,
    weight: tl.pointer_type,
    out: tl.pointer_type,
    head_stride: tl.tensor,
    token: tl.tensor,
    heads: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    half: tl.tensor,
    eps: tl.tensor,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Normalise, scale and turn all heads of one token; x points at its first head."""
    if weight is not None:
        first_weight, second_weight = load_weight(weight, half, INTERLEAVED, BLOCK)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS).to(tl.int64)
        live = head < heads
        a, b = load_pairs(x + head * head_stride, live, half, INTERLEAVED, BLOCK)
        reciprocal = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * half) + eps)[:, None]
        a = a * reciprocal
        b = b * reciprocal
        if weight is not None:
            a = a * first_weight.to(a.dtype)
            b = b * second_weight.to(b.dtype)
        to = out + (token * heads + head) * 2 * half
        store_pairs(to, a * cos - b * sin, b * cos + a * sin, live, half, INTERLEAVED, BLOCK)


@triton.jit
def turn_heads_back(
    grad: tl.pointer_type,
    x: tl.pointer_type,
    weight: tl.pointer_type,
    out: tl.pointer_type,
    grad_head_stride: tl.tensor,
    head_stride: tl.tensor,
    token: tl.tensor,
    heads: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    first_sum: tl.tensor,
    second_sum: tl.tensor,
    half: tl.tensor,
    eps: tl.tensor,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Write dx of all heads of one token and return the sums [HEADS, BLOCK] of the weight gradient, gone on."""
    if weight is not None:
        first_weight, second_weight = load_weight(weight, half, INTERLEAVED, BLOCK)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS).to(tl.int64)
        live = head < heads
        a, b = load_pairs(grad + head * grad_head_stride, live, half, INTERLEAVED, BLOCK)
        da = a * cos + b * sin
        db = b * cos - a * sin
        a, b = load_pairs(x + head * head_stride, live, half, INTERLEAVED, BLOCK)
        reciprocal = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * half) + eps)[:, None]
        a = a * reciprocal
        b = b * reciprocal
        if weight is not None:
            first_sum += da * a
            second_sum += db * b
            da = da * first_weight.to(a.dtype)
            db = db * second_weight.to(b.dtype)
        mean = ((tl.sum(da * a, axis=1) + tl.sum(db * b, axis=1)) / (2 * half))[:, None]
        to = out + (token * heads + head) * 2 * half
        store_pairs(to, (da - a * mean) * reciprocal, (db - b * mean) * reciprocal, live, half, INTERLEAVED, BLOCK)
    return first_sum, second_sum


@triton.jit
def store_share(
    to: tl.pointer_type,
    first_sum: tl.tensor,
    second_sum: tl.tensor,
    half: tl.tensor,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write one program's weight gradient [K], summed over its heads."""
    one = tl.arange(0, 1)
    first = tl.sum(first_sum, axis=0)[None, :]
    second = tl.sum(second_sum, axis=0)[None, :]
    store_pairs(to + one, first, second, one == 0, half, INTERLEAVED, BLOCK)


def qk_norm_rope_forward(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    sections: list[int],
    interleaved: bool,
    theta: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return q [B, S, H, K] and k [B, S, G, K] normalised, scaled and turned, contiguous."""
    outs = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    tokens = q.shape[0] * q.shape[1]
    if tokens == 0:
        return outs[0], outs[1]
    q, k = _unit_stride(q), _unit_stride(k)
    with torch.cuda.device_of(q):
        qk_norm_rope_forward_kernel[(tokens,)](
            q,
            k,
            positions.contiguous(),
            *_table(tuple(sections), q.shape[-1], theta, accumulation_dtype(q.dtype), q.device),
            _contiguous(q_weight),
            _contiguous(k_weight),
            *outs,
            *q.stride()[:3],
            *k.stride()[:3],
            q.shape[1],
            q.shape[2],
            k.shape[2],
            q.shape[3] // 2,
            eps,
            INTERLEAVED=interleaved,
            **_config("qk_norm_rope_forward_kernel", q, k),
            **LAUNCH,
        )
    return outs[0], outs[1]


def qk_norm_rope_backward(
    q_grad: Tensor,
    k_grad: Tensor,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    sections: list[int],
    interleaved: bool,
    theta: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (dq, dk, dq_weight, dk_weight), as reference.norm_rope_backward does for each of q and k."""
    outs = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    weights = q_weight, k_weight
    tokens = q.shape[0] * q.shape[1]
    if tokens == 0:
        shares = [None if weight is None else torch.zeros_like(weight) for weight in weights]
        return outs[0], outs[1], shares[0], shares[1]
    inputs = [_unit_stride(x) for x in (q_grad, k_grad, q, k)]
    tokens_each = triton.cdiv(tokens, BACKWARD_PROGRAMS)
    programs = triton.cdiv(tokens, tokens_each)
    wide = accumulation_dtype(q.dtype)
    partials = [
        None if weight is None else torch.empty(programs, q.shape[3], dtype=wide, device=q.device) for weight in weights
    ]
    with torch.cuda.device_of(q):
        qk_norm_rope_backward_kernel[(programs,)](
            *inputs,
            positions.contiguous(),
            *_table(tuple(sections), q.shape[-1], theta, wide, q.device),
            *(_contiguous(weight) for weight in weights),
            *outs,
            *partials,
            *(stride for x in inputs for stride in x.stride()[:3]),
            tokens,
            tokens_each,
            q.shape[1],
            q.shape[2],
            k.shape[2],
            q.shape[3] // 2,
            eps,
            INTERLEAVED=interleaved,
            **_config("qk_norm_rope_backward_kernel", q, k),
            **LAUNCH,
        )
    q_share, k_share = (
        None if weight is None or partial is None else partial.sum(0).to(weight.dtype)
        for weight, partial in zip(weights, partials, strict=True)
    )
    return outs[0], outs[1], q_share, k_share


@functools.lru_cache(maxsize=32)
def _table(
    sections: tuple[int, ...], head_width: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return (axes, frequencies) of the pairs; kept, for they are the same in every layer and step."""
    return rotary_table(sections, head_width, theta, dtype, device)


def _config(kernel: str, q: Tensor, k: Tensor) -> dict[str, int]:
    table = CONFIGS[kernel]
    for widest, config in table.items():
        if q.shape[3] <= widest:
            heads = {
                name: min(config["HEADS"], triton.next_power_of_2(x.shape[2]))
                for name, x in [("Q_HEADS", q), ("K_HEADS", k)]
            }
            return {**heads, "BLOCK": config["BLOCK"], "num_warps": config["num_warps"]}
    raise KernelInputError(
        f"qk_norm_rope: impl='triton' takes heads at most {max(table)} wide, not {q.shape[3]}; use auto"
    )


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()
