"""What `make test-gpu` runs, here on the CPU path: its checks tell right from wrong, and it ends in time."""

import json
import math
import subprocess
import sys

import pytest
import torch

from triweave.kernels.bench.cases import Sizes
from triweave.kernels.bench.masks import bench_mask
from triweave.kernels.device import device_checks, device_suite
from triweave.kernels.device.device_suite import LEFT_OUT, Plan, failures, run, run_checks

CPU = torch.device("cpu")


def plan(**changes):
    return Plan(**{"device": CPU, "impl": "sdpa", "rows": 67, "dtypes": (torch.float32,), "repeats": 1, **changes})


def silent(_):
    pass


def test_the_checks_pass_what_is_right_in_every_dtype():
    rows = list(run_checks(plan(dtypes=(torch.bfloat16, torch.float32)), silent))
    assert [row["status"] for row in rows] == ["passed"] * len(rows)
    assert {row["check"] for row in rows} >= {*device_checks.masks(67), "heads of 72", "views of one projection"}


@pytest.mark.parametrize("wrong", ["mask edge", "scale", "gradient", "not a number", "another order"])
def test_the_checks_find_what_is_wrong(monkeypatch, wrong):
    right = device_checks.attention
    calls = []

    def attention(q, k, v, lo, hi, impl):
        if impl == "reference":
            return right(q, k, v, lo, hi, impl=impl)
        calls.append(impl)
        if wrong == "mask edge":
            hi = (hi + 1).clamp(max=k.shape[1])
        out, lse = right(q, k, v, lo, hi, impl=impl, scale=1.0 if wrong == "scale" else None)
        if wrong == "gradient":
            out = out.detach() + 1.02 * (out - out.detach())
        if wrong == "not a number":
            out = out / out.ne(0)
        if wrong == "another order":
            out = out * (1 + 1e-7 * len(calls))
        return out, lse

    monkeypatch.setattr(device_checks, "attention", attention)
    failed = {row["check"] for row in run_checks(plan(), silent) if row["status"] == "failed"}
    if wrong == "another order":
        assert failed == {"the same bits twice"}
    elif wrong == "not a number":
        assert failed == {"padding rows", "any intervals, crossed ones among them", "all empty"}
    else:
        assert failed >= {"spans", "packed documents, empty ones among them", "8 query heads over 1"}


def test_a_check_that_breaks_off_is_a_finding(monkeypatch):
    def attention(*_, **__):
        raise RuntimeError("no such\nregister")

    monkeypatch.setattr(device_checks, "attention", attention)
    row = next(run_checks(plan(), silent))
    assert row["status"] == "failed: RuntimeError: no such register"


def test_rows_that_lie_far_apart_are_the_same_bits():
    assert device_checks.far_offsets_check(CPU, "sdpa", apart=1 << 16).worst() == 0.0


def test_shares_of_what_is_allowed():
    exact = torch.tensor([1.0, -2.0], dtype=torch.float64)
    got = exact.float()
    assert device_checks.share_of_allowed(got, got, exact) == 0.0
    assert device_checks.share_of_allowed(got * 1.0001, got, exact) > 1
    assert device_checks.share_of_allowed(got * torch.nan, got, exact) == math.inf
    assert device_checks.share_of_allowed(got * 0, got * 0, exact * 0) == 0.0
    assert device_checks.share_of_allowed(got, got * 0, exact * 0) == math.inf


def test_the_suite_gathers_checks_and_rows_and_goes_on_after_a_failure(monkeypatch):
    shapes = [
        (op, Sizes(mask=bench_mask("causal", 64), heads=2, key_heads=2, width=16), True)
        for op in ("attention", "swiglu")
    ]
    monkeypatch.setattr(device_suite, "build", _build_only_swiglu)
    result = run(plan(shapes=shapes), silent)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert failures(result) == ["attention: failed: RuntimeError: no attention today"]
    assert {row["impl"] for row in result["rows"] if row["ms"]} == {"triweave:reference", "torch"}
    assert result["machine"]["torch"] == torch.__version__


def _build_only_swiglu(op, sizes):
    from triweave.kernels.bench.cases import build

    if op == "attention":
        raise RuntimeError("no attention today")
    return build(op, sizes)


def test_what_does_not_fit_into_the_time_is_left_out():
    result = run(plan(seconds=0.0, shapes=[("swiglu", Sizes(mask=bench_mask("causal", 64)), True)]), silent)
    assert {row["status"] for row in result["checks"] + result["rows"]} == {LEFT_OUT}
    assert failures(result) == []


@pytest.mark.parametrize(
    ("device", "name"), [("NVIDIA H100 80GB HBM3", "h100.json"), ("NVIDIA RTX 9999 Ti", "nvidia_rtx_9999_ti.json")]
)
def test_the_file_is_named_for_the_chip(tmp_path, device, name):
    assert device_suite.result_file(device, tmp_path) == tmp_path / name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_it_says_so(capsys):
    assert device_suite.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


WITHOUT_OTHERS = """
import sys
import numpy, torch, torch._dynamo, triton
before = set(sys.modules)
import triweave.kernels.bench.masked_cases, triweave.kernels.bench.row_cases, triweave.kernels.device.device_suite
import triweave.kernels.admission.self_check_cases
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(tops - sys.stdlib_module_names - {"triweave", "torch", "triton", "numpy"}))
"""


@pytest.mark.slow
def test_it_needs_torch_triton_and_numpy_only():
    pytest.importorskip("triton")
    command = [sys.executable, "-c", WITHOUT_OTHERS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.slow  # it is what `make test-gpu` has just done
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_suite_passes_on_this_device(tmp_path):
    assert device_suite.main(["--results", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["rows"]
