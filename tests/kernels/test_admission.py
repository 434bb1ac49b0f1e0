"""A Triton kernel serves where it must be checked only after it was, and whatever is wrong with it is found.

The interpreter on the CPU stands in for the chip: `chip` makes the CPU a device where kernels are checked.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import os
import sys
from inspect import isfunction
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from triweave.kernels import attention_tiles, backends
from triweave.kernels.admission import admission, self_check, self_check_cases
from triweave.kernels.attention import attention
from triweave.kernels.errors import KernelUnavailableError
from triweave.kernels.swiglu import swiglu

PINNED = attention_tiles.CONFIGS
SMALL = {"forward": (16, 32), "dq": (16, 16), "dkv": (32, 16)}


@pytest.fixture(scope="module", autouse=True)
def kernels(interpreter):
    """Attention's tiles small, so that the few rows of a check in the interpreter have full, masked and dead ones."""
    attention_tiles.CONFIGS = {
        kernel: {
            (size, 256): attention_tiles.TileConfig(query_tile=rows, key_tile=keys, warps=4, stages=1)
            for size in (2, 4)
        }
        for kernel, (rows, keys) in SMALL.items()
    }
    yield interpreter
    attention_tiles.CONFIGS = PINNED


@pytest.fixture(autouse=True)
def chip(monkeypatch, tmp_path):
    """A CPU where `auto` tries Triton first, after a check, with nothing remembered; returns the cache folder."""
    monkeypatch.setenv(admission.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(backends.OVERRIDE_VARIABLE, raising=False)
    monkeypatch.setitem(backends.AUTO, "cpu", ("triton", "sdpa", "reference"))
    monkeypatch.setattr(backends, "CHECKED_ON", {"cpu"})
    monkeypatch.setattr(backends, "_choices", {})
    monkeypatch.setattr(admission, "_verdicts", {})
    backends._choose.cache_clear()
    yield tmp_path
    backends._choose.cache_clear()


def another_process(monkeypatch):
    """Forget what this process knows; the files stay."""
    monkeypatch.setattr(admission, "_verdicts", {})
    backends._choose.cache_clear()


def attend(impl="auto"):
    torch.manual_seed(0)
    q = torch.randn(1, 20, 2, 16, requires_grad=True)
    k, v = torch.randn(1, 20, 1, 16), torch.randn(1, 20, 1, 16)
    lo, hi = torch.zeros(1, 20, dtype=torch.int32), torch.arange(1, 21, dtype=torch.int32)[None]
    return attention(q, k, v, lo, hi, impl=impl)[0], q


def verdict(op="swiglu", dtype=torch.float32, width=0):
    subject = admission.current_subject(op, dtype, admission.shape_class(op, width), device_type="cpu")
    return admission.verdict_of(subject, "cpu")


# What is right is admitted


def test_auto_takes_a_kernel_that_passed_and_says_so(caplog):
    with caplog.at_level(logging.INFO, logger=backends.logger.name):
        out, _ = attend()
    assert torch.equal(out, attend(impl="triton")[0])
    assert backends.choices() == (
        "attention: auto chose triton: its kernels passed their self-check, float32, width 16",
    )
    assert [record.getMessage() for record in caplog.records] == list(backends.choices())


QUICK = ["cross_attention", "rms_norm", "swiglu", "linear_cross_entropy"]


@pytest.mark.parametrize("op", QUICK)
def test_every_op_passes(op):
    assert verdict(op, torch.float16, width=32).failure is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", self_check_cases.CASES)
def test_every_op_passes_in_every_dtype(op, dtype):
    found = verdict(op, dtype, width=80)
    assert found.failure is None
    assert {figure.tensor.split()[0] for figure in found.figures} > {"grad"}
    assert 0 < max(figure.share_of_allowed for figure in found.figures) < 0.8


def test_every_op_with_a_triton_kernel_has_cases():
    assert set(self_check_cases.CASES) == {op for op, names in backends.IMPLEMENTATIONS.items() if "triton" in names}
    assert set(admission.LIMITS) <= set(self_check_cases.CASES)


def test_the_cases_have_full_masked_and_dead_tiles():
    from triweave.kernels.tiles import tile_table

    lo, hi = self_check_cases._packed(self_check.ROWS["cuda"])
    table = tile_table(lo.numpy(), hi.numpy(), keys=lo.shape[1], query_tile=128, key_tile=128)
    assert 0 < table.full_tiles < table.live_tiles < 2 * 3 * 3
    assert (hi <= lo).any()


# What is wrong is refused


MUTATIONS = {
    "a key too many at the mask's end": ("keys[None, :] < hi[:, None]", "keys[None, :] <= hi[:, None]"),
    "a key too few at the mask's start": ("keys[None, :] >= lo[:, None]", "keys[None, :] > lo[:, None]"),
    "the scale is missing": ("to_base_2 = scale * 1.4426950408889634", "to_base_2 = 1.4426950408889634"),
    "the scale is missing in dq": ("dq0 * scale", "dq0"),
    "the log-sum-exp is of the peak alone": (" + tl.log2(total)", ""),
    "dk and dv see a mask of their own": ("keys[:, None] < hi[None, :]", "keys[:, None] <= hi[None, :]"),
}


@pytest.fixture
def broken(kernels, monkeypatch, tmp_path):
    """Put an attention_triton in place whose source, or that of what it calls, was changed."""

    def put(change, replacement):
        changed = 0
        for part in ("heads_triton", "attention_triton"):
            intact = Path(kernels(part).__file__).read_text(encoding="utf-8")
            changed += intact.count(change)
            path = tmp_path / f"{part}.py"
            path.write_text(intact.replace(change, replacement), encoding="utf-8")
            name = f"triweave.kernels.{part}"
            specification = importlib.util.spec_from_file_location(name, path)
            module = importlib.util.module_from_spec(specification)
            monkeypatch.setitem(sys.modules, name, module)
            specification.loader.exec_module(module)
        assert changed, "the kernel was rewritten; name the change anew"

    return put


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_broken_kernel_is_refused_and_the_run_goes_on(what, broken, caplog):
    broken(*MUTATIONS[what])
    with caplog.at_level(logging.INFO, logger=backends.logger.name):
        out, q = attend()
        out.sum().backward()
    torch.testing.assert_close(out, attend(impl="reference")[0])
    assert q.grad.isfinite().all()
    (record,) = (record for record in caplog.records if record.name == backends.logger.name)
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("attention: auto chose sdpa: ")
    assert "(triton is out: its self-check on cpu failed: " in record.getMessage()
    assert " against fp64, allowed " in record.getMessage()
    assert record.getMessage().endswith(" of 10 results are off))")


def test_a_stale_log_sum_exp_is_refused(kernels, monkeypatch):
    """The forward returns the log-sum-exp of the call before; its output is right, the gradients are not."""
    module = kernels("attention_triton")
    intact, before = module.attention_forward, {}

    def stale(q, *rest):
        out, lse = intact(q, *rest)
        previous = before.get(lse.shape, torch.zeros_like(lse))
        before[lse.shape] = lse
        return out, previous

    monkeypatch.setattr(module, "attention_forward", stale)
    found = verdict("attention", width=16)
    wrong = {figure.tensor for figure in found.figures if not figure.passed}
    assert wrong == {"lse", "grad q", "grad k", "grad v"}
    assert attend()[0].isfinite().all()
    assert "auto chose sdpa" in backends.choices()[0]


def off_by_two_percent(function, place, changed):
    """Return the function with the tensor at `place` of its results off, and its name put into `changed` if it is."""

    def wrong(*args, **kwargs):
        results, structure = tree_flatten(function(*args, **kwargs))
        if place < len(results) and torch.is_floating_point(results[place]) and results[place].numel():
            results[place] = results[place] * 1.02
            changed.add(function.__name__)
        return tree_unflatten(results, structure)

    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("op", self_check_cases.CASES)
def test_two_percent_off_in_any_result_is_refused(op, kernels, monkeypatch):
    monkeypatch.setitem(self_check.ROWS, "cpu", 9)
    module = kernels(f"{op}_triton")
    launchers = [name for name, value in vars(module).items() if name.startswith(op) and isfunction(value)]
    subject = admission.current_subject(op, torch.float16, admission.shape_class(op, 32), device_type="cpu")
    ever_changed = set()
    for name in launchers:
        for place in range(5):
            changed = set()
            with monkeypatch.context() as patch:
                patch.setattr(module, name, off_by_two_percent(getattr(module, name), place, changed))
                admitted = admission.verdict_of(subject, "cpu", fresh=True).admitted
            assert admitted == (not changed), (name, place)
            ever_changed |= changed
    assert ever_changed == set(launchers)


def test_an_explicit_choice_of_a_refused_kernel_raises(broken):
    broken(*MUTATIONS["the scale is missing"])
    message = (
        r"attention: impl='triton' .* its self-check on cpu failed: out of packed documents .* use auto or sdpa or"
    )
    with pytest.raises(KernelUnavailableError, match=message):
        attend(impl="triton")


def test_a_kernel_that_cannot_run_is_refused_with_its_own_words(kernels, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    monkeypatch.setattr(kernels("swiglu_triton"), "swiglu_forward", fails)
    assert verdict().failure == "RuntimeError: out of resource: shared memory"
    assert torch.equal(swiglu(torch.ones(3), torch.ones(3)), swiglu(torch.ones(3), torch.ones(3), impl="reference"))
    assert admission.checking() is False


def test_what_no_kernel_is_for_is_refused_without_a_check(monkeypatch):
    monkeypatch.setattr(self_check, "figures_of", None)
    assert "wider than 256" in admission.refusal("attention", torch.float32, admission.TOO_WIDE, device_type="cpu")


def test_a_number_that_is_none_is_refused():
    want = torch.tensor([1.0, 2.0, -math.inf], dtype=torch.float64)
    for got in ([1.0, math.nan, -math.inf], [1.0, 2.0, 0.0], [1.0, -math.inf, -math.inf], [1.0, 2.0, math.nan]):
        figure = self_check._figure("case", "lse", want, want.float(), torch.tensor(got))
        assert not figure.passed
        assert figure.share_of_allowed == math.inf
    assert self_check._figure("case", "lse", want, want.float(), want.float()).passed
    assert not self_check._figure("case", "out", want, want.float(), want.half()).passed


def test_one_wrong_row_of_many_is_refused():
    want = torch.ones(10_000, dtype=torch.float64)
    got = want.half()
    got[17] = 1.01
    figure = self_check._figure("case", "out", want, want.half(), got)
    assert figure.rms_ratio < figure.allowed_rms_ratio
    assert not figure.passed


@pytest.mark.parametrize("override", ["triton", "swiglu=auto", "reference"])
def test_the_override_does_not_reach_the_check(override, kernels, monkeypatch):
    module = kernels("swiglu_triton")
    intact = module.swiglu_forward
    monkeypatch.setattr(module, "swiglu_forward", lambda gate, up: intact(gate, up) * 1.01)
    monkeypatch.setenv(backends.OVERRIDE_VARIABLE, override)
    assert verdict().failure.startswith("y of halves of one projection")


# Memory


@pytest.fixture
def counted(monkeypatch):
    """Checks that cost nothing and find nothing; returns the list of those made."""
    made = []
    figure = admission.Figure(
        case="a", tensor="y", error=0.1, allowed_error=1.0, rms_ratio=0.0, allowed_rms_ratio=0.005
    )
    monkeypatch.setattr(self_check, "figures_of", lambda *subject: made.append(subject) or (figure,))
    return made


def test_a_verdict_is_made_once_and_remembered_on_disk(monkeypatch, chip, counted):
    first = verdict()
    assert verdict() is first
    another_process(monkeypatch)
    assert verdict() == first
    assert counted == [("swiglu", torch.float32, 0, torch.device("cpu"))]
    (path,) = (chip / "triweave" / "kernels").iterdir()
    stored = json.loads(path.read_text())
    assert stored["subject"]["chip"] == "cpu"
    assert stored["failure"] is None


def test_a_refusal_is_remembered_too(monkeypatch, broken):
    broken(*MUTATIONS["the scale is missing"])
    attend()
    another_process(monkeypatch)
    monkeypatch.setattr(self_check, "figures_of", None)
    attend()
    assert all("auto chose sdpa" in line for line in backends.choices())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_device_in_trouble_is_not_held_against_the_kernel_for_ever(error, monkeypatch, chip):
    def fails(*_):
        raise error("no memory left")

    monkeypatch.setattr(self_check, "figures_of", fails)
    assert verdict().failure.endswith("no memory left")
    assert list(chip.iterdir()) == []


@pytest.mark.parametrize("field", ["chip", "capability", "triton", "torch", "source"])
def test_what_changes_is_checked_anew(field, counted):
    subject = verdict().subject
    admission.verdict_of(dataclasses.replace(subject, **{field: "another"}), "cpu")
    assert len(counted) == 2
    assert admission.load(subject) is not None


@pytest.mark.parametrize("damage", ["", "{", '{"subject": {}}', "[]"])
def test_a_damaged_file_is_checked_anew(damage, monkeypatch, counted):
    first = verdict()
    path = admission.verdict_file(first.subject)
    path.write_text(damage)
    another_process(monkeypatch)
    assert verdict() == dataclasses.replace(first, seconds=verdict().seconds)
    assert len(counted) == 2
    assert json.loads(path.read_text())["subject"] == dataclasses.asdict(first.subject)


def test_a_write_that_fails_leaves_nothing_and_is_named(monkeypatch, chip, caplog, counted):  # noqa: ARG001
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with caplog.at_level(logging.WARNING):
        assert verdict().admitted
    assert list((chip / "triweave" / "kernels").iterdir()) == []
    assert "No space left on device; set TRIWEAVE_CACHE to a folder" in caplog.text


def test_where_verdicts_lie(monkeypatch, chip):
    assert admission.cache_folder() == chip / "triweave" / "kernels"
    monkeypatch.delenv(admission.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert admission.cache_folder() == Path("/x/triweave/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert admission.cache_folder() == Path("/h/.cache/triweave/kernels")


# Shape classes, tracing


def test_a_limit_stands_for_itself_and_one_width_for_all_between_two():
    widths = (1, 15, 16, 17, 65, 70, 71, 72, 96, 97, 256, 257)
    classes = (14, 14, 16, 30, 70, 70, 70, 72, 96, 126, 256, admission.TOO_WIDE)
    assert tuple(admission.shape_class("attention", width) for width in widths) == classes
    assert admission.shape_class("swiglu", 1000) == admission.ANY_WIDTH
    assert admission.shape_classes("swiglu") == (admission.ANY_WIDTH,)
    for op in admission.LIMITS:
        classes = admission.shape_classes(op)
        assert list(classes) == sorted(set(classes))
        assert all(admission.shape_class(op, width) == width and width % 2 == 0 for width in classes)
    assert admission.described("attention", torch.bfloat16, 70) == "bfloat16, a width below 72"


def test_what_stands_for_a_width_has_its_kernels(kernels, monkeypatch):
    monkeypatch.setattr(attention_tiles, "CONFIGS", PINNED)
    for width in range(1, 257):
        stand_in = admission.shape_class("attention", width)
        assert attention_tiles.head_parts(stand_in) == attention_tiles.head_parts(width)
        for kernel in attention_tiles.SECTIONS:
            for size in (2, 4):
                configs = [attention_tiles.tile_config(kernel, x, size) for x in (stand_in, width)]
                assert configs[0] == configs[1]
    assert set(admission.ROW_LIMITS) >= set(kernels("rms_norm_triton").CONFIGS["rms_norm_forward_kernel"])
    assert set(admission.HEAD_LIMITS) >= set(kernels("qk_norm_rope_triton").CONFIGS["qk_norm_rope_forward_kernel"])


def test_the_check_runs_while_a_graph_is_traced():
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    compiled = torch.compile(lambda a, b: swiglu(a, b) * 2, fullgraph=True, backend="aot_eager")(gate, up)
    assert "auto chose triton" in backends.choices()[0]
    assert torch.equal(compiled, swiglu(gate, up, impl="triton") * 2)


def test_modes_of_the_caller_do_not_reach_the_check():
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert verdict("attention", width=16).failure is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_check_inside_a_checkpoint_leaves_its_bookkeeping_alone(use_reentrant):
    gate = torch.randn(3, 8, requires_grad=True)
    checkpoint(lambda x: swiglu(x, x), gate, use_reentrant=use_reentrant).sum().backward()
    assert "auto chose triton" in backends.choices()[0]
    again = gate.detach().requires_grad_()
    swiglu(again, again, impl="triton").sum().backward()
    assert torch.equal(gate.grad, again.grad)
