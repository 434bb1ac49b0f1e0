"""DeepSpeed's settings for models that do not fit: what they move elsewhere changes no bit of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from spine_runs import metrics

from triweave.pretrain.ledger.consumed import read_consumed

TASKS = Path(__file__).with_name("engine_tasks.py")
CPU = {"device": "cpu"}
OPTIMIZER = {"offload_optimizer": CPU}
EVERYTHING = {"offload_optimizer": CPU, "offload_param": CPU}
SECONDARY = {"zero_hpz_partition_size": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (1, OPTIMIZER),
        (2, OPTIMIZER),
        (3, OPTIMIZER),
        (3, EVERYTHING),
        (3, SECONDARY),
    ],
    ids=["optimizer-1", "optimizer-2", "optimizer-3", "everything-3", "hpz-3"],
)
def test_offloading_and_secondary_partitions_change_nothing(rank_pool, stage: int, settings: dict[str, Any]) -> None:
    case = {"case": "nobody_has_audio", "zero_stage": stage, "accumulation": 2}
    pool = rank_pool.pool(2)
    plain = pool.run(TASKS, "train_case", **case)
    moved = pool.run(TASKS, "train_case", **case, deepspeed={"zero_optimization": settings})
    for wanted, found in zip(plain, moved, strict=True):
        assert found["losses"] == wanted["losses"]
        for one, other in zip(wanted["snapshots"], found["snapshots"], strict=True):
            assert one["pieces"].keys() == other["pieces"].keys()
            assert one["steps"] == other["steps"]
            for name, values in one["pieces"].items():
                np.testing.assert_array_equal(other["pieces"][name], values, err_msg=str(name))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "settings"), [(1, OPTIMIZER), (2, OPTIMIZER), (3, OPTIMIZER), (3, EVERYTHING)])
def test_an_offloaded_run_is_resumed(train, straight, tmp_path, stage: int, settings: dict[str, Any]) -> None:
    """Half of it with state in host memory, the other half without, at ZeRO 1; some towers miss last micro-batches."""
    offload = f"deepspeed={yaml.safe_dump({'zero_optimization': settings}, default_flow_style=True).strip()}"
    rest = "schedule.total_steps=20"
    assert train(tmp_path, 2, f"train.zero_stage={stage}", "train.steps=10", offload, rest) == ["", ""]
    assert train(tmp_path, 2, "train.zero_stage=1", "train.steps=20", rest, resume=True) == ["", ""]
    assert read_consumed(tmp_path)[-1].step == 20
    for line, wanted in zip(metrics(tmp_path), metrics(straight), strict=True):
        assert abs(line["loss"] - wanted["loss"]) <= 1e-6 * max(1, wanted["loss"]), line["step"]


@pytest.mark.slow
def test_secondary_partitions_are_of_the_weights_that_a_resume_loads(train, straight, tmp_path) -> None:
    """They are made when the model is, of its initial weights; the first step behind a resume must not see these."""
    rest = "schedule.total_steps=20"
    hpz = f"deepspeed={yaml.safe_dump({'zero_optimization': SECONDARY}, default_flow_style=True).strip()}"
    assert train(tmp_path, 2, "train.zero_stage=3", "train.steps=10", hpz, rest) == ["", ""]
    assert train(tmp_path, 2, "train.zero_stage=3", "train.steps=20", hpz, rest, resume=True) == ["", ""]
    for line, wanted in zip(metrics(tmp_path), metrics(straight), strict=True):
        assert abs(line["loss"] - wanted["loss"]) <= 1e-6 * max(1, wanted["loss"]), line["step"]
