"""What tests/pretrain/test_nvme.py runs inside rank processes: a model whose trunk and towers lie in files."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from siblings import load_sibling

from triweave.pretrain.checkpoints.checkpoint import CheckpointConfig, newest_whole_checkpoint, save_checkpoint
from triweave.pretrain.engine.nvme import file_groups
from triweave.pretrain.engine.zero import Engine
from triweave.pretrain.health.settings import HealthConfig
from triweave.pretrain.model.model import MultimodalTransformer

FEATURES = {"image": 2101, "audio": 2101}
"""Odd, so that pieces begin and end between the multiples that direct I/O wants."""


def build_model() -> MultimodalTransformer:
    """Return a model whose matrices, of the trunk and of each tower, take over a mebibyte on each of two ranks."""
    return MultimodalTransformer(
        model_config(), vocab_size=load_sibling("synthetic").VOCAB_SIZE, media_features=FEATURES, seed=3
    )


def model_config() -> Any:
    """Return the sizes of that model."""
    return dataclasses.replace(load_sibling("engine_tasks").MODEL, d_model=256, heads=4, head_width=64, ffn_multiple=2)


def _engine(world: Any, folder: str, stage: int, accumulation: int, run_dir: str = "unused", **options: Any) -> Engine:
    """Return an engine with its optimizer in files below `folder`, in memory where that is empty."""
    offload = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": folder}}}
    config = load_sibling("engine_tasks").config(stage, deepspeed=offload if folder else None, **options)
    config = dataclasses.replace(config, model=model_config(), run_dir=run_dir)
    torch.manual_seed(0)
    return Engine(build_model(), config, world, accumulation=accumulation)


def train(engine: Engine, world: Any, case: str, steps: range, poisoned: int = -1) -> list[dict[str, Any]]:
    """Return loss, norm and snapshot of each step; rank 1 hears no numbers in step `poisoned`."""
    tasks, taken = load_sibling("engine_tasks"), []
    for step in steps:
        window = [
            load_sibling("synthetic").make_batch(
                tasks.CASES[case](step, world.rank, micro),
                length=48,
                seed=1000 * step + 10 * world.rank + micro,
                features=FEATURES,
            )
            for micro in range(engine.accumulation)
        ]
        if step == poisoned and world.rank == 1:
            for batch in window:
                batch.payloads["audio"].values[:] = np.nan
        result = engine.train_window(window)
        taken.append({"loss": result.loss, "norm": result.grad_norm, **tasks.snapshot(engine)})
    return taken


def train_case(
    world: Any, *, case: str, folder: str, accumulation: int, poisoned: int, precision: str = "fp32"
) -> dict[str, Any]:
    """Train five steps; return each of them, and the numbers of the sub-groups that lay in files."""
    engine = _engine(world, folder, 3, accumulation, precision=precision, health=HealthConfig(bad_step="skip"))
    files = file_groups(engine._deepspeed.optimizer)
    steps = train(engine, world, case, range(5), poisoned)
    engine.close()
    return {"steps": steps, "files": files}


def history(world: Any, *, folder: str, run_dir: str) -> dict[str, Any]:
    """Save at step 3 with state in files, load at ZeRO 1 without, save there, and load into files again.

    Return snapshots of each, and of two more steps of the first engine and of one that has loaded its checkpoint.
    """
    snapshot, case = load_sibling("engine_tasks").snapshot, "nobody_has_audio"
    found: dict[str, Any] = {}

    def loaded(name: str, source: str, where: str, stage: int) -> Engine:
        engine = _engine(world, where, stage, 1, run_dir=name)
        checkpoint = newest_whole_checkpoint(source, world, tell=lambda _: None)
        assert checkpoint is not None
        checkpoint.load_into(engine)
        found[name] = snapshot(engine)
        return engine

    engine = _engine(world, folder, 3, 1, run_dir="first")
    train(engine, world, case, range(3))
    save_checkpoint(run_dir, engine, CheckpointConfig(), state={}, config_yaml="")
    found["saved"] = snapshot(engine)
    again = loaded("again", run_dir, folder, 3)
    found["straight"], found["resumed"] = (train(one, world, case, range(3, 5)) for one in (engine, again))
    again.close()
    checkpoint = newest_whole_checkpoint(run_dir, world, tell=lambda _: None)
    assert checkpoint is not None
    checkpoint.load_into(engine)  # as a roll-back does
    found["rolled_back"] = snapshot(engine)
    found["after"] = train(engine, world, case, range(3, 5))
    engine.close()
    other = loaded("other", run_dir, "", 1)
    save_checkpoint(f"{run_dir}-other", other, CheckpointConfig(), state={}, config_yaml="")
    other.close()
    loaded("back", f"{run_dir}-other", folder, 3).close()
    return found
