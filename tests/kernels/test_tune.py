"""The tuner's search with timers that are made up, the pinned tables, and the hooks that read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from triweave.kernels import attention_tiles
from triweave.kernels.attention_tiles import tile_config, tile_lists, tile_sizes
from triweave.kernels.errors import KernelInputError
from triweave.kernels.roofline.tile_figures import mask_intervals
from triweave.kernels.tuning import pinned, tune
from triweave.kernels.tuning.pinned import Config
from triweave.kernels.tuning.tune import CandidateError, search
from triweave.launch.cli import main

CPU = torch.device("cpu")


def timer_of(ms: Callable[[int], float]) -> Callable[[Config, int], Sequence[float]]:
    """Return a timer of configs {"n": number}; a negative time means that the config cannot run."""

    def timer(config: Config, runs: int) -> Sequence[float]:
        if ms(config["n"]) < 0:
            raise CandidateError(f"n={config['n']} does not fit")
        return [ms(config["n"])] * runs

    return timer


def numbered(count: int) -> list[Config]:
    return [{"n": number} for number in range(count)]


def test_the_fastest_wins() -> None:
    choice = search(numbered(20), timer_of(lambda n: 1 + abs(n - 13)))
    assert (choice.config, choice.ms, choice.pinned_ms) == ({"n": 13}, 1.0, None)
    assert choice.timings[0].config == {"n": 13}
    assert len(choice.timings) == 20


@pytest.mark.parametrize(("pinned_ms", "stays"), [(1.015, True), (1.03, False)])
def test_what_is_pinned_stays_unless_another_is_clearly_faster(pinned_ms: float, stays: bool) -> None:
    times = {0: 5.0, 1: 1.0, 2: pinned_ms, 3: 4.0, 4: 6.0}
    choice = search(numbered(5), timer_of(times.__getitem__), pinned={"n": 2})
    assert choice.config == {"n": 2 if stays else 1}
    assert choice.pinned_ms == pinned_ms


def test_the_pinned_config_is_timed_though_it_is_no_candidate_and_to_the_end_though_it_is_slow() -> None:
    choice = search(numbered(8), timer_of(lambda n: 100.0 if n == 99 else 1.0 + n), pinned={"n": 99})
    assert choice.pinned_ms == 100.0
    assert next(timing.rounds for timing in choice.timings if timing.config == {"n": 99}) == tune.ROUNDS


def test_two_runs_that_measure_a_little_differently_choose_the_same() -> None:
    times = [[1.004, 1.0, 3.0, 3.0], [1.0, 1.006, 3.0, 3.0]]
    chosen = [search(numbered(4), timer_of(run.__getitem__)).config for run in times]
    assert chosen == [{"n": 0}, {"n": 0}]


def test_candidates_that_cannot_run_are_dropped_with_the_reason() -> None:
    choice = search(numbered(4), timer_of(lambda n: -1.0 if n == 0 else 1.0 + n))
    assert choice.config == {"n": 1}
    assert choice.timings[-1].why_not == "n=0 does not fit"
    with pytest.raises(CandidateError, match="none of 4 candidates can run: n=0 does not fit; n=1"):
        search(numbered(4), timer_of(lambda _: -1.0))


def test_most_runs_go_to_the_best_and_candidates_take_turns() -> None:
    asked: list[tuple[int, int]] = []

    def timer(config: Config, runs: int) -> Sequence[float]:
        asked.append((config["n"], runs))
        return [1.0 + config["n"]] * runs

    search(numbered(16), timer, rounds=3, repeats=5)
    rounds = [[n for n, runs in asked if runs == repeats] for repeats in (5, 10, 20)]
    assert rounds == [list(range(16)), list(range(8)), list(range(4))]


def test_a_stray_slow_run_does_not_count() -> None:
    def timer(config: Config, runs: int) -> Sequence[float]:
        return [50.0 if config["n"] == 1 and run == 0 else 2.0 - config["n"] / 2 for run in range(runs)]

    assert search(numbered(2), timer).config == {"n": 1}


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
def test_candidates_are_tiles_the_kernels_take(kernel: str) -> None:
    for number_bytes, width in ((2, 64), (2, 256), (4, 128)):
        candidates = tune.attention_candidates(kernel, number_bytes, width)
        assert len({tune.described(config) for config in candidates}) == len(candidates) > 8
        for config in candidates:
            assert all(config[side] in (16, 32, 64, 128) for side in ("query_tile", "key_tile"))
    widest = max(config["key_tile"] for config in tune.attention_candidates(kernel, 4, 128))
    assert widest == 64, "fp32 tiles are half as wide"


def test_cells_are_the_rows_that_serve_the_widths() -> None:
    for kernel, size, widest in tune.attention_cells([2], [72]):
        assert size == 2
        assert attention_tiles.CONFIGS[kernel][2, widest] == tile_config(kernel, 72, 2)
    assert [cell[0] for cell in tune.attention_cells([2], [72])] == ["forward", "dq", "dkv"]


def test_what_is_pinned_is_a_candidate_like_the_others() -> None:
    for kernel, size, widest in tune.attention_cells([2, 4], [32, 64, 72, 80, 96, 128, 256]):
        config = tune.pinned_attention(kernel, size, widest)
        assert attention_tiles.TileConfig(**config) == attention_tiles.CONFIGS[kernel][size, widest]
        assert None not in config.values()


# Pinned tables


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of pinned tables of its own; afterwards none is in use."""
    monkeypatch.setattr(pinned, "FOLDER", tmp_path)
    pinned.load.cache_clear()
    yield tmp_path
    pinned.use(None)
    pinned.load.cache_clear()


def a_row(kernel: str, widest: int, query_tile: int) -> dict[str, Any]:
    config = {"query_tile": query_tile, "key_tile": 16, "warps": 4, "stages": 1}
    return {"op": "attention", "kernel": kernel, "number_bytes": 2, "width": widest, "config": config, "ms": 1.0}


def test_a_pinned_row_counts_for_its_cell_on_its_architecture_only(tables: Path) -> None:
    before = {width: tile_config("forward", width, 2) for width in (64, 128)}
    widest = {width: tune.attention_cells([2], [width])[0][2] for width in (64, 128)}
    pinned.write("sm_90", [a_row("forward", widest[128], 16)], {"device": "a chip"}, tables)
    assert tile_config("forward", 128, 2) == before[128], "no architecture is in use yet"
    pinned.use("sm_100")
    assert tile_config("forward", 128, 2) == before[128]
    pinned.use("sm_90")
    assert tile_config("forward", 128, 2).query_tile == 16
    assert tile_config("forward", 64, 2) == before[64], "a narrower head keeps its own row"
    assert tile_config("dq", 128, 2).query_tile != 16 or before[128].query_tile == 16
    lo, hi = mask_intervals("causal", 1, 64)
    lists = tile_lists(lo, hi, keys=64, width=128, number_bytes=2)
    assert lists[3:9].tolist() == tile_sizes(128, 2), "the lists a worker makes are for the tiles a launch takes"
    assert lists[3] == 16
    pinned.use_device(CPU)
    assert tile_config("forward", 128, 2) == before[128], "the interpreter has no table"


def test_writing_keeps_the_rows_of_other_cells_and_says_what_they_were_made_with(tables: Path) -> None:
    pinned.write("sm_90", [a_row("forward", 128, 16), a_row("dq", 128, 32)], {"triton": "3.8.0"}, tables)
    path = pinned.write("sm_90", [a_row("forward", 128, 64)], {"triton": "3.9.0"}, tables)
    assert {cell[1]: config["query_tile"] for cell, config in pinned.load("sm_90").items()} == {"forward": 64, "dq": 32}
    text = path.read_text()
    assert json.loads(text)["made_with"] == {"triton": "3.9.0"}
    assert [line.count('"op"') for line in text.splitlines() if '"op"' in line] == [1, 1], "one row a line"
    assert [file.name for file in tables.iterdir()] == ["sm_90.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [{"op": "attention"}]}', '{"rows": [3]}'])
def test_a_table_that_cannot_be_read_is_an_error_not_a_default(text: str, tables: Path) -> None:
    (tables / "sm_90.json").write_text(text)
    pinned.use("sm_90")
    with pytest.raises(KernelInputError, match="cannot be read as pinned configs"):
        tile_config("forward", 64, 2)


def test_the_shipped_tables_can_be_read() -> None:
    for path in pinned.FOLDER.glob("*.json"):
        for (op, kernel, number_bytes, widest), config in pinned.load(path.stem).items():
            assert op == "attention"
            assert (number_bytes, widest) in attention_tiles.CONFIGS[kernel]
            assert attention_tiles.TileConfig(**config).warps in (4, 8)


def test_a_trial_ends_with_its_context() -> None:
    before = tile_config("dkv", 64, 2)
    cell = ("attention", "dkv", 2, tune.attention_cells([2], [64])[2][2])
    with pinned.trying(cell, a_row("dkv", 64, 16)["config"]):
        assert tile_config("dkv", 64, 2).key_tile == 16
    assert tile_config("dkv", 64, 2) == before


# By the model


def test_the_model_ranks_candidates_of_a_chip_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is made up: one tile computes its scores twice, one does not fit, one does not compile."""
    pytest.importorskip("triton")
    from triweave.kernels.errors import KernelUnavailableError
    from triweave.kernels.roofline.loop_mix import CompiledLoops, LoopMix
    from triweave.kernels.roofline.roofline_rows import Case
    from triweave.kernels.tuning import tune_model_triton

    def compiled_loops(variant: Any, arch: str) -> CompiledLoops:
        rows, keys = variant.constants["QUERY_TILE"], variant.constants["KEY_TILE"]
        warps = variant.options["num_warps"]
        assert (arch, variant.config.split()[0]) == ("sm_90", f"QUERY_TILE={rows}")
        if (rows, keys) == (128, 128):
            raise KernelUnavailableError("does not compile")
        flops = 4 * rows * keys * 128 // warps * (2 if warps == 8 and rows == 64 else 1)
        mix = LoopMix(
            issued=100,
            fma=10,
            alu=10,
            special=rows * keys // warps // 32,
            exponentials=0,
            shared_clocks=0,
            matrix=1,
            matrix_flops=flops,
            matrix_clocks_by_operands=0.0,
            weights_in_tensor_memory=False,
            asynchronous=True,
        )
        blocks = 0 if variant.options["num_stages"] == 3 else 1
        return CompiledLoops(registers=1, spill_bytes=0, occupancy=0.1, blocks=blocks, warps=warps, loops=(mix, mix))

    monkeypatch.setattr(tune_model_triton, "compiled_loops", compiled_loops)
    case = Case(mask="full", batch=1, sequence_length=1024, head_dim=128)
    choice, made = tune_model_triton.model_choice("forward", case, "h100")
    why_not = {timing.why_not for timing in choice.timings if timing.ms is None}
    assert why_not == {"not even one block fits", "does not compile"}
    ms = {tuple(timing.config.values()): timing.ms for timing in choice.timings if timing.ms is not None}
    assert ms[64, 64, 8, 2] > 1.3 * ms[64, 64, 4, 2]
    assert choice.ms <= 1.02 * min(ms.values())
    assert tune.described(choice.config) in made
    with pytest.raises(KernelInputError, match="no attention kernel 'softmax'"):
        tune_model_triton.model_choice("softmax", case, "h100")


# On a device


def test_without_a_gpu_the_command_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["kernels", "tune"]) == 2
    printed = capsys.readouterr().err
    assert "there is none here" in printed
    assert "--model" in printed
    assert len(printed.strip().splitlines()) == 1


def test_the_tuner_times_each_candidate_in_the_launcher_and_refuses_wrong_results(interpreter) -> None:
    """On the CPU, interpreted, with a made-up clock: what is timed is the kernel with the candidate's tile."""
    module = interpreter("tuning.tune_triton")
    kernels = interpreter("attention_triton")
    sizes = module.Sizes(sequence_length=48, heads=2, key_heads=1)
    candidates: list[Config] = [
        {"query_tile": rows, "key_tile": 16, "warps": 4, "stages": stages}
        for rows, stages in ((16, 1), (32, 1), (32, 7))
    ]
    ms = {(16, 1): 3.0, (32, 1): 1.0, (32, 7): 0.5}
    timed: list[tuple[int, int]] = []

    def now() -> tuple[int, int]:
        config = tile_config("forward", 32, 4)
        return config.query_tile, config.stages

    def clock(run: Callable[[], Any], times: int) -> list[float]:
        run()
        timed.append(now())
        return [ms.get(now(), 2.0)] * times

    def broken(q: torch.Tensor, *rest: Any) -> Any:
        out, lse = attention_forward(q, *rest)
        return (out * 1.01 if now() == (32, 7) else out), lse

    attention_forward = kernels.attention_forward
    module.triton_kernels = lambda _: SimpleNamespace(attention_forward=broken)
    tuned = next(module.tune_attention(["fp32"], [32], CPU, clock, sizes=sizes, candidates=lambda *_: candidates))
    assert tuned.cell[:3] == ("attention", "forward", 4)
    assert tuned.choice.config == candidates[1]
    assert set(timed) >= {(16, 1), (32, 1)}
    assert (32, 7) not in timed
    (refused,) = (timing for timing in tuned.choice.timings if timing.ms is None)
    assert (refused.config, refused.why_not) == (candidates[2], "its results are wrong")
    made = module.row(tuned)
    assert (made["width"], made["number_bytes"], made["config"]) == (tuned.cell[3], 4, candidates[1])


def test_attention_gives_the_same_with_another_tile_pinned(interpreter) -> None:
    interpreter("attention_triton")
    from triweave.kernels.attention import attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 40, 2, 16, generator=generator) for _ in range(3))
    lo, hi = (
        torch.from_numpy(x.astype(np.int32)) for x in mask_intervals("documents", 1, 40, lengths=np.array([17, 9]))
    )
    expected = attention(q, k, v, lo, hi, impl="reference")[0]
    cell = ("attention", "forward", 4, tune.attention_cells([4], [16])[0][2])
    with pinned.trying(cell, {"query_tile": 16, "key_tile": 32, "warps": 4, "stages": 1}):
        found = attention(q, k, v, lo, hi, impl="triton")[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
