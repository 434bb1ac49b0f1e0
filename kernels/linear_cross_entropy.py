"""Vocabulary projection and cross-entropy of the supervised rows only, without the [N, V] logits.

The forward already computes the gradients of the unnormalised sum, chunk by chunk of rows (`reference`) or of the
vocabulary (`triton`), so that the backward is a multiplication by the incoming scalar: loss scaling and division by the
global token count stay outside, and the weight is not touched after the forward (under ZeRO-3 it is gone by then).
Limit: matrix time of the supervised rows: three GEMMs [N, D, V], which `reference` does; `triton` does four.
Sources: Liger-Kernel's fused linear cross-entropy; Wijmans et al. 2024, Cut Your Losses; z-loss: PaLM (2022),
section 5; soft cap: Gemma 2 (2024), section 2.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from triweave.kernels import reference
from triweave.kernels.backends import choose, triton_kernels
from triweave.kernels.errors import KernelInputError

torch.library.define(
    "triweave::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor row_index, Tensor row_weight, Tensor row_modality, "
    "float z_loss, float? softcap, int modalities, bool need_hidden_grad, bool need_weight_grad, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("triweave::linear_cross_entropy", "default")
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_index: Tensor,
    row_weight: Tensor,
    row_modality: Tensor,
    z_loss: float,
    softcap: float | None,
    modalities: int,
    need_hidden_grad: bool,
    need_weight_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options: dict[str, Any] = {
        "z_loss": z_loss,
        "softcap": softcap,
        "modalities": modalities,
        "need_rows_grad": need_hidden_grad,
        "need_weight_grad": need_weight_grad,
    }
    with torch.autocast(hidden.device.type, enabled=False):
        if impl == "triton":
            kernels = triton_kernels("linear_cross_entropy")
            result = kernels.linear_cross_entropy(
                hidden, weight, targets, row_index, row_weight, row_modality, **options
            )
            return cast("tuple[Tensor, Tensor, Tensor, Tensor, Tensor]", result)
        rows = hidden.flatten(0, -2).index_select(0, row_index)
        return reference.linear_cross_entropy(rows, weight, targets, row_weight, row_modality, **options)


@torch.library.register_fake("triweave::linear_cross_entropy")
def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_index: Tensor,  # noqa: ARG001
    row_weight: Tensor,  # noqa: ARG001
    row_modality: Tensor,  # noqa: ARG001
    z_loss: float,  # noqa: ARG001
    softcap: float | None,  # noqa: ARG001
    modalities: int,
    need_hidden_grad: bool,
    need_weight_grad: bool,
    impl: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = reference.accumulation_dtype(hidden.dtype)
    count = targets.shape[0]
    gradient_dtype = reference.weight_gradient_dtype(weight.dtype)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(modalities, dtype=wide),
        hidden.new_empty(count, dtype=wide),
        hidden.new_empty((count, hidden.shape[-1]) if need_hidden_grad else 0),
        hidden.new_empty(weight.shape if need_weight_grad else 0, dtype=gradient_dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, row_index, *_, need_hidden_grad, need_weight_grad, _ = inputs
    _, per_modality_sums, lse, rows_grad, weight_grad = output
    ctx.mark_non_differentiable(per_modality_sums, lse, rows_grad, weight_grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(row_index, rows_grad, weight_grad)
    ctx.hidden_shape, ctx.weight_dtype = hidden.shape, weight.dtype
    ctx.needed = need_hidden_grad, need_weight_grad


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    row_index, rows_grad, weight_grad = ctx.saved_tensors
    hidden_result = weight_result = None
    if grad is not None and ctx.needed[0]:
        flat = rows_grad.new_zeros((ctx.hidden_shape[:-1].numel(), ctx.hidden_shape[-1]))
        hidden_result = flat.index_add(0, row_index, rows_grad * grad.to(rows_grad.dtype)).view(ctx.hidden_shape)
    if grad is not None and ctx.needed[1]:
        weight_result = (weight_grad * grad).to(ctx.weight_dtype)
    return hidden_result, weight_result, *(None,) * 10


torch.library.register_autograd("triweave::linear_cross_entropy", _differentiate, setup_context=_save)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_index: Tensor,
    row_weight: Tensor,
    row_modality: Tensor,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    modalities: int = 8,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum, per_modality_sums, lse) of the supervised rows' cross-entropy.

    logits = hidden[row_index] weight^T, soft-capped to softcap * tanh(logits / softcap) if a cap is given;
    lse_n = logsumexp(logits_n); CE_n = lse_n - logits_n[target_n];
    sum = sum_n row_weight_n (CE_n + z_loss lse_n^2); per_modality_sums[m] = sum of row_weight_n CE_n where
    row_modality_n = m (without z_loss).

    hidden: [B, S, D] or [B * S, D]. weight: [V, D]; its dtype may differ, it is used in hidden's. targets: int [N].
    row_index: int64 [N], flat positions in B * S, each at most once (repeats are summed, on a GPU in no fixed order).
    row_weight: float [N]. row_modality: int [N], 0 <= m < modalities.
    sum [], per_modality_sums [modalities] and lse [N] are fp32 (fp64 for fp64 hidden). Only `sum` is differentiable,
    once, with respect to hidden and weight; the other two are measurements.

    At most max(V, reference.LOGITS_PER_CHUNK) logits exist at once; with `triton` none do, only gradients of at most
    max(128 N, 4 LOGITS_PER_CHUNK). Where a gradient is needed the forward stores it, [N, D] and [V, D], summed over
    chunks in fp32 whatever the dtype; under no_grad no gradient work is done. The weight is not read after the forward.
    N = 0 gives exact zeros and zero gradients. Autocast changes nothing here. `triton` takes fp32, fp16 and bf16.
    A target outside the vocabulary or a row_index outside hidden is torch's error; with `triton` such a target, and
    under no_grad such an index, makes sum NaN instead.
    Do not put it under activation checkpointing: it would work and do its GEMMs twice.

    Raises KernelInputError if shapes do not fit, KernelUnavailableError if `impl` cannot serve.
    """
    chosen = choose("linear_cross_entropy", impl, hidden.device.type, hidden.dtype)
    if weight.dim() != 2 or hidden.dim() not in (2, 3) or hidden.shape[-1] != weight.shape[1]:
        raise KernelInputError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit; they "
            "must be [B, S, D] or [B * S, D], and [V, D]"
        )
    count = row_index.shape[0]
    for name, rows in (("targets", targets), ("row_weight", row_weight), ("row_modality", row_modality)):
        if tuple(rows.shape) != (count,):
            raise KernelInputError(
                f"linear_cross_entropy: {name} has shape {tuple(rows.shape)}; it needs one entry per row of row_index, "
                f"({count},)"
            )
    differentiating = torch.is_grad_enabled()
    total, per_modality_sums, lse, _, _ = torch.ops.triweave.linear_cross_entropy(
        hidden,
        weight,
        targets,
        row_index,
        row_weight,
        row_modality,
        z_loss,
        softcap,
        modalities,
        differentiating and hidden.requires_grad,
        differentiating and weight.requires_grad,
        chosen,
    )
    return total, per_modality_sums, lse
