"""Attention over one key interval per query row, in Triton: a forward kernel, one for dq and one for dk and dv.

    s_ij = scale q_i . k_j;  p_ij = exp(s_ij - lse_i);  out_i = sum_j p_ij v_j
    dv_j = sum_i p_ij g_i;  ds_ij = p_ij (g_i . v_j - g_i . out_i)
    dq_i = scale sum_j ds_ij k_j;  dk_j = scale sum_i ds_ij q_i

No atomics, so the backward is deterministic and computes s and g . v twice: 7 matrix products where 5 would do.
With a gate t [H] (cross_attention.py) out_i, dq, dk and dv are t times that. What is gated is then stored nowhere: its
product with g_i is summed from p_ij (g_i . v_j) in a pass of its own over the tiles, 9 products in all.
A program visits the live tiles of its row (or column) of the mask, those without mask arithmetic first;
heads_triton.py has what happens to each.
Scores, softmax and sums are in fp32; the weights p and ds are rounded to the inputs' type before they are multiplied.
Sources: Dao 2023, FlashAttention-2; Milakov and Gimelshein 2018 (running softmax).
"""

# Triton itself types a kernel's arguments, at launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triweave.kernels.attention_tiles import (
    TILE_SIZES,
    WIDEST_HEAD,
    head_parts,
    tile_config,
    tile_lists,
    tile_sizes,
)
from triweave.kernels.errors import KernelInputError, KernelUnavailableError
from triweave.kernels.heads_triton import (
    add_product,
    add_queries,
    attend_to_keys,
    base_2,
    head_offset,
    load_head,
    run_start,
    score_gradients,
    store_head,
    turn,
    visited_tile,
)
from triweave.kernels.tuning.pinned import use_device

WIDEST_LOAD = 8
"""Numbers in a 16-byte load in 16 bit."""

# Kernels. `table` is what attention_tiles.tile_lists made.


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lo_ptr, hi_ptr, table_ptr, gate_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kg, stride_vb, stride_vt, stride_vg,
    S, T, heads_per_group, scale,
    WIDTH: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, HEAD_UNIT: tl.constexpr,
    QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
):  # fmt: skip
    """Write out and lse of one tile of query rows of head h of batch row b; grid (query tiles, H, B). scale > 0."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    tile = turn(table_ptr, 0, b)
    heads = tl.num_programs(1)
    rows = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    in_rows = rows < S
    lo = tl.load(lo_ptr + b * S + rows, mask=in_rows, other=0)
    hi = tl.load(hi_ptr + b * S + rows, mask=in_rows, other=0)
    q_rows = q_ptr + b * stride_qb + head_offset(h, stride_qh, HEAD_UNIT) + rows.to(tl.int64)[:, None] * stride_qs
    q0, q1 = load_head(q_rows, in_rows, WIDTH, K0, K1, True)
    local_keys = tl.arange(0, KEY_TILE)
    g = h // heads_per_group
    k_base = k_ptr + b * stride_kb + head_offset(g, stride_kg, HEAD_UNIT)
    v_base = v_ptr + b * stride_vb + head_offset(g, stride_vg, HEAD_UNIT)
    peak = tl.full([QUERY_TILE], float("-inf"), tl.float32)
    total = tl.full([QUERY_TILE], 0.0, tl.float32)
    sum0 = tl.full([QUERY_TILE, K0], 0.0, tl.float32)
    sum1 = tl.full([QUERY_TILE, K1 if K1 > 0 else K0], 0.0, tl.float32)
    bounds = table_ptr + tl.load(table_ptr) + 3 * (b * tl.num_programs(0) + tile)
    for MASKED in tl.static_range(2):
        first, end = tl.load(bounds + MASKED), tl.load(bounds + MASKED + 1)
        run = run_start(table_ptr, first, end)
        for entry in tl.range(first, end):
            start = visited_tile(table_ptr, entry, run, MASKED) * KEY_TILE
            keys = start + local_keys
            in_keys = keys < T
            k_rows = k_base + start.to(tl.int64) * stride_kt + local_keys[:, None] * stride_kt
            v_rows = v_base + start.to(tl.int64) * stride_vt + local_keys[:, None] * stride_vt
            peak, total, sum0, sum1 = attend_to_keys(
                peak, total, sum0, sum1, q0, q1, k_rows, v_rows, keys, in_keys, lo, hi, scale, WIDTH, K0, K1, MASKED
            )
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    in_base_2 = peak * (scale * 1.4426950408889634) + tl.log2(total)  # rounded as the backward rounds scores
    lse = tl.where(empty, float("-inf"), in_base_2 * 0.6931471805599453)
    tl.store(lse_ptr + (b * heads + h) * S + rows, lse, mask=in_rows)
    out_rows = out_ptr + ((b * S + rows)[:, None] * heads + h) * WIDTH
    sum0, sum1 = sum0 / total[:, None], sum1 / total[:, None]
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + h)
        sum0, sum1 = sum0 * gate, sum1 * gate
    store_head(out_rows, in_rows, sum0, sum1, WIDTH, K0, K1)


@triton.jit
def dq_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lo_ptr, hi_ptr, table_ptr, gate_ptr, delta_ptr, dq_ptr,
    stride_gb, stride_gs, stride_gh, stride_qb, stride_qs, stride_qh,
    stride_kb, stride_kt, stride_kg, stride_vb, stride_vt, stride_vg,
    S, T, heads_per_group, scale,
    WIDTH: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, HEAD_UNIT: tl.constexpr,
    QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
):  # fmt: skip
    """Write dq, and delta = g . attention for the other kernel, of one tile of query rows; grid (query tiles, H, B).

    With a gate delta is the sum of p_ij (g_i . v_j), a first pass over the tiles, and out_ptr is not read.
    """
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    tile = turn(table_ptr, 1, b)
    heads = tl.num_programs(1)
    rows = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    in_rows = rows < S
    lo = tl.load(lo_ptr + b * S + rows, mask=in_rows, other=0)
    hi = tl.load(hi_ptr + b * S + rows, mask=in_rows, other=0)
    wide_rows = rows.to(tl.int64)[:, None]
    q_rows = q_ptr + b * stride_qb + head_offset(h, stride_qh, HEAD_UNIT) + wide_rows * stride_qs
    q0, q1 = load_head(q_rows, in_rows, WIDTH, K0, K1, True)
    grad_rows = grad_ptr + b * stride_gb + head_offset(h, stride_gh, HEAD_UNIT) + wide_rows * stride_gs
    g0, g1 = load_head(grad_rows, in_rows, WIDTH, K0, K1, True)
    packed_rows = ((b * S + rows)[:, None] * heads + h) * WIDTH
    if gate_ptr is None:
        out0, out1 = load_head(out_ptr + packed_rows, in_rows, WIDTH, K0, K1, True)
        delta = tl.sum(g0.to(tl.float32) * out0.to(tl.float32), 1)
        if K1 > 0:
            delta += tl.sum(g1.to(tl.float32) * out1.to(tl.float32), 1)
    else:
        delta = tl.full([QUERY_TILE], 0.0, tl.float32)
    lse_rows = (b * heads + h) * S + rows
    lse = base_2(tl.load(lse_ptr + lse_rows, mask=in_rows, other=float("-inf")))
    local_keys = tl.arange(0, KEY_TILE)
    group = h // heads_per_group
    k_base = k_ptr + b * stride_kb + head_offset(group, stride_kg, HEAD_UNIT)
    v_base = v_ptr + b * stride_vb + head_offset(group, stride_vg, HEAD_UNIT)
    dq0 = tl.full([QUERY_TILE, K0], 0.0, tl.float32)
    dq1 = tl.full([QUERY_TILE, K1 if K1 > 0 else K0], 0.0, tl.float32)
    bounds = table_ptr + tl.load(table_ptr + 1) + 3 * (b * tl.num_programs(0) + tile)
    for LAST in tl.static_range(1 if gate_ptr is None else 0, 2):
        if LAST:
            tl.store(delta_ptr + lse_rows, delta, mask=in_rows)
        for MASKED in tl.static_range(2):
            first, end = tl.load(bounds + MASKED), tl.load(bounds + MASKED + 1)
            run = run_start(table_ptr, first, end)
            for entry in tl.range(first, end):
                start = visited_tile(table_ptr, entry, run, MASKED) * KEY_TILE
                keys = start + local_keys
                in_keys = keys < T
                k_rows = k_base + start.to(tl.int64) * stride_kt + local_keys[:, None] * stride_kt
                v_rows = v_base + start.to(tl.int64) * stride_vt + local_keys[:, None] * stride_vt
                k0, k1 = load_head(k_rows, in_keys, WIDTH, K0, K1, MASKED)
                v0, v1 = load_head(v_rows, in_keys, WIDTH, K0, K1, MASKED)
                dscores = score_gradients(
                    q0, q1, g0, g1, k0, k1, v0, v1, lse, delta if LAST else None, keys, lo, hi, scale, K1, MASKED
                )
                if LAST:
                    dq0, dq1 = add_product(dq0, dq1, dscores, k0, k1, K1)
                else:
                    delta += tl.sum(dscores, 1)
    if gate_ptr is not None:
        scale = scale * tl.load(gate_ptr + h)
    store_head(dq_ptr + packed_rows, in_rows, dq0 * scale, dq1 * scale, WIDTH, K0, K1)


@triton.jit
def dkv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, lo_ptr, hi_ptr, table_ptr, gate_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_gb, stride_gs, stride_gh, stride_qb, stride_qs, stride_qh,
    stride_kb, stride_kt, stride_kg, stride_vb, stride_vt, stride_vg,
    S, T, heads_per_group, scale,
    WIDTH: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, HEAD_UNIT: tl.constexpr,
    QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one tile of keys, over the query heads of its group in order; grid (key tiles, G, B)."""
    g = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    tile = turn(table_ptr, 2, b)
    groups = tl.num_programs(1)
    keys = tile * KEY_TILE + tl.arange(0, KEY_TILE)
    in_keys = keys < T
    wide_keys = keys.to(tl.int64)[:, None]
    k_rows = k_ptr + b * stride_kb + head_offset(g, stride_kg, HEAD_UNIT) + wide_keys * stride_kt
    k0, k1 = load_head(k_rows, in_keys, WIDTH, K0, K1, True)
    v_rows = v_ptr + b * stride_vb + head_offset(g, stride_vg, HEAD_UNIT) + wide_keys * stride_vt
    v0, v1 = load_head(v_rows, in_keys, WIDTH, K0, K1, True)
    dk0 = tl.full([KEY_TILE, K0], 0.0, tl.float32)
    dk1 = tl.full([KEY_TILE, K1 if K1 > 0 else K0], 0.0, tl.float32)
    dv0 = tl.full([KEY_TILE, K0], 0.0, tl.float32)
    dv1 = tl.full([KEY_TILE, K1 if K1 > 0 else K0], 0.0, tl.float32)
    local_rows = tl.arange(0, QUERY_TILE)
    bounds = table_ptr + tl.load(table_ptr + 2) + 3 * (b * tl.num_programs(0) + tile)
    for member in tl.range(0, heads_per_group):
        h = g * heads_per_group + member
        q_base = q_ptr + b * stride_qb + head_offset(h, stride_qh, HEAD_UNIT)
        grad_base = grad_ptr + b * stride_gb + head_offset(h, stride_gh, HEAD_UNIT)
        lse_row = (b * groups * heads_per_group + h) * S
        opening = None
        if gate_ptr is not None:  # heads of a group differ in it
            opening = tl.load(gate_ptr + h)
        for MASKED in tl.static_range(2):
            first, end = tl.load(bounds + MASKED), tl.load(bounds + MASKED + 1)
            run = run_start(table_ptr, first, end)
            for entry in tl.range(first, end):
                start = visited_tile(table_ptr, entry, run, MASKED) * QUERY_TILE
                rows = start + local_rows
                in_rows = rows < S
                q_rows = q_base + start.to(tl.int64) * stride_qs + local_rows[:, None] * stride_qs
                grad_rows = grad_base + start.to(tl.int64) * stride_gs + local_rows[:, None] * stride_gs
                dk0, dk1, dv0, dv1 = add_queries(
                    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_rows, grad_rows,
                    lse_ptr + lse_row + rows, delta_ptr + lse_row + rows, opening,
                    lo_ptr + b * S + rows, hi_ptr + b * S + rows, keys, in_rows, scale, WIDTH, K0, K1, MASKED,
                )  # fmt: skip
    packed_keys = ((b * T + keys)[:, None] * groups + g) * WIDTH
    store_head(dk_ptr + packed_keys, in_keys, dk0 * scale, dk1 * scale, WIDTH, K0, K1)
    store_head(dv_ptr + packed_keys, in_keys, dv0, dv1, WIDTH, K0, K1)


# Launchers


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, kv_lo: Tensor, kv_hi: Tensor, lists: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out [B, S, H, K], lse [B, H, S]); `lists` is what tile_lists returned, made here unless given."""
    return launch_forward("attention", q, k, v, kv_lo, kv_hi, lists, scale)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_lo: Tensor,
    kv_hi: Tensor,
    lists: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv), contiguous, of out's gradient `grad` from the stored out and lse."""
    return launch_backward("attention", grad, q, k, v, out, lse, kv_lo, kv_hi, lists, scale)[:3]


def launch_forward(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lo: Tensor,
    kv_hi: Tensor,
    lists: Tensor | None,
    scale: float,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse), out times gate [H] (fp32) if there is one; `op` is named in errors."""
    check_served(op, q)
    use_device(q.device)
    batch, rows, heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    table = _device_lists(op, lists, q, k, kv_lo, kv_hi)
    q, scale = with_positive_scale(q, scale)
    q, k, v = (addressable(x) for x in (q, k, v))
    lo, hi = kv_lo.int().contiguous(), kv_hi.clamp(max=k.shape[1]).int().contiguous()
    config = tile_config("forward", width, q.element_size())
    with torch.cuda.device_of(q):
        forward_kernel[(-(-rows // config.query_tile), heads, batch)](
            q, k, v, out, lse, lo, hi, table, gate,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            rows, k.shape[1], heads // k.shape[2], scale,
            **launch_options("forward", width, q.element_size()), HEAD_UNIT=head_unit(q, k, v),
        )  # fmt: skip
    return out, lse


def launch_backward(
    op: str,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    kv_lo: Tensor,
    kv_hi: Tensor,
    lists: Tensor | None,
    scale: float,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv, delta [B, H, S] in fp32), contiguous; `out` is needed only without a gate [H] (fp32).

    delta is grad . attention, the latter without the gate.
    """
    check_served(op, q)
    use_device(q.device)
    batch, rows, heads, width = q.shape
    keys, groups = k.shape[1:3]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), delta.zero_()
    table = _device_lists(op, lists, q, k, kv_lo, kv_hi)
    grad, q, k, v = (addressable(x) for x in (grad.to(q.dtype), q, k, v))
    lo, hi = kv_lo.int().contiguous(), kv_hi.clamp(max=keys).int().contiguous()
    lse, out = lse.contiguous(), None if out is None else out.contiguous()
    strides = (*grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    sizes = (rows, keys, heads // groups, scale)
    query_tiles = -(-rows // tile_config("dq", width, q.element_size()).query_tile)
    key_tiles = -(-keys // tile_config("dkv", width, q.element_size()).key_tile)
    with torch.cuda.device_of(q):
        dq_kernel[(query_tiles, heads, batch)](
            grad, q, k, v, out, lse, lo, hi, table, gate, delta, dq, *strides, *sizes,
            **launch_options("dq", width, q.element_size()), HEAD_UNIT=head_unit(grad, q, k, v),
        )  # fmt: skip
        dkv_kernel[(key_tiles, groups, batch)](
            grad, q, k, v, lse, lo, hi, table, gate, delta, dk, dv, *strides, *sizes,
            **launch_options("dkv", width, q.element_size()), HEAD_UNIT=head_unit(grad, q, k, v),
        )  # fmt: skip
    return dq, dk, dv, delta


def head_unit(*tensors: Tensor) -> int:
    """Return what divides every tensor's stride from head to head: WIDEST_LOAD or 1."""
    return WIDEST_LOAD if all(x.stride(2) % WIDEST_LOAD == 0 for x in tensors) else 1


def launch_options(kernel: str, width: int, number_bytes: int) -> dict[str, int | bool]:
    """Return a kernel's constants, but for HEAD_UNIT, and how Triton is to compile it."""
    config = tile_config(kernel, width, number_bytes)
    first, second = head_parts(width)
    limit = {} if config.registers is None or torch.version.hip else {"maxnreg": config.registers}
    return {
        "WIDTH": width,
        "K0": first,
        "K1": second,
        "QUERY_TILE": config.query_tile,
        "KEY_TILE": config.key_tile,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
        **limit,
    }


def check_served(op: str, q: Tensor) -> None:
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise KernelUnavailableError(
            f"{op}: impl='triton' cannot serve {q.dtype}, only float32, float16 and bfloat16; use reference"
        )
    if q.shape[3] > WIDEST_HEAD:
        raise KernelUnavailableError(
            f"{op}: impl='triton' serves heads of at most {WIDEST_HEAD} numbers, not {q.shape[3]}; use reference"
        )


def with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return (q, scale) with the same product and a scale that the forward takes; exact."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


def addressable(x: Tensor) -> Tensor:
    """Return x, or a copy of it if a tile of it does not lie within 2^31 numbers or a head is not contiguous."""
    return x if x.stride(3) == 1 and x.stride(1) * 256 < 2**31 else x.contiguous()


def _device_lists(op: str, lists: Tensor | None, q: Tensor, k: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> Tensor:
    """Return the tile lists on q's device; lists that were made for other tiles are refused while on the CPU."""
    keys, width, size = k.shape[1], q.shape[3], q.element_size()
    if lists is None:
        made = tile_lists(kv_lo.cpu().numpy(), kv_hi.cpu().numpy(), keys=keys, width=width, number_bytes=size)
        return torch.from_numpy(made).to(q.device)
    if lists.device.type == "cpu" and lists[TILE_SIZES].tolist() != tile_sizes(width, size):
        raise KernelInputError(f"{op}: the tile lists are for another head width or dtype; make them anew")
    return lists.to(q.device, non_blocking=True)
