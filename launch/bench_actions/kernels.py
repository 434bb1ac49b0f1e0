"""Measure the ops against torch, FlexAttention, flash-attn and Liger; what cannot run is marked with the reason.

examples:
  triweave bench kernels --mask interleaved,causal --json
  triweave bench kernels --span-percent 0,50 --direction fwd+bwd --csv attention.csv --plot attention.png
  triweave bench kernels --op rms_norm,swiglu --dtype bf16 --device cuda --compare torch,liger
  triweave bench kernels --mask documents --lengths lengths.txt --sequence-length 8192 --compare sdpa,flex,flash

Contenders take turns, medians count. ms is wall time, cpu_ms processor time, which a busy machine does not change.
`triweave:NAME` is ours; `sdpa` is one call of torch's attention (with a dense mask, unless the mask is causal),
`documents` a loop of it over the documents. On a CPU the table goes on with what the Triton kernels cost when compiled
for other chips and what the roofline model allows there; nothing of that was executed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from triweave.kernels.bench.cases import Sizes
    from triweave.kernels.bench.rows import BenchRow

COMPARED = {"cpu": "sdpa,documents,torch", "cuda": "sdpa,flex,flash,liger,torch"}
"""Device type -> peers unless others are named."""
DTYPES = ("fp32", "bf16", "fp16")
STDOUT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--op", default="attention", help="ops, separated by commas, or all (default attention)")
    parser.add_argument("--mask", default="interleaved", help="interleaved, causal, documents (default interleaved)")
    parser.add_argument("--lengths", type=Path, help="file of document lengths in tokens, one a line")
    parser.add_argument("--documents", type=int, default=8, help="equal documents; 0: the reference's (default 8)")
    parser.add_argument("--span-percent", default="50", help="tokens in spans of an interleaved mask (default 50)")
    parser.add_argument("--direction", default="fwd,bwd", help="fwd, bwd, fwd+bwd (default fwd,bwd)")
    parser.add_argument(
        "--compare", help="; ".join(f"peers (default on {on}: {peers})" for on, peers in COMPARED.items())
    )
    parser.add_argument("--impl", default="auto", help="our implementations (default auto)")
    parser.add_argument("--dtype", choices=DTYPES, help="default bf16 on a CUDA device, fp32 on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default cuda where there is one")
    parser.add_argument("--sequence-length", type=int, default=4096, help="packed tokens S (default 4096)")
    parser.add_argument("--heads", type=int, default=8, help="query heads H (default 8)")
    parser.add_argument("--kv-heads", type=int, help="key/value heads G (default H)")
    parser.add_argument("--head-width", type=int, default=64, help="head width K; D = H K (default 64)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="entries V of the cross-entropy (default 8192)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats in turns; the median counts (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU (default 1)")
    parser.add_argument("--chips", default="h100,b200", help="chips of the compiled rows, or none (default h100,b200)")
    parser.add_argument("--json", nargs="?", const=STDOUT, metavar="FILE", help="rows as JSON, printed without FILE")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="rows as CSV")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="bars of TFLOP/s, or of GB/s without products")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write."""
    import torch

    from triweave.kernels.bench import masked_cases, row_cases

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise _input_error("--device cuda: torch finds no CUDA device here; leave it out or name cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, arguments.threads))
    ops = [*masked_cases.CASES, *row_cases.CASES] if arguments.op == "all" else _names(arguments.op)
    shapes = _shapes(arguments, device)
    rows = _measured(arguments, ops, shapes, device)
    if device.type == "cpu":
        rows += _compiled(arguments, ops, shapes)
    _write(arguments, rows)
    return 0


def _input_error(message: str) -> Exception:
    from triweave.kernels.errors import KernelInputError

    return KernelInputError(f"bench kernels: {message}")


def _names(argument: str) -> list[str]:
    return [name.strip() for name in argument.split(",") if name.strip() and name.strip() != "none"]


def _shapes(arguments: argparse.Namespace, device: Any) -> list[Sizes]:
    """Return the sizes of every mask; of an interleaved one for every share of spans."""
    import torch

    from triweave.kernels.bench.cases import Sizes
    from triweave.kernels.bench.masks import bench_mask
    from triweave.kernels.roofline.tile_figures import read_lengths

    try:
        span_percents = [int(share) for share in _names(arguments.span_percent)]
    except ValueError:
        raise _input_error(f"--span-percent {arguments.span_percent}: write whole numbers, 0,50 for one") from None
    if min(arguments.sequence_length, arguments.heads, arguments.head_width, arguments.repeats) < 1:
        raise _input_error("--sequence-length, --heads, --head-width and --repeats must be 1 or more")
    key_heads = arguments.kv_heads or arguments.heads
    if arguments.heads % key_heads:
        raise _input_error(f"--heads {arguments.heads} is no multiple of --kv-heads {key_heads}")
    lengths = read_lengths(arguments.lengths) if arguments.lengths else None
    dtype = arguments.dtype or ("bf16" if device.type == "cuda" else "fp32")
    return [
        Sizes(
            mask=bench_mask(
                kind,
                arguments.sequence_length,
                documents=arguments.documents,
                lengths=lengths,
                span_percent=span_percent,
            ),
            heads=arguments.heads,
            key_heads=key_heads,
            width=arguments.head_width,
            vocabulary=arguments.vocabulary,
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype],
            device=device,
        )
        for kind in _names(arguments.mask)
        for span_percent in (span_percents if kind == "interleaved" else [0])
    ]


def _measured(arguments: argparse.Namespace, ops: list[str], shapes: list[Sizes], device: Any) -> list[BenchRow]:
    """Return the rows of every op and shape; an op without a mask has one shape."""
    from rich.console import Console

    from triweave.kernels.bench import masked_cases
    from triweave.kernels.bench.cases import build
    from triweave.kernels.bench.limits import measure_limits
    from triweave.kernels.bench.rows import DIRECTIONS, Options, bench_case

    directions = _names(arguments.direction)
    if not directions or set(directions) - set(DIRECTIONS):
        raise _input_error(f"--direction {arguments.direction}: known are {', '.join(DIRECTIONS)}")
    options = Options(
        directions=directions,
        compare=_names(COMPARED[device.type] if arguments.compare is None else arguments.compare),
        impls=_names(arguments.impl),
        repeats=arguments.repeats,
    )
    rows: list[BenchRow] = []
    with Console(stderr=True).status("measuring what the machine can do") as status:
        limits = measure_limits(shapes[0].dtype, device)
        for op in ops:
            for sizes in shapes if op in masked_cases.CASES else shapes[:1]:
                case = build(op, sizes)
                rows += bench_case(case, limits, options, device_name=_device_name(device), progress=status.update)
    return rows


def _device_name(device: Any) -> str:
    import torch

    from triweave.data_pipeline.machine import processor_name

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' * (threads > 1)}"


def _compiled(arguments: argparse.Namespace, ops: list[str], shapes: list[Sizes]) -> list[BenchRow]:
    from triweave.kernels.bench import masked_cases
    from triweave.kernels.bench.compiled import compiled_rows

    chips = _names(arguments.chips)
    return [
        row
        for op in ops
        for sizes in (shapes if op in masked_cases.CASES else shapes[:1])
        for row in compiled_rows(op, sizes, chips, _names(arguments.direction))
    ]


def _write(arguments: argparse.Namespace, rows: list[BenchRow]) -> None:
    from triweave.kernels.bench.plot import write_plot
    from triweave.kernels.bench.rows import write_csv

    text = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
    if arguments.json == STDOUT:
        print(text)
    else:
        _show(rows)
        if arguments.json:
            try:
                Path(arguments.json).write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                raise _input_error(f"--json {arguments.json}: {error.strerror}; choose another file") from error
    writers: list[tuple[Path | None, Callable[[list[BenchRow], Path], None]]] = [
        (arguments.csv, write_csv),
        (arguments.plot, write_plot),
    ]
    for path, write in writers:
        if path is not None:
            write(rows, path)
            print(f"wrote {path}", file=sys.stderr)


def _show(rows: list[BenchRow]) -> None:
    """Print a table for each op and shape; the reasons of cells that cannot run stand below, once each."""
    from rich.console import Console

    console = Console(width=max(200, Console().width))
    reasons: dict[str, int] = {}
    for measured in (True, False):
        shown = [row for row in rows if (row.compiled is None) == measured]
        for key in dict.fromkeys((row.op, row.mask, row.shape) for row in shown):
            group = [row for row in shown if (row.op, row.mask, row.shape) == key]
            cells = _measured_cells if measured else _compiled_cells
            about = f"{group[0].device}, {group[0].dtype}" if measured else "Triton kernels, compiled and not executed"
            console.print(_table(f"{', '.join(filter(None, key))}; {about}", [cells(row, reasons) for row in group]))
    for reason, number in reasons.items():
        console.print(f"[{number}] {reason}", markup=False, highlight=False)


def _note(status: str, reasons: dict[str, int]) -> str:
    """Return the status, its reason replaced by a number."""
    from triweave.kernels.bench.rows import MEASURED

    return status if status == MEASURED else f"- [{reasons.setdefault(status, len(reasons) + 1)}]"


def _measured_cells(row: BenchRow, reasons: dict[str, int]) -> dict[str, Any]:
    return {
        "implementation": row.impl,
        "direction": row.direction,
        "ms": row.ms,
        "cpu ms": row.cpu_ms,
        "TFLOP/s": row.tflops or None,
        "GB/s": row.gb_per_s,
        "% of limit": row.percent_of_limit,
        "limit": row.limit_kind,
        "peak MB": None if row.peak_bytes is None else row.peak_bytes / 1e6,
        "error": None if row.error_vs_fp64 is None else f"{row.error_vs_fp64:.1e}",
        "status": _note(row.status, reasons),
    }


def _compiled_cells(row: BenchRow, reasons: dict[str, int]) -> dict[str, Any]:
    figures = {name.replace("_", " "): figure for name, figure in (row.compiled or {}).items()}
    return {"chip": row.device, "direction": row.direction, **figures, "status": _note(row.status, reasons)}


def _table(title: str, lines: list[dict[str, Any]]) -> Any:
    """Return a table of `lines`, heading -> cell, in order."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in lines[0]:
        numbers = any(isinstance(line[heading], (int, float)) for line in lines)
        table.add_column(heading, justify="right" if numbers else "left")
    for line in lines:
        cells = ("" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x) for x in line.values())
        table.add_row(*map(escape, cells))
    return table
