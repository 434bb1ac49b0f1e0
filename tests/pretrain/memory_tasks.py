"""What tests/pretrain/test_memory.py runs inside rank processes: the bytes that an engine holds before an update."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import torch
from siblings import load_sibling

from triweave.pretrain.bench.memory import tensor_bytes
from triweave.pretrain.bench.step import SMALL_BUCKETS
from triweave.pretrain.engine.optimizer import group_parameters
from triweave.pretrain.engine.zero import Engine


def held_bytes(world: Any, *, stage: int, accumulation: int) -> dict[str, Any]:
    """Train two steps; return the bytes of all tensors when the gradients of the second are there.

    Also the number of parameters and the elements of each of every group's.
    """
    tasks, large = load_sibling("engine_tasks"), load_sibling("nvme_tasks")
    config = tasks.config(stage, deepspeed={"zero_optimization": SMALL_BUCKETS})
    config = dataclasses.replace(config, model=large.model_config())
    # of engines before this one in the process: held, so that none goes while this one is counted
    earlier = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    before = tensor_bytes()
    model = large.build_model()
    groups = [
        [parameter.numel() for parameter in group["params"]]
        for group in group_parameters(model.named_parameters(), config.optimizer)
    ]
    engine = Engine(model, config, world, accumulation=accumulation)
    held: list[int] = []
    large.train(engine, world, "all", range(1))
    engine.before_update = lambda: held.append(tensor_bytes(model) - before)
    large.train(engine, world, "all", range(1, 2))
    engine.close()
    del earlier
    return {"bytes": held[0], "parameters": sum(map(sum, groups)), "groups": groups}
