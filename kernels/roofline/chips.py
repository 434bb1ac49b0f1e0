"""What a chip can do at most, from what its maker and others published: the ceilings of the roofline model.

matrix FLOP/s = multiprocessors * clock * matrix_flops_per_clock, a multiply-add being two. Nothing here was measured
by us. Limits that decide how many warps are resident are in occupancy.py. Sources of what chips of one architecture
share: NVIDIA's CUDA programming guide, table of arithmetic throughput (lanes per clock of a multiprocessor); the tensor
core rates and 128 bytes of shared memory a clock of sm_90 and sm_100 are those of the FlashAttention-3 and -4 papers.
L2: the A100 whitepaper's 5120 bytes a clock, taken for every die of the other chips too, for no maker's figure of them
is known to us.
"""

from __future__ import annotations

from dataclasses import dataclass

from triweave.kernels.errors import KernelInputError

SHARED_BYTES_PER_CLOCK = 128
ISSUED_PER_CLOCK = 4
"""Warp instructions that a multiprocessor issues per clock, one for each of its schedulers."""


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Published peak figures of one chip, and the rates of one of its multiprocessors."""

    arch: str
    multiprocessors: int
    clock_mhz: float
    """The clock at which the published matrix figure holds, not the highest there is."""
    matrix_flops_per_clock: int
    """Dense, 16-bit inputs, fp32 sums."""
    memory_gb_per_s: float
    """10^9 bytes a second, read and written together."""
    fp32_lanes: int
    """Results per clock of fp32 add, multiply and multiply-add."""
    alu_lanes: int
    """Results per clock of comparisons, selects, minimum and maximum, shifts and integer logic."""
    l2_bytes_per_clock: int = 5120
    """Of the whole chip."""
    special_lanes: int = 16
    """Results per clock of exp2, log2, reciprocal and reciprocal square root."""
    device_names: tuple[str, ...] = ()
    """How CUDA's device name begins or what it holds."""
    source: str

    @property
    def clock_hz(self) -> float:
        """The clock in cycles a second."""
        return self.clock_mhz * 1e6

    @property
    def matrix_flops(self) -> float:
        """Dense FLOP/s with 16-bit inputs and fp32 sums."""
        return self.multiprocessors * self.clock_hz * self.matrix_flops_per_clock

    @property
    def fp32_flops(self) -> float:
        """FLOP/s of fp32 without the matrix units."""
        return self.multiprocessors * self.clock_hz * self.fp32_lanes * 2

    @property
    def special_per_s(self) -> float:
        """Exponentials a second."""
        return self.multiprocessors * self.clock_hz * self.special_lanes

    @property
    def bytes_per_s(self) -> float:
        """Bytes a second to and from memory."""
        return self.memory_gb_per_s * 1e9


PEAKS: dict[str, Peaks] = {
    "a100": Peaks(
        arch="sm_80",
        multiprocessors=108,
        clock_mhz=1410,
        matrix_flops_per_clock=2048,
        memory_gb_per_s=2039,
        fp32_lanes=64,
        alu_lanes=64,
        device_names=("A100",),
        source="NVIDIA A100 80GB SXM data sheet: 312 TFLOP/s, 2039 GB/s",
    ),
    "h100": Peaks(
        arch="sm_90",
        multiprocessors=132,
        clock_mhz=1830,
        matrix_flops_per_clock=4096,
        memory_gb_per_s=3350,
        fp32_lanes=128,
        alu_lanes=64,
        device_names=("H100",),
        source="NVIDIA H100 SXM5 data sheet and whitepaper: 989 TFLOP/s at 1830 MHz, 3.35 TB/s",
    ),
    "h200": Peaks(
        arch="sm_90",
        multiprocessors=132,
        clock_mhz=1830,
        matrix_flops_per_clock=4096,
        memory_gb_per_s=4800,
        fp32_lanes=128,
        alu_lanes=64,
        device_names=("H200",),
        source="NVIDIA H200 SXM data sheet: 989 TFLOP/s, 4.8 TB/s",
    ),
    "b200": Peaks(
        arch="sm_100",
        multiprocessors=148,
        clock_mhz=1856,
        matrix_flops_per_clock=8192,
        memory_gb_per_s=7672,
        fp32_lanes=128,
        alu_lanes=64,
        l2_bytes_per_clock=2 * 5120,
        device_names=("B200",),
        source="FlashAttention-4 paper: 2.25 PFLOP/s, 148 multiprocessors of 8192 FLOP and 16 exp2 a clock; "
        "pytorch/ao pull request 4002: 7.672 TB/s, read off the device (data sheet: 8)",
    ),
    "rtx5090": Peaks(
        arch="sm_120",
        multiprocessors=170,
        clock_mhz=2407,
        matrix_flops_per_clock=512,
        memory_gb_per_s=1792,
        fp32_lanes=128,
        alu_lanes=128,
        device_names=("RTX 5090",),
        source="NVIDIA RTX Blackwell whitepaper: 209.5 TFLOP/s with fp32 sums, 1792 GB/s",
    ),
}
"""Name as `--chip` takes it -> published figures."""


def peaks(name: str) -> Peaks:
    """Return the figures of a chip. Raises KernelInputError for a name that is not in the table."""
    if name not in PEAKS:
        raise KernelInputError(f"kernels roofline: there is no chip {name!r}; known are {', '.join(PEAKS)}")
    return PEAKS[name]


def chip_of_device(device_name: str) -> str | None:
    """Return the chip whose device CUDA calls `device_name`, None for one without published figures here."""
    return next((name for name, chip in PEAKS.items() if any(part in device_name for part in chip.device_names)), None)
