"""Time configs of the Triton kernels on this machine's GPU, for the tuner's search (tune.py).

A kernel is timed as its launcher runs it, on the reference distribution of documents, with the candidate pinned for the
moment (`pinned.trying`). A candidate whose results differ from the pinned config's by more than rounding is refused:
a config changes speed only. dq and dkv run in one launcher; each is timed with the other as it is pinned.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triweave.kernels.attention_tiles import tile_lists
from triweave.kernels.backends import triton_kernels
from triweave.kernels.roofline.tile_figures import mask_intervals
from triweave.kernels.tuning import pinned, tune
from triweave.kernels.tuning.pinned import Cell, Config
from triweave.kernels.tuning.tune import CandidateError, Choice

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLUSHED_BYTES = 256 << 20
"""What is overwritten between runs, so that each finds the caches without its inputs."""
WARM_RUNS = 2
HEAD_START_CYCLES_PER_RUN = 2_000_000
"""Clock cycles, about a ms, that the device waits for each run: the host has launched all of them by then."""

Run = Callable[[], tuple[Tensor, ...]]
"""One run of a kernel; returns its results."""
Clock = Callable[[Run, int], list[float]]
"""(run, times) -> ms of each."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The shape that is timed."""

    sequence_length: int = 8192
    batch: int = 1
    heads: int = 16
    key_heads: int = 4
    rows: int = 16384
    """Rows of the memory-bound kernels."""


def cuda_clock(device: torch.device) -> Clock:
    """Return a clock of CUDA events, caches flushed before every run."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def clock(run: Run, times: int) -> list[float]:
        for _ in range(WARM_RUNS):
            run()
        torch.cuda._sleep(times * HEAD_START_CYCLES_PER_RUN)  # torch has no public name for it
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
        for start, end in events:
            flushed.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) for start, end in events]

    return clock


def config_timer(cell: Cell, prepare: Callable[[], Run], clock: Clock) -> tune.Timer:
    """Return the timer of one cell; `prepare` makes the run under the config that counts then."""
    expected = prepare()()

    def timer(config: Config, runs: int) -> Sequence[float]:
        with pinned.trying(cell, config):
            try:
                run = prepare()
                results = run()
            except (RuntimeError, ValueError, AssertionError) as error:  # what compiling, or a tile too large, raises
                raise CandidateError(" ".join(str(error).split())[:200]) from error
            except Exception as error:
                if type(error).__module__.partition(".")[0] != "triton":
                    raise
                raise CandidateError(" ".join(str(error).split())[:200]) from error
            if not all(_near(one, other) for one, other in zip(results, expected, strict=True)):
                raise CandidateError("its results are wrong")
            return clock(run, runs)

    return timer


def _near(one: Tensor, other: Tensor) -> bool:
    """Return whether two results differ by rounding only."""
    tolerance = 1e-4 if one.dtype == torch.float32 else 2e-2
    difference, scale = (one.float() - other.float()).norm(), other.float().norm()
    return bool(difference <= tolerance * scale)


# Runs


def attention_runs(
    kernel: str, dtype: torch.dtype, width: int, device: torch.device, sizes: Sizes
) -> Callable[[], Run]:
    """Return what prepares a run of `forward`, or of dq and dkv together, with the tile lists of the config."""
    lo, hi = mask_intervals("interleaved", sizes.batch, sizes.sequence_length)
    generator = torch.Generator(device).manual_seed(0)
    rows = (sizes.batch, sizes.sequence_length)

    def normal(heads: int) -> Tensor:
        return torch.randn(*rows, heads, width, dtype=dtype, device=device, generator=generator)

    q, grad, k, v = normal(sizes.heads), normal(sizes.heads), normal(sizes.key_heads), normal(sizes.key_heads)
    kv_lo, kv_hi = (torch.from_numpy(x.copy()).to(device) for x in (lo, hi))
    scale = width**-0.5
    kernels = triton_kernels("attention")
    forward = kernels.attention_forward(q, k, v, kv_lo, kv_hi, None, scale)

    def prepare() -> Run:
        made = tile_lists(lo, hi, keys=sizes.sequence_length, width=width, number_bytes=dtype.itemsize)
        lists = torch.from_numpy(made).to(device)
        if kernel == "forward":
            return lambda: kernels.attention_forward(q, k, v, kv_lo, kv_hi, lists, scale)[:1]
        return lambda: kernels.attention_backward(grad, q, k, v, *forward, kv_lo, kv_hi, lists, scale)

    return prepare


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """One cell after the search."""

    cell: Cell
    dtype: str
    choice: Choice


def tune_attention(
    dtypes: Sequence[str],
    widths: Sequence[int],
    device: torch.device,
    clock: Clock,
    *,
    sizes: Sizes | None = None,
    candidates: Callable[[str, int, int], Sequence[Config]] = tune.attention_candidates,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Tuned]:
    """Yield the choice of every cell that the dtypes and widths need."""
    pinned.use_device(device)
    for dtype, (kernel, number_bytes, widest) in _cells(dtypes, widths):
        prepare = attention_runs(kernel, DTYPES[dtype], widest, device, sizes or Sizes())
        cell: Cell = ("attention", kernel, number_bytes, widest)
        choice = tune.search(
            candidates(kernel, number_bytes, widest),
            config_timer(cell, prepare, clock),
            pinned=tune.pinned_attention(kernel, number_bytes, widest),
            progress=functools.partial(_report, progress, f"{kernel} {dtype} {widest}"),
        )
        yield Tuned(cell=cell, dtype=dtype, choice=choice)


def compile_ahead(dtypes: Sequence[str], widths: Sequence[int], device: torch.device, jobs: int) -> None:
    """Run every candidate once in `jobs` processes, which fills Triton's cache: compiling takes most of a search."""
    wanted = [
        (dtype, cell, config) for dtype, cell in _cells(dtypes, widths) for config in tune.attention_candidates(*cell)
    ]
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=_compile, args=(wanted[job::jobs], str(device))) for job in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _compile(wanted: Sequence[tuple[str, tuple[str, int, int], Config]], device_name: str) -> None:
    device = torch.device(device_name)
    pinned.use_device(device)
    for dtype, (kernel, number_bytes, widest), config in wanted:
        timer = config_timer(
            ("attention", kernel, number_bytes, widest),
            attention_runs(kernel, DTYPES[dtype], widest, device, Sizes()),
            lambda *_: [],
        )
        with contextlib.suppress(CandidateError):
            timer(config, 1)


def _cells(dtypes: Sequence[str], widths: Sequence[int]) -> Iterator[tuple[str, tuple[str, int, int]]]:
    """Yield (dtype, cell); bf16 and fp16 share their cells, and the first that is named is timed."""
    of_size = {DTYPES[name].itemsize: name for name in reversed(dtypes)}
    for size, dtype in of_size.items():
        for cell in tune.attention_cells([size], widths):
            yield dtype, cell


def _report(progress: Callable[[str], None], name: str, text: str) -> None:
    progress(f"{name}: {text}")


def row(tuned: Tuned) -> dict[str, object]:
    """Return the table's row of one choice."""
    op, kernel, number_bytes, width = tuned.cell
    before = tuned.choice.pinned_ms
    return {
        "op": op,
        "kernel": kernel,
        "number_bytes": number_bytes,
        "width": width,
        "config": dict(tuned.choice.config),
        "ms": round(tuned.choice.ms, 4),
        "ms_before": None if before is None else round(before, 4),
    }
