"""Low-rank fusion in plain torch, forward and hand-written backward; low_rank_fusion.py registers them.

Projections are products in the inputs' dtype, rounded once; what is done with them is fp32 (fp64 for fp64). Rows are
taken in chunks, so that at most NUMBERS_PER_CHUNK projected numbers exist at once, or one row's. Deterministic.
Dimensions: N rows, D_m width of input m, R rank, E width of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from triweave.kernels.reference import accumulation_dtype

NUMBERS_PER_CHUNK = 1 << 23
"""Upper bound on the projected numbers of one input that exist at once, unless one row alone has more."""

ProductGradients = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
"""(dy, xs, factors) of some rows -> the gradient of each input's projections [n, R, E], in the input's dtype."""


def low_rank_fusion_forward(xs: Sequence[Tensor], factors: Sequence[Tensor], epilogue: str) -> tuple[Tensor, Tensor]:
    """Return (out, fused): y = sum_r prod_m ([x_m; 1] W_m^r), and what the epilogue makes of it.

    xs: [N, D_m]. factors: [R, D_m + 1, E], the last row of each is added, whatever x_m. out [N, E] in the dtype of x.
    fused: y in the dtype of sums where an epilogue follows, else empty.
    """
    fused = torch.cat([_products(parts, factors).sum(1) for parts in chunks(xs, factors)])
    if epilogue == "none":
        return fused.to(xs[0].dtype), fused.new_empty(0)
    return mfb_forward(fused).to(xs[0].dtype), fused


def low_rank_fusion_backward(
    grad: Tensor, xs: Sequence[Tensor], factors: Sequence[Tensor], fused: Tensor, epilogue: str
) -> list[Tensor]:
    """Return [dx_1, ..., dW_1, ...]: dp_m = dy prod_{n != m} p_n, dx_m = sum_r dp_m W_m^T, dW_m = [x_m; 1]^T dp_m."""
    product_grad = grad.to(accumulation_dtype(grad.dtype)) if epilogue == "none" else mfb_backward(grad, fused)
    return gradients(product_grad, xs, factors, product_gradients)


def gradients(
    product_grad: Tensor, xs: Sequence[Tensor], factors: Sequence[Tensor], of_projections: ProductGradients
) -> list[Tensor]:
    """Return the gradients of xs and factors from dy [N, E], by two products of each input with dp_m.

    `of_projections` makes dp_m of a chunk of rows. The factors' gradient is summed over chunks in fp32 at least.
    """
    narrow, wide = xs[0].dtype, accumulation_dtype(xs[0].dtype)
    matrices = [factor[:, :-1].transpose(1, 2).flatten(0, 1).to(narrow) for factor in factors]  # [R E, D]
    x_grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
    sums = [torch.zeros(x.shape[1] + 1, matrix.shape[0], dtype=wide, device=x.device)
            for x, matrix in zip(xs, matrices, strict=True)]  # fmt: skip
    start = 0
    for parts in chunks(xs, factors):
        rows = slice(start, start + parts[0].shape[0])
        start = rows.stop
        projection_grads = of_projections(product_grad[rows], parts, factors)
        for x, matrix, x_grad, total, made in zip(parts, matrices, x_grads, sums, projection_grads, strict=True):
            projection_grad = made.flatten(1)
            torch.mm(projection_grad, matrix, out=x_grad[rows])
            if narrow == torch.float16:  # a sum over rows may pass 65504
                total[:-1].addmm_(x.T.to(wide), projection_grad.to(wide))
            else:
                total[:-1].add_(x.T @ projection_grad)
            total[-1].add_(projection_grad.sum(0, dtype=wide))
    factor_grads = [
        total.unflatten(1, (factor.shape[0], -1)).transpose(0, 1).to(factor.dtype).contiguous()
        for total, factor in zip(sums, factors, strict=True)
    ]
    return [*x_grads, *factor_grads]


def chunks(xs: Sequence[Tensor], factors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the rows of all inputs, cut so that R E numbers a row stay within NUMBERS_PER_CHUNK."""
    rank, _, width = factors[0].shape
    step = max(1, NUMBERS_PER_CHUNK // (rank * width))
    return [list(parts) for parts in zip(*(x.split(step) for x in xs), strict=True)]


def product_gradients(product_grad: Tensor, xs: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """Return dp_m = dy prod_{n != m} p_n of every input, [n, R, E] in its dtype."""
    projections = [_projected(x, factor) for x, factor in zip(xs, factors, strict=True)]
    found = []
    for chosen in range(len(xs)):
        others = [projection for number, projection in enumerate(projections) if number != chosen]
        found.append(math.prod(others, start=product_grad.unsqueeze(1)).to(xs[chosen].dtype))
    return found


def _products(xs: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """Return prod_m p_m [n, R, E]."""
    first, *others = (_projected(x, factor) for x, factor in zip(xs, factors, strict=True))
    return math.prod(others, start=first)


def _projected(x: Tensor, factor: Tensor) -> Tensor:
    """Return p = [x; 1] W, [n, R, E], rounded to x's dtype and widened."""
    rank, _, width = factor.shape
    narrow = factor.to(x.dtype)
    matrix = narrow[:, :-1].transpose(0, 1).flatten(1)
    product = torch.addmm(narrow[:, -1].flatten(), x, matrix)
    return product.to(accumulation_dtype(x.dtype)).view(-1, rank, width)


# The epilogue of MFB: z = sign(y) sqrt(|y|), out = z / |z|_2. As z^2 = |y|, the norm is sqrt(sum |y|).


def mfb_forward(fused: Tensor) -> Tensor:
    """Return z / |z|_2 of each row of y [N, E]; a row of zeros stays zero."""
    root, reciprocal = _root_and_reciprocal_norm(fused)
    return root * reciprocal


def mfb_backward(grad: Tensor, fused: Tensor) -> Tensor:
    """Return dy = (g - out (out . g)) / (2 sqrt(|y|) |z|_2), and 0 where y = 0, where the root has no derivative."""
    wide_grad = grad.to(fused.dtype)
    root, reciprocal = _root_and_reciprocal_norm(fused)
    out = root * reciprocal
    along = (out * wide_grad).sum(-1, keepdim=True)
    return torch.where(root == 0, 0, (wide_grad - out * along) * reciprocal / (2 * root.abs()))


def _root_and_reciprocal_norm(fused: Tensor) -> tuple[Tensor, Tensor]:
    """Return (z, 1 / |z|_2 or 0); what is below the smallest normal number is 0, as on hardware that flushes it."""
    tiny = torch.finfo(fused.dtype).tiny
    size = torch.where(fused.abs() < tiny, 0, fused.abs())
    total = size.sum(-1, keepdim=True)
    return fused.sign() * size.sqrt(), torch.where(total > 0, total.rsqrt(), 0)
