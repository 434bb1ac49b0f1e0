"""The roofline model: limits, clocks of a turn, schedules and rows, against figures worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triweave.kernels import tiles
from triweave.kernels.errors import KernelInputError
from triweave.kernels.roofline import loop_mix, roofline, roofline_rows, work
from triweave.kernels.roofline.chips import PEAKS, chip_of_device, peaks
from triweave.kernels.roofline.loop_mix import CompiledLoops, LoopMix
from triweave.kernels.roofline.roofline_rows import Case
from triweave.kernels.roofline.work import AttentionShape, Work
from triweave.launch.cli import main

H100, B200 = PEAKS["h100"], PEAKS["b200"]
MIX = LoopMix(
    issued=400,
    fma=200,
    alu=100,
    special=34,
    exponentials=34,
    shared_clocks=20,
    matrix=12,
    matrix_flops=524288,
    matrix_clocks_by_operands=96.0,
    weights_in_tensor_memory=False,
    asynchronous=True,
)
"""Much like one turn of the forward on sm_90, tile 128 x 64, K=128, of one of 8 warps."""
MASKED = dataclasses.replace(MIX, issued=600, alu=300)


def compiled(*loops: LoopMix, blocks: int = 1, warps: int = 8) -> CompiledLoops:
    return CompiledLoops(registers=200, spill_bytes=0, occupancy=0.125, blocks=blocks, warps=warps, loops=loops)


@pytest.mark.parametrize(
    ("chip", "matrix_tflops", "fp32_tflops"),
    [("a100", 312, 19.5), ("h100", 989, 61.8), ("h200", 989, 61.8), ("b200", 2250, 70.3), ("rtx5090", 209.5, 104.8)],
)
def test_rates_per_multiprocessor_multiply_to_the_published_peaks(
    chip: str, matrix_tflops: float, fp32_tflops: float
) -> None:
    assert peaks(chip).matrix_flops / 1e12 == pytest.approx(matrix_tflops, rel=0.002)
    assert peaks(chip).fp32_flops / 1e12 == pytest.approx(fp32_tflops, rel=0.002)


def test_devices_are_known_by_their_names() -> None:
    assert chip_of_device("NVIDIA H100 80GB HBM3") == "h100"
    assert chip_of_device("NVIDIA H200") == "h200"
    assert chip_of_device("NVIDIA GeForce RTX 5090") == "rtx5090"
    assert chip_of_device("Tesla T4") is None
    with pytest.raises(KernelInputError, match="there is no chip 'b300'; known are a100"):
        peaks("b300")


def test_attention_counts_the_live_pairs_only() -> None:
    lo, hi = tiles.document_intervals(np.array([3, 5]))
    pairs = tiles.mask_area(lo, hi)
    shape = AttentionShape(batch=1, rows=8, keys=8, heads=4, key_heads=2, width=16, pairs=pairs)
    live = sum(1 for i in range(8) for j in range(8) if lo[0, i] <= j < hi[0, i])
    assert work.attention("fwd", shape).matrix_flops == 2 * 2 * live * 4 * 16
    assert work.attention("bwd", shape).matrix_flops == 5 * 2 * live * 4 * 16
    executed = sum(work.attention(kernel, shape).matrix_flops for kernel in ("dq", "dkv"))
    assert executed == 7 * 2 * live * 4 * 16
    assert work.attention("fwd", shape).exponentials == live * 4
    read_and_written = 2 * (8 * 4 * 16 + 8 * 2 * 16) * 2 + 8 * 4 * 4 + 2 * 8 * 4
    assert work.attention("fwd", shape).moved_bytes == read_and_written


def test_qk_norm_rope_moves_what_the_design_says() -> None:
    moved = work.qk_norm_rope("fwd", tokens=8192, heads=32, key_heads=8, width=128).moved_bytes
    assert moved / 1e6 == pytest.approx(168, abs=1)


@pytest.mark.parametrize(
    ("needed", "kind", "ms"),
    [
        (Work(matrix_flops=989.4e12, moved_bytes=1e9), "matrix", 1000.0),
        (Work(matrix_flops=1e9, moved_bytes=3.35e12), "memory", 1000.0),
        (Work(matrix_flops=1e9, moved_bytes=1e9, exponentials=132 * 1.83e9 * 16), "exponentials", 1000.0),
    ],
)
def test_the_scarcest_unit_sets_the_limit(needed: Work, kind: str, ms: float) -> None:
    found = roofline.limit(needed, H100)
    assert found.kind == kind
    assert found.ms == pytest.approx(ms, rel=1e-3)


def test_fp32_products_are_held_against_the_fp32_lanes() -> None:
    needed = Work(matrix_flops=61.8e12, moved_bytes=1)
    assert roofline.limit(needed, H100, number_bytes=4).ms == pytest.approx(1000, rel=0.01)


def test_clocks_of_a_turn_by_unit() -> None:
    clocks = roofline.turn_clocks(MIX, 8, [], 2 * 64 * 128 * 2, H100)
    assert clocks.tensor == 4 * 128 * 64 * 128 / 4096 == 1024
    assert clocks.shared == (20 + 96) * 8
    assert clocks.issue == 400 * 8 / 4
    assert clocks.fp32 == 200 * 8 * 32 / 128
    assert clocks.alu == 100 * 8 * 32 / 64
    assert clocks.special == 34 * 8 * 32 / 16
    assert clocks.l2 == pytest.approx(32768 * 132 / 5120)
    assert clocks.busiest == "tensor"
    assert clocks.overlapped == 1024
    assert clocks.in_turn == 1024 + 800


def test_loads_that_are_not_asynchronous_are_waited_for() -> None:
    waiting = dataclasses.replace(MIX, asynchronous=False)
    one, other = (roofline.turn_clocks(mix, 8, [], 32768, H100) for mix in (MIX, waiting))
    assert other.overlapped == one.overlapped
    assert other.in_turn == pytest.approx(one.in_turn + one.l2 + 300)


def test_instructions_of_single_warps_do_not_fill_the_matrix_units_of_sm_90() -> None:
    warps = dataclasses.replace(MIX, matrix_clocks_by_operands=0.0)
    groups, single = (roofline.turn_clocks(mix, 8, [], 0, H100).tensor for mix in (MIX, warps))
    assert single == pytest.approx(groups / 0.63)
    assert roofline.turn_clocks(warps, 8, [], 0, PEAKS["a100"]).tensor == 524288 * 8 / 2048


def test_where_the_code_does_not_say_the_products_of_the_tile_count_and_64_rows_fill_half_of_the_datapath() -> None:
    silent = dataclasses.replace(
        MIX, matrix_flops=0, matrix_clocks_by_operands=0.0, shared_clocks=0, weights_in_tensor_memory=True
    )
    wide, narrow = (
        roofline.turn_clocks(silent, 8, roofline.attention_products("forward", rows, 128, 128), 0, B200)
        for rows in (128, 64)
    )
    assert wide.tensor == 4 * 128 * 128 * 128 / 8192
    assert wide.shared == (3 * 128 * 128 * 2) / 128, "q, k and v; the weights are in tensor memory"
    assert narrow.tensor == wide.tensor


def test_programs_of_a_schedule_start_in_order_in_the_slot_that_is_free_first() -> None:
    assert roofline.makespan(np.array([3.0, 3.0, 3.0, 3.0]), 2) == 6
    assert roofline.makespan(np.array([1.0, 1.0, 1.0, 9.0]), 2) == 10, "the longest last"
    assert roofline.makespan(np.array([9.0, 1.0, 1.0, 1.0]), 2) == 9
    assert roofline.makespan(np.zeros(0), 4) == 0


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
def test_programs_hold_the_tiles_of_the_table(kernel: str) -> None:
    lo, hi = tiles.document_intervals(np.array([70, 130, 56]), span_tokens=16, span_every_tokens=64)
    table = tiles.tile_table(lo, hi, keys=256, query_tile=32, key_tile=16)
    full, masked = roofline.programs_of(table, kernel)
    assert len(full) == (256 // 16 if kernel == "dkv" else 256 // 32)
    assert full.sum() == table.full_tiles
    assert (full + masked).sum() == table.live_tiles
    key = np.arange(256)
    seen = (key >= lo[0][:, None]) & (key < hi[0][:, None])
    live = seen.reshape(8, 32, 16, 16).any(axis=(1, 3))
    assert (full + masked).tolist() == live.sum(axis=0 if kernel == "dkv" else 1).tolist()


def bound(kernel: str = "forward", loops: CompiledLoops | None = None, **changed: Any) -> roofline.KernelBound:
    """Return the model of a kernel on a causal mask of 4096 keys."""
    case = dataclasses.replace(Case(mask="causal", batch=1, sequence_length=4096), **changed)
    masks = roofline_rows.Masks(case)
    held = loops or compiled(MIX, MASKED)
    return roofline_rows.kernel_bound(kernel, held, 128, 64, case, masks, H100)


def test_a_bound_is_the_tiles_work_spread_over_the_chip() -> None:
    found = bound()
    full, masked = 32 * 31 // 2 * 2, 32 * 2
    clocks = 16 * (full * 1024 + masked * 1200) / 132
    assert found.bound_ms == pytest.approx(clocks / 1.83e9 * 1e3)
    assert found.bound_kind == "tensor"
    assert found.full_share == pytest.approx(full / (full + masked))
    assert found.work_to_area == pytest.approx((full + masked) * 128 * 64 / (4096 * 4097 / 2))


def test_blocks_that_share_a_multiprocessor_fill_each_others_gaps() -> None:
    alone, shared = bound(), bound(loops=compiled(MIX, MASKED, blocks=2))
    assert shared.bound_ms == alone.bound_ms
    assert shared.expected_ms < 0.75 * alone.expected_ms


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
def test_expected_is_never_below_the_bound_nor_that_below_the_limit(kernel: str) -> None:
    for key_heads in (16, 4, 1):
        found = bound(kernel, key_heads=key_heads)
        pairs = 4096 * 4097 // 2
        shape = roofline_rows.attention_shape(
            Case(mask="causal", batch=1, sequence_length=4096, key_heads=key_heads), pairs
        )
        least = roofline.limit(work.attention("forward", shape), H100).ms
        assert found.expected_ms >= found.bound_ms >= least


def test_a_plain_product_is_its_tiles_in_waves() -> None:
    turn = dataclasses.replace(MIX, matrix_flops=2 * 128 * 128 * 64 // 8, matrix_clocks_by_operands=0.0, issued=100)
    tile = roofline.Product(rows=128, columns=128, inner=64)
    shape = roofline.Product(rows=1000, columns=2560, inner=1024)
    needed = work.product(rows=1000, columns=2560, inner=1024)
    assert needed.matrix_flops == 2 * 1000 * 2560 * 1024
    held = compiled(dataclasses.replace(turn, fma=10, alu=10, special=0, shared_clocks=0))
    found = roofline.product_bound(held, tile, shape, number_bytes=2, work=needed, chip=H100)
    programs, turns = 8 * 20, 16
    l2 = 256 * 64 * 2 * 132 / 5120
    assert found.bound_kind == "l2"
    assert found.bound_ms == pytest.approx(programs * turns * l2 / 132 / 1.83e9 * 1e3)
    in_turn = 512 / 0.63 + 200
    assert found.expected_ms == pytest.approx(2 * turns * max(in_turn, l2) / 1.83e9 * 1e3), "two waves of 132"
    assert found.work_to_area == pytest.approx(1024 / 1000)


def test_the_cross_entropy_runs_four_products_where_three_are_needed() -> None:
    config = "ROWS=128 COLUMNS=128 DEPTH=64 GROUP=16 WHOLE=True num_warps=8 num_stages=3"
    names = roofline_rows.PRODUCT_KERNELS
    table = {("linear_cross_entropy", name, "sm_90", "bf16", None, config): compiled(MIX) for name in names}
    case = Case(batch=1, sequence_length=512, vocabulary=4096)
    *kernels, total = roofline_rows.cross_entropy_rows(case, "h100", table)
    assert [row.impl for row in kernels] == [f"triweave {name}" for name in names]
    assert total.ms == pytest.approx(sum(row.ms or 0 for row in kernels))
    assert total.tflops == pytest.approx(6 * 512 * 2048 * 4096 / (total.ms or 1) / 1e9)
    assert all(row.ms is None for row in roofline_rows.cross_entropy_rows(case, "b200", table))


def test_few_key_heads_leave_multiprocessors_idle_in_dkv() -> None:
    many, one = bound("dkv", key_heads=16), bound("dkv", key_heads=1)
    assert one.bound_ms == pytest.approx(many.bound_ms)
    assert one.expected_ms > 1.5 * many.expected_ms, "64 programs for 132 multiprocessors"


def test_rows_say_what_they_are(tmp_path: Path) -> None:
    config = "QUERY_TILE=128 KEY_TILE=64 num_warps=8 num_stages=2"
    table = {
        ("attention", name, "sm_90", "bf16", 128, config): compiled(MIX, MASKED) for name in ("forward", "dq", "dkv")
    }
    case = Case(mask="causal", batch=1, sequence_length=1024)
    rows = list(roofline_rows.model_rows(["attention", "swiglu"], [case], ["h100", "b200"], table))
    assert {row.status for row in rows} == {"model"}
    forward, dq, dkv, backward = (row for row in rows if row.chip == "h100" and row.op == "attention")
    assert [row.impl for row in (forward, dq, dkv)] == ["triweave forward", "triweave dq", "triweave dkv"]
    assert backward.ms == pytest.approx((dq.ms or 0) + (dkv.ms or 0))
    assert forward.percent_of_limit == pytest.approx(100 * (forward.limit_ms or 0) / (forward.ms or 1))
    assert forward.tflops == pytest.approx(4 * (1024 * 1025 / 2) * 16 * 128 / (forward.ms or 1) / 1e9)
    without = [row for row in rows if row.chip == "b200" and row.op == "attention"]
    assert all(row.ms is None and row.limit_ms for row in without), "nothing is compiled for it, so only the limit"
    for row in roofline_rows.public_rows(["h100", "b200"]):
        assert (row.status, bool(row.source)) == ("measured elsewhere", True)
        assert 0 < (row.percent_of_limit or 0) < 100
    measured = {"op": "swiglu", "impl": "triton", "direction": "fwd", "shape": "x", "dtype": "bf16", "ms": 1.5}
    (tmp_path / "h100.json").write_text(json.dumps([measured, measured | {"ms": None}]))
    (executed,) = roofline_rows.executed_rows(["h100", "b200"], folder=tmp_path)
    assert (executed.status, executed.ms, executed.source) == ("executed here", 1.5, "h100.json")


def test_every_implementation_that_is_to_be_compared_has_a_public_figure() -> None:
    found = {(row.impl, row.chip) for row in roofline_rows.public_rows(["h100", "b200"])}
    wanted = ("FlashAttention-2", "FlashAttention-3", "FlexAttention", "TLX", "MagiAttention")
    assert found >= {(impl, "h100") for impl in wanted}
    assert ("FlashAttention-4", "b200") in found


@pytest.mark.parametrize("chip", ["h100", "b200"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_committed_loops_give_a_row_for_every_kernel(chip: str, head_dim: int) -> None:
    case = Case(mask="interleaved", batch=1, sequence_length=2048, head_dim=head_dim)
    rows = list(roofline_rows.model_rows(["attention"], [case], [chip], loop_mix.load()))
    assert len(rows) == 4
    for row in rows:
        assert row.ms is not None
        assert row.bound_ms is not None
        assert row.limit_ms is not None
        assert row.ms >= row.bound_ms >= row.limit_ms


def test_the_command_prints_models_and_public_figures(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--mask", "causal", "--batch", "1", "--sequence-length", "1024", "--heads", "4", "--key-heads", "2"]
    assert main(["kernels", "roofline", "--chip", "h100", *shape, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["status"] for row in rows} >= {"model", "measured elsewhere"}
    assert {row["op"] for row in rows} == set(roofline_rows.OPS)
    shapes = {row["op"]: row["shape"] for row in rows if row["status"] == "model"}
    assert shapes["attention"] == shapes["qk_norm_rope"] == "B1 S1024 H4 G2 K128"
    assert shapes["linear_cross_entropy"] == "N1024 D512 V131072"
    assert shapes["rms_norm"] == "N1024 D512"
    assert main(["kernels", "roofline", "--chip", "h100", "--op", "attention", *shape]) == 0
    printed = capsys.readouterr().out
    assert "a model unless the last column says otherwise" in printed
    assert "triweave dkv" in printed
    assert "measured elsewhere" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chip", "b300"], "there is no chip 'b300'"),
        (["--op", "softmax"], "op 'softmax' is not modelled; those that are: attention"),
        (["--mask", "sliding"], "there is no mask 'sliding'"),
        (["--dtype", "fp8"], "there is no dtype 'fp8'"),
    ],
)
def test_a_wrong_name_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "roofline", "--sequence-length", "256", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
