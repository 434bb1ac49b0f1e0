"""Time the CPU path of the ops.

examples:
  python -m triweave.kernels.bench attention --json
  python -m triweave.kernels.bench attention --sequence-length 8192 --documents 16 --threads 2

Each row is one mask and one implementation, forward and backward together: `triweave` is the public op, `documents` a
plain loop of SDPA over the documents (a causal pass, then each span's rows overwritten by a second call), `dense` SDPA
with one S x S mask. The implementations take turns, so that a busy machine slows all of them; `ms` is the median wall
time, `cpu_ms` that of processor time, which does not count waiting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from triweave.kernels import tiles
from triweave.kernels.attention import attention

SPAN_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One mask to time: `documents` equal documents in `sequence_length` tokens, a share of them in spans."""

    sequence_length: int
    documents: int
    heads: int
    head_width: int
    span_percent: int

    @property
    def document_tokens(self) -> int:
        """Length of each document."""
        return self.sequence_length // self.documents

    def intervals(self) -> tuple[Tensor, Tensor]:
        """Return kv_lo and kv_hi [1, S]."""
        lengths = np.full(self.documents, self.document_tokens, dtype=np.int64)
        every = SPAN_TOKENS * 100 // self.span_percent if self.span_percent else 0
        lo, hi = tiles.document_intervals(lengths, span_tokens=SPAN_TOKENS if every else 0, span_every_tokens=every)
        return torch.from_numpy(lo), torch.from_numpy(hi)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Return SDPA's result with the S x S mask, heads as SDPA wants them."""
    key = torch.arange(k.shape[1])
    mask = (key >= lo[:, :, None]) & (key < hi[:, :, None])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2)


def document_attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Return a loop of SDPA over the documents: a causal pass, then the rows of each span overwritten."""
    starts = torch.unique_consecutive(lo[0]).tolist()
    pieces = []
    for start, end in zip(starts, [*starts[1:], q.shape[1]], strict=True):
        queries, keys, values = (x[:, start:end].transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        for first, last in _spans(hi[0, start:end] - start):
            span = scaled_dot_product_attention(queries[:, :, first:last], keys[:, :, :last], values[:, :, :last])
            out = torch.cat([out[:, :, :first], span, out[:, :, last:]], dim=2)
        pieces.append(out.transpose(1, 2))
    return torch.cat(pieces, dim=1)


def _spans(hi: Tensor) -> list[tuple[int, int]]:
    """Return the (first, end) rows of one document's spans, whose rows share one end."""
    ends, counts = torch.unique_consecutive(hi, return_counts=True)
    return [(end - count, end) for end, count in zip(ends.tolist(), counts.tolist(), strict=True) if count > 1]


def bench_attention(shape: AttentionShape, repeats: int) -> list[dict[str, object]]:
    """Time the three implementations in turns and return a row each, with the largest difference from `dense`."""
    generator = torch.Generator().manual_seed(0)
    size = (1, shape.sequence_length, shape.heads, shape.head_width)
    q, k, v, grad = (torch.randn(size, generator=generator) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    lo, hi = shape.intervals()
    implementations: dict[str, Callable[[], Tensor]] = {
        "triweave": lambda: attention(q, k, v, lo, hi)[0],
        "documents": lambda: document_attention(q, k, v, lo, hi),
        "dense": lambda: dense_attention(q, k, v, lo, hi),
    }
    seconds: dict[str, list[float]] = {name: [] for name in implementations}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in implementations}
    results: dict[str, list[Tensor]] = {}
    for _ in range(repeats):
        for name, run in implementations.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            out = run()
            gradients = torch.autograd.grad(out, inputs, grad)
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append(time.process_time() - cpu_start)
            results[name] = [out.detach(), *gradients]
    dense_ms = statistics.median(seconds["dense"]) * 1e3
    pairs = tiles.mask_area(lo.numpy(), hi.numpy())
    rows: list[dict[str, object]] = []
    for name in implementations:
        ms = statistics.median(seconds[name]) * 1e3
        difference = max((a - b).abs().max().item() for a, b in zip(results[name], results["dense"], strict=True))
        rows.append(
            {
                "op": "attention",
                "impl": name,
                "direction": "fwd+bwd",
                **asdict(shape),
                "dtype": "float32",
                "threads": torch.get_num_threads(),
                "ms": round(ms, 2),
                "cpu_ms": round(statistics.median(cpu_seconds[name]) * 1e3, 2),
                "gflops": round(14 * pairs * shape.heads * shape.head_width / ms / 1e6, 1),
                "speed_to_dense": round(dense_ms / ms, 2),
                "max_difference_from_dense": difference,
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m triweave.kernels.bench", epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", choices=["attention"])
    parser.add_argument("--sequence-length", type=int, default=4096, help="packed tokens S (default 4096)")
    parser.add_argument("--documents", type=int, default=8, help="equal documents in S (default 8)")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument(
        "--span-percent", type=int, nargs="+", default=[0, 25, 50, 75], help="tokens in bidirectional spans of 64"
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is printed (default 5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, object]] = []
    for span_percent in arguments.span_percent:
        shape = AttentionShape(
            sequence_length=arguments.sequence_length,
            documents=arguments.documents,
            heads=arguments.heads,
            head_width=arguments.head_width,
            span_percent=span_percent,
        )
        rows += bench_attention(shape, arguments.repeats)
        if not arguments.json:
            for row in rows[-3:]:
                print(
                    f"spans {span_percent:3d} %  {row['impl']!s:10} {row['ms']:9} ms  {row['speed_to_dense']:5}x dense"
                )
    if arguments.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
