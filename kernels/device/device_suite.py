"""What `make test-gpu` runs on a machine with a CUDA device: numeric checks, the self-check and the benchmark.

    python -m triweave.kernels.device.device_suite [--minutes 9] [--results FOLDER]

It needs torch, triton and numpy. What does not fit into the minutes is left out and said to be. The result goes to
kernels/results/<chip>.json: the machine and its versions, `checks`, `selftest` and the benchmark's `rows`, whose form
is that of `triweave bench kernels --json`. Exit code 1 if a check fails or the self-check refuses a kernel.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from triweave.kernels.admission import admission
from triweave.kernels.backends import IMPLEMENTATIONS
from triweave.kernels.bench.cases import Sizes, build
from triweave.kernels.bench.limits import measure_limits
from triweave.kernels.bench.masks import bench_mask
from triweave.kernels.bench.rows import BenchRow, Options, bench_case
from triweave.kernels.device import device_checks
from triweave.kernels.roofline.chips import chip_of_device

RESULTS = Path(__file__).parents[1] / "results"
MINUTES = 9.0
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SELF_CHECKED_WIDTHS = (64, 128, 4096)
"""Head widths and row lengths whose shape classes are self-checked."""
COMPARED = ("sdpa", "flex", "flash", "liger", "torch")
REPEATS, WARMUP = 20, 3
LEFT_OUT = "left out: the time is up"
CHECKS_SHARE = 0.6
"""Share of the time after which no check and no self-check begins, so that the benchmark has some."""
FAR_OFFSETS_BYTES = 16 << 30
"""Free memory that the check of far offsets asks for."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run of the suite does; a test makes a smaller one."""

    device: torch.device
    impl: str = "triton"
    dtypes: Sequence[torch.dtype] = DTYPES
    rows: int = device_checks.ROWS
    shapes: Sequence[tuple[str, Sizes, bool]] = ()
    """Op, sizes and whether errors against fp64 are taken too."""
    repeats: int = REPEATS
    seconds: float = 60 * MINUTES
    start_s: float = field(default_factory=time.monotonic)
    """On time.monotonic's clock."""

    def time_is_up(self, share: float = 1.0) -> bool:
        """Return whether that share of the seconds is over; what has not begun then is left out."""
        return time.monotonic() - self.start_s >= share * self.seconds


def bench_shapes(device: torch.device) -> list[tuple[str, Sizes, bool]]:
    """Return what is measured, the most telling first: bf16, H=16, K=128, D=2048."""
    masks = [
        bench_mask("causal", 8192),
        bench_mask("interleaved", 8192, documents=0, span_percent=25),
        bench_mask("documents", 8192, documents=0),
        bench_mask("documents", 32768, documents=0),
    ]
    sizes = [
        Sizes(mask=mask, heads=16, key_heads=16, width=128, vocabulary=65536, dtype=torch.bfloat16, device=device)
        for mask in masks
    ]
    others = ("rms_norm", "swiglu", "qk_norm_rope", "cross_attention", "mmca", "low_rank_fusion")
    return [
        *(("attention", one, one.tokens <= 8192) for one in sizes),
        *((op, sizes[1], op != "low_rank_fusion") for op in others),
        ("linear_cross_entropy", sizes[1], False),
    ]


def run_checks(plan: Plan, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yield a row for every numeric check.

    worst: the largest share of what is allowed, None where nothing is: numbers that are not finite, or other bits.
    """
    for dtype in plan.dtypes:
        widths = device_checks.HEAD_WIDTHS if dtype == plan.dtypes[0] else ()
        checks = list(device_checks.attention_checks(dtype, plan.device, plan.impl, rows=plan.rows, widths=widths))
        if dtype == torch.bfloat16 and _free_bytes(plan.device) >= FAR_OFFSETS_BYTES:
            checks.append(device_checks.far_offsets_check(plan.device, plan.impl))
        for check in checks:
            row = {"op": "attention", "check": check.name, "dtype": _name(dtype), "worst": None, "seconds": 0.0}
            if plan.time_is_up(CHECKS_SHARE):
                yield {**row, "status": LEFT_OUT}
                continue
            start = time.monotonic()
            try:
                worst = check.worst()
                finite = worst if math.isfinite(worst) else None
                row |= {"worst": finite, "status": "passed" if worst <= 1 else "failed"}
            except Exception as error:  # a kernel that does not compile or run is a finding, the suite goes on
                row |= {"status": f"failed: {type(error).__name__}: {_one_line(error)}"}
            yield {**row, "seconds": round(time.monotonic() - start, 2)}
            say(f"{check.name}, {_name(dtype)}: {row['status']}")


def run_selftest(plan: Plan, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yield a row for every self-check, whose verdict is remembered for `auto`."""
    for op in (op for op, names in IMPLEMENTATIONS.items() if "triton" in names):
        limits = admission.LIMITS.get(op, (0,))
        for limit in [limit for limit in limits if limit == 0 or limit in SELF_CHECKED_WIDTHS]:
            for dtype in plan.dtypes:
                row = {"op": op, "dtype": _name(dtype), "width": limit or None}
                if plan.time_is_up(CHECKS_SHARE):
                    yield {**row, "status": LEFT_OUT}
                    continue
                subject = admission.current_subject(op, dtype, limit, device_type=plan.device.type)
                verdict = admission.verdict_of(subject, plan.device.type, fresh=True)
                status = "admitted" if verdict.admitted else f"refused: {verdict.failure}"
                yield {**row, "status": status, "seconds": round(verdict.seconds, 2)}
                say(f"self-check of {op}, {row['dtype']}, {limit}: {status}")


def run_bench(plan: Plan, say: Callable[[str], None]) -> Iterator[BenchRow]:
    """Yield the benchmark's rows; a shape for which no time is left, or whose kernel fails, is one row that says so."""
    if not plan.shapes:
        return
    limits = measure_limits(plan.shapes[0][1].dtype, plan.device)
    name = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else "cpu"
    for op, sizes, with_error in plan.shapes:
        row = BenchRow(
            op=op,
            impl="triweave:auto",
            direction="fwd",
            mask=sizes.mask.kind,
            shape=f"S{sizes.tokens}",
            dtype=_name(sizes.dtype),
            device=name,
        )
        if plan.time_is_up():
            yield replace(row, status=LEFT_OUT)
            continue
        impls = [impl for impl in (plan.impl, "auto") if impl == "auto" or impl in IMPLEMENTATIONS[op]]
        try:
            case = build(op, sizes)
            compare = [peer for peer in COMPARED if peer in case.peers]
            options = Options(impls=impls, compare=compare, repeats=plan.repeats, warmup=WARMUP, with_error=with_error)
            yield from bench_case(case, limits, options, device_name=name, progress=say)
        except Exception as error:  # a finding about one op; the others are still measured
            yield replace(row, status=f"failed: {type(error).__name__}: {_one_line(error)}")


def run(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the whole plan and return what goes into the file; the benchmark comes last."""
    start = time.monotonic()
    checks = list(run_checks(plan, say))
    selftest = list(run_selftest(plan, say)) if plan.device.type == "cuda" else []
    rows = [asdict(row) for row in run_bench(plan, say)]
    return {
        "machine": machine(plan.device),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - start),
        "checks": checks,
        "selftest": selftest,
        "rows": rows,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Return chip and versions."""
    versions = {name: _version(name) for name in ("triton", "flash-attn", "liger-kernel")}
    about = {"python": platform.python_version(), "system": platform.platform(), "torch": torch.__version__, **versions}
    if device.type != "cuda":
        return {"device": device.type, **about}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        **about,
    }


def failures(result: dict[str, Any]) -> list[str]:
    """Return a line for each failed check, refused kernel and benchmark that broke off."""
    failed = [
        f"{row['op']}, {row['check']}, {row['dtype']}: {row['status']}, {row['worst']} of what is allowed"
        for row in result["checks"]
        if row["status"].startswith("failed")
    ]
    refused = [
        f"{row['op']}, {row['dtype']}, {row['width']}: {row['status']}"
        for row in result["selftest"]
        if row["status"].startswith("refused")
    ]
    broken = [f"{row['op']}: {row['status']}" for row in result["rows"] if row["status"].startswith("failed")]
    return failed + refused + broken


def result_file(device_name: str, folder: Path) -> Path:
    """Return <chip>.json: the chip's name in chips.py, else the device's in small letters."""
    return folder / f"{chip_of_device(device_name) or re.sub(r'[^a-z0-9]+', '_', device_name.lower()).strip('_')}.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite on the current CUDA device and write its file."""
    parser = argparse.ArgumentParser(
        prog="python -m triweave.kernels.device.device_suite",
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"what begins later is left out ({MINUTES:g})")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result (default kernels/results)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("device_suite: torch finds no CUDA device here; run it on a machine with one", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    plan = Plan(device=device, shapes=bench_shapes(device), seconds=60 * arguments.minutes)
    result = run(plan, lambda line: print(line, file=sys.stderr, flush=True))
    path = result_file(torch.cuda.get_device_name(device), arguments.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    failed = failures(result)
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    counted = f"{len(result['checks'])} checks, {len(result['selftest'])} self-checks, {len(result['rows'])} rows"
    print(f"wrote {path}: {counted}, {len(failed)} failed, {result['seconds']} s")
    return 1 if failed else 0


def _free_bytes(device: torch.device) -> int:
    """Return the device's free memory; 0 for one that is none of CUDA's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
