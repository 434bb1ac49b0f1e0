"""The rows of the benchmark: contenders take turns, medians count, and what cannot run is a row that says why."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triweave.kernels.bench import measure
from triweave.kernels.bench.cases import Call, Case
from triweave.kernels.bench.limits import Limits
from triweave.kernels.bench.peers import NOTHING_COMPARABLE
from triweave.kernels.errors import KernelInputError, KernelUnavailableError
from triweave.kernels.roofline.work import Work

DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
MEASURED = "measured"
NOT_FINITE = "its results are not finite where those in fp64 are"
OURS = "triweave:"
"""What our implementations' names begin with, for a peer may have the same name."""
FIGURES = 4
"""Significant digits of a figure in a row."""


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One contender in one direction on one shape; figures are None where nothing was measured.

    ms: median wall time, of a CUDA device its own. tflops: FLOPs of the exact mask area over ms, 2 products forward and
    5 backward; 0 for an op without products. percent_of_limit: the least time of that work over ms, where limit_kind
    says what limits it. peak_bytes: held at most beyond what was there before. error_vs_fp64: largest error over the
    largest exact number, of the worst tensor. status: "measured", "compiled ..." or "unsupported: " and the reason.
    cpu_ms: the same median in processor time, which does not count waiting; on a CUDA device what the host spent.
    gb_per_s: least bytes over ms. compiled: of a kernel that was not executed, what it costs.
    """

    op: str
    impl: str
    direction: str
    shape: str
    dtype: str
    device: str
    ms: float | None = None
    tflops: float | None = None
    percent_of_limit: float | None = None
    limit_kind: str | None = None
    peak_bytes: int | None = None
    error_vs_fp64: float | None = None
    status: str = MEASURED
    mask: str | None = None
    cpu_ms: float | None = None
    gb_per_s: float | None = None
    compiled: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a case is measured."""

    directions: Sequence[str] = ("fwd", "bwd")
    compare: Sequence[str] = ()
    """Peers, names of peers.NAMES."""
    impls: Sequence[str] = ("auto",)
    repeats: int = 5
    warmup: int = 1
    """Rounds before those that count, beside the one that finds out who can run."""
    with_error: bool = True


class _Contender:
    """One call under its name, what it can not do and why, and its repeats."""

    def __init__(self, name: str, call: Call) -> None:
        self.name, self.call = name, call
        self.refusals: dict[str, str] = {}
        self.grads: list[Tensor] = []
        self.errors: dict[str, float] = {}
        self.seconds = measure.Seconds()

    def runs(self, directions: Sequence[str]) -> list[str]:
        """Return the directions that it can do."""
        return [direction for direction in directions if direction not in self.refusals]


def bench_case(
    case: Case, limits: Limits, options: Options, *, device_name: str, progress: Callable[[str], None] = lambda _: None
) -> list[BenchRow]:
    """Return a row for every contender and direction of the case.

    The contenders take turns within each repeat, so that a busy machine slows all of them. Raises KernelInputError for
    an unknown peer.
    """
    for name in options.compare:
        if name not in NOTHING_COMPARABLE:
            known = ", ".join(NOTHING_COMPARABLE)
            raise KernelInputError(f"bench kernels: there is no peer {name!r}; known are {known}")
    directions = _timed(case, options.directions)
    serving = dict.fromkeys(_serving(case, impl) for impl in options.impls)
    contenders = [_Contender(OURS + impl, case.ours(impl)) for impl in serving]
    contenders += [_Contender(name, case.peers[name]) for name in options.compare if name in case.peers]
    exact: list[measure.Results] = []
    intact = [x.detach().clone() for x in case.inputs]
    for contender in contenders:
        progress(f"{case.op}, {case.shape}: checking {contender.name}")
        _check(case, contender, directions, exact, with_error=options.with_error)
        _put_back(case, intact)
    for repeat in range(-options.warmup, options.repeats):
        progress(f"{case.op}, {case.shape}: repeat {max(repeat, 0) + 1} of {options.repeats}")
        for contender in contenders:
            once = measure.time_once(contender.call, case.inputs, contender.grads, contender.runs(directions))
            _put_back(case, intact)
            if repeat >= 0:
                contender.seconds.extend(once)
    return [
        _row(case, contender, direction, limits, device_name, intact)
        for contender in contenders
        for direction in directions
    ] + [
        replace(_blank(case, name, direction, device_name), status=f"unsupported: {NOTHING_COMPARABLE[name]}")
        for name in options.compare
        if name not in case.peers
        for direction in directions
    ]


def _put_back(case: Case, intact: Sequence[Tensor]) -> None:
    """Give the case its inputs again, for Liger-Kernel's SwiGLU overwrites them in its backward."""
    with torch.no_grad():
        for x, kept in zip(case.inputs, intact, strict=True):
            if not torch.equal(x, kept):
                x.copy_(kept)


def _blank(case: Case, name: str, direction: str, device_name: str) -> BenchRow:
    """Return the row of a contender before anything is measured."""
    return BenchRow(
        op=case.op,
        impl=name,
        direction=direction,
        mask=case.mask,
        shape=case.shape,
        dtype=str(case.dtype).removeprefix("torch."),
        device=device_name,
    )


def _row(
    case: Case, contender: _Contender, direction: str, limits: Limits, device_name: str, intact: Sequence[Tensor]
) -> BenchRow:
    blank = _blank(case, contender.name, direction, device_name)
    if direction in contender.refusals:
        return replace(blank, status=f"unsupported: {contender.refusals[direction]}")
    return replace(
        blank,
        **_figures(case, direction, contender.seconds, limits),
        peak_bytes=_peak(case, contender, direction, intact),
        error_vs_fp64=contender.errors.get(direction),
    )


def _serving(case: Case, impl: str) -> str:
    """Return the name that `impl` is shown under: what auto chose, else itself."""
    if impl != "auto":
        return impl
    from triweave.kernels.backends import choose

    return choose(case.op, impl, case.inputs[0].device.type, case.dtype, case.inputs[0].shape[-1])


def _timed(case: Case, directions: Sequence[str]) -> list[str]:
    """Return the directions that are timed: where the forward makes the gradients, both together for the backward."""
    if not case.gradients_in_forward:
        return list(directions)
    return list(dict.fromkeys("fwd" if direction == "fwd" else "fwd+bwd" for direction in directions))


def _check(
    case: Case, contender: _Contender, directions: Sequence[str], exact: list[measure.Results], *, with_error: bool
) -> None:
    """Run a contender once, forward and then backward; keep its errors, or why it cannot.

    exact: the fp64 results once they are known. A mistake of ours other than a refusal is raised.
    """
    for part, does in (("fwd", measure.forward_results), ("bwd", measure.results)):
        concerned = [direction for direction in directions if (direction == "fwd") == (part == "fwd")]
        if not concerned:
            continue
        try:
            if not contender.grads:
                with torch.no_grad():
                    contender.grads = measure.grads_for(measure.outputs(contender.call, case.inputs))
            found = does(contender.call, case, *([contender.grads] if part == "bwd" else []))
        except (KernelUnavailableError, torch.OutOfMemoryError) as error:
            contender.refusals |= dict.fromkeys(concerned, _one_line(error))
            continue
        except Exception as error:
            if contender.name.startswith(OURS):
                raise
            contender.refusals |= dict.fromkeys(concerned, f"{type(error).__name__}: {_one_line(error)}")
            continue
        if with_error:
            exact[:] = exact or [measure.exact_results(case, contender.grads)]
            errors = {direction: found.error(exact[0], direction) for direction in concerned}
            contender.errors |= errors
            contender.refusals |= {name: NOT_FINITE for name, error in errors.items() if not math.isfinite(error)}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def work_of(case: Case, direction: str) -> Work:
    """Return the least work of a direction."""
    if direction != "fwd+bwd" or case.gradients_in_forward:
        return case.work(direction)
    both = [case.work(part) for part in ("fwd", "bwd")]
    return Work(
        matrix_flops=sum(work.matrix_flops for work in both),
        moved_bytes=sum(work.moved_bytes for work in both),
        exponentials=sum(work.exponentials for work in both),
    )


def _figures(case: Case, direction: str, seconds: measure.Seconds, limits: Limits) -> dict[str, Any]:
    ms = statistics.median(seconds.wall[direction]) * 1e3
    work = work_of(case, direction)
    limit_ms, kind = limits.of(work)
    return {
        "ms": _rounded(ms),
        "tflops": _rounded(work.matrix_flops / ms / 1e9),
        "percent_of_limit": _rounded(100 * limit_ms / ms),
        "limit_kind": kind,
        "cpu_ms": _rounded(statistics.median(seconds.processor[direction]) * 1e3),
        "gb_per_s": _rounded(work.moved_bytes / ms / 1e6),
    }


def _peak(case: Case, contender: _Contender, direction: str, intact: Sequence[Tensor]) -> int | None:
    """Return the peak of a direction; that of the backward counts what the forward keeps for it."""

    def forward() -> None:
        with torch.no_grad():
            contender.call(*case.inputs)

    def both() -> None:
        torch.autograd.grad(measure.outputs(contender.call, case.inputs), case.inputs, contender.grads)

    peak = measure.peak_bytes(forward if direction == "fwd" else both, case.inputs[0].device)
    _put_back(case, intact)
    return peak


def _rounded(number: float) -> float:
    return float(f"{number:.{FIGURES}g}")


def write_csv(rows: Iterable[BenchRow], path: Path) -> None:
    """Write a line a row; compiled costs as `name=value` parts. Raises KernelInputError."""
    names = [field.name for field in fields(BenchRow)]
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for row in rows:
                cells = asdict(row)
                cells["compiled"] = " ".join(f"{name}={value}" for name, value in (row.compiled or {}).items())
                writer.writerow(cells)
    except OSError as error:
        raise KernelInputError(f"--csv {path}: {error.strerror}; choose a file that can be written") from error
