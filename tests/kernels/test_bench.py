"""The benchmark: masks, contenders that agree, rows that say what was measured and what cannot run."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from triweave.kernels import tiles
from triweave.kernels.backends import IMPLEMENTATIONS
from triweave.kernels.bench import compiled, masked_cases, measure, plot, row_cases
from triweave.kernels.bench.cases import Sizes, build
from triweave.kernels.bench.limits import Limits, measure_limits
from triweave.kernels.bench.masks import SPAN_TOKENS, BenchMask, bench_mask
from triweave.kernels.bench.peers import NAMES, NOTHING_COMPARABLE
from triweave.kernels.bench.rows import DIRECTIONS, MEASURED, Options, bench_case, work_of, write_csv
from triweave.kernels.compiler import budgets
from triweave.kernels.errors import KernelInputError, KernelUnavailableError
from triweave.kernels.roofline import loop_mix
from triweave.kernels.roofline.loop_mix import CompiledLoops, LoopMix
from triweave.kernels.roofline.work import Work

LIMITS = Limits(matrix_flops=1e12, bytes_per_s=1e11, published=False)
QUICK = Options(directions=DIRECTIONS, repeats=1, warmup=0)


def tiny(kind="interleaved", tokens=256, documents=2, **sizes):
    return Sizes(
        mask=bench_mask(kind, tokens, documents=documents), **{"heads": 2, "key_heads": 2, "width": 16, **sizes}
    )


def measured(op, sizes, **options):
    return bench_case(build(op, sizes), LIMITS, dataclasses.replace(QUICK, **options), device_name="here")


@pytest.mark.parametrize("percent", [0, 25, 50, 75])
def test_masks_hold_the_share_of_span_tokens_they_name(percent):
    mask = bench_mask("interleaved", 4096, documents=8, span_percent=percent)
    lo, hi = mask.intervals()
    in_span = hi != np.arange(1, 4097)
    last_of_span = 1 / SPAN_TOKENS  # a span's last token sees what a causal one would
    assert in_span.mean() == pytest.approx(percent / 100 * (1 - last_of_span), abs=0.03)
    assert (mask.span_ids() >= 0).mean() == pytest.approx(percent / 100, abs=0.03)
    assert np.unique(lo).tolist() == list(range(0, 4096, 512))


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5), percent=st.sampled_from([0, 50, 100]))
def test_runs_hold_every_token_once_and_say_where_its_keys_end(lengths, percent):
    mask = BenchMask(kind="interleaved", lengths=tuple(lengths), span_percent=percent)
    starts = np.cumsum([0, *lengths])
    ends = [
        start + (end if is_span else row + 1)
        for start, document in zip(starts, mask.runs(), strict=False)
        for first, end, is_span in document
        for row in range(first, end)
    ]
    assert ends == mask.intervals()[1][0].tolist()
    assert mask.span_ids().shape == (1, sum(lengths))


def test_masks_of_given_and_of_drawn_lengths_fill_the_pack():
    assert bench_mask("documents", 100, lengths=[30, 25]).lengths == (30, 25, 30, 15)
    assert bench_mask("documents", 10, documents=3).lengths == (4, 3, 3)
    assert bench_mask("causal", 100, lengths=[30]).lengths == (100,)
    drawn = bench_mask("documents", 8192, documents=0)
    assert drawn.lengths == tuple(tiles.lognormal_packs(1, 8192)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "ring"}, "no mask 'ring'"),
        ({"kind": "documents", "documents": 9}, "9 documents in 8 tokens"),
        ({"kind": "interleaved", "span_percent": 101}, "101 %"),
    ],
)
def test_masks_that_there_are_not_are_named(arguments, message):
    with pytest.raises(KernelInputError, match=message):
        bench_mask(arguments.pop("kind"), 8, **{"documents": 1, **arguments})


@pytest.mark.parametrize(
    ("kind", "key_heads"), [("interleaved", 1), ("interleaved", 2), ("causal", 1), ("documents", 2)]
)
def test_the_contenders_compute_the_same(kind, key_heads):
    rows = measured("attention", tiny(kind, key_heads=key_heads), compare=("sdpa", "documents"))
    names = ("triweave:sdpa", "sdpa", "documents")
    assert [(row.impl, row.direction) for row in rows] == [(name, to) for name in names for to in DIRECTIONS]
    for row in rows:
        assert row.status == MEASURED
        assert row.error_vs_fp64 < 1e-5
        assert row.ms > 0
        assert row.cpu_ms > 0
        assert (row.mask, row.device, row.dtype) == (kind, "here", "float32")


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_every_op_is_measured(op):
    rows = measured(op, tiny(tokens=130, width=16, vocabulary=50), directions=("fwd", "bwd"), compare=("torch",))
    ours = [row for row in rows if row.impl.startswith("triweave:")]
    assert [row.direction for row in ours] == ["fwd", "fwd+bwd" if op == "linear_cross_entropy" else "bwd"]
    for row in rows:
        assert row.status == MEASURED or row.impl == "torch"
        assert row.error_vs_fp64 is None or row.error_vs_fp64 < 3e-5
        assert row.gb_per_s is None or row.gb_per_s > 0


def test_a_contender_that_computes_something_else_shows_in_the_error():
    case = dataclasses.replace(build("attention", tiny()), peers={"sdpa": lambda q, k, v: 1.01 * v + 0 * (q + k)})
    rows = bench_case(case, LIMITS, dataclasses.replace(QUICK, compare=("sdpa",)), device_name="here")
    assert all((row.error_vs_fp64 > 0.01) == (row.impl == "sdpa") for row in rows)


def test_a_contender_that_overwrites_its_inputs_spoils_nobody_elses():
    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            return torch.nn.functional.silu(gate) * up

        @staticmethod
        def backward(ctx, grad):
            gate, up = ctx.saved_tensors
            return gate.detach().zero_() + grad, up.detach().zero_() + grad

    peers = {"liger": Overwriting.apply, "torch": lambda gate, up: torch.nn.functional.silu(gate) * up}
    case = dataclasses.replace(build("swiglu", tiny()), peers=peers)
    before = [x.clone() for x in case.inputs]
    options = dataclasses.replace(QUICK, compare=("liger", "torch"), directions=("fwd", "bwd"))
    rows = bench_case(case, LIMITS, options, device_name="here")
    assert all(row.error_vs_fp64 < 1e-5 for row in rows if row.impl == "torch")
    assert all(map(torch.equal, case.inputs, before))


def test_what_cannot_run_is_a_row_with_the_reason():
    class ForwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(_, q, k, v):
            return q + k + v

    def refusing(*_):
        raise KernelUnavailableError("not on\nthis machine")

    def broken(*_):
        raise RuntimeError("out of luck")

    peers = {"sdpa": ForwardOnly.apply, "flash": refusing, "flex": broken, "documents": lambda q, k, v: (q + k + v) / 0}
    case = dataclasses.replace(build("attention", tiny()), peers=peers)
    options = dataclasses.replace(QUICK, compare=(*peers, "liger"), directions=("fwd", "bwd"))
    rows = {(row.impl, row.direction): row for row in bench_case(case, LIMITS, options, device_name="here")}
    assert rows["sdpa", "fwd"].ms > 0
    assert rows["sdpa", "bwd"].status.startswith("unsupported: NotImplementedError")
    assert rows["flash", "bwd"].status == "unsupported: not on this machine"
    assert rows["flex", "fwd"].status == "unsupported: RuntimeError: out of luck"
    assert rows["documents", "fwd"].status == "unsupported: its results are not finite where those in fp64 are"
    assert rows["liger", "fwd"].status == f"unsupported: {NOTHING_COMPARABLE['liger']}"
    figures = ("ms", "tflops", "percent_of_limit", "peak_bytes", "error_vs_fp64", "cpu_ms", "gb_per_s")
    assert all(getattr(rows["flash", "fwd"], name) is None for name in figures)


def test_a_mistake_of_ours_is_not_hidden_in_a_row():
    case = dataclasses.replace(build("swiglu", tiny()), ours=lambda _: lambda gate, up: gate @ up)
    with pytest.raises(RuntimeError):
        bench_case(case, LIMITS, QUICK, device_name="here")


def test_unknown_peers_and_ops_are_named():
    with pytest.raises(KernelInputError, match="no peer 'xformers'"):
        measured("swiglu", tiny(), compare=("xformers",))
    with pytest.raises(KernelInputError, match="no op 'softmax'"):
        build("softmax", tiny())
    assert tuple(NOTHING_COMPARABLE) == NAMES
    assert {*masked_cases.CASES, *row_cases.CASES} == set(IMPLEMENTATIONS)


def test_figures_follow_from_the_least_work():
    case = build("attention", tiny("causal", tokens=100))
    assert case.work("fwd").matrix_flops == 4 * 5050 * 2 * 16
    assert work_of(case, "fwd+bwd").matrix_flops == 14 * 5050 * 2 * 16
    assert work_of(case, "fwd+bwd").moved_bytes == case.work("fwd").moved_bytes + case.work("bwd").moved_bytes
    row = measured("attention", tiny("causal", tokens=100), directions=("fwd",))[0]
    assert row.tflops == pytest.approx(4 * 5050 * 2 * 16 / row.ms / 1e9, rel=1e-2)
    limit_ms, kind = LIMITS.of(case.work("fwd"))
    assert row.percent_of_limit == pytest.approx(100 * limit_ms / row.ms, rel=1e-2)
    assert row.limit_kind == kind == "matrix product, measured here"
    assert LIMITS.of(Work(matrix_flops=1e9, moved_bytes=1e9)) == (10.0, "copy, measured here")
    published = dataclasses.replace(LIMITS, published=True)
    assert published.of(Work(matrix_flops=1e12, moved_bytes=0)) == (1000.0, "matrix peak, published")


def test_limits_of_this_machine_are_rates():
    limits = measure_limits(torch.float32, torch.device("cpu"))
    assert 1e9 < limits.matrix_flops < 1e13
    assert 1e8 < limits.bytes_per_s < 1e12
    assert not limits.published


def test_peak_memory_is_what_was_held_at_once():
    def held():
        first = torch.empty(21 << 20, dtype=torch.uint8).fill_(1)
        del first
        return torch.empty(8 << 20, dtype=torch.uint8).fill_(1)

    held()
    found = measure.peak_bytes(held, torch.device("cpu"))
    assert found is None or 20 << 20 <= found < 24 << 20


def test_compiled_rows_are_those_of_the_committed_table():
    rows = compiled.compiled_rows("attention", tiny(width=64), ["h100"], ["fwd", "bwd"])
    table = [
        row for row in budgets.load().values()
        if (row["op"], row["arch"], row["dtype"], row["head_dim"]) == ("attention", "sm_90", "bf16", 64)
    ]  # fmt: skip
    assert {row.compiled["kernel"] for row in rows if row.direction == "bwd"} == {"dq", "dkv"}
    for row in rows:
        (costs,) = (costs for costs in table if costs["kernel"] == row.compiled["kernel"])
        assert {name: row.compiled[name] for name in compiled.COSTS} == {name: costs[name] for name in compiled.COSTS}
        assert row.compiled["limit_ms"] > 0
        assert (row.device, row.status, row.ms) == ("h100 (sm_90)", compiled.COMPILED, None)


def test_the_expected_time_is_modelled_on_the_very_mask(monkeypatch):
    counts = {field.name: 64 for field in dataclasses.fields(LoopMix)}
    mix = LoopMix(**{**counts, "weights_in_tensor_memory": False, "asynchronous": True})
    loops = CompiledLoops(registers=99, spill_bytes=0, occupancy=0.5, blocks=2, warps=4, loops=(mix, mix))
    name = ("attention", "forward", "sm_90", "bf16", 64, "QUERY_TILE=64 KEY_TILE=32 num_warps=4")
    monkeypatch.setattr(loop_mix, "load", lambda: {name: loops})

    def expected_ms(kind):
        rows = compiled.compiled_rows("attention", tiny(kind, tokens=8192, heads=16, width=64), ["h100"], ["fwd"])
        (row,) = (row for row in rows if row.compiled["kernel"] == "forward")
        return row.compiled["expected_ms"]

    assert 1.5 < expected_ms("causal") / expected_ms("documents") < 2.5


def test_what_was_not_compiled_has_a_limit_and_says_so():
    (row,) = compiled.compiled_rows("rms_norm", tiny(tokens=4, documents=1, heads=64, width=512), ["b200"], ["fwd"])
    assert row.status == compiled.NOT_COMPILED
    assert row.compiled["registers"] is None
    assert row.compiled["limit_ms"] > 0
    with pytest.raises(KernelInputError, match="no chip 'h900'"):
        compiled.compiled_rows("swiglu", tiny(), ["h900"], ["fwd"])


def test_csv_holds_every_row(tmp_path):
    rows = measured("attention", tiny(), compare=("liger",)) + compiled.compiled_rows(
        "swiglu", tiny(), ["h100"], ["fwd"]
    )
    path = tmp_path / "rows.csv"
    write_csv(rows, path)
    with path.open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [(line["op"], line["impl"], line["status"]) for line in read] == [
        (row.op, row.impl, row.status) for row in rows
    ]
    assert float(read[0]["ms"]) == rows[0].ms
    assert "registers=" in read[-1]["compiled"]
    json.dumps([dataclasses.asdict(row) for row in rows], allow_nan=False)
    with pytest.raises(KernelInputError, match="--csv"):
        write_csv(rows, tmp_path / "no" / "rows.csv")


def test_the_plot_marks_what_cannot_run(tmp_path):
    rows = measured("attention", tiny(), compare=("sdpa", "flash", "liger"), directions=("fwd",))
    path = tmp_path / "rows.png"
    plot.write_plot(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    axes = Figure().subplots()
    plot._panel(axes, rows, plot._colours(rows))
    assert [text.get_text() for text in axes.texts].count("×") == 2
    assert len(axes.patches) == 2
    assert axes.get_ylabel() == "GFLOP/s on the mask's area"
    with pytest.raises(KernelInputError, match="--plot"):
        plot.write_plot(rows, tmp_path / "no" / "rows.png")
