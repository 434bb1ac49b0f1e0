"""linear_cross_entropy in Triton: no logits in memory, and logit gradients for a block of the vocabulary at a time.

    x_n = hidden[row_index_n] weight^T; z = softcap tanh(x / softcap) or x; lse_n = logsumexp(z_n)
    g_nv = (exp(z_nv - lse_n) factor_n - [v = target_n] row_weight_n) slope_nv, factor = row_weight (1 + 2 z_loss lse)
    dhidden = g weight; dweight = g^T hidden

`statistics_kernel` is a matrix product that writes the log-sum-exp of each row of a tile instead of its logits, and the
logit of the target: N V / COLUMNS numbers, which are then merged. Under no_grad that is all. Else
`logit_gradient_kernel` makes the logits of one block of the vocabulary again and from them its gradients, a few times
reference.LOGITS_PER_CHUNK numbers in hidden's dtype, and `product_kernel` multiplies these with weight and hidden: four
matrix products where three would do if the logits were kept. In return a weight gradient is one sum, written once and
rounded once, with no fp32 copy of the weight's size, and the weight is read three times in all. (Chunks of rows, as in
the reference, are LOGITS_PER_CHUNK / V rows high, 64 at V=131072, and each would read the weight twice and read and
write its gradient once.) No atomics: the same bits every time.

Logits, sums and products are in fp32; logit gradients are rounded to hidden's dtype before they are multiplied.
Sources: Wijmans et al. 2024, Cut Your Losses; Milakov and Gimelshein 2018 (running softmax).
"""

# Triton itself types a kernel's arguments, at launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triweave.kernels import reference
from triweave.kernels.errors import KernelUnavailableError
from triweave.kernels.rows_triton import LAUNCH, as_rows

CONFIGS: dict[str, dict[int, dict[str, int]]] = {
    "statistics_kernel": {
        2: {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3},
        4: {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "GROUP": 16, "num_warps": 8, "num_stages": 2},
    },
    "logit_gradient_kernel": {
        2: {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3},
        4: {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "GROUP": 16, "num_warps": 8, "num_stages": 2},
    },
    "product_kernel": {
        2: {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3},
        4: {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "GROUP": 16, "num_warps": 8, "num_stages": 2},
    },
}
"""Kernel -> bytes of a number -> tile and how it is compiled.

Tiles are ROWS x COLUMNS, summed DEPTH at a time; GROUP of them, one below the other, run together, for what they share
to stay in the cache. The COLUMNS of logit_gradient_kernel are a multiple of product_kernel's ROWS and DEPTH.
"""

CUDA_CHUNKS = 4
"""Times reference.LOGITS_PER_CHUNK logit gradients that a CUDA device holds at once, 64 MiB in 16 bit; a CPU holds one.
Each block of the vocabulary reads and writes the rows' fp32 sums once."""


# Kernels


@triton.jit
def _tile_of(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Return (row tile, column tile) of a program: GROUP row tiles pass along all columns, then the next GROUP."""
    group = program // (GROUP * column_tiles)
    inside = program % (GROUP * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    return group * GROUP + inside % height, inside // height


@triton.jit
def _logits(
    x_rows, w_rows, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return x w^T [ROWS, COLUMNS] of the rows that x_rows [ROWS, 1] and w_rows [COLUMNS, 1] point to."""
    depth = tl.arange(0, DEPTH)
    logits = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for start in range(0, D, DEPTH):
        d = (start + depth)[None, :]
        if WHOLE:
            x = tl.load(x_rows + d)
            w = tl.load(w_rows + d)
        else:
            x = tl.load(x_rows + d, mask=d < D, other=0.0)
            w = tl.load(w_rows + d, mask=d < D, other=0.0)
        logits = tl.dot(x, tl.trans(w), logits, input_precision="ieee")
    return logits


@triton.jit
def _hidden_rows(x_ptr, index_ptr, n, in_rows, hidden_rows, stride_x):
    """Return pointers [ROWS, 1] to the rows' first numbers and which row_index lie in hidden; row 0 for the others."""
    position = tl.load(index_ptr + n, mask=in_rows, other=0).to(tl.int64)
    known = (position >= 0) & (position < hidden_rows)
    return x_ptr + tl.where(known, position, 0)[:, None] * stride_x, known


@triton.jit
def _capped(x, softcap):
    """Return softcap tanh(x / softcap): Lambert's fraction for small u, where 1 - exp(-2 |u|) would cancel."""
    u = x * (1.0 / softcap)
    square = u * u
    decay = tl.exp2(tl.abs(u) * -2.8853900817779268)
    small = square < 0.5
    above = tl.where(small, u * (945.0 + square * (105.0 + square)), tl.where(u < 0, decay - 1.0, 1.0 - decay))
    below = tl.where(small, 945.0 + square * (420.0 + square * 15.0), 1.0 + decay)
    return softcap * (above / below)


@triton.jit
def _local_column(column, start, COLUMNS: tl.constexpr):
    """Return where the int64 `column` lies among the COLUMNS from `start` on, -1 if it does not."""
    local = column - start
    return tl.where((local >= 0) & (local < COLUMNS), local, -1).to(tl.int32)


@triton.jit(do_not_specialize=["hidden_rows", "N", "V", "row_tiles", "column_tiles"])
def statistics_kernel(
    x_ptr, w_ptr, index_ptr, target_ptr, partial_ptr, target_logit_ptr,
    stride_x, stride_w, hidden_rows, N, V, D, row_tiles, column_tiles, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write the log-sum-exp of one tile of logits to partial [column tiles, N], and the targets' logits in the tile.

    A row_index outside hidden makes it NaN, a target outside the vocabulary leaves target_logit [N] as it was.
    """
    tile, column_tile = _tile_of(tl.program_id(0), row_tiles, column_tiles, GROUP)
    n = tile * ROWS + tl.arange(0, ROWS)
    in_rows = n < N
    x_rows, known = _hidden_rows(x_ptr, index_ptr, n, in_rows, hidden_rows, stride_x)
    columns = tl.arange(0, COLUMNS)
    start = column_tile * COLUMNS
    v = start + columns
    w_rows = w_ptr + tl.minimum(v, V - 1).to(tl.int64)[:, None] * stride_w
    z = _logits(x_rows, w_rows, D, ROWS, COLUMNS, DEPTH, WHOLE)
    if softcap is not None:
        z = _capped(z, softcap)
    z = tl.where((v < V)[None, :], z, float("-inf"))
    peak = tl.max(z, 1)
    total = tl.sum(tl.exp2((z - peak[:, None]) * 1.4426950408889634), 1)
    lse = tl.where(known, peak + tl.log2(total) * 0.6931471805599453, float("nan"))
    tl.store(partial_ptr + column_tile.to(tl.int64) * N + n, lse, mask=in_rows)
    target = tl.load(target_ptr + n, mask=in_rows, other=-1).to(tl.int64)
    local = _local_column(target, start, COLUMNS)
    target_logit = tl.sum(tl.where(columns[None, :] == local[:, None], z, 0.0), 1)
    tl.store(target_logit_ptr + n, target_logit, mask=in_rows & (local >= 0) & (target < V))


@triton.jit(do_not_specialize=["hidden_rows", "N", "V", "row_tiles", "column_tiles", "first_column"])
def logit_gradient_kernel(
    x_ptr, w_ptr, index_ptr, target_ptr, lse_ptr, factor_ptr, row_weight_ptr, logit_grad_ptr,
    stride_x, stride_w, stride_g, hidden_rows, N, V, D, row_tiles, column_tiles, first_column, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one tile of logits of the block that begins at first_column.

    Beyond the vocabulary, where nobody uses them, they are finite if those of its last row are.
    """
    tile, column_tile = _tile_of(tl.program_id(0), row_tiles, column_tiles, GROUP)
    n = tile * ROWS + tl.arange(0, ROWS)
    in_rows = n < N
    x_rows, _ = _hidden_rows(x_ptr, index_ptr, n, in_rows, hidden_rows, stride_x)
    columns = tl.arange(0, COLUMNS)
    start = first_column + column_tile * COLUMNS
    v = start + columns
    w_rows = w_ptr + tl.minimum(v, V - 1).to(tl.int64)[:, None] * stride_w
    z = _logits(x_rows, w_rows, D, ROWS, COLUMNS, DEPTH, WHOLE)
    if softcap is not None:
        z = _capped(z, softcap)
    lse = tl.load(lse_ptr + n, mask=in_rows, other=float("inf"))
    factor = tl.load(factor_ptr + n, mask=in_rows, other=0.0)
    row_weight = tl.load(row_weight_ptr + n, mask=in_rows, other=0.0)
    target = tl.load(target_ptr + n, mask=in_rows, other=-1).to(tl.int64)
    local = _local_column(target, start, COLUMNS)
    grad = tl.exp2((z - lse[:, None]) * 1.4426950408889634) * factor[:, None]
    grad -= tl.where(columns[None, :] == local[:, None], row_weight[:, None], 0.0)
    if softcap is not None:
        ratio = z * (1.0 / softcap)
        grad *= 1.0 - ratio * ratio
    place = n.to(tl.int64)[:, None] * stride_g + (column_tile * COLUMNS + columns)[None, :]
    tl.store(logit_grad_ptr + place, grad.to(logit_grad_ptr.dtype.element_ty), mask=in_rows[:, None])


@triton.jit(do_not_specialize=["M", "K", "row_tiles", "column_tiles"])
def product_kernel(
    logit_grad_ptr, b_ptr, total_ptr, out_ptr, stride_g, stride_b, stride_total, stride_out,
    M, K, D, row_tiles, column_tiles,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write one tile of out [M, D] = a b + total, a the logit gradients [M, K] or, TRANSPOSED, those of [K, M].

    A row of logit gradients is whole tiles long, finite to its end. b is [K, D]; total fp32, or None for 0.
    """
    tile, column_tile = _tile_of(tl.program_id(0), row_tiles, column_tiles, GROUP)
    m = tile * ROWS + tl.arange(0, ROWS)
    d = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = (d < D)[None, :]
    depth = tl.arange(0, DEPTH)
    a_rows = logit_grad_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * stride_g
    result = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for start in range(0, K, DEPTH):
        k = start + depth
        in_depth = (k < K)[:, None]
        wide_k = k.to(tl.int64)[:, None]
        b = tl.load(b_ptr + wide_k * stride_b + d[None, :], mask=in_depth & in_columns, other=0.0)
        if TRANSPOSED:
            # loaded as it is used: with tl.trans the copy to shared memory would not be asynchronous on sm_80
            a_columns = logit_grad_ptr + k.to(tl.int64)[None, :] * stride_g
            a = tl.load(a_columns + m[:, None], mask=(k < K)[None, :], other=0.0)
        else:
            a = tl.load(a_rows + k[None, :])
        result = tl.dot(a, b, result, input_precision="ieee")
    inside = (m < M)[:, None] & in_columns
    wide_m = m.to(tl.int64)[:, None]
    if total_ptr is not None:
        result += tl.load(total_ptr + wide_m * stride_total + d[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + wide_m * stride_out + d[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)


# Launchers


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_index: Tensor,
    row_weight: Tensor,
    row_modality: Tensor,
    *,
    z_loss: float,
    softcap: float | None,
    modalities: int,
    need_rows_grad: bool,
    need_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (sum, per_modality_sums, lse, rows_grad, weight_grad) as reference.linear_cross_entropy does.

    hidden [B, S, D] or [B * S, D] and row_index [N] instead of the rows themselves. A target outside the vocabulary,
    or under no_grad a row_index outside hidden, makes sum NaN; with gradients such an index is torch's error.
    """
    _check_served(hidden)
    rows = as_rows(hidden)
    matrix = as_rows(weight.to(hidden.dtype))
    with torch.cuda.device_of(hidden):
        lse, target_logit = _statistics(rows, matrix, targets, row_index, softcap)
        scale = row_weight.float().contiguous()
        cross_entropy = lse - target_logit
        total = (scale * (cross_entropy + z_loss * lse.square())).sum()
        belongs = row_modality.long().unsqueeze(1) == torch.arange(modalities, device=rows.device)
        per_modality = torch.where(belongs, (scale * cross_entropy).unsqueeze(1), 0).sum(0)
        grad_dtype = reference.weight_gradient_dtype(weight.dtype)
        rows_grad = rows.new_empty((len(row_index), rows.shape[1]) if need_rows_grad else 0)
        weight_grad = rows.new_empty(weight.shape if need_weight_grad else 0, dtype=grad_dtype)
        if need_rows_grad or need_weight_grad:
            factor = scale * (1 + 2 * z_loss * lse)
            _gradients(rows, matrix, targets, row_index, (lse, factor, scale), softcap, rows_grad, weight_grad)
    return total, per_modality, lse, rows_grad, weight_grad


def _statistics(
    rows: Tensor, matrix: Tensor, targets: Tensor, row_index: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return (lse, target_logit), fp32 [N]; NaN where the target is outside the vocabulary."""
    count, (vocabulary, width) = len(row_index), matrix.shape
    config = CONFIGS["statistics_kernel"][rows.element_size()]
    row_tiles = triton.cdiv(count, config["ROWS"])
    column_tiles = triton.cdiv(vocabulary, config["COLUMNS"])
    target_logit = torch.full((count,), torch.nan, dtype=torch.float32, device=rows.device)
    partial = torch.empty((column_tiles, count), dtype=torch.float32, device=rows.device)
    if count:
        statistics_kernel[(row_tiles * column_tiles,)](
            rows, matrix, row_index.contiguous(), targets.contiguous(), partial, target_logit,
            rows.stride(0), matrix.stride(0), len(rows), count, vocabulary, width, row_tiles, column_tiles, softcap,
            **config, **LAUNCH, WHOLE=width % config["DEPTH"] == 0,
        )  # fmt: skip
    return torch.logsumexp(partial, 0), target_logit


def _gradients(
    rows: Tensor,
    matrix: Tensor,
    targets: Tensor,
    row_index: Tensor,
    of_rows: tuple[Tensor, Tensor, Tensor],
    softcap: float | None,
    rows_grad: Tensor,
    weight_grad: Tensor,
) -> None:
    """Fill rows_grad [N, D] and weight_grad [V, D], or the one that is not empty; of_rows is (lse, factor, scale)."""
    count, (vocabulary, width) = len(row_index), matrix.shape
    if count == 0:
        weight_grad.zero_()
        return
    config = CONFIGS["logit_gradient_kernel"][rows.element_size()]
    row_tiles = triton.cdiv(count, config["ROWS"])
    chunk = reference.LOGITS_PER_CHUNK * (CUDA_CHUNKS if rows.is_cuda else 1)
    most_tiles = max(1, chunk // (count * config["COLUMNS"]))
    block_tiles = min(most_tiles, triton.cdiv(vocabulary, config["COLUMNS"]))
    block = block_tiles * config["COLUMNS"]
    index, target = row_index.contiguous(), targets.contiguous()
    product = CONFIGS["product_kernel"][rows.element_size()]
    assert config["COLUMNS"] % product["ROWS"] == config["COLUMNS"] % product["DEPTH"] == 0
    logit_grad = rows.new_empty((count, block))
    chosen = rows.index_select(0, index) if weight_grad.numel() else rows
    total = rows_grad if block >= vocabulary else torch.empty(rows_grad.shape, dtype=torch.float32, device=rows.device)
    for start in range(0, vocabulary, block):
        stop = min(start + block, vocabulary)
        column_tiles = triton.cdiv(stop - start, config["COLUMNS"])
        logit_gradient_kernel[(row_tiles * column_tiles,)](
            rows, matrix, index, target, *of_rows, logit_grad,
            rows.stride(0), matrix.stride(0), block, len(rows), count, vocabulary, width,
            row_tiles, column_tiles, start, softcap,
            **config, **LAUNCH, WHOLE=width % config["DEPTH"] == 0,
        )  # fmt: skip
        if rows_grad.numel():
            out = rows_grad if stop == vocabulary else total
            _multiply(logit_grad, matrix[start:stop], None if start == 0 else total, out, transposed=False)
        if weight_grad.numel():
            _multiply(logit_grad, chosen, None, weight_grad[start:stop], transposed=True)


def _multiply(logit_grad: Tensor, b: Tensor, total: Tensor | None, out: Tensor, *, transposed: bool) -> None:
    """out [M, D] = logit_grad b + total, of as many columns of logit_grad, or its transpose's, as b has rows."""
    config = CONFIGS["product_kernel"][logit_grad.element_size()]
    count, width = out.shape
    row_tiles, column_tiles = triton.cdiv(count, config["ROWS"]), triton.cdiv(width, config["COLUMNS"])
    product_kernel[(row_tiles * column_tiles,)](
        logit_grad, b, total, out, logit_grad.stride(0), b.stride(0), out.stride(0), out.stride(0),
        count, len(b), width, row_tiles, column_tiles,
        **config, **LAUNCH, TRANSPOSED=transposed,
    )  # fmt: skip


def _check_served(hidden: Tensor) -> None:
    if hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise KernelUnavailableError(
            f"linear_cross_entropy: impl='triton' cannot serve {hidden.dtype}, only float32, float16 and bfloat16; "
            "use reference"
        )
