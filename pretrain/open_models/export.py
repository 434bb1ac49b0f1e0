"""Write one of our models as a folder that plain transformers loads: config.json, model.safetensors, tokenizer.

The layout follows from the model: Llama, Qwen2 or Qwen3 by its decoder's options, LLaVA or Qwen2.5-VL by its tower.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from triweave.data_pipeline.text.hugging_face import MEANINGS, VOCABULARY
from triweave.pretrain.checkpoints.load import LoadedRun
from triweave.pretrain.engine.optimizer import TOWER_PREFIX
from triweave.pretrain.errors import OpenModelError
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.open_models.folder import CONFIG, WEIGHTS, OpenFolder
from triweave.pretrain.open_models.initial import entries_of
from triweave.pretrain.open_models.mapping import copy_out
from triweave.pretrain.open_models.settings import family_of, write_settings
from triweave.pretrain.open_models.tower_mapping import idle_tensors, on_disk

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Precision in which weights are written -> torch's."""
NAMED = 3
"""An error names at most so many parameters."""


def export_run(
    run: LoadedRun, out: Path, *, precision: str = "fp32", leave_out: Collection[str] = ()
) -> dict[str, Any]:
    """Write a run's model to the folder `out`, which must be there; return what was written.

    leave_out: modalities whose towers the layout has no place for and that may be lost. Keys of config.json that say
    nothing about the weights are taken over from `init_from.model`, where that folder is still there.
    Raises OpenModelError where no layout of transformers computes what the model does, naming the setting.
    """
    weights, settings = as_transformers(
        run.config.model,
        dict(run.model.named_parameters()),
        vocab_size=run.tokenizer.vocab_size,
        leave_out=leave_out,
        placeholders={name: (pair.start_id, pair.placeholder_id) for name, pair in run.tokenizer.media.items()},
    )
    settings["dtype"] = str(DTYPES[precision]).removeprefix("torch.")
    settings.setdefault("max_position_embeddings", run.config.data.sequence_length)
    if "text_config" in settings:
        settings["text_config"]["max_position_embeddings"] = settings.pop("max_position_embeddings")
    source = run.config.init_from.get("model")
    if source is not None:
        with suppress(OpenModelError):
            settings = _merged(OpenFolder(run.locate(source)).config, settings)
    (out / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file({name: tensor.to(DTYPES[precision]) for name, tensor in weights.items()}, out / WEIGHTS, {"format": "pt"})
    tokenizer = run.locate(run.config.data.tokenizer)
    if tokenizer.is_dir():
        for path in sorted(tokenizer.iterdir()):
            if path.name != MEANINGS:
                shutil.copy(path, out / path.name)
    return {
        "model_type": settings["model_type"],
        "tensors": len(weights),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "tokenizer": (out / VOCABULARY).is_file(),
    }


def as_transformers(
    config: ModelConfig,
    parameters: Mapping[str, Tensor],
    *,
    vocab_size: int,
    placeholders: Mapping[str, tuple[int, int]],
    leave_out: Collection[str] = (),
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors by their names, fp32; config.json) of a model; the arguments are those of `export_run`.

    Raises OpenModelError where no layout computes what the model does, or has a place for all its parameters.
    """
    kept_encoders = {name: encoder for name, encoder in config.open_encoders.items() if name not in leave_out}
    config = replace(config, open_encoders=kept_encoders)
    family = family_of(config)
    left_out = tuple(f"{TOWER_PREFIX}{modality}." for modality in leave_out)
    kept = {name: parameter for name, parameter in parameters.items() if not name.startswith(left_out)}
    entries = entries_of(family, config)
    homeless = sorted(set(kept) - {entry.ours for entry in entries})
    if homeless:
        towers = sorted({name.split(".")[1] for name in homeless if name.startswith(TOWER_PREFIX)})
        advice = "only the plain decoder can be exported"
        if towers:
            advice = f"leave out {', '.join(towers)} (--leave-out); a tower of a folder of its own goes back by --tower"
        raise OpenModelError(
            f"{family} has no place for {len(homeless)} parameters: {', '.join(homeless[:NAMED])}; {advice}"
        )
    tensors = {on_disk(family, name): tensor for name, tensor in copy_out(kept, entries).items()}
    return tensors | idle_tensors(config), write_settings(family, config, vocab_size, placeholders)


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return `new` with keys that only `old` has, in all depths; ways of writing what `new` says are left out."""
    stale = {"rope_theta", "rope_scaling", "torch_dtype", "transformers_version", "layer_types"}
    merged = {key: value for key, value in old.items() if key not in stale}
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
