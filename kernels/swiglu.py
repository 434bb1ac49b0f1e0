"""SwiGLU's elementwise half: y = silu(gate) * up. Limit: memory bandwidth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triweave.kernels import reference
from triweave.kernels.backends import choose, triton_kernels
from triweave.kernels.errors import KernelInputError

torch.library.define("triweave::swiglu", "(Tensor gate, Tensor up, str impl) -> Tensor")
torch.library.define("triweave::swiglu_backward", "(Tensor grad, Tensor gate, Tensor up, str impl) -> (Tensor, Tensor)")


@torch.library.impl("triweave::swiglu", "default")
def _forward(gate: Tensor, up: Tensor, impl: str) -> Tensor:
    implementation = triton_kernels("swiglu") if impl == "triton" else reference
    return implementation.swiglu_forward(gate, up)


@torch.library.impl("triweave::swiglu_backward", "default")
def _backward(grad: Tensor, gate: Tensor, up: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    implementation = triton_kernels("swiglu") if impl == "triton" else reference
    return implementation.swiglu_backward(grad, gate, up)


@torch.library.register_fake("triweave::swiglu")
def _forward_fake(gate: Tensor, up: Tensor, impl: str) -> Tensor:  # noqa: ARG001
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.register_fake("triweave::swiglu_backward")
def _backward_fake(grad: Tensor, gate: Tensor, up: Tensor, impl: str) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return (
        torch.empty_like(gate, memory_format=torch.contiguous_format),
        torch.empty_like(up, memory_format=torch.contiguous_format),
    )


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:  # noqa: ARG001
    gate, up, ctx.impl = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.triweave.swiglu_backward(grad, *ctx.saved_tensors, ctx.impl), None


torch.library.register_autograd("triweave::swiglu", _differentiate, setup_context=_save)


def swiglu(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """Return gate * sigmoid(gate) * up.

    gate, up: [...] of one shape and dtype, any strides. The result is contiguous, of gate's dtype; computed in fp32 for
    bf16 and fp16. Forward and backward are deterministic. Source: Shazeer 2020, GLU Variants Improve Transformer.

    Raises KernelInputError if shapes or dtypes differ, KernelUnavailableError if `impl` cannot serve.
    """
    chosen = choose("swiglu", impl, gate.device.type, gate.dtype)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise KernelInputError(
            f"swiglu: gate is {gate.dtype} {tuple(gate.shape)} but up is {up.dtype} {tuple(up.shape)}; make them equal"
        )
    return torch.ops.triweave.swiglu(gate, up, chosen)
