"""Attention in which each query row sees one contiguous interval of keys.

Causal text in a packed document is [document start, i + 1), a bidirectional media span [document start, span end), a
sliding window a later start, cross-attention an interval of the media axis. Limit: matrix time of the live tiles.
Sources: Dao 2023, FlashAttention-2 (backward from out and lse); Wang et al. 2024, FlashMask (intervals as masks).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from triweave.kernels import flash_attention, flex_attention, reference_attention, sdpa_attention
from triweave.kernels import tiles as tile_tables
from triweave.kernels.attention_inputs import Tables, check_heads, check_intervals, table_of, unit_stride
from triweave.kernels.backends import choose, triton_kernels
from triweave.kernels.reference import accumulation_dtype

_STRIP_IMPLEMENTATIONS: dict[str, ModuleType] = {"reference": reference_attention, "sdpa": sdpa_attention}
"""Those that run on the strips of tiles.segments; `triton` has tile lists of its own."""
_FOREIGN: dict[str, ModuleType] = {"flex": flex_attention, "flash": flash_attention}
"""Those that bring an autograd of their own, so that the ops below stay out of their way."""

_TAIL = "Tensor kv_lo, Tensor kv_hi, Tensor? segments, float scale, str impl"
torch.library.define("triweave::attention", f"(Tensor q, Tensor k, Tensor v, {_TAIL}) -> (Tensor, Tensor)")
torch.library.define(
    "triweave::attention_backward",
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_TAIL}) -> (Tensor, Tensor, Tensor)",
)


def _implementation(impl: str) -> ModuleType:
    return triton_kernels("attention") if impl == "triton" else _STRIP_IMPLEMENTATIONS[impl]


def _table(impl: str, kv_lo: Tensor, kv_hi: Tensor, table: Tensor | None) -> Tensor | None:
    """Return the table that `impl` reads; `triton` makes its own where there is none."""
    if table is not None or impl not in _STRIP_IMPLEMENTATIONS:
        return table
    return torch.from_numpy(tile_tables.segments(kv_lo.cpu().numpy(), kv_hi.cpu().numpy()))


@torch.library.impl("triweave::attention", "default")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, kv_lo: Tensor, kv_hi: Tensor, segments: Tensor | None, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        table = _table(impl, kv_lo, kv_hi, segments)
        return _implementation(impl).attention_forward(q, k, v, kv_lo, kv_hi, table, scale)


@torch.library.impl("triweave::attention_backward", "default")
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_lo: Tensor,
    kv_hi: Tensor,
    segments: Tensor | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        table = _table(impl, kv_lo, kv_hi, segments)
        return _implementation(impl).attention_backward(grad, q, k, v, out, lse, kv_lo, kv_hi, table, scale)


@torch.library.register_fake("triweave::attention")
def _forward_fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse_shape = (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=accumulation_dtype(q.dtype))


@torch.library.register_fake("triweave::attention_backward")
def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, kv_lo, kv_hi, segments, ctx.scale, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, kv_lo, kv_hi, segments)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    gradients = torch.ops.triweave.attention_backward(unit_stride(grad), *ctx.saved_tensors, ctx.scale, ctx.impl)
    return *gradients, *(None,) * 5


torch.library.register_autograd("triweave::attention", _differentiate, setup_context=_save)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lo: Tensor,
    kv_hi: Tensor,
    *,
    tiles: Tables | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return (out, lse): softmax(scale q k^T) v over keys kv_lo[b, i] <= j < kv_hi[b, i], and its log-sum-exp.

            keys 0 1 2 3 4 5 6 7     lo hi
        row 0    x . . . . . . .      0  1   document A, text
        row 1    x x . . . . . .      0  2
        row 2    . . x . . . . .      2  3   document B, text
        row 3    . . x x x x . .      2  6   its image, a bidirectional span
        row 4    . . x x x x . .      2  6
        row 5    . . x x x x . .      2  6
        row 6    . . x x x x x .      2  7   text after it
        row 7    . . . . . . . .      0  0   padding: out = 0, lse = -inf, no gradient

    q: [B, S, H, K]; k, v: [B, T, G, K], H a multiple of G; one dtype; any strides with a contiguous last dimension.
    kv_lo, kv_hi: int32 [B, S], 0 <= lo and hi <= T; hi <= lo is an empty row. Every interval is allowed, in any order.
    tiles: what `tiles.attention_tables(kv_lo, kv_hi)` returned for these very intervals (on the CPU), else it is
    computed here, once forward and once backward. `triton` takes attention_tiles.attention_tables instead, and both may
    be in one mapping. scale: 1 / sqrt(K) unless given.
    out: [B, S, H, K], contiguous. lse: [B, H, S] in fp32 (fp64 for fp64), natural logarithm, not differentiable.

    Computed in fp32 inside for bf16 and fp16. Deterministic, forward and backward. Numbers of keys outside a packed
    document never enter the arithmetic of its rows, so even a NaN elsewhere in the pack leaves them exactly as they
    are. (`triton` gives them weight 0, so NaN and infinities spread within a tile.) Memory is linear in S.
    `flex` and `flash` are other people's kernels with their own limits: see flex_attention.py and flash_attention.py.

    Raises KernelInputError if shapes or dtypes do not fit, KernelUnavailableError if `impl` cannot serve.
    """
    check_heads("attention", q, k, v)
    check_intervals("attention", q, kv_lo=kv_lo, kv_hi=kv_hi)
    chosen = choose("attention", impl, q.device.type, q.dtype, q.shape[-1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    if chosen in _FOREIGN:
        return _FOREIGN[chosen].attention(q, k, v, kv_lo, kv_hi, scale)
    table = table_of(tiles, "tile_lists" if chosen == "triton" else "segments")
    return torch.ops.triweave.attention(q, k, v, kv_lo, kv_hi, table, scale, chosen)
