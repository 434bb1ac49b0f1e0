"""Fusion of two or three modalities by products of low-rank projections: what is left of their outer product.

y = sum_r prod_m ([x_m; 1] W_m^r). Limit: matrix time of the M projections onto R E numbers, three times that with the
backward. Sources: Liu et al. 2018, Efficient Low-rank Multimodal Fusion (LMF: the 1 that is appended makes products
of fewer inputs part of the result); Yu et al. 2017, Multi-modal Factorized Bilinear Pooling (MFB: the epilogue; R is
its pooling window).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triweave.kernels import reference_low_rank_fusion
from triweave.kernels.backends import choose, triton_kernels
from triweave.kernels.errors import KernelInputError
from triweave.kernels.reference import accumulation_dtype

EPILOGUES = ("none", "mfb")

torch.library.define(
    "triweave::low_rank_fusion", "(Tensor[] xs, Tensor[] factors, str epilogue, str impl) -> (Tensor, Tensor)"
)
torch.library.define(
    "triweave::low_rank_fusion_backward",
    "(Tensor grad, Tensor[] xs, Tensor[] factors, Tensor fused, str epilogue, str impl) -> Tensor[]",
)


@torch.library.impl("triweave::low_rank_fusion", "default")
def _forward(xs: list[Tensor], factors: list[Tensor], epilogue: str, impl: str) -> tuple[Tensor, Tensor]:
    implementation = triton_kernels("low_rank_fusion") if impl == "triton" else reference_low_rank_fusion
    with torch.autocast(xs[0].device.type, enabled=False):
        return implementation.low_rank_fusion_forward(xs, factors, epilogue)


@torch.library.impl("triweave::low_rank_fusion_backward", "default")
def _backward(
    grad: Tensor, xs: list[Tensor], factors: list[Tensor], fused: Tensor, epilogue: str, impl: str
) -> list[Tensor]:
    implementation = triton_kernels("low_rank_fusion") if impl == "triton" else reference_low_rank_fusion
    with torch.autocast(xs[0].device.type, enabled=False):
        return implementation.low_rank_fusion_backward(grad, xs, factors, fused, epilogue)


@torch.library.register_fake("triweave::low_rank_fusion")
def _forward_fake(
    xs: list[Tensor],
    factors: list[Tensor],
    epilogue: str,
    impl: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    shape = (xs[0].shape[0], factors[0].shape[2])
    wide = accumulation_dtype(xs[0].dtype)
    return xs[0].new_empty(shape), xs[0].new_empty(0 if epilogue == "none" else shape, dtype=wide)


@torch.library.register_fake("triweave::low_rank_fusion_backward")
def _backward_fake(
    grad: Tensor,  # noqa: ARG001
    xs: list[Tensor],
    factors: list[Tensor],
    fused: Tensor,  # noqa: ARG001
    epilogue: str,  # noqa: ARG001
    impl: str,  # noqa: ARG001
) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*xs, *factors)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    xs, factors, ctx.epilogue, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.modalities = len(xs)
    ctx.save_for_backward(*xs, *factors, output[1])


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *saved, fused = ctx.saved_tensors
    count = ctx.modalities
    if grad is None:
        return [None] * count, [None] * count, None, None
    found = torch.ops.triweave.low_rank_fusion_backward(
        grad, saved[:count], saved[count:], fused, ctx.epilogue, ctx.impl
    )
    return found[:count], found[count:], None, None


torch.library.register_autograd("triweave::low_rank_fusion", _differentiate, setup_context=_save)


def low_rank_fusion(
    xs: Sequence[Tensor], factors: Sequence[Tensor], *, epilogue: str = "none", impl: str = "auto"
) -> Tensor:
    """Return y = sum_r prod_m ([x_m; 1] W_m^r), or with the epilogue "mfb" z / |z|_2 with z = sign(y) sqrt(|y|).

    xs: two or three tensors [N, D_m] of one dtype. factors: as many [R, D_m + 1, E], used in the dtype of x; the last
    of the D_m + 1 rows is what the appended 1 is multiplied with. The result is [N, E], contiguous, of x's dtype.

    Projections are rounded to x's dtype by `reference`, not by `triton`; products, sums over r and the epilogue are in
    fp32 (fp64 for fp64). With "mfb" a row of zeros stays zero, and where y = 0 the gradient, infinite there, is 0; what
    is below the smallest normal number counts as 0. Near 0 the slope of the root magnifies whatever error y has.

    Differentiable once, deterministic, forward and backward. At most 2^23 projected numbers of an input exist at once,
    or one row's. The backward reads the factors again, so call it in the module that owns them (ZeRO-3). `auto` takes
    the reference, plain torch, on every device: the Triton kernels were no faster on an H100 (results/h100.json).

    Raises KernelInputError if shapes, dtypes or the epilogue do not fit, KernelUnavailableError if `impl` cannot serve.
    """
    _check(xs, factors, epilogue)
    chosen = choose("low_rank_fusion", impl, xs[0].device.type, xs[0].dtype)
    out, _ = torch.ops.triweave.low_rank_fusion(list(xs), list(factors), epilogue, chosen)
    return out


def _check(xs: Sequence[Tensor], factors: Sequence[Tensor], epilogue: str) -> None:
    if epilogue not in EPILOGUES:
        raise KernelInputError(f"low_rank_fusion: epilogue is {epilogue!r}; it must be one of {', '.join(EPILOGUES)}")
    if len(xs) not in (2, 3) or len(factors) != len(xs):
        raise KernelInputError(
            f"low_rank_fusion: {len(xs)} inputs and {len(factors)} factors; it takes two or three of each"
        )
    for number, (x, factor) in enumerate(zip(xs, factors, strict=True)):
        if x.dim() != 2 or factor.dim() != 3 or 0 in factor.shape or not _alike(x, factor, xs[0], factors[0]):
            raise KernelInputError(
                f"low_rank_fusion: input {number} is {tuple(x.shape)}, its factor {tuple(factor.shape)}; they must be "
                "[N, D] and [R, D + 1, E] with one N, R and E for all inputs"
            )
        if x.dtype != xs[0].dtype:
            raise KernelInputError(
                f"low_rank_fusion: input {number} is {x.dtype}, input 0 {xs[0].dtype}; cast them to one dtype"
            )


def _alike(x: Tensor, factor: Tensor, first_x: Tensor, first_factor: Tensor) -> bool:
    """Return whether a factor fits its input, and both the first ones."""
    return factor.shape[1] == x.shape[1] + 1 and (x.shape[0], *factor.shape[::2]) == (
        first_x.shape[0],
        *first_factor.shape[::2],
    )
