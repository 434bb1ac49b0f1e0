"""Benchmark cases of the ops that have a mask: attention and its kin.

Tables of live tiles are made beforehand, as a loader worker makes them, and belong to no figure.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triweave.kernels import attention_tiles, flex_attention, mmca_tiles, tiles
from triweave.kernels.attention import attention
from triweave.kernels.bench import peers
from triweave.kernels.bench.cases import Call, Case, Sizes, draw
from triweave.kernels.bench.masks import SPAN_TOKENS
from triweave.kernels.cross_attention import cross_attention
from triweave.kernels.mmca import mmca
from triweave.kernels.roofline import work
from triweave.kernels.roofline.work import AttentionShape
from triweave.kernels.tiles import Intervals

GATE = 0.5


def attention_case(sizes: Sizes) -> Case:
    """Return attention over the mask."""
    lo, hi = sizes.mask.intervals()
    tables = _tables(sizes, lo, hi, sizes.tokens)
    kv_lo, kv_hi = _on_device(sizes, lo, hi)

    def ours(impl: str) -> Call:
        return lambda q, k, v: attention(q, k, v, kv_lo, kv_hi, tiles=tables, impl=impl)[0]

    shape = _shape(sizes, sizes.tokens, tiles.mask_area(lo, hi))
    return Case(
        op="attention",
        mask=sizes.mask.kind,
        shape=_named(sizes, sizes.tokens),
        dtype=sizes.dtype,
        inputs=_heads(sizes, sizes.tokens),
        ours=ours,
        peers={
            "sdpa": peers.sdpa(sizes.mask, kv_lo, kv_hi),
            "documents": peers.documents(sizes.mask),
            "flex": _flex(kv_lo, kv_hi, sizes.tokens, sizes.width),
            "flash": ours("flash"),
        },
        work=lambda direction: work.attention(direction, shape),
        of_whole=_first_group(sizes),
    )


def cross_attention_case(sizes: Sizes) -> Case:
    """Return gated attention of every token to 64 media tokens of its document."""
    ids = np.repeat(np.arange(len(sizes.mask.lengths)), sizes.mask.lengths)[None]
    lo, hi = ((ids + more).astype(np.int32) * SPAN_TOKENS for more in (0, 1))
    keys = SPAN_TOKENS * len(sizes.mask.lengths)
    tables = _tables(sizes, lo, hi, keys)
    media_lo, media_hi = _on_device(sizes, lo, hi)
    gate = torch.full((sizes.heads,), GATE, device=sizes.device, requires_grad=True)
    shape = _shape(sizes, keys, tiles.mask_area(lo, hi))

    def ours(impl: str) -> Call:
        return lambda q, k, v, gate: cross_attention(q, k, v, media_lo, media_hi, gate, tiles=tables, impl=impl)

    return Case(
        op="cross_attention",
        mask=sizes.mask.kind,
        shape=_named(sizes, keys),
        dtype=sizes.dtype,
        inputs=[*_heads(sizes, keys), gate],
        ours=ours,
        peers={},
        work=lambda direction: work.attention(direction, shape),
    )


def mmca_case(sizes: Sizes) -> Case:
    """Return the two softmaxes over the mask, the tokens of its spans being media; a span sees itself."""
    lo, hi = sizes.mask.intervals()
    span_ids = sizes.mask.span_ids()
    lo = mmca_tiles.own_spans(lo, span_ids)
    modality = (span_ids >= 0).astype(np.int32)
    tables = mmca_tiles.strip_tables(lo, hi, modality, modality)
    if sizes.number_bytes < 8:
        tables |= mmca_tiles.triton_tables(
            lo, hi, modality, modality, width=sizes.width, number_bytes=sizes.number_bytes
        )
    held = _held(sizes, tables, on_host=("mmca_segments",))
    kv_lo, kv_hi, classes = _on_device(sizes, lo, hi, modality)
    shape = _shape(sizes, sizes.tokens, tiles.mask_area(lo, hi))

    def ours(impl: str) -> Call:
        return lambda q, k, v: mmca(q, k, v, kv_lo, kv_hi, classes, classes, tiles=held, impl=impl)

    return Case(
        op="mmca",
        mask=sizes.mask.kind,
        shape=_named(sizes, sizes.tokens),
        dtype=sizes.dtype,
        inputs=_heads(sizes, sizes.tokens),
        ours=ours,
        peers={},
        work=lambda direction: work.attention(direction, shape),
        of_whole=_first_group(sizes),
    )


def _flex(kv_lo: Tensor, kv_hi: Tensor, keys: int, width: int) -> Call:
    """Return FlexAttention with its block mask made once, in the call that finds out whether it runs."""
    block_mask = functools.cache(lambda: flex_attention.block_mask(kv_lo, kv_hi, keys))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention.attention(q, k, v, kv_lo, kv_hi, width**-0.5, mask=block_mask())[0]

    return call


def _heads(sizes: Sizes, keys: int) -> list[Tensor]:
    """Return q [1, S, H, K], k and v [1, T, G, K]."""
    key = (1, keys, sizes.key_heads, sizes.width)
    return draw(sizes, (1, sizes.tokens, sizes.heads, sizes.width), key, key)


def _tables(sizes: Sizes, lo: Intervals, hi: Intervals, keys: int) -> dict[str, Tensor]:
    """Return what the strips of the CPU path and the Triton kernels read."""
    tables = tiles.attention_tables(lo, hi)
    if sizes.number_bytes < 8:
        tables |= attention_tiles.attention_tables(
            lo, hi, keys=keys, width=sizes.width, number_bytes=sizes.number_bytes
        )
    return _held(sizes, tables, on_host=("segments",))


def _held(sizes: Sizes, tables: Mapping[str, npt.NDArray[np.int32]], *, on_host: tuple[str, ...]) -> dict[str, Tensor]:
    held = {name: torch.from_numpy(table) for name, table in tables.items()}
    return {name: x if name in on_host else x.to(sizes.device) for name, x in held.items()}


def _on_device(sizes: Sizes, *arrays: npt.NDArray[np.int32]) -> list[Tensor]:
    return [torch.from_numpy(array).to(sizes.device) for array in arrays]


def _shape(sizes: Sizes, keys: int, pairs: int) -> AttentionShape:
    return AttentionShape(
        batch=1,
        rows=sizes.tokens,
        keys=keys,
        heads=sizes.heads,
        key_heads=sizes.key_heads,
        width=sizes.width,
        pairs=pairs,
        number_bytes=sizes.number_bytes,
    )


def _named(sizes: Sizes, keys: int) -> str:
    others = f" T{keys}" * (keys != sizes.tokens)
    groups = f" G{sizes.key_heads}" * (sizes.key_heads != sizes.heads)
    return f"B1 S{sizes.tokens}{others} H{sizes.heads}{groups} K{sizes.width}, {sizes.mask.describe()}"


def _first_group(sizes: Sizes) -> Callable[[Tensor], Tensor]:
    """Return what takes the heads of the first key/value head, of q as of k: the others are the same again."""
    return lambda x: x[:, :, : x.shape[2] // sizes.key_heads]


CASES: dict[str, Callable[[Sizes], Case]] = {
    "attention": attention_case,
    "cross_attention": cross_attention_case,
    "mmca": mmca_case,
}
"""Op -> what builds its case."""
