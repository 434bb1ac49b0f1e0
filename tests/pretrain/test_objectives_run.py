"""Three objectives at once over real shards: learnt weights, drawn objectives, cut in the middle and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from spine_runs import files_of, metrics, write_run_config

from triweave.data_pipeline.stream.loader import StepLoader
from triweave.pretrain.checkpoints.checkpoint import list_checkpoints
from triweave.pretrain.config import load_config
from triweave.pretrain.ledger.consumed import read_decisions
from triweave.pretrain.objectives.rows import objective_rows, objective_stages

TASKS = Path(__file__).with_name("checkpoint_tasks.py")
CORPUS = Path(__file__).parents[1] / "data_pipeline" / "conftest.py"
STEPS, HALF = 14, 7
CLASSES = ["even", "odd"]


@pytest.fixture(scope="session")
def run_config(rank_pool, tmp_path_factory) -> Path:
    """A run YAML over tiny shards whose documents have a label `parity`; run_dir is to be overridden."""
    return write_run_config(
        rank_pool.load(CORPUS),
        tmp_path_factory.mktemp("objectives"),
        labels=lambda number: {"parity": CLASSES[number % 2], "number": number},
        data={"packing": {"contrastive_share": 1.0, "contrastive_group_rows": 4}, "labels": ["parity"]},
        model={
            "objectives": {"language_model": 1.0, "contrastive": 0.5, "classification": 0.5},
            "contrastive": {"width": 16},
            "classification": {"label": "parity", "classes": CLASSES},
            "joint_loss": {"weighting": "uncertainty"},
        },
        tasks={"schedule": "loss", "window_steps": 2, "per_step": 1},
        schedule={"total_steps": STEPS},
        train={"steps": STEPS, "global_batch_rows": 8, "micro_batch_rows": 2},
        checkpoint={"every_steps": HALF},
    )


def train(rank_pool: Any, run_config: Path, run_dir: Path, *settings: str, resume: bool = False) -> None:
    answers = rank_pool.pool(2).run(
        TASKS, "run_spine", config=str(run_config), overrides=[f"run_dir={run_dir}", *settings], resume=resume
    )
    assert answers == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("model.joint_loss={weighting: loss_rate, window_steps: 2}",)])
def test_seven_and_seven_are_fourteen(rank_pool, run_config, tmp_path, settings):
    """Losses, learnt weights, decisions, weights and moments of a resumed run are equal to the bit."""
    train(rank_pool, run_config, tmp_path / "straight", *settings)
    train(rank_pool, run_config, tmp_path / "cut", f"train.steps={HALF + 2}", "checkpoint.keep=9", *settings)
    newest = list_checkpoints(tmp_path / "cut")[-1]
    newest.rename(newest.with_name(".lost"))  # as if it had been killed after step 9: steps 8 and 9 come again
    train(rank_pool, run_config, tmp_path / "cut", *settings, resume=True)
    straight, cut = metrics(tmp_path / "straight"), metrics(tmp_path / "cut")
    assert [line["tasks"] for line in cut] == [line["tasks"] for line in straight]
    assert [line["objective"] for line in cut] == [line["objective"] for line in straight]
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "straight")
    first, again = (read_decisions(tmp_path / "cut", attempt) for attempt in (1, 2))
    assert [decision.step for decision in again] == list(range(HALF + 1, STEPS + 1))
    assert again[:2] == first[HALF:]
    whole = read_decisions(tmp_path / "straight", 1)
    assert first[:HALF] + again == whole
    assert len({tuple(decision.weights) for decision in whole}) >= 3
    assert {len(decision.weights) for decision in whole} == {1, 3}


@pytest.mark.slow
def test_steps_done_again_follow_the_record_on_other_ranks(rank_pool, run_config, tmp_path):
    """One rank goes on after two and does in step 8 what stands in the record, which has been changed."""
    train(rank_pool, run_config, tmp_path, f"train.steps={HALF + 1}", "checkpoint.keep=9")
    newest = list_checkpoints(tmp_path)[-1]
    newest.rename(newest.with_name(".lost"))
    path = tmp_path / "consumed" / "attempt-0001" / "decisions.jsonl"
    lines = path.read_text().splitlines()
    drawn = json.loads(lines[HALF])["weights"]
    other = {"classification": 0.5} if "classification" not in drawn else {"contrastive": 0.5}
    path.write_text("\n".join([*lines[:HALF], json.dumps({"step": HALF + 1, "weights": other})]) + "\n")
    words = [f"run_dir={tmp_path}", f"train.steps={HALF + 1}"]
    assert rank_pool.pool(1).run(TASKS, "run_spine", config=str(run_config), overrides=words, resume=True) == [""]
    (again,) = read_decisions(tmp_path, 2)
    assert again.weights == other


def test_labels_come_with_the_batches_of_a_loader(run_config):
    """Each piece has its document's class and no other label, and the stage makes the objective's tables of them."""
    config = load_config(run_config)
    loader = StepLoader(
        config.data, rank=0, world_size=1, global_batch_rows=8, micro_batch_rows=8,
        stages=objective_stages(config.model, seed=0),
    )  # fmt: skip
    (batch,) = next(iter(loader)).micro_batches
    seen = 0
    for labels, names in zip(batch.labels, batch.sample_ids, strict=True):
        for label, name in zip(labels, names, strict=True):
            assert set(label) == {"parity"}
            number = int(name.split(":")[2].split("-")[1])
            assert label["parity"] == CLASSES[number % 2]
            seen += not name.endswith(":alone")
    (rows,) = objective_rows(batch, "classification")
    assert len(rows.targets) == seen > 3
    assert set(rows.targets.tolist()) == {0, 1}
