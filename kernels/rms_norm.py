"""RMS normalisation: plain, fused with the residual addition, and with one weight vector per modality.

y = x / sqrt(mean(x^2) + eps) * weight. Limit: memory bandwidth. Source: Zhang and Sennrich 2019, Root Mean Square Layer
Normalization; one weight per modality as in Mixture-of-Transformers (Liang et al. 2024).
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from triweave.kernels import reference
from triweave.kernels.backends import choose, triton_kernels
from triweave.kernels.errors import KernelInputError

torch.library.define("triweave::rms_norm", "(Tensor x, Tensor weight, Tensor? modality, float eps, str impl) -> Tensor")
torch.library.define(
    "triweave::rms_norm_residual",
    "(Tensor x, Tensor residual, Tensor weight, Tensor? modality, float eps, str impl) -> (Tensor, Tensor)",
)
torch.library.define(
    "triweave::rms_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? modality, float eps, Tensor? residual_grad, str impl)"
    " -> (Tensor, Tensor)",
)


@torch.library.impl("triweave::rms_norm", "default")
def _forward(x: Tensor, weight: Tensor, modality: Tensor | None, eps: float, impl: str) -> Tensor:
    implementation = triton_kernels("rms_norm") if impl == "triton" else reference
    return implementation.rms_norm_forward(x, weight, modality, eps)


@torch.library.impl("triweave::rms_norm_residual", "default")
def _forward_residual(
    x: Tensor, residual: Tensor, weight: Tensor, modality: Tensor | None, eps: float, impl: str
) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        return triton_kernels("rms_norm").rms_norm_residual_forward(x, residual, weight, modality, eps)
    total = (x + residual).contiguous()
    return reference.rms_norm_forward(total, weight, modality, eps), total


@torch.library.impl("triweave::rms_norm_backward", "default")
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    modality: Tensor | None,
    eps: float,
    residual_grad: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        return triton_kernels("rms_norm").rms_norm_backward(grad, x, weight, modality, eps, residual_grad)
    with torch.autocast(x.device.type, enabled=False):
        x_grad, weight_grad = reference.rms_norm_backward(grad, x, weight, modality, eps)
    return x_grad if residual_grad is None else x_grad.add_(residual_grad), weight_grad


@torch.library.register_fake("triweave::rms_norm")
def _forward_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("triweave::rms_norm_residual")
def _forward_residual_fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like)


@torch.library.register_fake("triweave::rms_norm_backward")
def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, weight, modality, ctx.eps, ctx.impl = inputs
    ctx.save_for_backward(x, weight, modality)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, modality = ctx.saved_tensors
    x_grad, weight_grad = torch.ops.triweave.rms_norm_backward(grad, x, weight, modality, ctx.eps, None, ctx.impl)
    return x_grad, weight_grad, None, None, None


def _save_residual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, modality, ctx.eps, ctx.impl = inputs
    ctx.save_for_backward(output[1], weight, modality)


def _differentiate_residual(ctx: Any, grad: Tensor, total_grad: Tensor) -> tuple[Tensor | None, ...]:
    total, weight, modality = ctx.saved_tensors
    x_grad, weight_grad = torch.ops.triweave.rms_norm_backward(
        grad, total, weight, modality, ctx.eps, total_grad, ctx.impl
    )
    return x_grad, x_grad, weight_grad, None, None, None


torch.library.register_autograd("triweave::rms_norm", _differentiate, setup_context=_save)
torch.library.register_autograd("triweave::rms_norm_residual", _differentiate_residual, setup_context=_save_residual)


@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, residual: None = None, modality: Tensor | None = None, eps: float, impl: str = "auto"
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, residual: Tensor, modality: Tensor | None = None, eps: float, impl: str = "auto"
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    modality: Tensor | None = None,
    eps: float,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return y = x / sqrt(mean(x^2) + eps) * weight, or with `residual` (y of x + residual, x + residual).

    x, residual: [..., D] of one shape and dtype. weight: [D], or [M, D] with `modality`, any float dtype.
    modality: int [...], x's shape without D: which of the M weights each row takes; negative (padding) takes weight 0.
    eps: added to the mean square. Results are contiguous, of x's dtype; the sum x + residual is rounded to that dtype
    before it is normalised, as two separate ops would. Computed in fp32 for bf16 and fp16, the weight gradient too;
    deterministic.

    Raises KernelInputError if shapes or dtypes do not fit, KernelUnavailableError if `impl` cannot serve.
    """
    chosen = choose("rms_norm", impl, x.device.type, x.dtype, x.shape[-1])
    expected = (x.shape[-1],) if modality is None else (weight.shape[0], x.shape[-1])
    if tuple(weight.shape) != tuple(expected):
        raise KernelInputError(
            f"rms_norm: weight has shape {tuple(weight.shape)} but x is {tuple(x.shape)}; allowed are [D], or [M, D] "
            "together with `modality`"
        )
    if modality is not None and modality.shape != x.shape[:-1]:
        raise KernelInputError(
            f"rms_norm: modality has shape {tuple(modality.shape)}; it must be "
            f"{tuple(x.shape[:-1])}, x's without the last dimension"
        )
    if residual is None:
        return torch.ops.triweave.rms_norm(x, weight, modality, eps, chosen)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise KernelInputError(
            f"rms_norm: residual is {residual.dtype} {tuple(residual.shape)} but x is {x.dtype} {tuple(x.shape)}; "
            "make them equal"
        )
    return torch.ops.triweave.rms_norm_residual(x, residual, weight, modality, eps, chosen)
