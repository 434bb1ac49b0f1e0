"""Compile the Triton kernels ahead of time, for any chip and without a GPU, and read the result off the machine code.

`compiled(variant, arch)` gives one row: registers, spilled bytes, local memory accesses inside the inner loops, shared
memory, a modelled occupancy, the matrix instruction and the seconds it took. `shipped_triton.py` lists the variants,
`budgets.py` compares rows with the committed table. Nothing is executed.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import constexpr
from triton.runtime.jit import JITFunction

from triweave.kernels.compiler.machine_code import CodeFigures, figures, parse_amdgcn, parse_sass
from triweave.kernels.compiler.occupancy import CHIPS, occupancy
from triweave.kernels.errors import KernelCompileError, KernelUnavailableError


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel with everything a launch would fix: types, compile-time constants and launch options."""

    op: str
    kernel: str
    dtype: str
    head_dim: int | None
    """Width K of a head or D of a row; None for an op without one."""
    function: Any
    """The `@triton.jit` function."""
    signature: Mapping[str, str]
    """Run-time argument -> Triton type: *bf16, i32, fp32, ..."""
    constants: Mapping[str, Any]
    """Compile-time argument -> value."""
    aligned: Sequence[str] = ()
    """Integer arguments that are multiples of 16 at launch, which the launch would notice; pointers always are."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """num_warps, num_stages, ..."""
    config: str
    """The pinned config as the row shows it."""

    def name(self, arch: str) -> tuple[str | int | None, ...]:
        """Return what names its row in the table: the values of budgets.KEY, in order."""
        return self.op, self.kernel, arch, self.dtype, self.head_dim, self.config

    @property
    def source(self) -> str:
        """12 hex digits of all that is compiled: the kernel, what it calls, types and constants.

        Comments, layout and the place in the file do not count.
        """
        launch = [sorted(part.items()) for part in (self.signature, self.constants, self.options)]
        parts = [*sorted(_sources(self.function)), repr(launch), repr(sorted(self.aligned))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one compiled variant costs; the fields are the output form of `triweave kernels compile --json`."""

    op: str
    kernel: str
    arch: str
    dtype: str
    head_dim: int | None
    config: str
    registers: int
    spill_bytes: int
    """Stack bytes per thread: spilled registers, and what a library function such as the exact cosine keeps there."""
    inner_loop_local_accesses: int
    shared_bytes: int
    occupancy: float
    """A model, see occupancy.py; 0 where one block does not fit."""
    matrix_instruction: str | None
    compile_s: float


def compiled(variant: Variant, arch: str) -> Row:
    """Compile `variant` for `arch`, always anew, and return its row.

    arch: one of CHIPS. Raises KernelUnavailableError where Triton interprets instead of compiling, KernelCompileError
    where it cannot compile this variant.
    """
    if not isinstance(variant.function, JITFunction):
        raise KernelUnavailableError(
            f"kernels compile: {variant.kernel} was loaded for the interpreter; unset TRITON_INTERPRET and start again"
        )
    started = time.perf_counter()
    try:
        kernel = compile_variant(variant, arch)
    except Exception as error:  # Triton's compiler raises many kinds
        name = f"{variant.kernel} {variant.dtype} {variant.head_dim} {variant.config}"
        why = " ".join(str(error).split())[-300:]
        raise KernelCompileError(f"kernels compile: {name} does not compile for {arch}: {why}") from error
    seconds = time.perf_counter() - started
    registers, spill_bytes, code = _inspect(kernel, arch)
    shared_bytes = int(kernel.metadata.shared)
    return Row(
        op=variant.op,
        kernel=variant.kernel,
        arch=arch,
        dtype=variant.dtype,
        head_dim=variant.head_dim,
        config=variant.config,
        registers=registers,
        spill_bytes=spill_bytes,
        inner_loop_local_accesses=code.inner_loop_local_accesses,
        shared_bytes=shared_bytes,
        occupancy=occupancy(
            CHIPS[arch],
            warps=int(kernel.metadata.num_warps),
            registers=registers,
            shared_bytes=shared_bytes,
            tensor_memory_columns=int(getattr(kernel.metadata, "tmem_size", 0) or 0),
        ),
        matrix_instruction=code.matrix_instruction,
        compile_s=round(seconds, 2),
    )


def compile_variant(variant: Variant, arch: str) -> Any:
    """Return Triton's CompiledKernel; its cache is a folder that is gone afterwards."""
    names = variant.function.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    aligned = [index for index, name in enumerate(names) if signature[name].startswith("*") or name in variant.aligned]
    source = ASTSource(
        variant.function,
        signature,
        dict(variant.constants),
        {(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    chip = CHIPS[arch]
    hip = arch.startswith("gfx")
    target = GPUTarget("hip" if hip else "cuda", arch if hip else int(arch.removeprefix("sm_")), chip.warp_size)
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        contextlib.redirect_stdout(sys.stderr),  # where Triton prints the whole program if the assembler refuses it
    ):
        knobs.cache.dir = folder
        return triton.compile(source, target=target, options={"enable_fp_fusion": True, **variant.options})


@functools.cache
def _sources(function: JITFunction) -> frozenset[str]:
    """Return the texts of a kernel, without comments and docstring, and of our kernels and constants that it uses."""
    tree = ast.parse(function.src).body[0]
    assert isinstance(tree, ast.FunctionDef)
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    texts = {ast.unparse(tree)}
    for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
        value = function.fn.__globals__.get(name)
        if isinstance(value, JITFunction) and value is not function:
            texts |= _sources(value)
        elif isinstance(value, constexpr):
            texts.add(f"{name} = {value.value!r}")
    return frozenset(texts)


def _inspect(kernel: Any, arch: str) -> tuple[int, int, CodeFigures]:
    """Return registers per thread, spilled bytes per thread and the figures of the machine code."""
    if arch.startswith("gfx"):
        assembly = kernel.asm["amdgcn"]
        return (
            _number(r"\.vgpr_count:\s+(\d+)", assembly),
            _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
            figures(parse_amdgcn(assembly)),
        )
    text = disassembled(kernel.asm["cubin"])
    return _number(r"\bREG:(\d+)", text), _number(r"\bSTACK:(\d+)", text), figures(parse_sass(text))


def disassembled(cubin: bytes) -> str:
    """Return what Triton's own cuobjdump says of a binary: its resource usage and its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise KernelUnavailableError(f"kernels compile: the disassembler's answer lacks {pattern!r}; is Triton whole?")
    return int(found[1])
