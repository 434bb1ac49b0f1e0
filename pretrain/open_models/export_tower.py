"""Write a tower back into the layout of the folder that it came from: CLIP, SigLIP or Whisper, trained on.

The folder that `init_from` names gives all that the tower does not compute (CLIP's text side and last block, SigLIP's
head, Whisper's decoder), its config and its tokenizer; the trained encoder takes the place of its own. The projector
stays behind: no layout of these families has one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from triweave.pretrain.checkpoints.load import LoadedRun
from triweave.pretrain.errors import OpenModelError
from triweave.pretrain.open_models.config import OPEN_ENCODER_KINDS
from triweave.pretrain.open_models.export import DTYPES
from triweave.pretrain.open_models.folder import CONFIG, INDEX, WEIGHTS, OpenFolder
from triweave.pretrain.open_models.initial import check_tower
from triweave.pretrain.open_models.mapping import copy_out
from triweave.pretrain.open_models.tower_mapping import tower_entries

BESIDE = (".json", ".jinja", ".model", ".txt")
"""Ends of the names of files that go along: tokenizer, processor, generation settings; no weights and no code."""


def export_tower(run: LoadedRun, modality: str, out: Path, *, precision: str = "fp32") -> dict[str, Any]:
    """Write the folder of `init_from.<modality>` with the run's encoder to `out`, which must be there.

    All tensors are written in `precision`. Returns what was written; `trained` counts the tensors made of the run's
    parameters. Raises OpenModelError where the run has no such tower, or its folder is not there or another one now.
    """
    encoder, source = run.config.model.open_encoders.get(modality), run.config.init_from.get(modality)
    if encoder is None or source is None:
        have = [name for name in OPEN_ENCODER_KINDS if name in run.config.init_from]
        raise OpenModelError(
            f"--tower {modality}: init_from.{modality} of the run names no folder that its tower came from; "
            + (f"use one of {', '.join(have)}" if have else "export the whole model, without --tower")
        )
    folder = OpenFolder(run.locate(source))
    stored = check_tower(folder, encoder)
    dtype = DTYPES[precision]
    weights = {}
    for name, tensor in copy_out(dict(run.model.named_parameters()), tower_entries(encoder)).items():
        if tuple(tensor.shape) != folder.shape(stored[name]):
            raise OpenModelError(
                f"{folder.path}: {stored[name]} is {folder.shape(stored[name])}, the trained one {tuple(tensor.shape)};"
                " put the folder back that the run started from"
            )
        weights[stored[name]] = tensor.to(dtype)
    trained = len(weights)
    for name in folder.names - set(weights):
        tensor = folder.tensor(name)
        weights[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    settings = _in_precision(folder.config, str(dtype).removeprefix("torch."))
    (out / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(weights, out / WEIGHTS, {"format": "pt"})
    for path in sorted(folder.path.iterdir()):
        if path.suffix in BESIDE and path.name not in (CONFIG, INDEX):
            shutil.copy(path, out / path.name)
    return {
        "model_type": folder.config["model_type"],
        "tensors": len(weights),
        "trained": trained,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
    }


def _in_precision(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config.json, in all its parts, without the precision its weights had, and with what they have now."""

    def without(part: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in part.items() if key not in ("dtype", "torch_dtype")}
        return {key: without(value) if isinstance(value, dict) else value for key, value in kept.items()}

    return {**without(config), "dtype": dtype}
