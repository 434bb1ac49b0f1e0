"""Benchmark cases of the ops without a mask: norms, rotary positions, SwiGLU, cross-entropy, fusion."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from triweave.kernels.bench.cases import EPS, SEED, Call, Case, Sizes, draw
from triweave.kernels.bench.peers import liger
from triweave.kernels.linear_cross_entropy import linear_cross_entropy
from triweave.kernels.low_rank_fusion import low_rank_fusion
from triweave.kernels.qk_norm_rope import qk_norm_rope
from triweave.kernels.rms_norm import rms_norm
from triweave.kernels.roofline import work
from triweave.kernels.swiglu import swiglu

FEED_FORWARD = 3
"""Width of swiglu's halves in model widths."""
RANK = 4
"""Factors R of low_rank_fusion."""


def rms_norm_case(sizes: Sizes) -> Case:
    """Return the plain norm of [S, D], the weight fp32 as in a model."""
    tokens, width = sizes.tokens, sizes.model_width
    (x,) = draw(sizes, (tokens, width))
    weight = torch.ones(width, device=sizes.device, requires_grad=True)
    return Case(
        op="rms_norm",
        shape=f"S{tokens} D{width}",
        dtype=sizes.dtype,
        inputs=[x, weight],
        ours=lambda impl: lambda x, weight: rms_norm(x, weight, eps=EPS, impl=impl),
        peers={
            "torch": lambda x, weight: F.rms_norm(x, (width,), weight.to(x.dtype), EPS),
            "liger": lambda x, weight: liger("liger_rms_norm")(x, weight, EPS, in_place=False),
        },
        work=lambda direction: work.rms_norm(direction, rows=tokens, width=width, number_bytes=sizes.number_bytes),
    )


def swiglu_case(sizes: Sizes) -> Case:
    """Return SwiGLU's elementwise half of [S, 3 D]."""
    shape = (sizes.tokens, FEED_FORWARD * sizes.model_width)
    return Case(
        op="swiglu",
        shape=f"S{shape[0]} F{shape[1]}",
        dtype=sizes.dtype,
        inputs=draw(sizes, shape, shape),
        ours=lambda impl: lambda gate, up: swiglu(gate, up, impl=impl),
        peers={"torch": lambda gate, up: F.silu(gate) * up, "liger": liger("liger_swiglu")},
        work=lambda direction: work.swiglu(direction, numbers=shape[0] * shape[1], number_bytes=sizes.number_bytes),
    )


def qk_norm_rope_case(sizes: Sizes) -> Case:
    """Return norm and rotation of q and k; both are differentiated."""
    tokens, width = sizes.tokens, sizes.width
    q, k = draw(sizes, (1, tokens, sizes.heads, width), (1, tokens, sizes.key_heads, width))
    weights = [torch.ones(width, device=sizes.device, requires_grad=True) for _ in range(2)]
    positions = torch.arange(tokens, device=sizes.device)[None, :, None].expand(1, tokens, 3).contiguous()
    third = width // 6
    sections = (width // 2 - 2 * third, third, third)

    def ours(impl: str) -> Call:
        return lambda q, k, q_weight, k_weight: qk_norm_rope(
            q, k, positions, q_weight=q_weight, k_weight=k_weight, sections=sections, eps=EPS, impl=impl
        )

    return Case(
        op="qk_norm_rope",
        shape=f"B1 S{tokens} H{sizes.heads} G{sizes.key_heads} K{width}",
        dtype=sizes.dtype,
        inputs=[q, k, *weights],
        ours=ours,
        peers={},
        work=lambda direction: work.qk_norm_rope(
            direction,
            tokens=tokens,
            heads=sizes.heads,
            key_heads=sizes.key_heads,
            width=width,
            number_bytes=sizes.number_bytes,
        ),
    )


def linear_cross_entropy_case(sizes: Sizes) -> Case:
    """Return the loss of S supervised rows [S, D] over V entries."""
    rows, width, vocabulary = sizes.tokens, sizes.model_width, sizes.vocabulary
    hidden, weight = draw(sizes, (rows, width), (vocabulary, width), scale=width**-0.25)
    generator = torch.Generator().manual_seed(SEED)
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(sizes.device)
    index, modality = torch.arange(rows, device=sizes.device), torch.zeros_like(targets)
    row_weight = torch.ones(rows, device=sizes.device)

    def ours(impl: str) -> Call:
        return lambda hidden, weight: linear_cross_entropy(
            hidden, weight, targets, index, row_weight.to(hidden.dtype), modality, modalities=1, impl=impl
        )[0]

    return Case(
        op="linear_cross_entropy",
        shape=f"N{rows} D{width} V{vocabulary}",
        dtype=sizes.dtype,
        inputs=[hidden, weight],
        ours=ours,
        peers={
            "torch": lambda hidden, weight: F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum"),
            "liger": lambda hidden, weight: liger("liger_fused_linear_cross_entropy")(
                hidden, weight, targets, reduction="sum"
            ),
        },
        work=lambda direction: work.linear_cross_entropy(
            supervised=rows,
            width=width,
            vocabulary=vocabulary,
            number_bytes=sizes.number_bytes,
            gradients=direction != "fwd",
        ),
        gradients_in_forward=True,
    )


def low_rank_fusion_case(sizes: Sizes) -> Case:
    """Return LMF of two modalities as wide as the model, rank 4."""
    rows, width = sizes.tokens, sizes.model_width
    xs = draw(sizes, (rows, width), (rows, width))
    factors = draw(sizes, (RANK, width + 1, width), (RANK, width + 1, width), scale=width**-0.5)
    return Case(
        op="low_rank_fusion",
        shape=f"N{rows} D{width} D{width} E{width} R{RANK}",
        dtype=sizes.dtype,
        inputs=[*xs, *factors],
        ours=lambda impl: lambda *inputs: low_rank_fusion(inputs[:2], inputs[2:], impl=impl),
        peers={},
        work=lambda direction: work.low_rank_fusion(
            direction,
            rows=rows,
            widths=[width, width],
            out_width=width,
            rank=RANK,
            number_bytes=sizes.number_bytes,
        ),
    )


CASES: dict[str, Callable[[Sizes], Case]] = {
    "qk_norm_rope": qk_norm_rope_case,
    "rms_norm": rms_norm_case,
    "swiglu": swiglu_case,
    "linear_cross_entropy": linear_cross_entropy_case,
    "low_rank_fusion": low_rank_fusion_case,
}
"""Op -> what builds its case."""
