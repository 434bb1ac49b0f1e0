"""One row per shipped kernel, dtype, head width and pinned config, for each chip; nothing is executed.

examples:
  triweave kernels compile --arch sm_80,sm_90 --op attention
  triweave kernels compile --arch sm_90 --check
  triweave kernels compile --write --only-missing --jobs 2

A row has registers and spilled bytes per thread, accesses of local memory inside the inner loops, shared memory,
occupancy (a model), the matrix instruction. --check compares with the committed kernels/compiler/budgets.json, prints
what changed and exits with 1 if a budget is broken. --write puts every row there as it comes: after Ctrl-C
--only-missing goes on where it stopped, and it compiles anew what has changed since. Exit code 2 if a kernel does not
compile.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ARCHITECTURES = "sm_80,sm_90,sm_100,sm_120"
_LOG_EVERY_S = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--arch", default=ARCHITECTURES, help=f"chips, separated by commas (default {ARCHITECTURES})")
    parser.add_argument("--op", help="only these ops, separated by commas")
    parser.add_argument("--dtype", help="only these dtypes, separated by commas: bf16, fp16, fp32")
    parser.add_argument("--head-dim", help="only these widths, separated by commas")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--check", action="store_true", help="compare with the committed table; 1 if over budget")
    parser.add_argument("--write", action="store_true", help="put the rows into the committed table as they come")
    parser.add_argument(
        "--only-missing", action="store_true", help="only what the table lacks or has of another source or Triton"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="instead of the committed table")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that compile, 0.5 GB each")


def run(arguments: argparse.Namespace) -> int:
    """Compile, print and compare."""
    from triweave.kernels.compiler import budgets
    from triweave.kernels.compiler.occupancy import CHIPS
    from triweave.kernels.errors import KernelInputError, KernelUnavailableError

    for arch in _names(arguments.arch):
        if arch not in CHIPS:
            raise KernelInputError(f"kernels compile: there is no arch {arch!r}; known are {', '.join(CHIPS)}")
    try:
        from triweave.kernels.compiler.shipped_triton import variants
    except ImportError as error:
        raise KernelUnavailableError(
            f"kernels compile needs Triton ({error}); install triton, which has wheels for Linux only"
        ) from error
    if arguments.jobs < 1:
        raise KernelInputError(f"kernels compile: --jobs is {arguments.jobs}; give 1 or more")
    arguments.table = arguments.table or budgets.TABLE
    before = budgets.load(arguments.table)
    ops = _names(arguments.op)
    wanted = _wanted(arguments, {arch: variants(ops, arch=arch) for arch in _names(arguments.arch)})
    rows, failures = _compile(wanted, arguments)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    elif rows:
        _show(rows)
    return max(2 if failures else 0, _check(rows, before) if arguments.check else 0)


def _wanted(arguments: argparse.Namespace, variants_of: Mapping[str, list[Any]]) -> list[tuple[Any, str]]:
    """Return which (variant, arch) are to be compiled, of those that ship for each arch."""
    from importlib.metadata import version

    from triweave.kernels.compiler import budgets
    from triweave.kernels.errors import KernelInputError

    dtypes, widths = _names(arguments.dtype), _names(arguments.head_dim)
    wanted = {
        variant.name(arch): (variant, arch)
        for arch, variants in variants_of.items()
        for variant in variants
        if (not dtypes or variant.dtype in dtypes) and (not widths or str(variant.head_dim) in widths)
    }
    if not wanted:
        raise KernelInputError("kernels compile: no shipped variant has such a dtype and width; leave one of them out")
    if not arguments.only_missing:
        return list(wanted.values())
    same_triton = budgets.version(arguments.table) == version("triton")
    table = budgets.load(arguments.table) if same_triton else {}
    sources = {name: variant.source for name, (variant, _) in wanted.items()}
    return [wanted[name] for name in budgets.missing(sources, table)]


def _compile(wanted: list[tuple[Any, str]], arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Return the rows in the order of `wanted`, and how many do not compile; each of those is said on stderr."""
    from importlib.metadata import version

    from triweave.kernels.compiler import budgets
    from triweave.kernels.compiler.compile_jobs import compile_all
    from triweave.kernels.compiler.occupancy import CHIPS
    from triweave.kernels.compiler.shipped_triton import variants

    variant_of = {variant.name(arch): variant for variant, arch in wanted}
    if arguments.write:
        made_by = budgets.version(arguments.table)
        if made_by not in (None, version("triton")):
            print(f"the rows of Triton {made_by} go, here is {version('triton')}", file=sys.stderr)
        shipped = {variant.name(arch) for arch in CHIPS for variant in variants(arch=arch)}
        budgets.write([], triton=version("triton"), shipped=shipped, path=arguments.table)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    failures = 0
    try:
        with contextlib.closing(compile_all(wanted, arguments.jobs)) as outcomes:
            for outcome in _with_progress(outcomes, len(wanted)):
                if isinstance(outcome, Exception):
                    failures += 1
                    print(outcome, file=sys.stderr)
                    continue
                row = dataclasses.asdict(outcome)
                name = budgets.key(row)
                rows[name] = row
                if arguments.write:
                    made = row | {"source": variant_of[name].source}
                    budgets.write([made], triton=version("triton"), path=arguments.table)
    except KeyboardInterrupt:
        kept = "in the table; --only-missing goes on from there" if arguments.write else "lost; --write keeps them"
        print(f"{len(rows)} of {len(wanted)} rows are {kept}", file=sys.stderr)
        raise
    return [rows[name] for name in variant_of if name in rows], failures


def _with_progress(outcomes: Iterator[Any], total: int) -> Iterator[Any]:
    """Yield `outcomes` and say on stderr how many there are and when all will be; into a log, a line a minute."""
    from rich.console import Console

    console = Console(stderr=True)
    started = said = time.monotonic()
    with console.status("compiling") as status:
        for number, outcome in enumerate(outcomes, start=1):
            yield outcome
            now = time.monotonic()
            left_s = (now - started) / number * (total - number)
            text = f"{number} of {total} compiled, about {left_s / 60:.0f} min left"
            status.update(text)
            if not console.is_terminal and now - said > _LOG_EVERY_S:
                print(text, file=sys.stderr, flush=True)
                said = now


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


def _check(rows: list[dict[str, Any]], before: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> int:
    """Print what changed against the table as it was, on stderr, and return the exit code."""
    from triweave.kernels.compiler import budgets

    found = budgets.changes(rows, before)
    for change in found:
        print(change, file=sys.stderr)
    broken = sum(change.broken for change in found)
    print(f"{len(rows)} rows, {len(found)} changes, {broken} over budget", file=sys.stderr)
    return 1 if broken else 0
