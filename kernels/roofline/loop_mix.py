"""What one turn of a compiled kernel's inner loop asks of a multiprocessor, read off its machine code.

Counts are warp instructions of one warp, by the unit that executes them. A matrix instruction's work is in its opcode
(warp and warp group instructions) or, for sm_100, only in a descriptor; there it stays 0 and roofline.py takes it from
the tile. `loop_mixes.json` holds the counts of shipped kernels, `loop_mix_triton.py` makes them. NVIDIA only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triweave.kernels.compiler.budgets import KEY
from triweave.kernels.compiler.machine_code import Instruction, inner_loops
from triweave.kernels.roofline.chips import SHARED_BYTES_PER_CLOCK

TABLE = Path(__file__).with_name("loop_mixes.json")

WARPS_OF_A_GROUP = 4

_FMA = frozenset({"FADD", "FMUL", "FFMA", "IMAD", "HADD2", "HMUL2", "HFMA2"})
_PAIRED_FMA = frozenset({"FADD2", "FMUL2", "FFMA2"})
"""Two fp32 results per lane in one instruction: one issue, twice the work."""
_ALU = re.compile(
    r"FMNMX3?|FSETP?|FSEL|ISETP|SEL|P?LOP3|LOP|IADD3?|VIADD(MNMX)?|V?IMNMX|PRMT|SHF|LEA|MOV|SGXT|P2R|R2P|[FI]2FP|IABS"
)
_SPECIAL = frozenset({"MUFU"})
_SHARED = frozenset({"LDS", "STS", "LDSM", "STSM", "SHFL", "LDL", "STL"})
_ASYNCHRONOUS = frozenset({"LDGSTS", "UTMALDG", "UBLKCP"})
_HMMA = re.compile(r"HMMA\.(\d)?(\d\d)(\d+)\.")
_HGMMA = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class LoopMix:
    """One turn of one inner loop: warp instructions of one warp, unless it says otherwise."""

    issued: int
    """All instructions that take an issue slot."""
    fma: int
    alu: int
    special: int
    exponentials: int
    """Those of `special` that are exp2."""
    shared_clocks: int
    """Clocks of the shared memory pipe, 128 bytes each."""
    matrix: int
    """Matrix instructions."""
    matrix_flops: int
    """FLOPs of one warp's matrix instructions, 0 where the code does not say."""
    matrix_clocks_by_operands: float
    """Clocks of one warp's share of reading the matrix operands from shared memory (sm_90)."""
    weights_in_tensor_memory: bool
    """Whether some matrix instructions take their first operand from tensor memory (sm_100)."""
    asynchronous: bool
    """Whether tiles are copied to shared memory while the loop computes; otherwise it waits for them."""


def loop_mixes(instructions: Sequence[Instruction]) -> list[LoopMix]:
    """Return the mix of every inner loop, in the order of the code."""
    loops = sorted(inner_loops(instructions), key=min)
    return [_mix([instructions[index] for index in sorted(loop)]) for loop in loops]


def _mix(loop: Sequence[Instruction]) -> LoopMix:
    matrix = [one for one in loop if one.base in ("HMMA", "HGMMA", "UTCHMMA")]
    return LoopMix(
        issued=sum(one.base != "NOP" for one in loop),
        fma=sum((one.base in _FMA) + 2 * (one.base in _PAIRED_FMA) for one in loop),
        alu=sum(_ALU.fullmatch(one.base) is not None for one in loop),
        special=sum(one.base in _SPECIAL for one in loop),
        exponentials=sum(one.opcode.startswith("MUFU.EX2") for one in loop),
        shared_clocks=sum(_shared_clocks(one.opcode) for one in loop if one.base in _SHARED),
        matrix=len(matrix),
        matrix_flops=sum(_matrix_flops(one.opcode) for one in matrix),
        matrix_clocks_by_operands=sum(_operand_clocks(one) for one in matrix),
        weights_in_tensor_memory=any(
            one.base == "UTCHMMA" and one.operands.lstrip().startswith("tmem") for one in matrix
        ),
        asynchronous=any(one.base in _ASYNCHRONOUS for one in loop),
    )


def _shared_clocks(opcode: str) -> int:
    """Return 128-byte accesses of one warp: 32 lanes of 4 bytes, or of as many as the modifiers say."""
    modifiers = opcode.split(".")[1:]
    if opcode.startswith(("LDSM", "STSM")):
        return next((int(part) for part in modifiers if part in ("2", "4")), 1)
    return next((int(part) // 32 for part in modifiers if part in ("64", "128")), 1)


def _matrix_flops(opcode: str) -> int:
    """Return FLOPs per warp; a warp group's instruction is shared by its four warps."""
    if found := _HGMMA.match(opcode):
        m, n, k = (int(size) for size in found.groups())
        return 2 * m * n * k // WARPS_OF_A_GROUP
    if found := _HMMA.match(opcode):
        return 2 * 16 * 8 * int(found[3])
    return 0


def _operand_clocks(instruction: Instruction) -> float:
    """Return a warp's share of the shared memory clocks: 16-bit b always, a too unless it comes from registers."""
    found = _HGMMA.match(instruction.opcode)
    if not found:
        return 0.0
    m, n, k = (int(size) for size in found.groups())
    from_registers = re.match(r"R\w+,\s*R\d", instruction.operands.lstrip()) is not None
    numbers = n * k + (0 if from_registers else m * k)
    return 2 * numbers / SHARED_BYTES_PER_CLOCK / WARPS_OF_A_GROUP


# The committed table


@dataclass(frozen=True, kw_only=True)
class CompiledLoops:
    """What the model needs of one compiled variant: how many blocks are resident and what their loops hold."""

    registers: int
    spill_bytes: int
    occupancy: float
    blocks: int
    """Resident blocks of a multiprocessor, a model (occupancy.py); 0 where not even one fits."""
    warps: int
    loops: tuple[LoopMix, ...]
    """Innermost loops, in order; of attention the one without a mask and then the one with it."""


def load(path: Path = TABLE) -> dict[tuple[Any, ...], CompiledLoops]:
    """Return the committed loops by the key of budgets.py: op, kernel, arch, dtype, head_dim, config."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return {tuple(row[name] for name in KEY): _from_row(row) for row in rows}


def write(rows: Iterable[tuple[tuple[Any, ...], CompiledLoops]], *, triton: str, path: Path = TABLE) -> None:
    """Put `rows` into the table; older rows of the same op, kernel, chip, dtype and width go, all others stay."""
    fresh = dict(rows)
    cells = {name[:5] for name in fresh}
    merged = {name: loops for name, loops in load(path).items() if name[:5] not in cells} | fresh
    lines = ",\n".join(f"  {json.dumps(_to_row(name, merged[name]))}" for name in sorted(merged, key=_order))
    path.write_text(f'{{\n "triton": {json.dumps(triton)},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def _order(name: tuple[Any, ...]) -> tuple[Any, ...]:
    op, kernel, arch, dtype, width, config = name
    return op, kernel, len(arch), arch, dtype, width or 0, config


def _to_row(name: tuple[Any, ...], loops: CompiledLoops) -> dict[str, Any]:
    return dict(zip(KEY, name, strict=True)) | asdict(loops)


def _from_row(row: Mapping[str, Any]) -> CompiledLoops:
    figures = {name: value for name, value in row.items() if name not in KEY}
    return CompiledLoops(**{**figures, "loops": tuple(LoopMix(**loop) for loop in row["loops"])})
