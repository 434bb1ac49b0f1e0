"""The ahead-of-time compiler on a kernel of its own, and the shipped kernels against the committed table.

Compiling happens in processes of their own: one that tests interpreted kernels cannot compile them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from triweave.kernels.compiler import budgets
from triweave.kernels.errors import KernelCompileError, KernelUnavailableError
from triweave.launch.cli import main

pytest.importorskip("triton")
from triweave.kernels.attention_triton import head_unit
from triweave.kernels.compiler.compile_triton import Row, Variant

LOOP_DOT = Path(__file__).with_name("loop_dot.py")
COMMAND = ("-m", "triweave.launch.cli", "kernels", "compile")

MATRIX_INSTRUCTIONS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
"""The chips of the committed table and the base opcode of their own matrix unit."""
MATRIX_OPS = {"attention", "cross_attention", "mmca", "linear_cross_entropy"}
WIDEST_WITHOUT_SPILLS = {"rms_norm": 4096, "qk_norm_rope": 256}
"""Op -> widest row or head whose 16-bit kernels spill nothing on sm_80, sm_90 and sm_100; 128 for the others."""
BESIDE_THE_LOOPS = {
    ("attention", "dq", "sm_80", 64): (8, 0),
    ("attention", "forward", "sm_100", 72): (8, 0),
    ("cross_attention", "forward", "sm_100", 72): (8, 0),
    ("mmca", "dkv", "sm_100", 72): (24, 0),
    ("mmca", "forward", "sm_80", 64): (16, 0),
}
"""(op, kernel, arch, head width) of 16-bit kernels that spill a little -> bytes, local accesses in inner loops."""
MEASURED_FASTER = {
    (op, "dkv", "sm_90", width) for op in ("attention", "cross_attention", "mmca") for width in (64, 72, 80, 96, 128)
}
"""Those whose tiles were chosen by time on an H100, kernels/configs/sm_90.json."""
OTHER_MATRIX_UNIT = {
    (op, "dkv", arch, 256) for op in ("attention", "cross_attention", "mmca") for arch in ("sm_90", "sm_100")
}
"""(op, kernel, arch, head width) of 16-bit kernels that use another matrix unit; kernels/README.md says why."""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=environment,
    )


@functools.cache
def loop_dot_rows(*wanted: str) -> list[dict[str, Any]]:
    result = python(str(LOOP_DOT), *wanted)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def test_a_row_says_what_the_machine_code_says() -> None:
    roomy, cramped = loop_dot_rows("sm_80", "sm_80:32")
    assert (roomy["spill_bytes"], roomy["inner_loop_local_accesses"], roomy["matrix_instruction"]) == (0, 0, "HMMA")
    assert roomy["registers"] > 40  # the 64 x 64 sums alone are 32 a thread
    assert 0 < roomy["occupancy"] < 0.5
    assert roomy["shared_bytes"] == 2 * 64 * 32 * 2  # two tiles of 16-bit numbers
    assert 0 < roomy["compile_s"] < 600
    assert cramped["registers"] == 32
    assert cramped["spill_bytes"] >= 4 * (roomy["registers"] - 32)
    assert cramped["inner_loop_local_accesses"] > 20
    assert cramped["occupancy"] == 1.0


@pytest.mark.slow
def test_every_generation_has_its_own_matrix_instruction() -> None:
    rows = loop_dot_rows("sm_90", "sm_100", "sm_120", "gfx942")
    assert [row["matrix_instruction"] for row in rows] == ["HGMMA", "UTCHMMA", "HMMA", "v_mfma"]
    assert all(row["spill_bytes"] == row["inner_loop_local_accesses"] == 0 < row["occupancy"] for row in rows)


def chips_and_variants() -> dict[tuple[Any, ...], tuple[str, Variant]]:
    from triweave.kernels.compiler.shipped_triton import variants

    return {variant.name(arch): (arch, variant) for arch in MATRIX_INSTRUCTIONS for variant in variants(arch=arch)}


def test_the_table_has_one_row_for_every_shipped_variant_and_chip() -> None:
    shipped, table = chips_and_variants().keys(), budgets.load().keys()
    again = "run `triweave kernels compile --write --only-missing --jobs 2` and commit the table"
    assert sorted(map(str, shipped - table)) == [], again
    assert sorted(map(str, table - shipped)) == [], again


def name_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["op"], row["kernel"], row["arch"], row["head_dim"]


def test_every_kernel_fits_its_chip() -> None:
    assert [row for row in budgets.load().values() if not row["occupancy"] > 0] == []


def test_16_bit_kernels_keep_nothing_in_local_memory() -> None:
    """On the chips and up to the widths that are promised; the other rows have what the table says, and no more."""
    held = [
        row
        for row in budgets.load().values()
        if row["arch"] in ("sm_80", "sm_90", "sm_100")
        and row["dtype"] != "fp32"
        and (row["head_dim"] or 0) <= WIDEST_WITHOUT_SPILLS.get(row["op"], 128)
    ]
    assert len(held) > 600
    found = {
        name_of(row): (row["spill_bytes"], row["inner_loop_local_accesses"])
        for row in held
        if row["spill_bytes"] or row["inner_loop_local_accesses"]
    }
    assert {name: figures for name, figures in found.items() if name not in MEASURED_FASTER} == BESIDE_THE_LOOPS
    assert all(spilled <= 176 and in_loops <= 9 for spilled, in_loops in found.values())


def test_16_bit_matrix_kernels_use_the_matrix_unit_of_their_chip() -> None:
    """Or stand in OTHER_MATRIX_UNIT, with the reason."""
    rows = [row for row in budgets.load().values() if row["op"] in MATRIX_OPS and row["dtype"] != "fp32"]
    other = {name_of(row) for row in rows if row["matrix_instruction"] != MATRIX_INSTRUCTIONS[row["arch"]]}
    assert {row["op"] for row in rows} == MATRIX_OPS
    assert other == OTHER_MATRIX_UNIT


def test_the_command_prints_rows_in_the_output_form_and_checks_them() -> None:
    result = python(*COMMAND, "--arch", "sm_90", "--op", "swiglu", "--dtype", "bf16", "--json", "--check")
    assert result.returncode == 0, result.stderr[-2000:]
    rows = json.loads(result.stdout)
    assert [row["kernel"] for row in rows] == ["swiglu_forward", "swiglu_backward"]
    form = "op kernel arch dtype head_dim config registers spill_bytes inner_loop_local_accesses shared_bytes occupancy"
    assert all(list(row) == [*form.split(), "matrix_instruction", "compile_s"] for row in rows)
    assert "2 rows, 0 changes, 0 over budget" in result.stderr


SWIGLU = ["kernels", "compile", "--op", "swiglu", "--arch", "sm_90"]


def pretend_to_compile(monkeypatch: pytest.MonkeyPatch, answer: Callable[[int], Any]) -> list[list[str]]:
    """Let the command get, for its n-th variant, what `answer(n)` is: None for a row; returns what it asked for."""
    from triweave.kernels.compiler import compile_jobs

    asked: list[list[str]] = []

    def compile_all(wanted: Sequence[tuple[Variant, str]], jobs: int) -> Generator[compile_jobs.Outcome]:
        assert jobs == 1
        asked.append([f"{variant.kernel} {variant.dtype}" for variant, _ in wanted])
        for number, (variant, arch) in enumerate(wanted):
            figures = {"registers": 32, "spill_bytes": 0, "inner_loop_local_accesses": 0, "shared_bytes": 0}
            row = dict(zip(budgets.KEY, variant.name(arch), strict=True)) | figures
            yield answer(number) or Row(**row, occupancy=1.0, matrix_instruction=None, compile_s=1.0)

    monkeypatch.setattr(compile_jobs, "compile_all", compile_all)
    return asked


def test_what_was_compiled_before_an_interrupt_is_kept_and_not_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    table = tmp_path / "budgets.json"
    command = [*SWIGLU, "--table", str(table), "--write", "--only-missing"]
    first = pretend_to_compile(monkeypatch, interrupted)
    assert main(command) == 130
    assert "2 of 6 rows are in the table" in capsys.readouterr().err
    assert [f"{row['kernel']} {row['dtype']}" for row in budgets.load(table).values()] == first[0][:2]
    second = pretend_to_compile(monkeypatch, lambda _: None)
    assert main(command) == 0
    assert second == [first[0][2:]]
    assert len(budgets.load(table)) == 6
    third = pretend_to_compile(monkeypatch, lambda _: None)
    assert main(command) == 0
    assert third == [[]]


def test_a_changed_kernel_is_missing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "budgets.json"
    command = [*SWIGLU, "--table", str(table), "--write", "--only-missing"]
    pretend_to_compile(monkeypatch, lambda _: None)
    assert main(command) == 0
    rows = list(budgets.load(table).values())
    budgets.write([rows[3] | {"source": "before"}], triton=str(budgets.version(table)), path=table)
    asked = pretend_to_compile(monkeypatch, lambda _: None)
    assert main(command) == 0
    assert asked == [[f"{rows[3]['kernel']} {rows[3]['dtype']}"]]


def test_a_kernel_that_does_not_compile_is_said_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "budgets.json"
    pretend_to_compile(monkeypatch, lambda number: KernelCompileError("does not compile") if number == 1 else None)
    assert main([*SWIGLU, "--table", str(table), "--write", "--json"]) == 2
    printed = capsys.readouterr()
    assert "does not compile" in printed.err
    assert len(json.loads(printed.out)) == len(budgets.load(table)) == 5


def test_a_worse_row_breaks_the_budget_even_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "budgets.json"
    pretend_to_compile(monkeypatch, lambda _: None)
    assert main([*SWIGLU, "--table", str(table), "--write"]) == 0
    better = [row | {"spill_bytes": -4} for row in budgets.load(table).values()]
    budgets.write(better, triton=str(budgets.version(table)), path=table)
    assert main([*SWIGLU, "--table", str(table), "--write", "--check"]) == 1
    assert "6 rows, 6 changes, 6 over budget" in capsys.readouterr().err


def test_the_digest_of_a_source_is_that_of_what_is_compiled(tmp_path: Path) -> None:
    """A comment, a docstring or another place in the file are nothing; a kernel that is called, or a launch, is."""
    kernel = "@triton.jit\ndef kernel(x, N: tl.constexpr):\n    tl.store(x, called(N))\n"
    called = "@triton.jit\ndef called(n):\n    return n + 1\n"
    start = "import triton\nimport triton.language as tl\n"
    texts = {
        "plain": start + called + kernel,
        "commented": start + "\n# moved\n" + called + kernel.replace("    tl", '    """Store."""\n    # why\n    tl'),
        "other_call": start + called.replace("n + 1", "n + 2") + kernel,
    }
    program = (
        "import dataclasses, importlib, sys\n"
        "from triweave.kernels.compiler.compile_triton import Variant\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "for name in sys.argv[2:]:\n"
        "    variant = Variant(op='a', kernel='a', dtype='bf16', head_dim=None, config='',"
        " function=importlib.import_module(name).kernel, signature={'x': '*i32'}, constants={'N': 1})\n"
        "    print(variant.source, dataclasses.replace(variant, constants={'N': 2}).source)\n"
    )
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    result = python("-c", program, str(tmp_path), *texts)
    assert result.returncode == 0, result.stderr[-2000:]
    (plain, other_launch), (commented, _), (other_call, _) = (line.split() for line in result.stdout.splitlines())
    assert plain == commented
    assert len({plain, other_launch, other_call}) == 3


@pytest.mark.slow
def test_ctrl_c_keeps_the_rows_and_two_jobs_make_the_rest(tmp_path: Path) -> None:
    table = tmp_path / "budgets.json"
    command = [sys.executable, *COMMAND, *SWIGLU[2:], "--table", str(table), "--write", "--only-missing", "--jobs", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not budgets.load(table):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read() if process.stderr else ""
    assert process.returncode == 130, said
    kept = len(budgets.load(table))
    assert f"{kept} of 6 rows are in the table" in said
    assert 0 < kept < 6
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(json.loads(result.stdout)) == 6 - kept
    committed = {name: row for name, row in budgets.load().items() if name[0] == "swiglu" and name[2] == "sm_90"}
    assert budgets.changes(budgets.load(table).values(), committed) == []


TWO_JOBS = ["--json", "--jobs", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", MATRIX_INSTRUCTIONS)
def test_a_handful_of_rows_is_what_compiling_gives(arch: str) -> None:
    """The whole table is `triweave kernels compile --check`."""
    ops = ",".join({variant.op for _, variant in chips_and_variants().values()})
    result = python(*COMMAND, "--arch", arch, "--op", ops, "--dtype", "bf16", "--head-dim", "128", "--check", *TWO_JOBS)
    assert result.returncode == 0, result.stderr[-2000:]
    assert {row["op"] for row in json.loads(result.stdout)} >= {"attention", "qk_norm_rope", "rms_norm"}


@pytest.mark.slow
def test_the_table_is_of_the_kernels_as_they_are() -> None:
    if budgets.version() != version("triton"):
        pytest.skip(f"the table is of Triton {budgets.version()}, here is {version('triton')}")
    sources = {name: variant.source for name, (_, variant) in chips_and_variants().items()}
    assert budgets.missing(sources, budgets.load()) == [], "compile them again with --write --only-missing"


def test_a_stride_between_heads_that_16_bytes_do_not_divide_is_said_to_the_kernels() -> None:
    """They would read beside the numbers, which only a GPU notices."""
    heads = torch.empty(1, 4, 3, 72)
    assert head_unit(heads) == head_unit(heads, heads[..., 8:]) == 8
    assert head_unit(heads, torch.empty(1, 4, 3, 20)) == 1
    assert head_unit(torch.empty(1, 4, 3, 76)[..., :72]) == 1


@pytest.mark.slow
def test_heads_of_72_are_loaded_16_bytes_at_a_time() -> None:
    """And not number by number, as Triton does where it is not told that 8 divides the stride between heads."""
    program = (
        "from triweave.kernels.compiler.compile_triton import compile_variant, disassembled, parse_sass\n"
        "from triweave.kernels.compiler.shipped_triton import variants\n"
        "for one in variants(['attention']):\n"
        "    if (one.dtype, one.head_dim) == ('bf16', 72):\n"
        "        code = parse_sass(disassembled(compile_variant(one, 'sm_80').asm['cubin']))\n"
        "        print(one.kernel, *{i.opcode for i in code if i.base in ('LDG', 'LDGSTS')})\n"
    )
    result = python("-c", program)
    assert result.returncode == 0, result.stderr[-2000:]
    for line in result.stdout.splitlines():
        assert "LDG.E.128" in line.split()
        # dkv's second part of 16 rows is one number a thread
        assert ("LDG.E.U16" in line.split()) == line.startswith("dkv"), line
    assert len(result.stdout.splitlines()) == 3


@pytest.mark.slow
def test_every_shipped_kernel_compiles_for_amd() -> None:
    """A smoke test: one dtype and one width of each kernel, for gfx942."""
    from triweave.kernels.compiler.shipped_triton import variants

    widths: dict[tuple[str, str], set[int | None]] = {}
    for one in variants():
        widths.setdefault((one.op, one.kernel), set()).add(one.head_dim)
    chosen = {128 if 128 in of_kernel else min(of_kernel, key=str) for of_kernel in widths.values()}
    command = [*COMMAND, "--arch", "gfx942", "--dtype", "bf16", "--head-dim", ",".join(map(str, chosen)), *TWO_JOBS]
    result = python(*command)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = json.loads(result.stdout)
    assert {(row["op"], row["kernel"]) for row in rows} == widths.keys()
    assert all(row["matrix_instruction"] == "v_mfma" for row in rows if row["op"] in MATRIX_OPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_90,sm_77"], "there is no arch 'sm_77'; known are sm_80"),
        (["--op", "sotfmax"], "'sotfmax' has no Triton kernel; those that do: attention"),
        (["--op", "swiglu", "--dtype", "fp8"], "no shipped variant"),
        (["--op", "swiglu", "--jobs", "0"], "--jobs is 0; give 1 or more"),
    ],
)
def test_what_is_not_shipped_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", "compile", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.out == ""


def test_an_interpreted_kernel_is_refused() -> None:
    from triton.runtime.interpreter import InterpretedFunction

    from triweave.kernels.compiler.compile_triton import compiled
    from triweave.kernels.compiler.shipped_triton import variants

    variant = variants(["swiglu"])[0]
    interpreted = dataclasses.replace(variant, function=InterpretedFunction(variant.function.fn))
    with pytest.raises(KernelUnavailableError, match="unset TRITON_INTERPRET"):
        compiled(interpreted, "sm_90")
