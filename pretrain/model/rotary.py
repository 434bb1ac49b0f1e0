"""Rotary positions without a norm: what imported decoders and vision towers turn their queries and keys by.

The decoder's own default is `kernels.qk_norm_rope`, which normalises and turns in one pass; this is plain torch.
Source: Su et al. 2021, RoFormer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from triweave.kernels.reference import accumulation_dtype, rotary_table
from triweave.pretrain.model.config import RopeScalingConfig


def rotate(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    sections: Sequence[int],
    theta: float,
    scaling: RopeScalingConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Return q and k with pair (j, j + K/2) turned by position[axis(j)] * frequency(j).

    frequency(j) = theta^(-2j/K), changed by `scaling`. q: [B, S, H, K]; k: [B, S, G, K]. positions: int [B, S, 3].
    sections: runs of pairs for time, height, width, time, ..., as in `kernels.qk_norm_rope`. Angles in fp32 for bf16
    and fp16; results have the inputs' dtype.
    """
    dtype = accumulation_dtype(q.dtype)
    axis, frequencies = rotary_table(sections, q.shape[-1], theta, dtype, positions.device)
    if scaling is not None:
        frequencies = scaled(frequencies, scaling)
    angles = (positions.to(dtype).index_select(-1, axis) * frequencies).unsqueeze(2)
    cos, sin = angles.cos(), angles.sin()
    return turn(q, cos, sin), turn(k, cos, sin)


def scaled(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Return frequency * (kept + (1 - kept) / factor), kept = clamp((waves - slow) / (fast - slow), 0, 1).

    waves: of a pair over `scaling.positions`.
    """
    waves = scaling.positions * frequencies / (2 * math.pi)
    kept = ((waves - scaling.slow) / (scaling.fast - scaling.slow)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [..., K] with pair (a, b) = (j, j + K/2) made (a cos - b sin, b cos + a sin); cos, sin [..., K/2]."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
