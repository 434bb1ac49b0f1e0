"""Cross-attention of each query to one interval of media tokens, with a tanh gate per head.

Limit: bandwidth, to read queries, media and intervals and write the result once; a query sees few media tokens.
Sources: Alayrac et al. 2022, Flamingo (gated cross-attention to the latest medium); attention.py for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from triweave.kernels import reference_attention, reference_cross_attention, sdpa_attention
from triweave.kernels import tiles as tile_tables
from triweave.kernels.attention_inputs import Tables, check_heads, check_intervals, table_of, unit_stride
from triweave.kernels.backends import choose, triton_kernels
from triweave.kernels.errors import KernelInputError
from triweave.kernels.reference import accumulation_dtype

_ATTENTION: dict[str, ModuleType] = {"reference": reference_attention, "sdpa": sdpa_attention}
"""Implementations that gate an attention on the strips of tiles.segments; `triton` has kernels and lists of its own."""

_TAIL = "Tensor media_lo, Tensor media_hi, Tensor gate, Tensor? table, float scale, str impl"
torch.library.define(
    "triweave::cross_attention", f"(Tensor q, Tensor k, Tensor v, {_TAIL}) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "triweave::cross_attention_backward",
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor attended, Tensor lse, {_TAIL}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


def _implementation(name: str, impl: str) -> Callable[..., tuple[Tensor, ...]]:
    """Return cross_attention_`name` of `impl`; `name` is forward or backward."""
    if impl == "triton":
        kernels = triton_kernels("cross_attention")
        return {"forward": kernels.cross_attention_forward, "backward": kernels.cross_attention_backward}[name]
    attention = _ATTENTION[impl]
    if name == "forward":
        return partial(reference_cross_attention.cross_attention_forward, attention.attention_forward)
    return partial(reference_cross_attention.cross_attention_backward, attention.attention_backward)


def _table(impl: str, media_lo: Tensor, media_hi: Tensor, table: Tensor | None) -> Tensor | None:
    """Return the table that `impl` reads; `triton` makes its own where there is none."""
    if table is not None or impl == "triton":
        return table
    return torch.from_numpy(tile_tables.segments(media_lo.cpu().numpy(), media_hi.cpu().numpy()))


@torch.library.impl("triweave::cross_attention", "default")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    media_lo: Tensor,
    media_hi: Tensor,
    gate: Tensor,
    table: Tensor | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, ...]:
    with torch.autocast(q.device.type, enabled=False):
        table = _table(impl, media_lo, media_hi, table)
        return _implementation("forward", impl)(q, k, v, media_lo, media_hi, gate, table, scale)


@torch.library.impl("triweave::cross_attention_backward", "default")
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    lse: Tensor,
    media_lo: Tensor,
    media_hi: Tensor,
    gate: Tensor,
    table: Tensor | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, ...]:
    with torch.autocast(q.device.type, enabled=False):
        table = _table(impl, media_lo, media_hi, table)
        tail = (media_lo, media_hi, gate, table, scale)
        return _implementation("backward", impl)(grad, q, k, v, attended, lse, *tail)


@torch.library.register_fake("triweave::cross_attention")
def _forward_fake(q: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulation_dtype(q.dtype))
    return q.new_empty(q.shape), q.new_empty(0 if others[-1] == "triton" else q.shape), lse


@torch.library.register_fake("triweave::cross_attention_backward")
def _backward_fake(
    grad: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,  # noqa: ARG001
    lse: Tensor,  # noqa: ARG001
    media_lo: Tensor,  # noqa: ARG001
    media_hi: Tensor,  # noqa: ARG001
    gate: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), gate.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, media_lo, media_hi, gate, table, ctx.scale, ctx.impl = inputs
    _, attended, lse = output
    ctx.mark_non_differentiable(attended, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, attended, lse, media_lo, media_hi, gate, table)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    dq, dk, dv, gate_grad = torch.ops.triweave.cross_attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.impl)
    return dq, dk, dv, None, None, gate_grad, None, None, None


torch.library.register_autograd("triweave::cross_attention", _differentiate, setup_context=_save)


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    media_lo: Tensor,
    media_hi: Tensor,
    gate: Tensor,
    *,
    tiles: Tables | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return tanh(gate_h) softmax(scale q k^T) v over the media tokens media_lo[b, i] <= j < media_hi[b, i].

            media 0 1 2 3 4 5     lo hi      (the latest medium; all before it would be 0 5 in row 4)
        row 0     . . . . . .      0  0   document A, text before its first medium: 0
        row 1     x x . . . .      0  2   its first medium, two tokens
        row 2     x x . . . .      0  2   text after it
        row 3     . . x x x .      2  5   its second medium
        row 4     . . x x x .      2  5
        row 5     . . . . . .      0  0   document B, before its medium: nothing of A's
        row 6     . . . . . x      5  6

    q: [B, S, H, K]; k, v: [B, T, G, K] of the media tokens, H a multiple of G; one dtype; any strides.
    media_lo, media_hi: int32 [B, S], 0 <= lo and hi <= T; hi <= lo is an empty row: out = 0 and no gradient, even if
    what it holds is not finite. tiles.media_intervals makes them from the documents of a pack; any are allowed.
    gate: [H], fp32 as a rule, or one for all heads, expanded; 0 is a closed gate, whose own gradient is not 0.
    tiles: what `tiles.attention_tables(media_lo, media_hi)` returned (on the CPU), or for `triton` what that of
    attention_tiles did, as in `attention`. scale: 1 / sqrt(K) unless given.
    out: [B, S, H, K], contiguous.

    Computed in fp32 inside for bf16 and fp16. Deterministic, forward and backward. `reference` and `sdpa` keep the
    ungated result for the backward; `triton` keeps the log-sum-exp only and visits its tiles once more. What is not
    finite in media that a row does not see leaves it as it is, except that `triton` lets it spread within a tile.

    Raises KernelInputError if shapes or dtypes do not fit, KernelUnavailableError if `impl` cannot serve.
    """
    _check(q, k, v, media_lo, media_hi, gate)
    chosen = choose("cross_attention", impl, q.device.type, q.dtype, q.shape[-1])
    out: Tensor = torch.ops.triweave.cross_attention(
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        media_lo,
        media_hi,
        gate,
        table_of(tiles, "tile_lists" if chosen == "triton" else "segments"),
        q.shape[-1] ** -0.5 if scale is None else scale,
        chosen,
    )[0]
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, media_lo: Tensor, media_hi: Tensor, gate: Tensor) -> None:
    check_heads("cross_attention", q, k, v)
    check_intervals("cross_attention", q, media_lo=media_lo, media_hi=media_hi)
    if gate.shape != q.shape[2:3] or not gate.dtype.is_floating_point:
        raise KernelInputError(
            f"cross_attention: gate is {gate.dtype} {tuple(gate.shape)}; it must be floating-point [H], ({q.shape[2]},)"
        )
