"""The weights of a checkpoint as a folder that anything reads: safetensors files of whole parameters, and their config.

    OUT/model.safetensors                     or model-00001-of-00003.safetensors ... and model.safetensors.index.json
    OUT/config.yaml                           the run's resolved config

Parameters have the model's names and shapes; tied ones are one parameter and stand there once, under the first of their
names; frozen ones are there like the others. Files are filled parameter by parameter, so memory holds one file at most.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from triweave.data_pipeline.errors import ExportError
from triweave.data_pipeline.new_folder import new_folder
from triweave.pretrain.checkpoints.manifest import Checkpoint
from triweave.pretrain.checkpoints.reader import Wanted
from triweave.pretrain.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.yaml"
SHARD_BYTES = 4 << 30
"""Largest file, unless one parameter is larger."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written; bytes of the weights alone."""

    step: int
    parameters: int
    elements: int
    files: int
    bytes: int


def export_weights(
    checkpoint: Checkpoint,
    out: Path,
    *,
    dtype: Dtype = "fp32",
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write all parameters of a checkpoint to the new folder `out`.

    fp32 is bit by bit what training keeps. Every byte read is checked. Raises CheckpointError where the checkpoint is
    damaged, ExportError where `out` holds something or cannot be written; then nothing stays behind.
    """
    shapes = {name: tuple(entry["shape"]) for name, entry in checkpoint.manifest["parameters"].items()}
    item_bytes = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    shards = _divide({name: math.prod(shape) * item_bytes for name, shape in shapes.items()}, shard_bytes)
    names = [WEIGHTS] if len(shards) == 1 else [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    total = sum(math.prod(shape) for shape in shapes.values())
    with new_folder(out, ExportError) as (folder, _):
        try:
            for file, parameters in zip(names, shards, strict=True):
                tensors = _read(checkpoint, parameters, shapes, DTYPES[dtype])
                save_file(tensors, folder / file, metadata={"format": "pt"})
            if len(shards) > 1:
                where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
                index = {"metadata": {"total_size": total * item_bytes}, "weight_map": where}
                (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
            (folder / CONFIG).write_text(checkpoint.config_yaml, encoding="utf-8")
        except SafetensorError as error:  # as which safetensors reports a full disk
            raise CheckpointError(f"cannot write {out}: {error}; free space or choose another folder") from error
    return Exported(
        step=checkpoint.step, parameters=len(shapes), elements=total, files=len(names), bytes=total * item_bytes
    )


def _read(
    checkpoint: Checkpoint, names: list[str], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    flat = {name: torch.empty(math.prod(shapes[name]), dtype=dtype) for name in names}
    checkpoint.reader.read(Wanted(target=flat[name], kind="weight", name=name, offset=0) for name in names)
    return {name: values.view(shapes[name]) for name, values in flat.items()}


def _divide(sizes: dict[str, int], most: int) -> list[list[str]]:
    """Return the parameters of each file, in their order."""
    shards: list[list[str]] = [[]]
    room = most
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    return shards
