"""How fast an op can be on a chip, what a compiled kernel of ours is expected to reach, and what others published.

examples:
  triweave kernels roofline
  triweave kernels roofline --op attention --chip h100 --mask interleaved --key-heads 4
  triweave kernels roofline --mask documents --lengths lengths.txt --json
  triweave kernels roofline --chip b200 --compile --write

Every row says in its status whether it is a model, measured elsewhere or executed here. limit: no kernel can be faster.
bound: this compiled kernel cannot. ms and tflops of a model: what it is expected to reach, see kernels/README.md. The
instruction mix of compiled inner loops comes from kernels/roofline/loop_mixes.json; --compile makes what that lacks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triweave.kernels.roofline.roofline_rows import Case

CHIPS = "h100,b200"
MASKS = "full,causal,interleaved"
COLUMNS = {
    "op": "op",
    "impl": "implementation",
    "direction": "dir",
    "mask": "mask",
    "shape": "shape",
    "limit_ms": "limit ms",
    "limit_kind": "by",
    "bound_ms": "bound ms",
    "bound_kind": "by",
    "ms": "ms",
    "tflops": "TFLOP/s",
    "percent_of_limit": "% of limit",
    "work_to_area": "tiles/area",
    "occupancy": "occup.",
    "status": "status",
}
"""Field of a row -> heading."""
WIDEST_TABLE = 300
"""Columns of text; a narrower terminal wraps the lines, and nothing is cut."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--op", help="only these ops, separated by commas (default all that are modelled)")
    parser.add_argument("--chip", default=CHIPS, help=f"a100, h100, h200, b200, rtx5090 (default {CHIPS})")
    parser.add_argument("--mask", default=MASKS, help=f"full, causal, interleaved, documents (default {MASKS})")
    parser.add_argument("--lengths", type=Path, help="document lengths for the mask documents, one a line")
    parser.add_argument("--batch", type=int, default=2, help="packs (default 2)")
    parser.add_argument("--sequence-length", type=int, default=8192, help="tokens of a pack (default 8192)")
    parser.add_argument("--heads", type=int, default=16, help="query heads (default 16)")
    parser.add_argument("--key-heads", type=int, help="key/value heads (default as many as query heads)")
    parser.add_argument("--head-dim", type=int, default=128, help="width of a head (default 128)")
    parser.add_argument("--dtype", default="bf16", help="bf16, fp16 or fp32 (default bf16)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument(
        "--compile", action="store_true", help="compile the kernels with matrix products that the table lacks"
    )
    parser.add_argument("--write", action="store_true", help="with --compile: put what was compiled into the table")


def run(arguments: argparse.Namespace) -> int:
    """Print the model, and the figures of others beside it."""
    from triweave.kernels.roofline import loop_mix
    from triweave.kernels.roofline.roofline_rows import executed_rows, model_rows, public_rows

    ops, chips = _names(arguments.op), _names(arguments.chip)
    cases = _cases(arguments)
    table = loop_mix.load()
    if arguments.compile:
        table |= _compile(cases, chips, table, write=arguments.write)
    rows = list(model_rows(ops, cases, chips, table))
    if not ops or "attention" in ops:
        rows += public_rows(chips)
    rows += executed_rows(chips, ops)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return 0
    _show(rows)
    lacking = {
        row.chip for row in rows if row.op == "attention" and row.impl.startswith("triweave ") and row.ms is None
    }
    if lacking:
        print(
            f"{', '.join(sorted(lacking))}: kernels/roofline/loop_mixes.json lacks compiled loops of this width and "
            "dtype, so only the limit is shown; --compile makes them",
            file=sys.stderr,
        )
    return 0


def _cases(arguments: argparse.Namespace) -> list[Case]:
    from triweave.kernels.roofline.roofline_rows import Case
    from triweave.kernels.roofline.tile_figures import read_lengths

    lengths = read_lengths(arguments.lengths) if arguments.lengths else None
    return [
        Case(
            mask=mask,
            batch=arguments.batch,
            sequence_length=arguments.sequence_length,
            heads=arguments.heads,
            key_heads=arguments.key_heads or arguments.heads,
            head_dim=arguments.head_dim,
            dtype=arguments.dtype,
            lengths=lengths,
        )
        for mask in _names(arguments.mask)
    ]


def _compile(cases: Sequence[Case], chips: Sequence[str], table: dict[Any, Any], *, write: bool) -> dict[Any, Any]:
    """Return the loops that `table` lacks: of attention at the cases' dtype and width, and of the cross-entropy."""
    from importlib.metadata import version

    from rich.console import Console

    from triweave.kernels.errors import KernelUnavailableError
    from triweave.kernels.roofline import loop_mix
    from triweave.kernels.roofline.chips import peaks

    try:
        from triweave.kernels.compiler.shipped_triton import variants
        from triweave.kernels.roofline.loop_mix_triton import compiled_loops, key
    except ImportError as error:
        raise KernelUnavailableError(
            f"kernels roofline --compile needs Triton ({error}); install triton, which has wheels for Linux only"
        ) from error
    dtype = "bf16" if cases[0].dtype == "fp16" else cases[0].dtype
    wanted = [
        (variant, arch)
        for arch in dict.fromkeys(peaks(name).arch for name in chips)
        for variant in variants(["attention", "linear_cross_entropy"], arch=arch)
        if variant.dtype == dtype
        and variant.head_dim in (None, cases[0].head_dim)
        and not variant.kernel.endswith("+softcap")
        and key(variant, arch) not in table
    ]
    made = {}
    with Console(stderr=True).status("starting") as status:
        for number, (variant, arch) in enumerate(wanted, start=1):
            status.update(f"{number} of {len(wanted)}: {variant.kernel} {variant.dtype} {variant.head_dim} {arch}")
            made[key(variant, arch)] = compiled_loops(variant, arch)
    if write and made:
        loop_mix.write(made.items(), triton=version("triton"))
        print(f"wrote {loop_mix.TABLE}", file=sys.stderr)
    return made


def _show(rows: Sequence[Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = Console(width=max(WIDEST_TABLE, console.width))
    for chip in dict.fromkeys(row.chip for row in rows):
        shown = [row for row in rows if row.chip == chip]
        table = Table(title=f"{chip}: a model unless the last column says otherwise", box=box.SIMPLE)
        for name, heading in COLUMNS.items():
            number = any(isinstance(getattr(row, name), (int, float)) for row in shown)
            table.add_column(heading, justify="right" if number else "left", no_wrap=True)
        for row in shown:
            table.add_row(*(_text(getattr(row, name)) for name in COLUMNS))
        console.print(table)
        for impl, source in dict.fromkeys((row.impl, row.source) for row in shown if row.source):
            console.print(f"  {impl}: {source}", highlight=False)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value)


def _names(argument: str | None) -> list[str]:
    return [name.strip() for name in (argument or "").split(",") if name.strip()]
