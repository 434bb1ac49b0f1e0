"""Each kernel runs forward and backward on small inputs on this machine's device and is compared with fp64.

examples:
  triweave kernels selftest
  triweave kernels selftest --op attention,swiglu --dtype bf16 --width 64,128 --json
  TRITON_INTERPRET=1 triweave kernels selftest --op swiglu     without a GPU: in Triton's interpreter, slow

One row per op, dtype and width. On a CUDA device the verdicts are remembered below TRIWEAVE_CACHE (else XDG_CACHE_HOME,
else ~/.cache), where impl="auto" looks them up: it would otherwise make each check at the kernel's first use. Exit code
1 if a kernel is refused; auto goes on without it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
USUAL_WIDTHS = (64, 128, 4096)
"""Head widths and row lengths that are checked unless others are named."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    usual = ",".join(map(str, USUAL_WIDTHS))
    parser.add_argument("--op", help="only these ops, separated by commas")
    parser.add_argument("--dtype", help=f"only these dtypes, separated by commas: {', '.join(DTYPES)}")
    parser.add_argument("--width", help=f"head widths and row lengths, separated by commas, or all (default {usual})")
    parser.add_argument("--only-missing", action="store_true", help="check only what no verdict is remembered for")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Check, print and remember."""
    from rich.console import Console

    device_type = _device_type()
    rows = []
    with Console(stderr=True).status("starting") as status:
        for op, dtype, shape_class in _wanted(arguments, device_type):
            status.update(f"{op} {dtype} {shape_class or ''}")
            rows.append(_row(op, dtype, shape_class, device_type, only_missing=arguments.only_missing))
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        _show(rows)
    return int(any(row["status"] == "refused" for row in rows))


def _device_type() -> str:
    import torch

    from triweave.kernels.backends import INTERPRET_VARIABLE, interpreted
    from triweave.kernels.errors import KernelUnavailableError

    if torch.cuda.is_available():
        return "cuda"
    if interpreted():
        return "cpu"
    raise KernelUnavailableError(
        f"kernels selftest: there is no CUDA device here; run it on a machine with one, or set {INTERPRET_VARIABLE}=1 "
        "to check the kernels' arithmetic in Triton's interpreter"
    )


def _wanted(arguments: argparse.Namespace, device_type: str) -> Iterator[tuple[str, str, int]]:
    """Yield op, dtype and shape class of every check. Raises KernelInputError for names that there are not."""
    from triweave.kernels.backends import IMPLEMENTATIONS
    from triweave.kernels.errors import KernelInputError

    ops = [op for op, implementations in IMPLEMENTATIONS.items() if "triton" in implementations]
    # the interpreter of Triton 3.9 multiplies bf16 numbers wrongly
    dtypes = [name for name in DTYPES if device_type == "cuda" or name != "bf16"]
    chosen: dict[str, list[str]] = {}
    for what, argument, known in (("op", arguments.op, ops), ("dtype", arguments.dtype, dtypes)):
        chosen[what] = _names(argument) or known
        unknown = [name for name in chosen[what] if name not in known]
        if unknown:
            raise KernelInputError(
                f"kernels selftest: there is no {what} {unknown[0]!r} to check here; there are {', '.join(known)}"
            )
    for op in chosen["op"]:
        for dtype in chosen["dtype"]:
            for shape_class in _shape_classes(op, arguments.width):
                yield op, dtype, shape_class


def _shape_classes(op: str, argument: str | None) -> list[int]:
    """Return the shape classes of an op that stand for the widths asked for; for the usual ones that it has."""
    from triweave.kernels.admission import admission
    from triweave.kernels.errors import KernelInputError

    every = admission.shape_classes(op)
    if argument == "all" or every == (admission.ANY_WIDTH,):
        return list(every)
    if argument is None:
        return [width for width in USUAL_WIDTHS if width in every]
    if not all(name.isdecimal() for name in _names(argument)):
        raise KernelInputError(f"kernels selftest: --width {argument!r} must be numbers separated by commas, or all")
    asked = {admission.shape_class(op, int(name)) for name in _names(argument)}
    return [width for width in every if width in asked]


def _row(op: str, dtype: str, shape_class: int, device_type: str, *, only_missing: bool) -> dict[str, Any]:
    import torch

    from triweave.kernels.admission import admission

    subject = admission.current_subject(op, getattr(torch, DTYPES[dtype]), shape_class, device_type=device_type)
    verdict = admission.verdict_of(subject, device_type, fresh=not only_missing)
    worst = max(verdict.figures, key=lambda figure: figure.share_of_allowed, default=None)
    share = math.inf if worst is None else worst.share_of_allowed
    return {
        "op": op,
        "dtype": dtype,
        "width": shape_class or None,
        "chip": subject.chip,
        "status": "admitted" if verdict.admitted else "refused",
        "worst_share_of_allowed": share if math.isfinite(share) else None,
        "worst": None if worst is None else f"{worst.tensor} of {worst.case}",
        "seconds": verdict.seconds,
        "failure": verdict.failure,
    }


def _names(argument: str | None) -> list[str]:
    return [name.strip() for name in (argument or "").split(",") if name.strip()]


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="errors are shares of what is allowed; 1 is the limit")
    shown = [name for name in rows[0] if name != "failure"]
    for name in shown:
        number = name in ("width", "worst_share_of_allowed", "seconds")
        table.add_column(name.replace("_", " "), justify="right" if number else "left")
    for row in rows:
        cells = (row[name] for name in shown)
        table.add_row(*("" if x is None else f"{x:.2f}" if isinstance(x, float) else str(x) for x in cells))
    console = Console(width=max(140, Console().width))
    console.print(table)
    for row in rows:
        if row["failure"]:
            console.print(f"{row['op']} {row['dtype']}: {row['failure']}", markup=False, highlight=False)
