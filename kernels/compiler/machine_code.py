"""What a compiled kernel's machine code says: its loops, the local memory traffic inside them, its matrix instructions.

Reads the text that `cuobjdump -sass` prints (NVIDIA) or the assembly that LLVM writes (AMD). Loops are the natural
loops of the control-flow graph, not address ranges: compilers move wait loops and rare paths behind the last
instruction and jump back, which by addresses would look like a loop around everything. Imports no torch and no Triton.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction; `target` is the index of the one it may jump to, `ends` whether it never goes on to the next."""

    opcode: str
    operands: str = ""
    target: int | None = None
    ends: bool = False

    @property
    def base(self) -> str:
        """The opcode without its modifiers: HMMA of HMMA.16816.F32.BF16, v_mfma of v_mfma_f32_32x32x8_bf16."""
        return "v_mfma" if self.opcode.startswith("v_mfma") else self.opcode.partition(".")[0]


MATRIX = frozenset({"HMMA", "IMMA", "QMMA", "OMMA", "DMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "v_mfma"})
"""Base opcodes of the matrix units, by generation: warp (sm_80, sm_120), warp group (sm_90), tensor memory (sm_100)."""

_MEMORY = re.compile(
    r"(LDG|STG|LDS|STS|LDSM|STSM|LD|ST|LDGSTS|LDTM|STTM|ATOM|ATOMG|ATOMS|RED|REDG|UTMALDG|UTMASTG|UBLKCP"
    r"|(global|buffer|flat|ds|s)_(load|store|read|write|atomic)\w*)"
)
_LOCAL = re.compile(r"LDL|STL|scratch_(load|store)\w*")


@dataclass(frozen=True, kw_only=True)
class CodeFigures:
    """Counts over one kernel's instructions."""

    instructions: int
    inner_loops: int
    inner_loop_local_accesses: int
    """Loads and stores of a thread's local memory (spilled registers) inside the inner loops."""
    matrix_instruction: str | None
    """Base opcodes of the matrix unit joined by +, None without any."""


def figures(instructions: Sequence[Instruction]) -> CodeFigures:
    """Count what `CodeFigures` lists."""
    loops = inner_loops(instructions)
    looped = frozenset().union(*loops)
    matrix = sorted({instruction.base for instruction in instructions} & MATRIX)
    return CodeFigures(
        instructions=len(instructions),
        inner_loops=len(loops),
        inner_loop_local_accesses=sum(bool(_LOCAL.fullmatch(instructions[index].base)) for index in looped),
        matrix_instruction="+".join(matrix) or None,
    )


def inner_loops(instructions: Sequence[Instruction]) -> list[frozenset[int]]:
    """Return the innermost working loops as sets of instruction indices.

    A loop works if it holds a matrix instruction or an access to memory other than a thread's own; loops that only wait
    for a barrier do not, so that one inside the main loop leaves that the innermost.
    """
    working = [loop for loop in natural_loops(instructions) if any(_works(instructions[index].base) for index in loop)]
    return [loop for loop in working if not any(other < loop for other in working)]


def _works(base: str) -> bool:
    return base in MATRIX or _MEMORY.fullmatch(base) is not None


def natural_loops(instructions: Sequence[Instruction]) -> list[frozenset[int]]:
    """Return every natural loop: what reaches a jump back to a dominating head without passing that head.

    Loops with one head are merged; an instruction that jumps to itself (the padding behind the end) is none.
    """
    starts = _block_starts(instructions)
    ends = [*starts[1:], len(instructions)]
    successors = _successors(instructions, starts, ends)
    predecessors: list[list[int]] = [[] for _ in starts]
    for block, following in enumerate(successors):
        for successor in following:
            predecessors[successor].append(block)
    dominators = _dominators(predecessors)
    bodies: dict[int, set[int]] = {}
    for block, following in enumerate(successors):
        for head in following:
            if head in dominators[block] and not (head == block and ends[block] - starts[block] == 1):
                bodies.setdefault(head, {head}).update(_reaching(block, head, predecessors))
    return [
        frozenset(index for block in body for index in range(starts[block], ends[block])) for body in bodies.values()
    ]


def _block_starts(instructions: Sequence[Instruction]) -> list[int]:
    starts = {0}
    for index, instruction in enumerate(instructions):
        if instruction.target is not None:
            starts.add(instruction.target)
        if (instruction.target is not None or instruction.ends) and index + 1 < len(instructions):
            starts.add(index + 1)
    return sorted(starts) if instructions else []


def _successors(instructions: Sequence[Instruction], starts: list[int], ends: list[int]) -> list[list[int]]:
    block_of = {start: block for block, start in enumerate(starts)}
    successors = []
    for block, end in enumerate(ends):
        last = instructions[end - 1]
        following = [] if last.target is None else [block_of[last.target]]
        if not last.ends and end < len(instructions) and block + 1 not in following:
            following.append(block + 1)
        successors.append(following)
    return successors


def _dominators(predecessors: list[list[int]]) -> list[frozenset[int]]:
    """Return for each block the blocks on every path to it; blocks nobody jumps to (jump tables) are entries too."""
    everything = frozenset(range(len(predecessors)))
    dominators = [everything if before and block else frozenset({block}) for block, before in enumerate(predecessors)]
    changed = True
    while changed:
        changed = False
        for block, before in enumerate(predecessors):
            if block == 0 or not before:
                continue
            found = frozenset.intersection(*(dominators[other] for other in before)) | {block}
            if found != dominators[block]:
                dominators[block] = found
                changed = True
    return dominators


def _reaching(tail: int, head: int, predecessors: list[list[int]]) -> set[int]:
    """Return the blocks from which `tail` can be reached without passing `head`, both included."""
    found, waiting = {head}, [tail]
    while waiting:
        block = waiting.pop()
        if block not in found:
            found.add(block)
            waiting.extend(predecessors[block])
    return found


_SASS = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_ADDRESS = re.compile(r"(?:^|\s)0x([0-9a-f]+)\s*$")
_SASS_JUMPS = {"BRA", "JMP", "CALL"}
_SASS_ENDS = {"EXIT", "RET", "BRX", "BRXU", "JMX", "JMXU"}


def parse_sass(text: str) -> list[Instruction]:
    """Return the instructions of the one function in what `cuobjdump -sass` printed."""
    parsed = [match.groups() for line in text.splitlines() if (match := _SASS.match(line))]
    index_of = {int(address, 16): index for index, (address, _, _, _) in enumerate(parsed)}
    instructions = []
    for _, guard, opcode, operands in parsed:
        base = opcode.partition(".")[0]
        address = _ADDRESS.search(operands) if base in _SASS_JUMPS else None
        target = index_of.get(int(address[1], 16)) if address else None
        plain_jump = base in ("BRA", "JMP") and operands.strip().startswith("0x")
        ends = guard is None and (plain_jump or base in _SASS_ENDS)
        instructions.append(Instruction(opcode=opcode, operands=operands, target=target, ends=ends))
    return instructions


_LABEL = re.compile(r"(\.L\w+):")
_GCN = re.compile(r"\s+([a-z]\w*)(?:\s+([^;]*))?")
_GCN_ENDS = {"s_branch", "s_endpgm", "s_setpc_b64"}


def parse_amdgcn(text: str) -> list[Instruction]:
    """Return the instructions of the one function in LLVM's AMD assembly."""
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _GCN.match(line):
            code.append((found[1], (found[2] or "").strip()))
    return [
        Instruction(
            opcode=opcode, target=labels.get(operands) if "branch" in opcode else None, ends=opcode in _GCN_ENDS
        )
        for opcode, operands in code
    ]
