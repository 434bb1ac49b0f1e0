"""RMS norm of the query and key heads and their rotation by (t, h, w) positions, in one op.

Limit: memory bandwidth. Sources: Henry et al. 2020, Query-Key Normalization; Su et al. 2021, RoFormer; Wang et al.
2024, Qwen2-VL (M-RoPE).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triweave.kernels import reference
from triweave.kernels.backends import choose, triton_kernels
from triweave.kernels.errors import KernelInputError

_TAIL = (
    "Tensor positions, Tensor? q_weight, Tensor? k_weight, "
    "int[] sections, bool interleaved, float theta, float eps, str impl"
)
torch.library.define("triweave::qk_norm_rope", f"(Tensor q, Tensor k, {_TAIL}) -> (Tensor, Tensor)")
torch.library.define(
    "triweave::qk_norm_rope_backward",
    f"(Tensor q_grad, Tensor k_grad, Tensor q, Tensor k, {_TAIL}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("triweave::qk_norm_rope", "default")
def _forward(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    sections: list[int],
    interleaved: bool,
    theta: float,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        return triton_kernels("qk_norm_rope").qk_norm_rope_forward(
            q, k, positions, q_weight, k_weight, sections, interleaved, theta, eps
        )
    wide = reference.accumulation_dtype(q.dtype)
    cos, sin = reference.rotary_angles(positions, sections, q.shape[-1], theta, wide)
    return (
        reference.norm_rope_forward(q, cos, sin, q_weight, interleaved, eps),
        reference.norm_rope_forward(k, cos, sin, k_weight, interleaved, eps),
    )


@torch.library.impl("triweave::qk_norm_rope_backward", "default")
def _backward(
    q_grad: Tensor,
    k_grad: Tensor,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    sections: list[int],
    interleaved: bool,
    theta: float,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if impl == "triton":
        dq, dk, q_weight_grad, k_weight_grad = triton_kernels("qk_norm_rope").qk_norm_rope_backward(
            q_grad, k_grad, q, k, positions, q_weight, k_weight, sections, interleaved, theta, eps
        )
    else:
        wide = reference.accumulation_dtype(q.dtype)
        cos, sin = reference.rotary_angles(positions, sections, q.shape[-1], theta, wide)
        dq, q_weight_grad = reference.norm_rope_backward(q_grad, q, cos, sin, q_weight, interleaved, eps)
        dk, k_weight_grad = reference.norm_rope_backward(k_grad, k, cos, sin, k_weight, interleaved, eps)
    absent = q.new_empty(0), k.new_empty(0)
    return (
        dq,
        dk,
        absent[0] if q_weight_grad is None else q_weight_grad,
        absent[1] if k_weight_grad is None else k_weight_grad,
    )


@torch.library.register_fake("triweave::qk_norm_rope")
def _forward_fake(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
    )


@torch.library.register_fake("triweave::qk_norm_rope_backward")
def _backward_fake(
    q_grad: Tensor,  # noqa: ARG001
    k_grad: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    positions: Tensor,  # noqa: ARG001
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        q.new_empty(0) if q_weight is None else torch.empty_like(q_weight),
        k.new_empty(0) if k_weight is None else torch.empty_like(k_weight),
    )


def _save(
    ctx: Any,
    inputs: tuple[Any, ...],
    output: tuple[Tensor, Tensor],  # noqa: ARG001
) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _differentiate(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, positions, q_weight, k_weight = ctx.saved_tensors
    dq, dk, q_weight_grad, k_weight_grad = torch.ops.triweave.qk_norm_rope_backward(
        q_grad, k_grad, q, k, positions, q_weight, k_weight, *ctx.options
    )
    return (
        dq,
        dk,
        None,
        None if q_weight is None else q_weight_grad,
        None if k_weight is None else k_weight_grad,
        *(None,) * 5,
    )


torch.library.register_autograd("triweave::qk_norm_rope", _differentiate, setup_context=_save)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    sections: Sequence[int],
    interleaved: bool = False,
    theta: float = 10_000.0,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return q and k with each head RMS-normalised over K, scaled by its weight, then turned pair by pair.

    Pair j turns by position[axis(j)] * theta^(-2j/K); axis is t for the first sections[0] pairs, h for the next
    sections[1], w for the next sections[2], then t again. (a, b) becomes (a cos - b sin, b cos + a sin). Three sections
    are Qwen2-VL's blocks, where w only has the slowest pairs; (1, 1, 1, ...) is Qwen3-VL's interleaving.

    q: [B, S, H, K]; k: [B, S, G, K], q's dtype; any strides. positions: int [B, S, 3], (t, h, w).
    q_weight, k_weight: [K], or None for no scaling after the norm. sections: run lengths of pairs, sum K/2.
    interleaved: pairs are (2j, 2j+1); otherwise halves are split, pairs are (j, j + K/2).
    Results are contiguous, of the inputs' dtype; computed in fp32 for bf16 and fp16, the angles too.
    Deterministic.

    Raises KernelInputError if shapes do not fit, KernelUnavailableError if `impl` cannot serve.
    """
    chosen = choose("qk_norm_rope", impl, q.device.type, q.dtype, q.shape[-1])
    head_width = q.shape[-1]
    if not sections or min(sections) < 0 or 2 * sum(sections) != head_width:
        raise KernelInputError(
            f"qk_norm_rope: sections {tuple(sections)} must be counts (t, h, w, t, ...) of frequency pairs whose "
            f"sum is half the head width, {head_width // 2}"
        )
    if k.shape[:2] != q.shape[:2] or k.shape[-1] != head_width or k.dtype != q.dtype:
        raise KernelInputError(
            f"qk_norm_rope: q is {q.dtype} {tuple(q.shape)} but k is {k.dtype} {tuple(k.shape)}; only the number of "
            "heads may differ"
        )
    if positions.shape != (*q.shape[:2], 3):
        raise KernelInputError(
            f"qk_norm_rope: positions has shape {tuple(positions.shape)}; it must be {(*q.shape[:2], 3)}"
        )
    return torch.ops.triweave.qk_norm_rope(
        q, k, positions, q_weight, k_weight, list(sections), interleaved, theta, eps, chosen
    )
