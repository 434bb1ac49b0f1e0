"""Choose the tiles of the attention kernels by measuring on the GPU of this machine, and pin them for its architecture.

examples:
  triweave kernels tune
  triweave kernels tune --jobs 16
  triweave kernels tune --dtype bf16 --head-dim 128 --dry-run
  triweave kernels tune --model --chip h100 --kernel dq --head-dim 128

The choice goes to kernels/configs/<architecture>.json, which launchers and loader workers read from then on; commit it.
cross_attention and mmca run with the same tiles. Nothing is ever searched during training. --model needs no GPU: it
compiles the candidates for --chip and ranks them by the roofline model, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--dtype", default="bf16,fp32", help="bf16, fp16, fp32 (default bf16,fp32)")
    parser.add_argument("--head-dim", default="64,128,256", help="widths of a head (default 64,128,256)")
    parser.add_argument("--dry-run", action="store_true", help="measure and print, write nothing")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile ahead of the search (default 1)")
    parser.add_argument("--out", type=Path, help="folder for the table (default kernels/configs)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--model", action="store_true", help="rank candidates by the roofline model instead")
    parser.add_argument("--chip", default="h100", help="with --model: the chip (default h100)")
    parser.add_argument("--kernel", default="forward,dq,dkv", help="with --model: only these kernels")


def run(arguments: argparse.Namespace) -> int:
    """Search, print and pin."""
    return _model(arguments) if arguments.model else _measure(arguments)


def _measure(arguments: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from triweave.kernels.errors import KernelInputError, KernelUnavailableError
    from triweave.kernels.tuning import pinned

    if not torch.cuda.is_available():
        raise KernelUnavailableError(
            "kernels tune measures on a CUDA device and there is none here; run it on a machine with the chip, or add "
            "--model to rank the candidates by the roofline model"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = pinned.architecture_of(device)
    if architecture is None:
        raise KernelUnavailableError("kernels tune: this GPU is not by NVIDIA; the tables are per sm_ architecture")
    from triweave.kernels.tuning.tune_triton import DTYPES, compile_ahead, cuda_clock, row, tune_attention

    dtypes, widths = _names(arguments.dtype), _widths(arguments.head_dim)
    if arguments.jobs < 1:
        raise KernelInputError(f"kernels tune: --jobs is {arguments.jobs}; give 1 or more")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise KernelInputError(f"kernels tune: there is no dtype {dtype!r}; known are {', '.join(DTYPES)}")
    rows: list[dict[str, Any]] = []
    with Console(stderr=True).status("starting") as status:
        if arguments.jobs > 1:
            status.update(f"compiling in {arguments.jobs} processes")
            compile_ahead(dtypes, widths, device, arguments.jobs)
        for tuned in tune_attention(dtypes, widths, device, cuda_clock(device), progress=status.update):
            rows.append(row(tuned))
            if not arguments.json:
                _print_row(rows[-1])
    if arguments.json:
        print(json.dumps(rows, indent=1))
    if not arguments.dry_run:
        from importlib.metadata import version

        made_with = {
            "device": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "triton": version("triton"),
        }
        path = pinned.write(architecture, rows, made_with, arguments.out or pinned.FOLDER)
        print(f"wrote {path}; commit it, it counts for every {architecture}", file=sys.stderr)
    return 0


def _model(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from triweave.kernels.errors import KernelUnavailableError
    from triweave.kernels.roofline.roofline_rows import Case
    from triweave.kernels.tuning.tune import described

    try:
        from triweave.kernels.tuning.tune_model_triton import model_choice
    except ImportError as error:
        raise KernelUnavailableError(
            f"kernels tune --model needs Triton ({error}); install triton, which has wheels for Linux only"
        ) from error
    dtype = _names(arguments.dtype)[0]
    rows: list[dict[str, Any]] = []
    with Console(stderr=True).status("starting") as status:
        for width in _widths(arguments.head_dim):
            case = Case(batch=4, heads=32, key_heads=8, head_dim=width, dtype=dtype)
            for kernel in _names(arguments.kernel):
                choice, made = model_choice(kernel, case, arguments.chip, progress=status.update)
                for timing in choice.timings:
                    compiled = made.get(described(timing.config))
                    rows.append(
                        {
                            "kernel": kernel,
                            "chip": arguments.chip,
                            "dtype": dtype,
                            "head_dim": width,
                            "config": dict(timing.config),
                            "ms": timing.ms,
                            "spill_bytes": compiled.spill_bytes if compiled else None,
                            "registers": compiled.registers if compiled else None,
                            "blocks": compiled.blocks if compiled else None,
                            "chosen": timing.config == choice.config,
                            "why_not": timing.why_not,
                            "status": "model",
                        }
                    )
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(f"a model, none was executed; reference documents, B4 S8192 H32 G8, {arguments.chip}")
    for row in rows:
        figure = row["why_not"] or f"{row['ms']:.3f} ms, {row['spill_bytes']} bytes spilled, {row['blocks']} blocks"
        mark = "*" if row["chosen"] else " "
        print(f"{mark} {row['kernel']:8} {row['dtype']} {row['head_dim']:4} {described(row['config']):52} {figure}")
    return 0


def _print_row(row: dict[str, Any]) -> None:
    from triweave.kernels.tuning.tune import described

    before = "" if row["ms_before"] is None else f" (before {row['ms_before']:.3f} ms)"
    cell = f"{row['kernel']:8} {row['number_bytes']} bytes {row['width']:4}"
    print(f"{cell} {described(row['config']):52} {row['ms']:.3f} ms{before}")


def _widths(text: str) -> list[int]:
    from triweave.kernels.attention_tiles import WIDEST_HEAD
    from triweave.kernels.errors import KernelInputError

    names = _names(text)
    if not names or not all(name.isdigit() and 0 < int(name) <= WIDEST_HEAD for name in names):
        raise KernelInputError(
            f"kernels tune: --head-dim {text!r} is not a list of widths from 1 to {WIDEST_HEAD}, like 64,128"
        )
    return [int(name) for name in names]


def _names(argument: str) -> list[str]:
    return [name.strip() for name in argument.split(",") if name.strip()]
