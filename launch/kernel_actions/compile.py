"""One row per shipped kernel, dtype, head width and pinned config, for each chip; nothing is executed.

examples:
  triweave kernels compile --arch sm_80,sm_90 --op attention
  triweave kernels compile --arch sm_90 --check
  triweave kernels compile --json

One row per kernel, dtype, head width and pinned config: registers and spilled bytes per thread, accesses of local
memory inside the inner loops, shared memory, occupancy (a model), the matrix instruction. Nothing is executed. --check
compares with the committed kernels/budgets.json, prints what changed and exits with 1 if a budget is broken.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

ARCHITECTURES = "sm_80,sm_90,sm_100,sm_120"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--arch", default=ARCHITECTURES, help=f"chips, separated by commas (default {ARCHITECTURES})")
    parser.add_argument("--op", help="only these ops, separated by commas")
    parser.add_argument("--dtype", help="only these dtypes, separated by commas: bf16, fp16, fp32")
    parser.add_argument("--head-dim", help="only these widths, separated by commas")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--check", action="store_true", help="compare with the committed table; 1 if over budget")
    parser.add_argument("--write", action="store_true", help="put the rows into the committed table")


def run(arguments: argparse.Namespace) -> int:
    """Compile, print and compare."""
    from triweave.kernels.errors import KernelInputError, KernelUnavailableError
    from triweave.kernels.occupancy import CHIPS

    for arch in _names(arguments.arch):
        if arch not in CHIPS:
            raise KernelInputError(f"kernels compile: there is no arch {arch!r}; known are {', '.join(CHIPS)}")
    try:
        from triweave.kernels.compile_triton import compiled
        from triweave.kernels.shipped_triton import variants
    except ImportError as error:
        raise KernelUnavailableError(
            f"kernels compile needs Triton ({error}); install triton, which has wheels for Linux only"
        ) from error
    rows = _compile(arguments, list(variants(_names(arguments.op))), compiled)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        _show(rows)
    if arguments.write:
        _write(rows)
    return _check(rows) if arguments.check else 0


def _compile(
    arguments: argparse.Namespace, variants: list[Any], compiled: Callable[[Any, str], Any]
) -> list[dict[str, Any]]:
    from rich.console import Console

    from triweave.kernels.errors import KernelInputError

    dtypes, widths = _names(arguments.dtype), _names(arguments.head_dim)
    wanted = [
        (variant, arch)
        for arch in _names(arguments.arch)
        for variant in variants
        if (not dtypes or variant.dtype in dtypes) and (not widths or str(variant.head_dim) in widths)
    ]
    if not wanted:
        raise KernelInputError("kernels compile: no shipped variant has such a dtype and width; leave one of them out")
    rows = []
    with Console(stderr=True).status("starting") as status:
        for number, (variant, arch) in enumerate(wanted, start=1):
            status.update(f"{number} of {len(wanted)}: {variant.kernel} {variant.dtype} {variant.head_dim} {arch}")
            rows.append(dataclasses.asdict(compiled(variant, arch)))
    return rows


def _names(argument: str | None) -> list[str]:
    return [name.strip() for name in (argument or "").split(",") if name.strip()]


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="compiled, not executed; occupancy is a model")
    for name in rows[0]:
        number = isinstance(rows[0][name], (int, float))
        table.add_column(
            name.replace("_", " "), justify="right" if number else "left", no_wrap=name in ("kernel", "config")
        )
    for row in rows:
        table.add_row(
            *(
                "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
                for value in row.values()
            )
        )
    Console(width=max(200, Console().width)).print(table)


def _check(rows: list[dict[str, Any]]) -> int:
    """Print what changed against the committed table, on stderr, and return the exit code."""
    from triweave.kernels import budgets

    found = budgets.changes(rows, budgets.load())
    for change in found:
        print(change, file=sys.stderr)
    broken = sum(change.broken for change in found)
    print(f"{len(rows)} rows, {len(found)} changes, {broken} over budget", file=sys.stderr)
    return 1 if broken else 0


def _write(rows: list[dict[str, Any]]) -> None:
    from importlib.metadata import version

    from triweave.kernels import budgets

    budgets.write(rows, triton=version("triton"))
    print(f"wrote {budgets.TABLE}", file=sys.stderr)
