"""Loops and counts on machine code written by hand: each listing has the trap that its test is named for."""

from __future__ import annotations

from triweave.kernels.compiler.machine_code import Instruction, figures, natural_loops, parse_amdgcn, parse_sass


def sass(*lines: str) -> list[Instruction]:
    """Return the parsed listing, an instruction every 16 bytes, in cuobjdump's layout."""
    rows = []
    for number, line in enumerate(lines):
        rows.append(f"        /*{number * 16:04x}*/                   {line} ;      /* 0x000000fc00fc7947 */")
        rows.append("                                                       /* 0x000fc0000383ffff */")
    return parse_sass("\n".join(["\t\tFunction : kernel", '\t.headerflags\t@"EF_CUDA_SM80"', *rows]))


def loop_indices(instructions: list[Instruction]) -> list[list[int]]:
    return sorted(sorted(loop) for loop in natural_loops(instructions))


def test_only_local_accesses_inside_the_inner_loop_count() -> None:
    code = sass(
        "STL [R1], R2",
        "LDG.E.128 R4, [R2.64]",
        "LDL.LU R5, [R1+0x4]",
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "STL.64 [R1+0x8], R4",
        "@P0 BRA 0x10",
        "LDL R6, [R1]",
        "EXIT",
        "BRA 0x80",
    )
    found = figures(code)
    assert loop_indices(code) == [[1, 2, 3, 4, 5]]
    assert (found.inner_loops, found.inner_loop_local_accesses, found.matrix_instruction) == (1, 2, "HMMA")


def test_the_outer_loop_of_a_nest_does_not_count() -> None:
    code = sass(
        "MOV R0, R1",
        "LDL R5, [R1]",  # outer
        "LDS R6, [R7]",  # inner
        "LDL R8, [R1]",
        "@P0 BRA 0x20",
        "STG.E [R2], R3",
        "@!P1 BRA 0x10",
        "EXIT",
    )
    assert loop_indices(code) == [[1, 2, 3, 4, 5, 6], [2, 3, 4]]
    assert figures(code).inner_loop_local_accesses == 1


def test_a_wait_loop_behind_the_end_is_neither_the_inner_loop_nor_stretches_it() -> None:
    code = sass(
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0]",  # the main loop: 0 to 4
        "@!P0 BRA 0x70",
        "LDTM.x16 R4, tmem[UR4]",
        "UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR4]",
        "BRA.U UP0, 0x0",
        "STL [R1], R4",  # the epilogue, between the loop and its wait loop
        "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0]",
        "@!P0 BRA 0x70",
        "BRA 0x20",
        "BRA 0xa0",
    )
    found = figures(code)
    assert loop_indices(code) == [[0, 1, 2, 3, 4, 7, 8, 9], [7, 8]]
    assert (found.inner_loops, found.inner_loop_local_accesses, found.matrix_instruction) == (1, 0, "UTCHMMA")


def test_a_jump_over_the_loop_from_elsewhere_makes_no_second_one() -> None:
    code = sass(
        "@P0 BRA 0x40",
        "LDS R4, [R5]",
        "@P1 BRA 0x10",
        "EXIT",
        "MOV R4, R5",  # a rare path behind the end that goes back before the loop
        "BRA 0x10",
    )
    assert loop_indices(code) == [[1, 2]]


def test_code_without_loops_has_none() -> None:
    code = sass("HGMMA.64x64x16.F32 R4, gdesc[UR8]", "HMMA.16816.F32 R4, R8, R12, R4", "STL [R1], R4", "EXIT")
    found = figures(code)
    assert (found.instructions, found.inner_loops, found.inner_loop_local_accesses) == (4, 0, 0)
    assert found.matrix_instruction == "HGMMA+HMMA"
    assert figures(sass("FADD R1, R2, R3", "EXIT")).matrix_instruction is None


def test_amd_assembly_is_read_too() -> None:
    text = """
kernel:                                 ; @kernel
; %bb.0:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                                ; =>This Inner Loop Header
\t.loc\t1 10 35
\tscratch_load_dword v1, off, s32        ; 4-byte Folded Reload
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\ts_cbranch_scc1 .LBB0_1
; %bb.2:
\tscratch_store_dword off, v1, s32
\ts_endpgm
.Lfunc_end0:
"""
    code = parse_amdgcn(text)
    found = figures(code)
    assert loop_indices(code) == [[1, 2, 3]]
    assert (found.instructions, found.inner_loop_local_accesses, found.matrix_instruction) == (6, 1, "v_mfma")
