"""Compile shipped kernels, or candidates for their tiles, and read the mix of their inner loops; nothing runs."""

from __future__ import annotations

from typing import Any

from triweave.kernels.compiler.compile_triton import Variant, compile_variant, disassembled
from triweave.kernels.compiler.machine_code import parse_sass
from triweave.kernels.compiler.occupancy import CHIPS, occupancy
from triweave.kernels.errors import KernelUnavailableError
from triweave.kernels.roofline.loop_mix import CompiledLoops, loop_mixes


def compiled_loops(variant: Variant, arch: str) -> CompiledLoops:
    """Compile `variant` for an NVIDIA architecture and return its loops and how many blocks are resident.

    Raises KernelUnavailableError where Triton does not compile it or the disassembler's answer cannot be read.
    """
    name = f"{variant.kernel} {variant.dtype} {variant.head_dim} {variant.config}"
    try:
        kernel = compile_variant(variant, arch)
    except Exception as error:  # Triton's compiler raises many kinds
        why = " ".join(str(error).split())[-300:]
        raise KernelUnavailableError(f"kernels roofline: {name} does not compile for {arch}: {why}") from error
    text = disassembled(kernel.asm["cubin"])
    registers, spill_bytes = (_after(text, mark) for mark in ("REG:", "STACK:"))
    chip, warps = CHIPS[arch], int(kernel.metadata.num_warps)
    share = occupancy(
        chip,
        warps=warps,
        registers=registers,
        shared_bytes=int(kernel.metadata.shared),
        tensor_memory_columns=int(getattr(kernel.metadata, "tmem_size", 0) or 0),
    )
    return CompiledLoops(
        registers=registers,
        spill_bytes=spill_bytes,
        occupancy=share,
        blocks=round(share * chip.warps / warps),
        warps=warps,
        loops=tuple(loop_mixes(parse_sass(text))),
    )


def key(variant: Variant, arch: str) -> tuple[Any, ...]:
    """Return what names the variant on `arch` in the table: the values of budgets.KEY."""
    return variant.op, variant.kernel, arch, variant.dtype, variant.head_dim, variant.config


def _after(text: str, mark: str) -> int:
    digits = ""
    for character in text.partition(mark)[2]:
        if not character.isdigit():
            break
        digits += character
    if not digits:
        raise KernelUnavailableError(f"kernels roofline: the disassembler's answer lacks {mark}; is Triton whole?")
    return int(digits)
