"""The ahead-of-time compiler on a kernel of its own, and the shipped kernels against the committed table.

Compiling happens in processes of their own: one that tests interpreted kernels cannot compile them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from triweave.kernels import budgets
from triweave.kernels.errors import KernelUnavailableError
from triweave.launch.cli import main

pytest.importorskip("triton")

LOOP_DOT = Path(__file__).with_name("loop_dot.py")
COMMAND = ("-m", "triweave.launch.cli", "kernels", "compile")


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


def test_the_table_holds_shipped_variants_only_and_its_16_bit_inner_loops_are_free_of_local_memory() -> None:
    from triweave.kernels.shipped_triton import variants

    shipped = {(one.op, one.kernel, one.dtype, one.head_dim, one.config) for one in variants()}
    table = budgets.load()
    stale = [name for name in table if (*name[:2], *name[3:]) not in shipped]
    assert stale == [], "compile them again with --write"
    matrix = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
    for row in table.values():
        assert row["occupancy"] > 0, f"does not fit: {row}"
        if row["op"] == "attention" and row["dtype"] != "fp32" and row["head_dim"] <= 128:
            assert row["inner_loop_local_accesses"] == 0, row
            assert row["matrix_instruction"] == matrix[row["arch"]], row


def test_the_command_prints_rows_in_the_output_form_and_checks_them() -> None:
    result = python(*COMMAND, "--arch", "sm_90", "--op", "swiglu", "--dtype", "bf16", "--json", "--check")
    assert result.returncode == 0, result.stderr[-2000:]
    rows = json.loads(result.stdout)
    assert [row["kernel"] for row in rows] == ["swiglu_forward", "swiglu_backward"]
    form = "op kernel arch dtype head_dim config registers spill_bytes inner_loop_local_accesses shared_bytes occupancy"
    assert all(list(row) == [*form.split(), "matrix_instruction", "compile_s"] for row in rows)
    assert "2 rows, 0 changes, 0 over budget" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("op", "arch"), sorted({(row["op"], row["arch"]) for row in budgets.load().values()}))
def test_every_row_of_the_table_is_what_compiling_gives(op: str, arch: str) -> None:
    table = {name: row for name, row in budgets.load().items() if (row["op"], row["arch"]) == (op, arch)}
    dtypes, widths = ({str(row[name]) for row in table.values()} for name in ("dtype", "head_dim"))
    chosen = ["--dtype", ",".join(dtypes), "--head-dim", ",".join(widths)]
    result = python(*COMMAND, "--arch", arch, "--op", op, *chosen, "--json")
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [row for row in json.loads(result.stdout) if budgets.key(row) in table]
    assert len(rows) == len(table)
    assert [str(change) for change in budgets.changes(rows, table) if change.broken] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_90,sm_77"], "there is no arch 'sm_77'; known are sm_80"),
        (["--op", "sotfmax"], "'sotfmax' has no Triton kernel; those that do: attention"),
        (["--op", "swiglu", "--dtype", "fp8"], "no shipped variant"),
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

    from triweave.kernels.compile_triton import compiled
    from triweave.kernels.shipped_triton import variants

    variant = next(variants(["swiglu"]))
    interpreted = dataclasses.replace(variant, function=InterpretedFunction(variant.function.fn))
    with pytest.raises(KernelUnavailableError, match="unset TRITON_INTERPRET"):
        compiled(interpreted, "sm_90")
