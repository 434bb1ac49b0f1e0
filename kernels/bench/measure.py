"""Time, peak memory and error of one call, on a CPU or a CUDA device."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from triweave.kernels.bench.cases import SEED, Call, Case

FLUSHED_BYTES = 256 << 20
"""Written before every timed call on a CUDA device, so that nothing of the inputs is left in its cache."""
HEAD_START_CYCLES = 20_000_000
"""Clock cycles, about 12 ms, that the device waits before a timed call: the host has launched its kernels by then, so
that their gaps are the device's own. What the host takes is the processor's time. A call that waits for the device
midway is timed with that wait."""
_RESET_PEAK = "5"
"""What clear_refs takes to forget the peak of resident memory (proc(5))."""
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_MAPPED_BYTES = 64 << 10
_LARGEST_THRESHOLD = 32 << 20
"""Blocks from which on glibc maps by itself: while memory is measured, and the most that it would ever choose."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Repeats of one contender: wall time (on a CUDA device the device's own) and time of the processor."""

    wall: dict[str, list[float]] = field(default_factory=dict)
    processor: dict[str, list[float]] = field(default_factory=dict)

    def add(self, direction: str, wall: float, processor: float) -> None:
        """Keep one more repeat."""
        self.wall.setdefault(direction, []).append(wall)
        self.processor.setdefault(direction, []).append(processor)

    def extend(self, other: Seconds) -> None:
        """Keep all repeats of another."""
        for direction, walls in other.wall.items():
            for wall, processor in zip(walls, other.processor[direction], strict=True):
                self.add(direction, wall, processor)


def time_once(call: Call, inputs: Sequence[Tensor], grads: Sequence[Tensor], directions: Sequence[str]) -> Seconds:
    """Return one repeat of each direction: fwd under no_grad; bwd and fwd+bwd from one forward that keeps its graph."""
    clock = _CudaClock(inputs[0].device) if inputs[0].is_cuda else _Clock()
    seconds = Seconds()
    if "fwd" in directions:
        with torch.no_grad():
            clock.start()
            call(*inputs)
            seconds.add("fwd", *clock.stop())
    if "bwd" in directions or "fwd+bwd" in directions:
        clock.start()
        outs = outputs(call, inputs)
        forward = clock.stop()
        clock.start()
        torch.autograd.grad(outs, inputs, grads)
        backward = clock.stop()
        if "bwd" in directions:
            seconds.add("bwd", *backward)
        if "fwd+bwd" in directions:
            seconds.add("fwd+bwd", *(a + b for a, b in zip(forward, backward, strict=True)))
    return seconds


class _Clock:
    """The processor's clocks."""

    def start(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def stop(self) -> tuple[float, float]:
        return time.perf_counter() - self.wall, time.process_time() - self.processor


class _CudaClock:
    """A device's events, its cache emptied before; processor time is what the host spent."""

    def __init__(self, device: torch.device) -> None:
        self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def start(self) -> None:
        self.flushed.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)  # torch has no public name for it
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.processor = time.process_time()
        self.begin.record()

    def stop(self) -> tuple[float, float]:
        self.end.record()
        processor = time.process_time() - self.processor
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) / 1e3, processor


def outputs(call: Call, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the call's results as a tuple."""
    returned = call(*inputs)
    return returned if isinstance(returned, tuple) else (returned,)


def grads_for(outs: Sequence[Tensor]) -> list[Tensor]:
    """Return incoming gradients, the same for every contender; 1 for a loss."""
    generator = torch.Generator().manual_seed(SEED + 1)
    drawn = (torch.randn(x.shape, generator=generator) if x.dim() else torch.ones(()) for x in outs)
    return [grad.to(x.device, x.dtype) for grad, x in zip(drawn, outs, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Results:
    """Values of one call, on the host in fp64: its results and the gradients of its inputs."""

    outs: list[Tensor]
    gradients: list[Tensor]

    def error(self, exact: Results, direction: str) -> float:
        """Return the largest error over the largest exact number, of the worst tensor that the direction makes."""
        pairs = [] if direction == "bwd" else list(zip(self.outs, exact.outs, strict=True))
        pairs += [] if direction == "fwd" else list(zip(self.gradients, exact.gradients, strict=True))
        return max(((got - want).abs().max() / want.abs().max()).item() for got, want in pairs)


def results(call: Call, case: Case, grads: Sequence[Tensor], inputs: Sequence[Tensor] | None = None) -> Results:
    """Return the parts of results and gradients that are compared; `inputs` are the case's unless given."""
    given = case.inputs if inputs is None else inputs
    compared = case.of_whole if inputs is None else _all_of
    outs = outputs(call, given)
    gradients = torch.autograd.grad(outs, given, grads)
    return Results(
        outs=[compared(x).detach().cpu().double() for x in outs],
        gradients=[compared(x).cpu().double() for x in gradients],
    )


def forward_results(call: Call, case: Case) -> Results:
    """Return the parts of the results that are compared, without a graph; for calls that have no backward."""
    with torch.no_grad():
        return Results(outs=[case.of_whole(x).cpu().double() for x in outputs(call, case.inputs)], gradients=[])


def _all_of(x: Tensor) -> Tensor:
    return x


def exact_results(case: Case, grads: Sequence[Tensor]) -> Results:
    """Return the reference's results in fp64 on the part of the case that is compared."""
    inputs = [case.of_whole(x).detach().double().requires_grad_() for x in case.inputs]
    return results(case.ours("reference"), case, [case.of_whole(x).double() for x in grads], inputs)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the most bytes that were held at once while `run` went on, beyond those there before.

    On a CUDA device of torch's allocator, on a CPU the process's resident memory, which Linux counts to a quarter of a
    megabyte for each thread; None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    gc.collect()
    with _freed_memory_returned():
        try:
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
        except OSError:
            return None
        before = _resident_bytes("VmRSS")
        run()
        return max(0, _resident_bytes("VmHWM") - before)


@contextlib.contextmanager
def _freed_memory_returned() -> Iterator[None]:
    """Within it glibc maps every large block by itself, so that freed ones are gone at once; before, what it kept goes.

    Afterwards it keeps them again, up to its largest threshold, as it does by itself in a process that has freed some.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
    except (OSError, AttributeError):  # another C library than glibc
        yield
        return
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)


def _resident_bytes(name: str) -> int:
    """Return VmRSS, resident now, or VmHWM, resident at most since the last reset."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) << 10 if found else 0
