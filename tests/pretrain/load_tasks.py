"""What the tests of loading run inside rank processes: a short training whose weights and logits are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from siblings import load_sibling

from triweave.data_pipeline.stream.prompt import prompt_batch
from triweave.data_pipeline.text.tokenizer import Tokenizer
from triweave.pretrain import train as spine
from triweave.pretrain.batch import to_device
from triweave.pretrain.config import load_config


def train_and_keep(world: Any, *, config: str, overrides: Sequence[str], text: str) -> dict[str, Any]:  # noqa: ARG001
    """Train; return this rank's fragments at the end, and (up to stage 2, in fp32) the model's logits of a text."""
    settings = load_config(config, list(overrides))
    engines = []
    real = spine.build_engine
    spine.build_engine = lambda *arguments: engines.append(real(*arguments)) or engines[0]
    try:
        spine.train(settings)
    finally:
        spine.build_engine = real
    kept: dict[str, Any] = {"snapshot": load_sibling("engine_tasks").snapshot(engines[0]), "logits": None}
    if settings.train.zero_stage < 3 and settings.train.precision == "fp32":
        batch = prompt_batch(
            [[text]], tokenizer=Tokenizer.load(settings.data.tokenizer), geometry=settings.data.geometry
        )
        with torch.no_grad():
            kept["logits"] = np.array(engines[0]._deepspeed.module.eval().logits(to_device(batch, "cpu")))
    return kept
