"""What inner loops ask of a multiprocessor, on machine code written by hand, and the table of compiled ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from triweave.kernels.compiler.machine_code import parse_sass
from triweave.kernels.roofline import loop_mix
from triweave.kernels.roofline.loop_mix import CompiledLoops, LoopMix, loop_mixes


def loop_of(*lines: str) -> LoopMix:
    """Return the mix of a loop of these instructions and the branch that closes it."""
    (mix,) = loop_mixes(parse_sass(listing(*lines, "@P0 BRA 0x0", "EXIT")))
    return mix


def listing(*lines: str) -> str:
    return "\n".join(
        f"        /*{number * 16:04x}*/                   {line} ;      /* 0x000000fc00fc7947 */"
        for number, line in enumerate(lines)
    )


def test_units_are_told_apart_and_nops_are_not_issued() -> None:
    mix = loop_of(
        "LDS.128 R4, [R2]",
        "FMUL R4, R4, R5",
        "FFMA2 R6, R6, R8, R10",
        "ISETP.GE.AND P0, PT, R4, R5, PT",
        "F2FP.BF16.F32.PACK_AB R4, R5, R6",
        "MUFU.EX2 R4, R4",
        "MUFU.RCP R5, R5",
        "STS [R2], R4",
        "NOP",
    )
    assert mix.issued == 9, "the branch too"
    assert mix.fma == 1 + 2, "the paired one does two results a lane"
    assert mix.alu == 2
    assert (mix.special, mix.exponentials) == (2, 1)
    assert mix.shared_clocks == 4 + 1, "16 bytes a lane take four accesses of 128"
    assert (mix.matrix, mix.asynchronous) == (0, False)


def test_spilled_registers_pass_through_the_shared_memory_pipe() -> None:
    assert loop_of("LDS R4, [R2]", "LDL.64 R4, [R1]", "STL [R1], R5").shared_clocks == 1 + 2 + 1


def test_a_warps_matrix_instruction_says_its_flops() -> None:
    mix = loop_of("LDSM.16.M88.4 R4, [R2]", "HMMA.16816.F32.BF16 R8, R4, R6, R8", "LDGSTS.E.BYPASS.128 [R3], [R4.64]")
    assert mix.matrix_flops == 2 * 16 * 8 * 16
    assert mix.shared_clocks == 4, "four 8 x 8 matrices of 2-byte numbers are 512 bytes"
    assert mix.asynchronous


def test_a_warp_group_reads_its_operands_from_shared_memory_unless_the_first_is_in_registers() -> None:
    shared = loop_of("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0")
    registers = loop_of("HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8].tnspB, R24, gsb0")
    assert shared.matrix_flops == registers.matrix_flops == 2 * 64 * 128 * 16 // 4, "a quarter each of four warps"
    assert registers.matrix_clocks_by_operands * 4 == 128 * 16 * 2 / 128
    assert shared.matrix_clocks_by_operands * 4 == (128 + 64) * 16 * 2 / 128


def test_tensor_memory_instructions_do_not_say_their_flops_but_where_the_weights_are() -> None:
    from_shared = loop_of("UTCHMMA gdesc[UR14], gdesc[UR16], tmem[UR10], tmem[UR32], idesc[UR33], !UPT")
    from_tensor = loop_of("UTCHMMA tmem[UR14], gdesc[UR16], tmem[UR10], tmem[UR32], idesc[UR33], !UPT")
    assert from_shared.matrix == 1
    assert from_shared.matrix_flops == 0
    assert not from_shared.weights_in_tensor_memory
    assert from_tensor.weights_in_tensor_memory


def test_loops_come_in_the_order_of_the_code() -> None:
    text = listing(
        "LDS R4, [R2]",
        "FMUL R4, R4, R5",
        "@P0 BRA 0x0",
        "LDS R4, [R2]",
        "LDS R5, [R2]",
        "@P0 BRA 0x30",
        "EXIT",
    )
    assert [mix.shared_clocks for mix in loop_mixes(parse_sass(text))] == [1, 2]


def compiled(registers: int) -> CompiledLoops:
    mix = loop_of("LDS R4, [R2]")
    return CompiledLoops(registers=registers, spill_bytes=0, occupancy=0.25, blocks=2, warps=8, loops=(mix, mix))


def test_writing_replaces_a_kernels_row_of_the_same_chip_and_width_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "mixes.json"
    cell = ("attention", "forward", "sm_90", "bf16", 64)
    other = ("attention", "forward", "sm_100", "bf16", 64, "a")
    loop_mix.write([((*cell, "a"), compiled(100)), (other, compiled(101))], triton="3.9.0", path=path)
    loop_mix.write([((*cell, "b"), compiled(102))], triton="3.9.0", path=path)
    assert loop_mix.load(path) == {(*cell, "b"): compiled(102), other: compiled(101)}


def test_without_a_table_there_are_no_rows(tmp_path: Path) -> None:
    assert loop_mix.load(tmp_path / "none.json") == {}


def test_the_committed_table_holds_shipped_variants_with_the_loops_the_model_reads() -> None:
    pytest.importorskip("triton")
    from triweave.kernels.compiler.shipped_triton import variants

    table = loop_mix.load()
    shipped = {
        (one.op, one.kernel, one.dtype, one.head_dim, one.config)
        for arch in {name[2] for name in table}
        for one in variants(arch=arch)
    }
    assert {name[2] for name in table} >= {"sm_80", "sm_90", "sm_100", "sm_120"}
    for name, loops in table.items():
        assert (*name[:2], *name[3:]) in shipped, f"{name}: triweave kernels roofline --compile --write"
        assert all(loop.matrix > 0 for loop in loops.loops)
        if name[0] == "attention":
            assert len(loops.loops) == 2
            assert loops.loops[1].alu > loops.loops[0].alu, "the second loop is the one with mask arithmetic"
        assert loops.blocks > 0


@pytest.mark.slow
def test_compiling_gives_what_the_table_says() -> None:
    """In a process of its own: one that tests interpreted kernels cannot compile them."""
    import subprocess
    import sys

    pytest.importorskip("triton")
    code = (
        "from triweave.kernels.roofline import loop_mix\n"
        "from triweave.kernels.roofline.loop_mix_triton import compiled_loops, key\n"
        "from triweave.kernels.compiler.shipped_triton import variants\n"
        "table = loop_mix.load()\n"
        "for arch in ('sm_90', 'sm_100'):\n"
        "    for one in variants(['attention'], arch=arch):\n"
        "        if (one.kernel, one.head_dim, one.dtype) == ('dq', 64, 'bf16'):\n"
        "            assert compiled_loops(one, arch) == table[key(one, arch)], (one.config, arch)\n"
        "            print('compared')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("compared") == 2
