"""The masks of the benchmark: one causal document, packed causal documents, packed documents with media spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from triweave.kernels import tiles
from triweave.kernels.errors import KernelInputError
from triweave.kernels.tiles import Intervals

KINDS = ("interleaved", "causal", "documents")
SPAN_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class BenchMask:
    """Documents packed into one row of a batch; a share of their tokens lies in bidirectional spans of 64."""

    kind: str
    """One of KINDS."""
    lengths: tuple[int, ...]
    """Tokens of each document, in order."""
    span_percent: int = 0

    @property
    def tokens(self) -> int:
        """Packed tokens S."""
        return sum(self.lengths)

    def intervals(self) -> tuple[Intervals, Intervals]:
        """Return kv_lo and kv_hi [1, S]."""
        every = SPAN_TOKENS * 100 // self.span_percent if self.span_percent else 0
        lengths = np.array(self.lengths, dtype=np.int64)
        return tiles.document_intervals(lengths, span_tokens=SPAN_TOKENS if every else 0, span_every_tokens=every)

    def runs(self) -> list[list[tuple[int, int, bool]]]:
        """Return each document's runs (first, end, is a span), from its own start on; together they hold its tokens."""
        _, hi = self.intervals()
        starts = np.cumsum([0, *self.lengths[:-1]])
        return [
            _runs((hi[0, start : start + length] - start).tolist())
            for start, length in zip(starts, self.lengths, strict=True)
        ]

    def span_ids(self) -> npt.NDArray[np.int32]:
        """Return [1, S]: the number of the span that a token is in, -1 for text."""
        ids: list[int] = []
        spans = 0
        for document in self.runs():
            for first, end, is_span in document:
                ids += [spans if is_span else -1] * (end - first)
                spans += is_span
        return np.array([ids], dtype=np.int32)

    def describe(self) -> str:
        """Return what tells masks of one kind and length apart."""
        spans = f", {self.span_percent} % in spans" if self.kind == "interleaved" else ""
        return f"{len(self.lengths)} document{'s' * (len(self.lengths) > 1)}{spans}"


def bench_mask(
    kind: str,
    tokens: int,
    *,
    documents: int = 8,
    lengths: npt.NDArray[np.int64] | Sequence[int] | None = None,
    span_percent: int = 50,
) -> BenchMask:
    """Return a mask over `tokens` tokens: of one document if causal, else of `lengths` or of equal documents.

    lengths: tokens of documents, repeated until they fill the pack, whose end cuts the last one. documents: how many
    equal ones, 0 for a pack of the reference distribution. span_percent: tokens in spans, of an interleaved mask.

    Raises KernelInputError for an unknown kind, too many documents or a share of spans outside 0 to 100.
    """
    if kind not in KINDS:
        raise KernelInputError(f"bench kernels: there is no mask {kind!r}; known are {', '.join(KINDS)}")
    if not 0 <= span_percent <= 100:
        raise KernelInputError(f"bench kernels: {span_percent} % of the tokens in spans; choose 0 to 100")
    if not 0 <= documents <= tokens:
        raise KernelInputError(f"bench kernels: {documents} documents in {tokens} tokens; choose 0 to {tokens}")
    if kind == "causal":
        held: Sequence[int] = [tokens]
    elif lengths is not None:
        held = _filled(np.asarray(lengths, dtype=np.int64), tokens)
    elif documents == 0:
        held = tiles.lognormal_packs(1, tokens)[0].tolist()
    else:
        held = [tokens // documents + (number < tokens % documents) for number in range(documents)]
    return BenchMask(kind=kind, lengths=tuple(held), span_percent=span_percent if kind == "interleaved" else 0)


def _filled(lengths: npt.NDArray[np.int64], tokens: int) -> list[int]:
    """Return `lengths`, repeated, of a sum of `tokens`."""
    ends = np.cumsum(np.tile(lengths, -(-tokens // int(lengths.sum()))))
    return np.diff(np.append(ends[ends < tokens], tokens), prepend=0).tolist()


def _runs(ends: list[int]) -> list[tuple[int, int, bool]]:
    """Return the runs of one document from where each row's keys end; the rows of a span share one end."""
    runs: list[tuple[int, int, bool]] = []
    row = 0
    while row < len(ends):
        end = ends[row]
        is_span = end > row + 1
        if runs and not is_span and not runs[-1][2]:
            runs[-1] = (runs[-1][0], end, False)
        else:
            runs.append((row, end, is_span))
        row = end
    return runs
