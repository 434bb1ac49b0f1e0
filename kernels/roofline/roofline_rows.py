"""The rows of `triweave kernels roofline`: models of ops and compiled kernels on chips, beside figures of others.

A row says in `status` what it is: "model", "measured elsewhere" (public_figures.py) or "executed here"
(results/<chip>.json, which `make test-gpu` writes).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from triweave.kernels.attention_tiles import head_parts
from triweave.kernels.errors import KernelInputError
from triweave.kernels.roofline import media_work, public_figures, roofline, work
from triweave.kernels.roofline.chips import PEAKS, Peaks, peaks
from triweave.kernels.roofline.loop_mix import CompiledLoops
from triweave.kernels.roofline.tile_figures import mask_intervals
from triweave.kernels.roofline.work import AttentionShape, Work
from triweave.kernels.tiles import Intervals, TileTable, mask_area, tile_table

MODEL = "model"
EXECUTED = "executed here"
RESULTS = Path(__file__).parents[1] / "results"
NUMBER_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
MODALITIES = 2
"""Inputs of the low_rank_fusion that is modelled, as wide as the model."""
RANK = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is modelled: one attention shape and mask, and for the other ops as many tokens, as wide as its heads."""

    mask: str = "interleaved"
    """One of tile_figures.MASKS."""
    batch: int = 2
    sequence_length: int = 8192
    heads: int = 16
    key_heads: int = 16
    head_dim: int = 128
    dtype: str = "bf16"
    vocabulary: int = 131072
    lengths: npt.NDArray[np.int64] | None = field(default=None, repr=False)
    """Document lengths of the mask `documents`; the reference distribution's without."""

    @property
    def shape(self) -> str:
        """The shape as rows show it."""
        groups = "" if self.key_heads == self.heads else f" G{self.key_heads}"
        return f"B{self.batch} S{self.sequence_length} H{self.heads}{groups} K{self.head_dim}"

    def shape_of(self, op: str) -> str:
        """Return the shape of an op: its heads, or N rows as wide as all heads together (swiglu: 8/3 times that)."""
        if op in ("attention", "qk_norm_rope", "cross_attention", "mmca"):
            return self.shape
        rows, width = self.batch * self.sequence_length, self.heads * self.head_dim
        vocabulary = f" V{self.vocabulary}" if op == "linear_cross_entropy" else ""
        return f"N{rows} D{8 * width // 3 if op == 'swiglu' else width}{vocabulary}"

    @property
    def number_bytes(self) -> int:
        """Bytes of a number. Raises KernelInputError for a dtype no kernel takes."""
        if self.dtype not in NUMBER_BYTES:
            raise KernelInputError(
                f"kernels roofline: there is no dtype {self.dtype!r}; known are {', '.join(NUMBER_BYTES)}"
            )
        return NUMBER_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row; figures that do not apply are None."""

    op: str
    impl: str
    direction: str
    chip: str
    mask: str | None
    shape: str
    dtype: str
    config: str | None = None
    limit_ms: float | None = None
    limit_kind: str | None = None
    bound_ms: float | None = None
    bound_kind: str | None = None
    ms: float | None = None
    """Expected by the model, or measured."""
    tflops: float | None = None
    percent_of_limit: float | None = None
    work_to_area: float | None = None
    full_share: float | None = None
    occupancy: float | None = None
    registers: int | None = None
    spill_bytes: int | None = None
    loop: Mapping[str, float] | None = None
    """Clocks of a multiprocessor for one turn of the unmasked loop of one block, by unit."""
    status: str = MODEL
    source: str | None = None


ATTENTION_KERNELS = {"fwd": ("forward",), "bwd": ("dq", "dkv")}


class Masks:
    """The masks of one case, made once: intervals, exact area and tile tables."""

    def __init__(self, case: Case) -> None:
        self.intervals: tuple[Intervals, Intervals] = mask_intervals(
            case.mask, case.batch, case.sequence_length, lengths=case.lengths
        )
        self.pairs = mask_area(*self.intervals)
        self.keys = case.sequence_length
        self._tables: dict[tuple[int, int], TileTable] = {}

    def table(self, query_tile: int, key_tile: int) -> TileTable:
        """Return the tile table of one tile size."""
        size = (query_tile, key_tile)
        if size not in self._tables:
            self._tables[size] = tile_table(*self.intervals, keys=self.keys, query_tile=query_tile, key_tile=key_tile)
        return self._tables[size]


def attention_shape(case: Case, pairs: int) -> AttentionShape:
    """Return the sizes of self-attention over the case."""
    return AttentionShape(
        batch=case.batch,
        rows=case.sequence_length,
        keys=case.sequence_length,
        heads=case.heads,
        key_heads=case.key_heads,
        width=case.head_dim,
        pairs=pairs,
        number_bytes=case.number_bytes,
    )


def kernel_bound(
    kernel: str, compiled: CompiledLoops, query_tile: int, key_tile: int, case: Case, masks: Masks, chip: Peaks
) -> roofline.KernelBound:
    """Return the model of one attention kernel with tiles of one size."""
    return roofline.attention_bound(
        kernel,
        compiled,
        roofline.attention_products(kernel, query_tile, key_tile, sum(head_parts(case.head_dim))),
        masks.table(query_tile, key_tile),
        tile_bytes=roofline.attention_tile_bytes(kernel, query_tile, key_tile, case.head_dim, case.number_bytes),
        heads=case.heads,
        key_heads=case.key_heads,
        work=work.attention(kernel, attention_shape(case, masks.pairs)),
        pairs=masks.pairs,
        chip=chip,
    )


def attention_rows(case: Case, chip_name: str, table: Mapping[tuple[Any, ...], CompiledLoops]) -> Iterator[Row]:
    """Yield a row per kernel, and one for the whole backward; without compiled loops they hold only the limit."""
    masks = Masks(case)
    shape = attention_shape(case, masks.pairs)
    for direction, names in ATTENTION_KERNELS.items():
        rows = [_kernel_row(name, case, chip_name, masks, table) for name in names]
        yield from rows
        if len(rows) > 1:
            needed = work.attention(direction, shape)
            yield _summed(_limit_row("attention", direction, case, chip_name, needed), rows, needed)


def _kernel_row(
    kernel: str, case: Case, chip_name: str, masks: Masks, table: Mapping[tuple[Any, ...], CompiledLoops]
) -> Row:
    chip = peaks(chip_name)
    kernel_work = work.attention(kernel, attention_shape(case, masks.pairs))
    row = replace(
        _limit_row("attention", "fwd" if kernel == "forward" else "bwd", case, chip_name, kernel_work),
        impl=f"triweave {kernel}",
    )
    found = compiled_of(table, "attention", kernel, chip.arch, case, case.head_dim)
    if found is None or len(found[1].loops) != 2:
        return row
    config, compiled = found
    tile = _sizes(config)
    bound = kernel_bound(kernel, compiled, tile["QUERY_TILE"], tile["KEY_TILE"], case, masks, chip)
    return _modelled(row, config, compiled, bound, kernel_work)


def _sizes(config: str) -> dict[str, int]:
    """Return the numbers of a config, `QUERY_TILE=64 KEY_TILE=32 WHOLE=True` for one."""
    pairs = (part.split("=") for part in config.split())
    return {name: int(value) for name, value in pairs if value.isdigit()}


def _modelled(row: Row, config: str, compiled: CompiledLoops, bound: roofline.KernelBound, kernel_work: Work) -> Row:
    """Return the row with what the model says of a compiled kernel."""
    return replace(
        _reaching(row, bound.expected_ms, kernel_work),
        config=config,
        bound_ms=bound.bound_ms,
        bound_kind=bound.bound_kind,
        work_to_area=bound.work_to_area,
        full_share=bound.full_share,
        occupancy=compiled.occupancy,
        registers=compiled.registers,
        spill_bytes=compiled.spill_bytes,
        loop=asdict(bound.turn),
    )


def _summed(total: Row, rows: Sequence[Row], needed: Work) -> Row:
    """Return the row of an op whose kernels run one after the other; its own where one of them is not compiled."""
    if any(row.ms is None for row in rows):
        return total
    return replace(
        _reaching(total, sum(row.ms or 0.0 for row in rows), needed),
        bound_ms=sum(row.bound_ms or 0.0 for row in rows),
        bound_kind="+".join(dict.fromkeys(str(row.bound_kind) for row in rows)),
    )


PRODUCT_KERNELS = ("statistics", "logit_gradient", "product+total", "product")
"""Kernels of linear_cross_entropy with both gradients: the logits, again with their gradients, dhidden and dw."""


def cross_entropy_rows(case: Case, chip_name: str, table: Mapping[tuple[Any, ...], CompiledLoops]) -> Iterator[Row]:
    """Yield a row per kernel, each as if it ran over all rows and the whole vocabulary at once, and one for the op."""
    chip, size = peaks(chip_name), case.number_bytes
    tokens, width = case.batch * case.sequence_length, case.heads * case.head_dim
    logits = roofline.Product(rows=tokens, columns=case.vocabulary, inner=width)
    shapes = {
        "statistics": (logits, 0),
        "logit_gradient": (logits, size),
        "product+total": (roofline.Product(rows=tokens, columns=width, inner=case.vocabulary), size),
        "product": (roofline.Product(rows=case.vocabulary, columns=width, inner=tokens), 4),
    }
    rows = []
    for kernel in PRODUCT_KERNELS:
        shape, out_bytes = shapes[kernel]
        kernel_work = work.product(
            rows=shape.rows, columns=shape.columns, inner=shape.inner, number_bytes=size, out_bytes=out_bytes
        )
        row = _limit_row("linear_cross_entropy", "fwd", case, chip_name, kernel_work)
        row = replace(row, impl=f"triweave {kernel}")
        found = compiled_of(table, "linear_cross_entropy", kernel, chip.arch, case, None)
        if found is not None and len(found[1].loops) == 1:
            config, compiled = found
            tile = _sizes(config)
            bound = roofline.product_bound(
                compiled,
                roofline.Product(rows=tile["ROWS"], columns=tile["COLUMNS"], inner=tile["DEPTH"]),
                shape,
                number_bytes=size,
                work=kernel_work,
                chip=chip,
            )
            row = _modelled(row, config, compiled, bound, kernel_work)
        rows.append(row)
    needed = op_work("linear_cross_entropy", "fwd", case)
    yield from rows
    yield _summed(_limit_row("linear_cross_entropy", "fwd", case, chip_name, needed), rows, needed)


def compiled_of(
    table: Mapping[tuple[Any, ...], CompiledLoops], op: str, kernel: str, arch: str, case: Case, width: int | None
) -> tuple[str, CompiledLoops] | None:
    """Return (config, loops) of a shipped variant; fp16 takes those of bf16, whose instructions differ in name only."""
    dtype = "bf16" if case.dtype == "fp16" else case.dtype
    wanted = (op, kernel, arch, dtype, width)
    return next(((str(name[5]), loops) for name, loops in table.items() if name[:5] == wanted), None)


def _limit_row(op: str, direction: str, case: Case, chip_name: str, op_work: Work) -> Row:
    found = roofline.limit(op_work, peaks(chip_name), number_bytes=case.number_bytes)
    return Row(
        op=op,
        impl="triweave",
        direction=direction,
        chip=chip_name,
        mask={"attention": case.mask, "cross_attention": "latest medium", "mmca": "interleaved"}.get(op),
        shape=case.shape_of(op),
        dtype=case.dtype,
        limit_ms=found.ms,
        limit_kind=found.kind,
    )


def _reaching(row: Row, ms: float, op_work: Work) -> Row:
    """Return the row with a time and what follows from it."""
    tflops = op_work.matrix_flops / ms / 1e9 if op_work.matrix_flops else None
    return replace(row, ms=ms, tflops=tflops, percent_of_limit=100 * (row.limit_ms or 0.0) / ms)


def op_work(op: str, direction: str, case: Case) -> Work:
    """Return the work of an op but attention over the case's tokens; over media those of reference packs."""
    tokens, width, size = case.batch * case.sequence_length, case.heads * case.head_dim, case.number_bytes
    if op in ("cross_attention", "mmca"):
        return getattr(media_work, op)(
            direction,
            batch=case.batch,
            sequence_length=case.sequence_length,
            heads=case.heads,
            key_heads=case.key_heads,
            width=case.head_dim,
            number_bytes=size,
        )
    if op == "linear_cross_entropy":
        return work.linear_cross_entropy(supervised=tokens, width=width, vocabulary=case.vocabulary, number_bytes=size)
    if op == "qk_norm_rope":
        return work.qk_norm_rope(
            direction,
            tokens=tokens,
            heads=case.heads,
            key_heads=case.key_heads,
            width=case.head_dim,
            number_bytes=size,
        )
    if op == "rms_norm":
        return work.rms_norm(direction, rows=tokens, width=width, number_bytes=size)
    if op == "swiglu":
        return work.swiglu(direction, numbers=tokens * (8 * width // 3), number_bytes=size)
    return work.low_rank_fusion(
        direction, rows=tokens, widths=[width] * MODALITIES, out_width=width, rank=RANK, number_bytes=size
    )


OPS = (
    "attention",
    "linear_cross_entropy",
    "qk_norm_rope",
    "cross_attention",
    "rms_norm",
    "swiglu",
    "mmca",
    "low_rank_fusion",
)


def model_rows(
    ops: Sequence[str],
    cases: Sequence[Case],
    chips: Sequence[str],
    table: Mapping[tuple[Any, ...], CompiledLoops],
) -> Iterator[Row]:
    """Yield the model's rows of `ops` (all if empty) on `chips`. Raises KernelInputError for an unknown name."""
    for op in ops:
        if op not in OPS:
            raise KernelInputError(f"kernels roofline: op {op!r} is not modelled; those that are: {', '.join(OPS)}")
    for chip_name in chips:
        peaks(chip_name)
        for op in ops or OPS:
            if op == "attention":
                for case in cases:
                    yield from attention_rows(case, chip_name, table)
                continue
            if op == "linear_cross_entropy":
                yield from cross_entropy_rows(cases[0], chip_name, table)
                continue
            for direction in work.DIRECTIONS:
                yield _limit_row(op, direction, cases[0], chip_name, op_work(op, direction, cases[0]))


def public_rows(chips: Iterable[str]) -> Iterator[Row]:
    """Yield others' figures on `chips`, in percent of the matrix peak."""
    for figure in public_figures.FIGURES:
        if figure.chip in chips:
            yield Row(
                op="attention",
                impl=figure.impl,
                direction=figure.direction,
                chip=figure.chip,
                mask=figure.mask,
                shape=figure.shape,
                dtype=figure.dtype,
                limit_kind="matrix",
                tflops=figure.tflops,
                percent_of_limit=100 * figure.tflops * 1e12 / PEAKS[figure.chip].matrix_flops,
                status=public_figures.STATUS,
                source=figure.source,
            )


def executed_rows(chips: Iterable[str], ops: Sequence[str] = (), *, folder: Path = RESULTS) -> Iterator[Row]:
    """Yield what was measured on `chips` with this repository: rows of the benchmark in results/<chip>.json."""
    for chip_name in chips:
        path = folder / f"{chip_name}.json"
        made = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        for row in made["rows"] if isinstance(made, dict) else made:
            if row.get("ms") is not None and (not ops or row["op"] in ops):
                yield Row(
                    op=row["op"],
                    impl=row["impl"],
                    direction=row["direction"],
                    chip=chip_name,
                    mask=row.get("mask"),
                    shape=str(row["shape"]),
                    dtype=row["dtype"],
                    limit_kind=row.get("limit_kind"),
                    ms=row["ms"],
                    tflops=row.get("tflops"),
                    percent_of_limit=row.get("percent_of_limit"),
                    status=EXECUTED,
                    source=path.name,
                )
