"""How many warps of a kernel fit on one multiprocessor: a model from the chips' published limits, nothing is measured.

occupancy = resident warps / the most warps a multiprocessor holds. Sources: NVIDIA's CUDA programming guide, appendix
compute capabilities, and the Ampere, Hopper and Blackwell tuning guides, each section occupancy (warps, blocks,
registers, shared memory; 1 KiB of it is the system's in every block); the occupancy calculator (allocation units);
AMD's CDNA3 instruction set manual (registers per lane, waves per SIMD, LDS). On compute capability 12.0 NVIDIA's texts
differ: 24 blocks and 100 KiB by the programming guide's tables of CUDA 13, which are taken here, 32 blocks and 128 KB
(with the L1 cache) by the Blackwell tuning guide.
"""

from __future__ import annotations

from dataclasses import dataclass

_KIB = 1 << 10
TENSOR_MEMORY_COLUMNS = 512
"""Columns of tensor memory per multiprocessor of sm_100 and sm_103; blocks share them."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Limits of one multiprocessor (compute unit)."""

    matrix_instruction: str
    """Base opcode of the chip's own matrix unit for 16-bit inputs."""
    warps: int
    blocks: int
    shared_bytes: int
    block_shared_bytes: int
    """The most one block can ask for."""
    reserved_shared_bytes: int = _KIB
    """What the system takes of shared memory for every block."""
    registers: int = 65536
    register_unit: int = 256
    """Registers are given to a warp in multiples of this."""
    warp_size: int = 32


CHIPS: dict[str, Chip] = {
    "sm_80": Chip(
        matrix_instruction="HMMA", warps=64, blocks=32, shared_bytes=164 * _KIB, block_shared_bytes=163 * _KIB
    ),
    "sm_86": Chip(
        matrix_instruction="HMMA", warps=48, blocks=16, shared_bytes=100 * _KIB, block_shared_bytes=99 * _KIB
    ),
    "sm_89": Chip(
        matrix_instruction="HMMA", warps=48, blocks=24, shared_bytes=100 * _KIB, block_shared_bytes=99 * _KIB
    ),
    "sm_90": Chip(
        matrix_instruction="HGMMA", warps=64, blocks=32, shared_bytes=228 * _KIB, block_shared_bytes=227 * _KIB
    ),
    "sm_100": Chip(
        matrix_instruction="UTCHMMA", warps=64, blocks=32, shared_bytes=228 * _KIB, block_shared_bytes=227 * _KIB
    ),
    "sm_103": Chip(
        matrix_instruction="UTCHMMA", warps=64, blocks=32, shared_bytes=228 * _KIB, block_shared_bytes=227 * _KIB
    ),
    "sm_120": Chip(
        matrix_instruction="HMMA", warps=48, blocks=24, shared_bytes=100 * _KIB, block_shared_bytes=99 * _KIB
    ),
    "gfx942": Chip(
        matrix_instruction="v_mfma",
        warps=32,
        blocks=32,
        shared_bytes=64 * _KIB,
        block_shared_bytes=64 * _KIB,
        reserved_shared_bytes=0,
        registers=4 * 512 * 64,
        register_unit=8 * 64,
        warp_size=64,
    ),
}
"""Architecture -> limits."""

_SCHEDULERS = 4
_SHARED_UNIT_BYTES = 128


def occupancy(chip: Chip, *, warps: int, registers: int, shared_bytes: int, tensor_memory_columns: int = 0) -> float:
    """Return the share of the chip's warps that are resident, 0 where not even one block fits.

    warps: per block. registers: per thread. shared_bytes: per block, without what the system reserves.
    """
    if shared_bytes > chip.block_shared_bytes:
        return 0.0
    per_warp = _up(registers * chip.warp_size, chip.register_unit)
    by_registers = chip.registers // max(per_warp, 1) // _SCHEDULERS * _SCHEDULERS // warps
    per_block = _up(shared_bytes + chip.reserved_shared_bytes, _SHARED_UNIT_BYTES)
    by_shared = chip.shared_bytes // per_block if per_block else chip.blocks
    by_tensor_memory = TENSOR_MEMORY_COLUMNS // tensor_memory_columns if tensor_memory_columns else chip.blocks
    blocks = min(chip.blocks, chip.warps // warps, by_registers, by_shared, by_tensor_memory)
    return blocks * warps / chip.warps


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
