"""MMCA: attention in which a text query attends to text and to media in two separate softmaxes and adds the results.

A long text before an image, or the other way round, then takes no weight from it, and media tokens see media only.
Limit: matrix time of the live tiles; two running softmaxes, each key visited once. Source: Yao et al. 2023,
DeepSpeed-VisualChat (multi-modal causal attention, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from triweave.kernels import mmca_tiles, reference_attention, reference_mmca, sdpa_attention
from triweave.kernels import tiles as tile_tables
from triweave.kernels.attention_inputs import Tables, check_heads, table_of, unit_stride
from triweave.kernels.backends import choose, triton_kernels
from triweave.kernels.errors import KernelInputError
from triweave.kernels.reference import accumulation_dtype

_STRIP_IMPLEMENTATIONS = {"reference": reference_attention, "sdpa": sdpa_attention}
"""Attention on strips that each class is given to."""

_MASK = "Tensor kv_lo, Tensor kv_hi, Tensor key_modality, Tensor query_modality, Tensor? layout, Tensor? table"
torch.library.define(
    "triweave::mmca",
    f"(Tensor q, Tensor k, Tensor v, {_MASK}, float scale, bool keep, str impl) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "triweave::mmca_backward",
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor text, Tensor lse, {_MASK}, float scale, str impl)"
    " -> (Tensor, Tensor, Tensor)",
)


def _function(name: str, impl: str) -> Callable[..., Any]:
    if impl == "triton":
        return getattr(triton_kernels("mmca"), name)
    return partial(getattr(reference_mmca, name), _STRIP_IMPLEMENTATIONS[impl])


def _tables(
    impl: str, mask: tuple[Tensor, Tensor, Tensor, Tensor], layout: Tensor | None, table: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the layout and the table that `impl` reads; `triton` makes its own table where there is none."""
    if layout is None or table is None:
        layout = torch.from_numpy(mmca_tiles.layout(*(x.cpu().numpy() for x in mask)))
        if impl in _STRIP_IMPLEMENTATIONS:
            intervals = mmca_tiles.class_intervals(layout.numpy(), mask[2].shape[1])
            table = torch.from_numpy(tile_tables.segments(*intervals))
    return layout, table


@torch.library.impl("triweave::mmca", "default")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lo: Tensor,
    kv_hi: Tensor,
    key_modality: Tensor,
    query_modality: Tensor,
    layout: Tensor | None,
    table: Tensor | None,
    scale: float,
    keep: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        tables = _tables(impl, (kv_lo, kv_hi, key_modality, query_modality), layout, table)
        return _function("mmca_forward", impl)(q, k, v, *tables, scale, keep)


@torch.library.impl("triweave::mmca_backward", "default")
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    text: Tensor,
    lse: Tensor,
    kv_lo: Tensor,
    kv_hi: Tensor,
    key_modality: Tensor,
    query_modality: Tensor,
    layout: Tensor | None,
    table: Tensor | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        tables = _tables(impl, (kv_lo, kv_hi, key_modality, query_modality), layout, table)
        return _function("mmca_backward", impl)(grad, q, k, v, out, text, lse, *tables, scale)


@torch.library.register_fake("triweave::mmca")
def _forward_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    keep = rest[-2]
    lse_shape = (mmca_tiles.CLASSES, q.shape[0], q.shape[2], q.shape[1])
    text = q.new_empty(q.shape if keep else 0)
    return q.new_empty(q.shape), text, q.new_empty(lse_shape, dtype=accumulation_dtype(q.dtype))


@torch.library.register_fake("triweave::mmca_backward")
def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, *mask, ctx.scale, _, ctx.impl = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *mask)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    gradients = torch.ops.triweave.mmca_backward(unit_stride(grad), *ctx.saved_tensors, ctx.scale, ctx.impl)
    return *gradients, *(None,) * 9


torch.library.register_autograd("triweave::mmca", _differentiate, setup_context=_save)


def mmca(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lo: Tensor,
    kv_hi: Tensor,
    key_modality: Tensor,
    query_modality: Tensor,
    *,
    tiles: Tables | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return out_i = [query i is text] A_text(i) + A_media(i), attention to the keys of each class in i's interval.

    A_c(i) = sum_j softmax_j(scale q_i . k_j) v_j over the keys j of class c with kv_lo[b, i] <= j < kv_hi[b, i], and 0
    if there are none: a text query that has seen no media yet gets A_text alone.

            keys 0 1 2 3 4 5 6       lo hi
                 T T M M T M T
        row 0  T t . . . . . .       0  1   t: weight in the softmax over text
        row 1  T t t . . . . .       0  2
        row 2  M . . m m . . .       2  4   m: weight in the softmax over media; an image sees its own span
        row 3  M . . m m . . .       2  4
        row 4  T t t m m t . .       0  5   both sum to 1, so the weights of this row sum to 2
        row 5  M . . . . . m .       5  6
        row 6  T t t m m t m t       0  7

    q: [B, S, H, K]; k, v: [B, T, G, K], H a multiple of G; one dtype; any strides with a contiguous last dimension.
    kv_lo, kv_hi: int32 [B, S] as in attention. What a media query sees is the media keys of the interval the caller
    gives it. key_modality: int [B, T], query_modality: int [B, S]; 0 is text, any other number media.
    tiles: what mmca_tiles.strip_tables (or triton_tables, for `triton`) returned for this very mask, else it is made
    here on the CPU, once forward and once backward. scale: 1 / sqrt(K) unless given.
    out: [B, S, H, K], contiguous.

    Computed in fp32 inside for bf16 and fp16; A_text is rounded to the inputs' type before A_media is added.
    Deterministic. Memory is linear in S: queries and keys are put in the order of their class, text first, and A_text
    is kept for the backward. A query without a key of a class, or with an empty interval, gets exactly 0 from it.
    Numbers of another document stay out exactly as in attention.

    Raises KernelInputError if shapes or dtypes do not fit, KernelUnavailableError if `impl` cannot serve.
    """
    _check(q, k, v, kv_lo, kv_hi, key_modality, query_modality)
    chosen = choose("mmca", impl, q.device.type, q.dtype, q.shape[-1])
    out, _, _ = torch.ops.triweave.mmca(
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        kv_lo,
        kv_hi,
        key_modality,
        query_modality,
        table_of(tiles, "mmca_layout"),
        table_of(tiles, "mmca_tile_lists" if chosen == "triton" else "mmca_segments"),
        q.shape[-1] ** -0.5 if scale is None else scale,
        torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        chosen,
    )
    return out


def _check(
    q: Tensor, k: Tensor, v: Tensor, kv_lo: Tensor, kv_hi: Tensor, key_modality: Tensor, query_modality: Tensor
) -> None:
    check_heads("mmca", q, k, v)
    for name, x, shape, letters in (
        ("kv_lo", kv_lo, q.shape[:2], "[B, S]"),
        ("kv_hi", kv_hi, q.shape[:2], "[B, S]"),
        ("query_modality", query_modality, q.shape[:2], "[B, S]"),
        ("key_modality", key_modality, k.shape[:2], "[B, T]"),
    ):
        if x.shape != shape or x.is_floating_point():
            raise KernelInputError(
                f"mmca: {name} is {x.dtype} {tuple(x.shape)}; it must be integers {letters}, {tuple(shape)}"
            )
