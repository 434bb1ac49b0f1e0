"""What a time is judged by: the least work of the formula over what the machine can do.

Matrix work is held against the published peak of a known chip (chips.py), elsewhere against a large matrix product of
the same dtype measured here; moved bytes against a large copy measured here, read and write counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from triweave.kernels.roofline.chips import PEAKS, chip_of_device
from triweave.kernels.roofline.work import Work

PRODUCT_ROWS = {"cpu": 1024, "cuda": 8192}
COPIED_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Rates of one device for one dtype."""

    matrix_flops: float
    """FLOP/s of matrix products."""
    bytes_per_s: float
    """Bytes read and written a second by a copy."""
    published: bool
    """Whether the matrix rate is the published peak; the copy is always measured."""

    def of(self, work: Work) -> tuple[float, str]:
        """Return the least ms of some work and what sets it."""
        matrix_ms, copy_ms = work.matrix_flops / self.matrix_flops * 1e3, work.moved_bytes / self.bytes_per_s * 1e3
        if matrix_ms >= copy_ms:
            return matrix_ms, "matrix peak, published" if self.published else "matrix product, measured here"
        return copy_ms, "copy, measured here"


def measure_limits(dtype: torch.dtype, device: torch.device) -> Limits:
    """Return the rates of a device, the best of a few repeats of a copy and, where needed, a matrix product."""
    numbers = COPIED_BYTES[device.type] // 4
    source, target = (torch.zeros(numbers, device=device) for _ in range(2))
    bytes_per_s = 2 * COPIED_BYTES[device.type] / _best_s(lambda: target.copy_(source), device)
    chip = chip_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if chip is not None:
        peak = PEAKS[chip].matrix_flops if dtype.itemsize == 2 else PEAKS[chip].fp32_flops
        return Limits(matrix_flops=peak, bytes_per_s=bytes_per_s, published=True)
    rows = PRODUCT_ROWS[device.type]
    left = torch.randn(rows, rows, device=device).to(dtype)
    matrix_flops = 2 * rows**3 / _best_s(lambda: left @ left, device)
    return Limits(matrix_flops=matrix_flops, bytes_per_s=bytes_per_s, published=False)


def _best_s(run: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds of a few repeats; on a CPU processor time per thread, which does not count waiting."""
    seconds = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        else:
            start = time.process_time()
            run()
            seconds.append((time.process_time() - start) / torch.get_num_threads())
    return min(seconds)
