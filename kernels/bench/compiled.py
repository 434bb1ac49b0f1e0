"""Rows of kernels that were compiled for a chip and not executed: what they cost and what the roofline model allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from triweave.kernels.bench.cases import Case, Sizes, build
from triweave.kernels.bench.rows import BenchRow, work_of
from triweave.kernels.compiler import budgets
from triweave.kernels.roofline import loop_mix, roofline, roofline_rows
from triweave.kernels.roofline.chips import Peaks, peaks
from triweave.kernels.roofline.roofline_rows import Masks
from triweave.kernels.tiles import mask_area

DTYPE = torch.bfloat16
COMPILED = "compiled, not executed; occupancy, limit and expected time are a model"
NOT_COMPILED = "not in the table of compiled kernels; the limit is a model"
COSTS = (
    "registers",
    "spill_bytes",
    "inner_loop_local_accesses",
    "shared_bytes",
    "occupancy",
    "matrix_instruction",
)
"""Figures of budgets.json that a row shows."""
_BACKWARD = ("backward", "dq", "dkv", "delta", "grad")
"""Parts of the names of kernels that run in the backward or make gradients."""


def compiled_rows(op: str, sizes: Sizes, chips: Sequence[str], directions: Sequence[str]) -> list[BenchRow]:
    """Return a row for each chip, direction and kernel of the op, in bf16 at this width.

    `compiled` of a row: the kernel, its costs from budgets.json, limit_ms of the whole direction and what sets it, and
    where the inner loops were read expected_ms of the kernel, on the mask of `sizes`. A direction without compiled
    kernels for the chip and the width has one row with the limit alone. Raises KernelInputError for an unknown chip.
    """
    on_host = replace(sizes, dtype=DTYPE, device=torch.device("cpu"))
    case = build(op, on_host)
    wanted = list(dict.fromkeys("fwd" if direction == "fwd" else "bwd" for direction in directions))
    return [
        row
        for name in chips
        for direction in wanted
        for row in _rows(case, on_host, name, direction, _kernels(op, peaks(name).arch, sizes, direction))
    ]


def _rows(
    case: Case, sizes: Sizes, chip_name: str, direction: str, kernels: Sequence[Mapping[str, Any]]
) -> Iterator[BenchRow]:
    chip = peaks(chip_name)
    whole = "fwd+bwd" if case.gradients_in_forward and direction == "bwd" else direction
    least = roofline.limit(work_of(case, whole), chip, number_bytes=DTYPE.itemsize)
    blank = {**dict.fromkeys(("kernel", *COSTS)), "head_dim": None}
    for row in kernels or [blank]:
        expected = _expected_ms(row["kernel"], sizes, chip) if case.op == "attention" and kernels else None
        yield BenchRow(
            op=case.op,
            impl="triton",
            direction=whole,
            mask=case.mask,
            shape=case.shape,
            dtype=str(DTYPE).removeprefix("torch."),
            device=f"{chip_name} ({chip.arch})",
            status=COMPILED if kernels else NOT_COMPILED,
            compiled={
                **{name: row[name] for name in ("kernel", *COSTS)},
                "limit_ms": float(f"{least.ms:.4g}"),
                "limit_of": least.kind,
                "expected_ms": expected,
            },
        )


def _kernels(op: str, arch: str, sizes: Sizes, direction: str) -> list[Mapping[str, Any]]:
    """Return the committed rows of the direction's plain kernels at the width that serves."""
    rows = [row for row in budgets.load().values() if (row["op"], row["arch"], row["dtype"]) == (op, arch, "bf16")]
    needed = sizes.model_width if op == "rms_norm" else sizes.width
    fitting = [row["head_dim"] for row in rows if row["head_dim"] is not None and row["head_dim"] >= needed]
    return [
        row
        for row in rows
        if row["head_dim"] in (None, min(fitting, default=None))
        and "+" not in row["kernel"]
        and any(part in row["kernel"] for part in _BACKWARD) == (direction == "bwd")
    ]


def _expected_ms(kernel: str, sizes: Sizes, chip: Peaks) -> float | None:
    """Return the model's time of one attention kernel on the mask, None where its inner loops were not read."""
    case = roofline_rows.Case(
        mask="causal",
        batch=1,
        sequence_length=sizes.tokens,
        heads=sizes.heads,
        key_heads=sizes.key_heads,
        head_dim=sizes.width,
    )
    wanted = ("attention", kernel, chip.arch, "bf16", sizes.width)
    found = next(((name[5], loops) for name, loops in loop_mix.load().items() if name[:5] == wanted), None)
    if found is None or len(found[1].loops) != 2:
        return None
    config, loops = found
    tile = dict(part.split("=") for part in config.split())
    masks = Masks(case)
    masks.intervals = sizes.mask.intervals()
    masks.pairs = mask_area(*masks.intervals)
    bound = roofline_rows.kernel_bound(kernel, loops, int(tile["QUERY_TILE"]), int(tile["KEY_TILE"]), case, masks, chip)
    return float(f"{bound.expected_ms:.4g}")
