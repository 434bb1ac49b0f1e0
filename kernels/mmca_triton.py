"""MMCA in Triton: two running softmaxes in one pass over the keys; a forward kernel, one for dq, one for dk and dv.

    class c is text or media;  s_ij = scale q_i . k_j;  p_ij = exp(s_ij - lse_ci), c the class of key j
    out_i = sum_c sum_j p_ij v_j;  delta_ci = g_i . A_ci;  ds_ij = p_ij (g_i . v_j - delta_ci)
    dv_j = sum_i p_ij g_i;  dq_i = scale sum_j ds_ij k_j;  dk_j = scale sum_i ds_ij q_i

"Positions" are those of mmca_tiles.layout, text before media, so that a tile holds one class of queries and of keys and
its work is that of attention. A program does the text keys, then the media keys, with one set of sums: A_text waits in
memory, where the backward needs it, and is added at the end. The forward reads queries in place; k and v, and in the
backward q and out's gradient, are copied to their positions first, a read and a write of each; results are written
in place.
Deterministic, no atomics: 7 matrix products in the backward where 5 would do. Inner loops, sums and rounding are
attention's (heads_triton.py). Source of the op: Yao et al. 2023, DeepSpeed-VisualChat.
"""

# Triton itself types a kernel's arguments, at launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triweave.kernels.attention_tiles import TILE_SIZES, tile_config, tile_lists, tile_sizes
from triweave.kernels.attention_triton import addressable, check_served, launch_options, with_positive_scale
from triweave.kernels.errors import KernelInputError
from triweave.kernels.heads_triton import (
    add_product,
    add_queries,
    attend_to_keys,
    base_2,
    load_head,
    run_start,
    score_gradients,
    store_head,
    turn,
    visited_tile,
)
from triweave.kernels.mmca_tiles import CLASSES, class_intervals
from triweave.kernels.reference_mmca import in_order

# Kernels. `layout` is what mmca_tiles.layout made, `table` what tile_lists made of its class intervals.


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, text_ptr, out_ptr, lse_ptr, layout_ptr, table_ptr,
    stride_qb, stride_qs, stride_qh, stride_t, S, T, heads_per_group, scale,
    WIDTH: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
):  # fmt: skip
    """Write A_text, out and both lse of one tile of queries of head h of batch row b; grid (query tiles, H, B).

    text_ptr may be out_ptr: A_text is then overwritten by out.
    """
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    tile = turn(table_ptr, 0, b)
    heads = tl.num_programs(1)
    rows = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    in_rows = rows < S
    layout_row = layout_ptr + b * (T + 5 * S) + T
    place = tl.load(layout_row + rows, mask=in_rows, other=0).to(tl.int64)[:, None]
    q0, q1 = load_head(q_ptr + b * stride_qb + h * stride_qh + place * stride_qs, in_rows, WIDTH, K0, K1, True)
    local_keys = tl.arange(0, KEY_TILE)
    kv_base = b * T * stride_t + h // heads_per_group * WIDTH
    k_base, v_base = k_ptr + kv_base, v_ptr + kv_base
    for part in tl.range(0, 2):
        lo = tl.load(layout_row + (1 + 2 * part) * S + rows, mask=in_rows, other=0)
        hi = tl.load(layout_row + (2 + 2 * part) * S + rows, mask=in_rows, other=0)
        peak = tl.full([QUERY_TILE], float("-inf"), tl.float32)
        total = tl.full([QUERY_TILE], 0.0, tl.float32)
        sum0 = tl.full([QUERY_TILE, K0], 0.0, tl.float32)
        sum1 = tl.full([QUERY_TILE, K1 if K1 > 0 else K0], 0.0, tl.float32)
        bounds = table_ptr + tl.load(table_ptr)
        bounds += 3 * ((part * tl.num_programs(2) + b) * tl.num_programs(0) + tile)
        for MASKED in tl.static_range(2):
            first, end = tl.load(bounds + MASKED), tl.load(bounds + MASKED + 1)
            run = run_start(table_ptr, first, end)
            for entry in tl.range(first, end):
                start = visited_tile(table_ptr, entry, run, MASKED) * KEY_TILE
                keys = start + local_keys
                in_keys = keys < T
                k_rows = k_base + start.to(tl.int64) * stride_t + local_keys[:, None] * stride_t
                v_rows = v_base + start.to(tl.int64) * stride_t + local_keys[:, None] * stride_t
                peak, total, sum0, sum1 = attend_to_keys(
                    peak, total, sum0, sum1, q0, q1, k_rows, v_rows, keys, in_keys, lo, hi, scale, WIDTH, K0, K1, MASKED
                )
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        # the rows again, by the table's copy of QUERY_TILE: all that follows from them would stay in registers
        ended = tile * tl.load(table_ptr + 3) + tl.arange(0, QUERY_TILE)
        in_ended = ended < S
        in_base_2 = peak * (scale * 1.4426950408889634) + tl.log2(total)  # rounded as the backward rounds scores
        lse = tl.where(empty, float("-inf"), in_base_2 * 0.6931471805599453)
        tl.store(lse_ptr + ((part * tl.num_programs(2) + b) * heads + h) * S + ended, lse, mask=in_ended)
        sum0, sum1 = sum0 / total[:, None], sum1 / total[:, None]
        home = tl.load(layout_row + ended, mask=in_ended, other=0).to(tl.int64)[:, None]
        packed_rows = ((b * S + home) * heads + h) * WIDTH
        if part == 0:
            store_head(text_ptr + packed_rows, in_ended, sum0, sum1, WIDTH, K0, K1)
        else:
            tl.debug_barrier()  # A_text may come back to other threads than wrote it
            text0, text1 = load_head(text_ptr + packed_rows, in_ended, WIDTH, K0, K1, True)
            store_head(out_ptr + packed_rows, in_ended, sum0 + text0, sum1 + text1, WIDTH, K0, K1)


@triton.jit
def dq_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, text_ptr, out_ptr, lse_ptr, layout_ptr, table_ptr, delta_ptr, dq_ptr,
    stride_t, S, T, heads_per_group, scale,
    WIDTH: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
):  # fmt: skip
    """Write dq, and delta = g . A of both classes for the other kernel, of one tile; grid (query tiles, H, B)."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    tile = turn(table_ptr, 1, b)
    heads = tl.num_programs(1)
    rows = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    in_rows = rows < S
    layout_row = layout_ptr + b * (T + 5 * S) + T
    place = tl.load(layout_row + rows, mask=in_rows, other=0).to(tl.int64)[:, None]
    packed_rows = ((b * S + place) * heads + h) * WIDTH
    query_rows = ((b * S + rows)[:, None] * heads + h) * WIDTH
    q0, q1 = load_head(q_ptr + query_rows, in_rows, WIDTH, K0, K1, True)
    g0, g1 = load_head(grad_ptr + query_rows, in_rows, WIDTH, K0, K1, True)
    text0, text1 = load_head(text_ptr + packed_rows, in_rows, WIDTH, K0, K1, True)
    out0, out1 = load_head(out_ptr + packed_rows, in_rows, WIDTH, K0, K1, True)
    text_delta = tl.sum(g0.to(tl.float32) * text0.to(tl.float32), 1)
    both_delta = tl.sum(g0.to(tl.float32) * out0.to(tl.float32), 1)
    if K1 > 0:
        text_delta += tl.sum(g1.to(tl.float32) * text1.to(tl.float32), 1)
        both_delta += tl.sum(g1.to(tl.float32) * out1.to(tl.float32), 1)
    local_keys = tl.arange(0, KEY_TILE)
    kv_base = b * T * stride_t + h // heads_per_group * WIDTH
    k_base, v_base = k_ptr + kv_base, v_ptr + kv_base
    dq0 = tl.full([QUERY_TILE, K0], 0.0, tl.float32)
    dq1 = tl.full([QUERY_TILE, K1 if K1 > 0 else K0], 0.0, tl.float32)
    for part in tl.range(0, 2):
        delta = tl.where(part == 0, text_delta, both_delta - text_delta)
        lo = tl.load(layout_row + (1 + 2 * part) * S + rows, mask=in_rows, other=0)
        hi = tl.load(layout_row + (2 + 2 * part) * S + rows, mask=in_rows, other=0)
        lse_rows = ((part * tl.num_programs(2) + b) * heads + h) * S + rows
        tl.store(delta_ptr + lse_rows, delta, mask=in_rows)
        lse = base_2(tl.load(lse_ptr + lse_rows, mask=in_rows, other=float("-inf")))
        bounds = table_ptr + tl.load(table_ptr + 1)
        bounds += 3 * ((part * tl.num_programs(2) + b) * tl.num_programs(0) + tile)
        for MASKED in tl.static_range(2):
            first, end = tl.load(bounds + MASKED), tl.load(bounds + MASKED + 1)
            run = run_start(table_ptr, first, end)
            for entry in tl.range(first, end):
                start = visited_tile(table_ptr, entry, run, MASKED) * KEY_TILE
                keys = start + local_keys
                in_keys = keys < T
                k_rows = k_base + start.to(tl.int64) * stride_t + local_keys[:, None] * stride_t
                v_rows = v_base + start.to(tl.int64) * stride_t + local_keys[:, None] * stride_t
                k0, k1 = load_head(k_rows, in_keys, WIDTH, K0, K1, MASKED)
                v0, v1 = load_head(v_rows, in_keys, WIDTH, K0, K1, MASKED)
                dscores = score_gradients(q0, q1, g0, g1, k0, k1, v0, v1, lse, delta, keys, lo, hi, scale, K1, MASKED)
                dq0, dq1 = add_product(dq0, dq1, dscores, k0, k1, K1)
    store_head(dq_ptr + packed_rows, in_rows, dq0 * scale, dq1 * scale, WIDTH, K0, K1)


@triton.jit
def dkv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, layout_ptr, table_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_s, S, T, heads_per_group, scale,
    WIDTH: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one tile of keys, over the query heads of its group in order; grid (key tiles, G, B).

    Each head has a turn for text and one for media; one of them finds no tiles where the keys are of one class.
    """
    g = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    tile = turn(table_ptr, 2, b)
    groups = tl.num_programs(1)
    heads = groups * heads_per_group
    keys = tile * KEY_TILE + tl.arange(0, KEY_TILE)
    in_keys = keys < T
    layout_row = layout_ptr + b * (T + 5 * S)
    tile_keys = ((b * T + keys)[:, None] * groups + g) * WIDTH
    k0, k1 = load_head(k_ptr + tile_keys, in_keys, WIDTH, K0, K1, True)
    v0, v1 = load_head(v_ptr + tile_keys, in_keys, WIDTH, K0, K1, True)
    dk0 = tl.full([KEY_TILE, K0], 0.0, tl.float32)
    dk1 = tl.full([KEY_TILE, K1 if K1 > 0 else K0], 0.0, tl.float32)
    dv0 = tl.full([KEY_TILE, K0], 0.0, tl.float32)
    dv1 = tl.full([KEY_TILE, K1 if K1 > 0 else K0], 0.0, tl.float32)
    local_rows = tl.arange(0, QUERY_TILE)
    for half in tl.range(0, 2 * heads_per_group):
        part = half % 2
        h = g * heads_per_group + half // 2
        query_base = b * S * stride_s + h * WIDTH
        q_base, grad_base = q_ptr + query_base, grad_ptr + query_base
        lse_row = ((part * tl.num_programs(2) + b) * heads + h) * S
        bounds = table_ptr + tl.load(table_ptr + 2)
        bounds += 3 * ((part * tl.num_programs(2) + b) * tl.num_programs(0) + tile)
        for MASKED in tl.static_range(2):
            first, end = tl.load(bounds + MASKED), tl.load(bounds + MASKED + 1)
            run = run_start(table_ptr, first, end)
            for entry in tl.range(first, end):
                start = visited_tile(table_ptr, entry, run, MASKED) * QUERY_TILE
                rows = start + local_rows
                in_rows = rows < S
                q_rows = q_base + start.to(tl.int64) * stride_s + local_rows[:, None] * stride_s
                grad_rows = grad_base + start.to(tl.int64) * stride_s + local_rows[:, None] * stride_s
                interval = layout_row + T + (1 + 2 * part) * S + rows
                dk0, dk1, dv0, dv1 = add_queries(
                    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_rows, grad_rows,
                    lse_ptr + lse_row + rows, delta_ptr + lse_row + rows, None,
                    interval, interval + S, keys, in_rows, scale, WIDTH, K0, K1, MASKED,
                )  # fmt: skip
    place = tl.load(layout_row + keys, mask=in_keys, other=0).to(tl.int64)[:, None]
    packed_keys = ((b * T + place) * groups + g) * WIDTH
    store_head(dk_ptr + packed_keys, in_keys, dk0 * scale, dk1 * scale, WIDTH, K0, K1)
    store_head(dv_ptr + packed_keys, in_keys, dv0, dv1, WIDTH, K0, K1)


# Launchers


def mmca_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Tensor, lists: Tensor | None, scale: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out [B, S, H, K], A_text of the same shape, lse [2, B, H, S] by position).

    `lists` is what tile_lists made of the layout's class intervals, made here unless given. A_text has no numbers
    unless `keep`.
    """
    check_served("mmca", q)
    batch, rows, heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    text = torch.empty_like(out) if keep else q.new_empty(0)
    lse = torch.empty((CLASSES, batch, heads, rows), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, text, lse
    layout, table = _on_device(layout, lists, q, k.shape[1])
    key_order = layout[:, : k.shape[1]].long()
    q, scale = with_positive_scale(q, scale)
    q, k, v = addressable(q), in_order(k, key_order), in_order(v, key_order)
    config = tile_config("forward", width, q.element_size())
    with torch.cuda.device_of(q):
        forward_kernel[(-(-rows // config.query_tile), heads, batch)](
            q, k, v, text if keep else out, out, lse, layout, table,
            *q.stride()[:3], k.stride(1), rows, k.shape[1], heads // k.shape[2], scale,
            **launch_options("forward", width, q.element_size()),
        )  # fmt: skip
    return out, text, lse


def mmca_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    text: Tensor,
    lse: Tensor,
    layout: Tensor,
    lists: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv), contiguous, of out's gradient `grad` from the stored out, A_text and lse."""
    check_served("mmca", q)
    batch, rows, heads, width = q.shape
    keys, groups = k.shape[1:3]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    layout, table = _on_device(layout, lists, q, keys)
    key_order, query_order = layout[:, :keys].long(), layout[:, keys : keys + rows].long()
    grad, q = in_order(grad.to(q.dtype), query_order), in_order(q, query_order)
    k, v = in_order(k, key_order), in_order(v, key_order)
    out, text, lse = out.contiguous(), text.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    sizes = (rows, keys, heads // groups, scale)
    query_tiles = -(-rows // tile_config("dq", width, q.element_size()).query_tile)
    key_tiles = -(-keys // tile_config("dkv", width, q.element_size()).key_tile)
    with torch.cuda.device_of(q):
        dq_kernel[(query_tiles, heads, batch)](
            grad, q, k, v, text, out, lse, layout, table, delta, dq, k.stride(1), *sizes,
            **launch_options("dq", width, q.element_size()),
        )  # fmt: skip
        dkv_kernel[(key_tiles, groups, batch)](
            grad, q, k, v, lse, layout, table, delta, dk, dv, q.stride(1), *sizes,
            **launch_options("dkv", width, q.element_size()),
        )  # fmt: skip
    return dq, dk, dv


def _on_device(layout: Tensor, lists: Tensor | None, q: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Return the layout and the tile lists on q's device; lists for other tiles are refused while on the CPU."""
    width, size = q.shape[3], q.element_size()
    if lists is None:
        intervals = class_intervals(layout.cpu().numpy(), keys)
        lists = torch.from_numpy(tile_lists(*intervals, keys=keys, width=width, number_bytes=size, parts=CLASSES))
    elif lists.device.type == "cpu" and lists[TILE_SIZES].tolist() != tile_sizes(width, size):
        raise KernelInputError("mmca: the tile lists are for another head width or dtype; make them anew")
    return layout.to(q.device, non_blocking=True).contiguous(), lists.to(q.device, non_blocking=True)
