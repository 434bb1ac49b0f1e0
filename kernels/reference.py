"""Plain torch, one pair of functions per op: forward and hand-written backward. The spec, the CPU path and the oracle.

Every function here is a pure function of its tensors, deterministic, and computes in fp32 where the inputs are narrower
(in fp64 where they are fp64). The public ops register these with torch.library; attention's live in
reference_attention.py. Dimensions: B batch, S packed sequence length, D model width, H query heads, G key/value heads,
K head width, V vocabulary, N supervised rows, M modalities.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOGITS_PER_CHUNK = 1 << 23
"""Upper bound on the logits that exist at once in linear_cross_entropy, unless one row alone has more."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype sums are taken in: fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# RMS norm


def rms_norm_forward(x: Tensor, weight: Tensor, modality: Tensor | None, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension.

    x [..., D]; weight [D], or [M, D] with modality int [...] choosing each row's weight.
    """
    wide = x.to(accumulation_dtype(x.dtype))
    normed = (wide * _reciprocal_rms(wide, eps)).contiguous()
    return normed.mul_(_row_weight(weight, modality, wide.dtype)).to(x.dtype)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, modality: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (dx, dweight): dx = r (g w - x^ mean(g w x^)), dweight = sum of g x^ over rows, x^ = r x."""
    wide = x.to(accumulation_dtype(x.dtype))
    reciprocal = _reciprocal_rms(wide, eps)
    normed = wide * reciprocal
    wide_grad = grad.to(wide.dtype)
    product = (wide_grad * normed).reshape(-1, x.shape[-1])
    if modality is None:
        weight_grad = product.sum(0)
    else:
        # A product with a one-hot matrix instead of index_add: the same order of additions on every device.
        rows = modality.flatten().clamp(min=0).long()
        one_hot = torch.nn.functional.one_hot(rows, weight.shape[0]).to(wide.dtype)
        weight_grad = one_hot.T @ product
    scaled = wide_grad * _row_weight(weight, modality, wide.dtype)
    mean = (scaled * normed).mean(-1, keepdim=True)
    x_grad = scaled.sub_(normed.mul_(mean)).mul_(reciprocal).to(x.dtype)
    return x_grad.contiguous(), weight_grad.to(weight.dtype)


def _reciprocal_rms(wide: Tensor, eps: float) -> Tensor:
    return wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _row_weight(weight: Tensor, modality: Tensor | None, dtype: torch.dtype) -> Tensor:
    if modality is None:
        return weight.to(dtype)
    return weight.to(dtype)[modality.clamp(min=0).long()]


# SwiGLU


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """y = gate * sigmoid(gate) * up."""
    wide = gate.to(accumulation_dtype(gate.dtype))
    return (torch.nn.functional.silu(wide) * up.to(wide.dtype)).to(gate.dtype).contiguous()


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dgate, dup): dup = g s gate, dgate = g up s (1 + gate (1 - s)), s = sigmoid(gate)."""
    wide = gate.to(accumulation_dtype(gate.dtype))
    wide_grad = grad.to(wide.dtype)
    gate_grad = torch.ops.aten.silu_backward(wide_grad * up.to(wide.dtype), wide)
    up_grad = torch.nn.functional.silu(wide) * wide_grad
    return gate_grad.to(gate.dtype).contiguous(), up_grad.to(up.dtype).contiguous()


# QK norm and M-RoPE


def rotary_angles(
    positions: Tensor, sections: list[int], head_width: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) [B, S, 1, K/2] of position * theta^(-2j/K) for frequency pair j.

    positions int [B, S, 3]; the first sections[0] pairs turn with t, the next sections[1] with h, then w, then t again.
    """
    axis, frequencies = rotary_table(sections, head_width, theta, dtype, positions.device)
    angles = positions.to(dtype).index_select(-1, axis) * frequencies
    return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)


def rotary_table(
    sections: Sequence[int], head_width: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return (axis int64 [K/2], theta^(-2j/K) [K/2]) of the frequency pairs; the powers are taken in fp64."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float64, device=device) / head_width
    frequencies = (theta**-exponents).to(dtype)
    counts = torch.tensor(sections, device=device)
    axes = torch.arange(len(sections), device=device) % 3
    return torch.repeat_interleave(axes, counts, output_size=head_width // 2), frequencies


def norm_rope_forward(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, interleaved: bool, eps: float
) -> Tensor:
    """RMS-normalise each head of x [B, S, H, K] over K, scale by weight [K], turn every pair by its angle.

    A pair is (2j, 2j+1) if interleaved, else (j, j + K/2); (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    wide = x.to(cos.dtype)
    normed = wide * _reciprocal_rms(wide, eps)
    if weight is not None:
        normed.mul_(weight.to(cos.dtype))
    return _rotate(normed, cos, sin, interleaved).to(x.dtype)


def norm_rope_backward(
    grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, interleaved: bool, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Return (dx, dweight): turn the gradient back by the same angles, then the backward of the norm."""
    turned = _rotate(grad.to(cos.dtype), cos, -sin, interleaved)
    wide = x.to(cos.dtype)
    reciprocal = _reciprocal_rms(wide, eps)
    normed = wide * reciprocal
    weight_grad = None
    if weight is not None:
        weight_grad = (turned * normed).flatten(0, -2).sum(0).to(weight.dtype)
        turned.mul_(weight.to(cos.dtype))
    mean = (turned * normed).mean(-1, keepdim=True)
    return turned.sub_(normed.mul_(mean)).mul_(reciprocal).to(x.dtype), weight_grad


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        turned_first, turned_second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
        turned_first, turned_second = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned_first)
    turned_first.addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned_second)
    turned_second.addcmul_(first, sin)
    return turned


# Linear cross-entropy


def linear_cross_entropy(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    row_modality: Tensor,
    z_loss: float,
    softcap: float | None,
    modalities: int,
    need_rows_grad: bool,
    need_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (sum, per_modality_sums, lse, rows_grad, weight_grad) without ever holding all N x V logits.

    x = rows weight^T, z = softcap tanh(x / softcap) or x, lse = logsumexp(z), CE = lse - z[target];
    sum = sum_n row_weight (CE + z_loss lse^2); per_modality_sums = sum of row_weight CE by row_modality.
    rows [N, D], weight [V, D], targets int [N], row_weight [N], row_modality int [N]. The gradients are those of `sum`,
    [N, D] and [V, D], or empty where they are not needed. The weight gradient is summed over chunks in fp32.
    """
    count, vocabulary = rows.shape[0], weight.shape[0]
    wide = accumulation_dtype(rows.dtype)
    matrix = weight.to(rows.dtype)
    scale = row_weight.to(wide)
    cross_entropy = torch.empty(count, dtype=wide, device=rows.device)
    lse = torch.empty_like(cross_entropy)
    rows_grad = torch.empty_like(rows) if need_rows_grad else rows.new_empty(0)
    weight_grad = torch.zeros(weight.shape, dtype=wide, device=rows.device) if need_weight_grad else rows.new_empty(0)
    step = max(1, LOGITS_PER_CHUNK // vocabulary)
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        target = targets[chunk].long().unsqueeze(1)
        logits = (rows[chunk] @ matrix.T).to(wide)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        chunk_lse = torch.logsumexp(logits, dim=1)
        lse[chunk] = chunk_lse
        cross_entropy[chunk] = chunk_lse - logits.gather(1, target).squeeze(1)
        if not (need_rows_grad or need_weight_grad):
            continue
        slope = None if softcap is None else 1 - (logits / softcap).square()
        factor = scale[chunk] * (1 + 2 * z_loss * chunk_lse)
        logits_grad = logits.sub_(chunk_lse.unsqueeze(1)).exp_().mul_(factor.unsqueeze(1))
        logits_grad.scatter_add_(1, target, -scale[chunk].unsqueeze(1))
        if slope is not None:
            logits_grad.mul_(slope)
        narrow = logits_grad.to(rows.dtype)
        if need_rows_grad:
            torch.mm(narrow, matrix, out=rows_grad[chunk])
        if need_weight_grad:
            if rows.dtype == torch.bfloat16:
                weight_grad.add_(narrow.T @ rows[chunk])
            else:  # fp16 goes wide: a sum over rows may pass 65504
                weight_grad.addmm_(narrow.T.to(wide), rows[chunk].to(wide))
    total = (scale * (cross_entropy + z_loss * lse.square())).sum()
    belongs = row_modality.long().unsqueeze(1) == torch.arange(modalities, device=rows.device)
    per_modality = torch.where(belongs, (scale * cross_entropy).unsqueeze(1), 0).sum(0)
    return total, per_modality, lse, rows_grad, weight_grad.to(weight_gradient_dtype(weight.dtype))


def weight_gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype the unnormalised weight gradient is kept in: the weight's, but fp32 for fp16 (range)."""
    return torch.float32 if dtype == torch.float16 else dtype
