"""What the state of training takes: the formula of the ZeRO paper and the tensors that are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from triweave.launch.cli import main
from triweave.pretrain.bench.memory import state_bytes_per_parameter, straddling_bytes, tensor_bytes
from triweave.pretrain.bench.step import SMALL_BUCKETS


@pytest.mark.parametrize(
    ("stage", "ranks", "precision", "accumulation", "wanted"),
    [
        (0, 8, "fp32", 1, 16),
        (1, 1, "fp32", 4, 4 + 4 + 12),
        (1, 4, "fp32", 4, 4 + 4 + 3),
        (1, 4, "fp32", 1, 4 + 16 / 4),
        (2, 4, "fp32", 4, 4 + 16 / 4),
        (3, 4, "fp32", 1, 20 / 4),
        (2, 64, "bf16", 1, 2 + 16 / 64),
        (3, 64, "bf16", 1, 18 / 64),
    ],
)
def test_the_formula(stage, ranks, precision, accumulation, wanted):
    assert state_bytes_per_parameter(stage, ranks, precision, accumulation=accumulation) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("groups", "ranks", "wanted"),
    [
        ([[10]], 1, [0]),
        ([[6, 4]], 2, [0, 0]),  # two partitions of 6, the second one padded
        ([[4, 4, 4]], 2, [2, 2]),
        ([[3, 20, 3], [8, 8]], 3, [13 + 2, 10 + 10, 17 + 4]),
    ],
)
def test_gradients_that_a_partition_ends_in(groups, ranks, wanted):
    assert [straddling_bytes(groups, ranks, rank) // 4 for rank in range(ranks)] == wanted


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "accumulation"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_ranks_hold_what_the_formula_says(rank_pool, stage: int, accumulation: int) -> None:
    """To a thousandth of the bytes; at ZeRO 3 the bucket is on top."""
    tasks = Path(__file__).with_name("memory_tasks.py")
    for rank, found in enumerate(rank_pool.pool(2).run(tasks, "held_bytes", stage=stage, accumulation=accumulation)):
        beside = straddling_bytes(found["groups"], 2, rank) if stage < 3 else 4 * SMALL_BUCKETS["reduce_bucket_size"]
        state = state_bytes_per_parameter(stage, 2) * found["parameters"]
        assert found["bytes"] == pytest.approx(state + beside, rel=1e-3)


def test_tensors_are_counted_once_with_their_gradients():
    before = tensor_bytes()
    layer = nn.Linear(100, 50, bias=False)
    view = layer.weight.detach().view(-1)[10:]
    assert tensor_bytes(layer) - before == 4 * 5000
    layer(torch.ones(1, 100)).sum().backward()
    assert tensor_bytes(layer) - before == 2 * 4 * 5000
    assert len(view) == 4990


@pytest.mark.slow
def test_bench_step_measures_the_spine_and_its_memory(run_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model whose largest matrix is small beside the whole: then so is what DeepSpeed holds beside its state."""
    words = ["data.sequence_length=256", "train.micro_batch_rows=2", "model.layers=16", "model.d_model=64"]
    counts = ["--stages", "3", "--steps", "2", "--repeats", "2", "--wait-steps", "2"]
    assert main(["bench", "step", "--config", str(run_config), *counts, "--json", *words]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert {"stage", "spine_over_bare", "data_wait_fraction", "bytes_per_param", "formula_bytes_per_param"} <= set(row)
    assert row["formula_bytes_per_param"] == 10
    assert row["bytes_per_param"] == pytest.approx(10, rel=0.05)
    assert row["spine_over_bare"] > 0
    assert row["fsdp2_over_bare"] > 0
    assert 0 <= row["data_wait_fraction"] < 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stages", "1,4"], "--stages 1,4: '4' is none of 0, 1, 2, 3"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
    ],
)
def test_bench_step_refuses(words, said, capsys):
    assert main(["bench", "step", *words]) == 2
    assert said in capsys.readouterr().err
