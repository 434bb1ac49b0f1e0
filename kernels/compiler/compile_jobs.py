"""Compile many shipped variants, one after the other or in several processes, and give each row when it is there."""

from __future__ import annotations

import functools
import multiprocessing
import signal
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from triweave.kernels.compiler.compile_triton import Row, Variant, compiled
from triweave.kernels.compiler.shipped_triton import variants
from triweave.kernels.errors import KernelCompileError

Outcome = Row | KernelCompileError
"""A row, or why this variant does not compile."""


def compile_all(wanted: Sequence[tuple[Variant, str]], jobs: int) -> Generator[Outcome]:
    """Yield the outcome of every (shipped variant, arch) as it comes; with more than one job in any order.

    jobs: processes that compile, each 0.5 GB. Closing the generator drops what has not begun and waits for the
    rest, seconds.
    """
    if jobs == 1 or len(wanted) < 2:
        for variant, arch in wanted:
            yield _outcome(variant, arch)
        return
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(min(jobs, len(wanted)), mp_context=context, initializer=_ignore_interrupts)
    try:
        # a `@triton.jit` function cannot be sent to another process; the order in which variants() yields is the same
        archs = dict.fromkeys(arch for _, arch in wanted)
        place = {one.name(arch): number for arch in archs for number, one in enumerate(_variants(arch))}
        futures = [executor.submit(_numbered, place[variant.name(arch)], arch) for variant, arch in wanted]
        for future in as_completed(futures):
            yield future.result()
    finally:
        executor.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Leave Ctrl-C, which a terminal sends to every process, to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _numbered(number: int, arch: str) -> Outcome:
    return _outcome(_variants(arch)[number], arch)


@functools.cache
def _variants(arch: str) -> list[Variant]:
    return variants(arch=arch)


def _outcome(variant: Variant, arch: str) -> Outcome:
    try:
        return compiled(variant, arch)
    except KernelCompileError as error:
        return error
