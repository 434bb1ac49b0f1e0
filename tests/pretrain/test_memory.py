"""What the state of training takes: the formula of the ZeRO paper and the tensors that are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from triweave.launch.cli import main
from triweave.pretrain.engine.memory import state_bytes_per_parameter, tensor_bytes


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
