"""What the self-check runs: for each op with a Triton kernel its cases at one width. An op without an entry is refused.

A case holds what the op's edges are made of: packed documents and spans, an empty document, padding rows, heads in
groups, sizes that fill no tile. Numbers are drawn on the host from the generator that is passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Generator, Tensor

from triweave.kernels.admission.self_check import Case
from triweave.kernels.attention import attention
from triweave.kernels.cross_attention import cross_attention
from triweave.kernels.linear_cross_entropy import linear_cross_entropy
from triweave.kernels.low_rank_fusion import low_rank_fusion
from triweave.kernels.mmca import mmca
from triweave.kernels.qk_norm_rope import qk_norm_rope
from triweave.kernels.rms_norm import rms_norm
from triweave.kernels.swiglu import swiglu
from triweave.kernels.tiles import document_intervals

SPAN = 7
"""Tokens of a media span."""
HEADS, GROUPS = 2, 1
MODALITIES = 3
RANK = 3
VOCABULARY = 301
Z_LOSS = 1e-3
EPS = 1e-6


def _draw(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _packed(rows: int) -> tuple[Tensor, Tensor]:
    """Return intervals [2, rows]: one causal document, and a pack of several with spans, an empty one and padding."""
    tail = rows // 8
    lengths = np.array([rows // 2, 1, 0, rows - rows // 2 - 1 - tail, tail])
    one = document_intervals(np.array([rows]))
    several = document_intervals(lengths, span_tokens=SPAN, span_every_tokens=2 * SPAN + 1)
    several[0][:, -tail:] = several[1][:, -tail:] = 0
    lo, hi = (torch.from_numpy(np.concatenate(pair)) for pair in zip(one, several, strict=True))
    return lo, hi


def _any_order(rows: int, keys: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return intervals [1, rows] of `keys` keys in no order, some of them empty."""
    lo, hi = (torch.randint(0, keys + 1, (1, rows), generator=generator, dtype=torch.int32) for _ in range(2))
    return lo, hi


def _heads(generator: Generator, intervals: Tensor, keys: int, width: int) -> dict[str, Tensor]:
    """Return q for every row of `intervals` [B, S], and k and v of `keys` keys."""
    batch, rows = intervals.shape
    return {
        "q": _draw(generator, batch, rows, HEADS, width),
        "k": _draw(generator, batch, keys, GROUPS, width),
        "v": _draw(generator, batch, keys, GROUPS, width),
    }


def _attention(width: int, rows: int, generator: Generator) -> Iterator[Case]:
    def call(impl: str, q: Tensor, k: Tensor, v: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, kv_lo, kv_hi, impl=impl)

    keys = rows // 3
    masks = {
        "packed documents with spans": (_packed(rows), rows),
        "intervals in no order": (_any_order(rows // 2, keys, generator), keys),
    }
    for name, ((lo, hi), of) in masks.items():
        leaves = _heads(generator, lo, of, width)
        yield Case(name=name, call=call, results=("out", "lse"), leaves=leaves, fixed={"kv_lo": lo, "kv_hi": hi})


def _cross_attention(width: int, rows: int, generator: Generator) -> Iterator[Case]:
    def call(impl: str, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, media_lo: Tensor, media_hi: Tensor) -> Tensor:
        return cross_attention(q, k, v, media_lo, media_hi, gate, impl=impl)

    keys = rows // 3
    lo, hi = _any_order(rows // 2, keys, generator)
    yield Case(
        name="media intervals in no order",
        call=call,
        results=("out",),
        leaves={**_heads(generator, lo, keys, width), "gate": 0.5 + 0.1 * _draw(generator, HEADS)},
        fixed={"media_lo": lo, "media_hi": hi},
        wide=frozenset({"gate"}),
    )


def _mmca(width: int, rows: int, generator: Generator) -> Iterator[Case]:
    def call(impl: str, q: Tensor, k: Tensor, v: Tensor, *, lo: Tensor, hi: Tensor, modality: Tensor) -> Tensor:
        return mmca(q, k, v, lo, hi, modality, modality, impl=impl)

    lo, hi = _packed(rows)
    modality = ((hi - 1 - torch.arange(rows)) > 0).int()  # a span's tokens are media, all but its last
    yield Case(
        name="packed documents with spans",
        call=call,
        results=("out",),
        leaves=_heads(generator, lo, rows, width),
        fixed={"lo": lo, "hi": hi, "modality": modality},
    )


def _qk_norm_rope(width: int, rows: int, generator: Generator) -> Iterator[Case]:
    def call(
        impl: str, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, positions: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        pairs = q.shape[-1] // 2
        sections = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
        return qk_norm_rope(
            q, k, positions, q_weight=q_weight, k_weight=k_weight, sections=sections, interleaved=interleaved,
            eps=EPS, impl=impl,
        )  # fmt: skip

    for interleaved in (False, True):
        yield Case(
            name="interleaved pairs" if interleaved else "split pairs",
            call=call,
            results=("q", "k"),
            leaves={
                "q": _draw(generator, 2, rows, 3, width),
                "k": _draw(generator, 2, rows, 1, width),
                "q_weight": _draw(generator, width),
                "k_weight": _draw(generator, width),
            },
            fixed={"positions": torch.randint(0, rows, (2, rows, 3), generator=generator), "interleaved": interleaved},
        )


def _rms_norm(width: int, rows: int, generator: Generator) -> Iterator[Case]:
    def plain(impl: str, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, eps=EPS, impl=impl)

    def fused(impl: str, x: Tensor, residual: Tensor, weight: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight, residual=residual, modality=modality, eps=EPS, impl=impl)

    x, residual = _draw(generator, 2, rows, width), _draw(generator, 2, rows, width)
    weights = _draw(generator, MODALITIES, width)
    yield Case(name="plain", call=plain, results=("y",), leaves={"x": x, "weight": weights[0]})
    yield Case(
        name="a residual and a weight per modality",
        call=fused,
        results=("y", "sum"),
        leaves={"x": x, "residual": residual, "weight": weights},
        fixed={"modality": torch.randint(-1, MODALITIES, (2, rows), generator=generator, dtype=torch.int32)},
        wide=frozenset({"weight"}),
    )


def _swiglu(_: int, rows: int, generator: Generator) -> Iterator[Case]:
    def call(impl: str, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        return swiglu(gate, up, impl=impl)

    yield Case(
        name="halves of one projection",
        call=call,
        results=("y",),
        leaves={"gate_and_up": 3 * _draw(generator, 3, rows, 2 * rows)},
    )


def _linear_cross_entropy(_: int, rows: int, generator: Generator) -> Iterator[Case]:
    def call(
        impl: str, hidden: Tensor, weight: Tensor, softcap: float | None, **supervised: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return linear_cross_entropy(
            hidden, weight, **supervised, z_loss=Z_LOSS, softcap=softcap, modalities=MODALITIES, impl=impl
        )

    for width, softcap in ((64, None), (52, 5.0)):
        chosen = torch.randperm(2 * rows, generator=generator)[: rows // 2]
        yield Case(
            name=f"D={width}" if softcap is None else f"D={width} with a soft cap",
            call=call,
            results=("sum", "sums by modality", "lse"),
            leaves={"hidden": _draw(generator, 2, rows, width), "weight": 0.3 * _draw(generator, VOCABULARY, width)},
            fixed={
                "softcap": softcap,
                "targets": torch.randint(0, VOCABULARY, chosen.shape, generator=generator),
                "row_index": chosen,
                "row_weight": torch.rand(chosen.shape, generator=generator),
                "row_modality": torch.randint(0, MODALITIES, chosen.shape, generator=generator),
            },
        )


def _low_rank_fusion(_: int, rows: int, generator: Generator) -> Iterator[Case]:
    def call(impl: str, epilogue: str, **leaves: Tensor) -> Tensor:
        xs, factors = ([x for name, x in leaves.items() if name.startswith(kind)] for kind in ("x", "factor"))
        return low_rank_fusion(xs, factors, epilogue=epilogue, impl=impl)

    for widths, epilogue in (((40, 17, 64), "none"), ((40, 17), "mfb")):
        leaves = {f"x{m}": _draw(generator, rows, width) for m, width in enumerate(widths)}
        leaves |= {f"factor{m}": _draw(generator, RANK, width + 1, 50) / width for m, width in enumerate(widths)}
        if epilogue == "mfb":  # away from 0, where the root's slope is infinite and magnifies any rounding
            leaves = {name: x.abs() for name, x in leaves.items()}
        yield Case(
            name=f"{len(widths)} inputs, epilogue {epilogue}",
            call=call,
            results=("y",),
            leaves=leaves,
            fixed={"epilogue": epilogue},
        )


CASES: dict[str, Callable[[int, int, Generator], Iterator[Case]]] = {
    "attention": _attention,
    "cross_attention": _cross_attention,
    "mmca": _mmca,
    "qk_norm_rope": _qk_norm_rope,
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "linear_cross_entropy": _linear_cross_entropy,
    "low_rank_fusion": _low_rank_fusion,
}
"""Op -> its cases at one width (0 where the op has one shape class) and number of rows, drawn from a generator."""
