"""`triweave kernels selftest`, in Triton's interpreter."""

from __future__ import annotations

import json

import pytest

from triweave.kernels import backends
from triweave.kernels.admission import admission, self_check
from triweave.launch.cli import main

ROW = {"op", "dtype", "width", "chip", "status", "worst_share_of_allowed", "worst", "seconds", "failure"}


@pytest.fixture(scope="module", autouse=True)
def kernels(interpreter):
    return interpreter


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv(admission.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(admission, "_verdicts", {})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def checks(monkeypatch):
    """Checks that cost nothing; returns what was asked for."""
    made = []
    monkeypatch.setattr(
        self_check, "figures_of", lambda op, dtype, width, _: made.append((op, str(dtype), width)) or ()
    )
    return made


def selftest(capsys, *words):
    code = main(["kernels", "selftest", *words])
    return code, capsys.readouterr()


def test_a_row_has_what_the_check_found(capsys, tmp_path):
    code, printed = selftest(capsys, "--op", "swiglu", "--dtype", "fp32", "--json")
    assert code == 0
    (row,) = json.loads(printed.out)
    assert set(row) == ROW
    assert (row["op"], row["dtype"], row["width"], row["status"]) == ("swiglu", "fp32", None, "admitted")
    assert 0 < row["worst_share_of_allowed"] < 1
    assert row["worst"] in ("y of halves of one projection", "grad gate_and_up of halves of one projection")
    assert len(list(tmp_path.rglob("swiglu-float32-0-*.json"))) == 1


def test_a_refused_kernel_is_exit_code_1_and_its_figures_are_printed(capsys, kernels, monkeypatch):
    module = kernels("swiglu_triton")
    intact = module.swiglu_forward
    monkeypatch.setattr(module, "swiglu_forward", lambda gate, up: intact(gate, up) * 1.01)
    code, printed = selftest(capsys, "--op", "swiglu", "--dtype", "fp32")
    assert code == 1
    assert "refused" in printed.out
    assert "swiglu fp32: y of halves of one projection: error " in printed.out


def test_everything_is_checked_at_its_usual_widths(capsys, checks):
    assert selftest(capsys)[0] == 0
    ops = {op for op, implementations in backends.IMPLEMENTATIONS.items() if "triton" in implementations}
    assert {op for op, _, _ in checks} == ops
    assert {dtype for _, dtype, _ in checks} == {"torch.float16", "torch.float32"}  # no bf16 in the interpreter
    assert {width for op, _, width in checks if op == "attention"} == {64, 128}
    assert {width for op, _, width in checks if op == "rms_norm"} == {64, 128, 4096}
    assert {width for op, _, width in checks if op == "swiglu"} == {0}


def test_widths_are_those_that_stand_for_what_is_asked(capsys, checks):
    selftest(capsys, "--op", "attention,rms_norm", "--dtype", "fp16", "--width", "70,72,5000")
    assert checks == [
        ("attention", "torch.float16", 70), ("attention", "torch.float16", 72),
        ("rms_norm", "torch.float16", 126), ("rms_norm", "torch.float16", 8190),
    ]  # fmt: skip
    checks.clear()
    selftest(capsys, "--op", "attention", "--dtype", "fp16", "--width", "all")
    assert [width for _, _, width in checks] == list(admission.shape_classes("attention"))


def test_only_missing_checks_what_is_not_remembered(capsys, checks, monkeypatch):
    selftest(capsys, "--op", "swiglu", "--dtype", "fp32")
    monkeypatch.setattr(admission, "_verdicts", {})
    selftest(capsys, "--op", "swiglu", "--only-missing")
    assert [dtype for _, dtype, _ in checks] == ["torch.float32", "torch.float16"]
    selftest(capsys, "--op", "swiglu", "--dtype", "fp32")
    assert len(checks) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--op", "atention"], "there is no op 'atention' to check here; there are attention, "),
        (["--dtype", "bf16"], "there is no dtype 'bf16' to check here; there are fp16, fp32"),
        (["--op", "attention", "--width", "wide"], "--width 'wide' must be numbers separated by commas, or all"),
    ],
)
def test_what_there_is_not_is_named(words, said, capsys):
    code, printed = selftest(capsys, *words)
    assert code == 2
    assert said in printed.err


def test_without_a_device_it_says_what_to_do(capsys, monkeypatch):
    monkeypatch.delenv(backends.INTERPRET_VARIABLE)
    code, printed = selftest(capsys)
    assert code == 2
    assert "there is no CUDA device here; run it on a machine with one, or set TRITON_INTERPRET=1" in printed.err
    assert len(printed.err.splitlines()) == 1
