"""Three objectives at once over real shards: learnt weights, drawn objectives, cut in the middle and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

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
    folder = tmp_path_factory.mktemp("objectives")
    corpus = rank_pool.load(CORPUS)
    records = corpus.write_records(folder / "birds.jsonl", 36)
    labelled = [
        json.dumps(json.loads(line) | {"labels": {"parity": CLASSES[number % 2], "number": number}})
        for number, line in enumerate(records.read_text(encoding="utf-8").splitlines())
    ]
    records.write_text("\n".join(labelled), encoding="utf-8")
    manifest = corpus.build(
        corpus.ManifestSource(root=records), folder / "birds", corpus.BuildOptions(shard_size_bytes=100_000)
    )
    corpus.train_tokenizer([manifest], 400, folder / "tokenizer.model")
    corpus.write_token_counts(manifest, folder / "tokenizer.model")
    config = {
        "run_dir": str(folder / "unused"),
        "data": {
            "sources": [{"name": "birds", "shards": str(folder / "birds")}],
            "tokenizer": str(folder / "tokenizer.model"),
            "sequence_length": 96,
            "geometry": {"image_patch_px": 8, "image_max_tokens": 12},
            "packing": {"contrastive_share": 1.0, "contrastive_group_rows": 4},
            "labels": ["parity"],
            "workers": 0,
        },
        "model": {
            "d_model": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 16,
            "objectives": {"language_model": 1.0, "contrastive": 0.5, "classification": 0.5},
            "contrastive": {"width": 16},
            "classification": {"label": "parity", "classes": CLASSES},
            "joint_loss": {"weighting": "uncertainty"},
        },
        "tasks": {"schedule": "loss", "window_steps": 2, "per_step": 1},
        "optimizer": {"lr": 1e-3, "eps": 1e-5},
        "schedule": {"warmup_steps": 2, "total_steps": STEPS},
        "train": {"steps": STEPS, "global_batch_rows": 8, "micro_batch_rows": 2, "zero_stage": 2, "device": "cpu",
                  "torch_threads": 1},
        "checkpoint": {"every_steps": HALF, "keep": 5},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(rank_pool: Any, run_config: Path, run_dir: Path, *settings: str, resume: bool = False) -> None:
    answers = rank_pool.pool(2).run(
        TASKS, "run_spine", config=str(run_config), overrides=[f"run_dir={run_dir}", *settings], resume=resume
    )
    assert answers == ["", ""]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def files_of(run_dir: Path) -> dict[str, list[str]]:
    manifest = json.loads((list_checkpoints(run_dir)[-1] / "manifest.json").read_text())
    return {name: entry["blocks"] for name, entry in manifest["files"].items() if name.startswith("rank-")}


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
