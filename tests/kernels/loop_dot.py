"""A kernel of the compiler's tests: one matrix product in a loop over K. Run as a script it compiles and prints rows.

python tests/kernels/loop_dot.py sm_80 sm_80:32   # an arch, and the same with at most 32 registers a thread
"""

from __future__ import annotations

import dataclasses
import json
import sys

import triton
import triton.language as tl

from triweave.kernels.compiler.compile_triton import Variant, compiled


@triton.jit
def loop_dot(a, b, c, n, stride, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row = tl.arange(0, M)
    inner = tl.arange(0, K)
    column = tl.arange(0, N)
    total = tl.zeros((M, N), dtype=tl.float32)
    for step in range(n):
        x = tl.load(a + row[:, None] * stride + step * K + inner[None, :])
        y = tl.load(b + (step * K + inner[:, None]) * N + column[None, :])
        total = tl.dot(x, y, total)
    tl.store(c + row[:, None] * N + column[None, :], total)


def variant(registers: int | None) -> Variant:
    return Variant(
        op="loop_dot",
        kernel="loop_dot",
        dtype="bf16",
        head_dim=None,
        function=loop_dot,
        signature={"a": "*bf16", "b": "*bf16", "c": "*fp32", "n": "i32", "stride": "i32"},
        constants={"M": 64, "N": 64, "K": 32},
        aligned=("stride",),
        options={"num_warps": 4, "num_stages": 2, "maxnreg": registers},
        config=f"registers={registers}",
    )


if __name__ == "__main__":
    wanted = [argument.partition(":") for argument in sys.argv[1:]]
    rows = [compiled(variant(int(registers) if registers else None), arch) for arch, _, registers in wanted]
    print(json.dumps([dataclasses.asdict(row) for row in rows]))
