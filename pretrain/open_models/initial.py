"""Start a model from open models: `init_from` in a run's config.

    init_from: {model: FOLDER}      a whole model: Llama, Qwen2, Qwen3, LLaVA, Qwen2.5-VL
    init_from: {image: FOLDER}      the vision tower of a CLIP or SigLIP; its projector starts anew
    init_from: {audio: FOLDER}      the encoder of a Whisper; its projector starts anew

What a folder does not hold (a tower for sounds, tokens of ours) starts as `seed` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from triweave.pretrain.engine.optimizer import TOWER_PREFIX
from triweave.pretrain.errors import OpenModelError
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.open_models.config import OPEN_ENCODER_KINDS, OpenEncoderConfig
from triweave.pretrain.open_models.folder import CONFIG, OpenFolder
from triweave.pretrain.open_models.mapping import Entry, check_names, copy_in, decoder_entries
from triweave.pretrain.open_models.settings import OpenModel, read_settings, read_tower
from triweave.pretrain.open_models.tower_mapping import (
    LLAVA_DECODER,
    canonical,
    clip_entries,
    projector_entries,
    qwen_entries,
    tower_entries,
    unused_by_llava,
    unused_by_tower,
)
from triweave.pretrain.open_models.whisper import sinusoids

BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Tensors that some folders store although nothing in them is learnt."""
POSITION_ROUNDING = 4e-3
"""How far stored positions may be from the sinusoids: bf16 rounds numbers near 1 by 2e-3."""


def start_from(model: nn.Module, config: ModelConfig, folders: Mapping[str, str]) -> list[str]:
    """Overwrite the model's weights with those of the folders; return the names of parameters that stay as they were.

    Raises OpenModelError where a folder is not what `config` describes, naming the setting or the tensor.
    """
    parameters = dict(model.named_parameters())
    filled: set[str] = set()
    for part, path in folders.items():
        folder = OpenFolder(path)
        if part in OPEN_ENCODER_KINDS:
            filled |= _start_tower(parameters, config, folder, part)
            continue
        opened = read_settings(folder.config, f"{folder.path / CONFIG}")
        check_same(opened, config, str(folder.path))
        entries = entries_of(opened.family, config)
        for entry in entries:
            if entry.ours not in parameters:
                raise OpenModelError(
                    f"{folder.path} has weights for {entry.ours}, which the model lacks; take the tokenizer and the "
                    "model section that `triweave import` writes"
                )
        filled |= copy_in(
            parameters,
            folder,
            entries,
            canonical=partial(canonical, opened.family),
            ignored=ignored_tensors(opened),
        )
    return [name for name in parameters if name not in filled]


def _start_tower(parameters: Mapping[str, Tensor], config: ModelConfig, folder: OpenFolder, modality: str) -> set[str]:
    """Fill the encoder of one modality; the settings of its projector are the user's."""
    needed, found = read_tower(folder.config, f"{folder.path / CONFIG}", modality), config.open_encoders.get(modality)
    if found is not None:
        chosen = ("projector_activation", "projector_bias", *(("merge", "whole_window") if modality == "audio" else ()))
        needed = replace(needed, **{name: getattr(found, name) for name in chosen})
    if found != needed or not any(name.startswith(f"{TOWER_PREFIX}{modality}.") for name in parameters):
        raise OpenModelError(
            f"{folder.path} needs model.open_encoders.{modality}={needed} and a tokenizer with markers of {modality}; "
            "take the tokenizer and the model section that `triweave import` writes"
        )
    check_tower(folder, needed)
    names, ignored = partial(canonical, needed.kind), ignored_by_tower(needed)
    return copy_in(parameters, folder, tower_entries(needed), canonical=names, ignored=ignored)


def check_tower(folder: OpenFolder, settings: OpenEncoderConfig) -> dict[str, str]:
    """Return name in the table -> name in the folder of a tower on its own.

    Raises OpenModelError where they do not match one to one, or a Whisper's positions are not the sinusoids.
    """
    names = partial(canonical, settings.kind)
    stored = check_names(folder, tower_entries(settings), canonical=names, ignored=ignored_by_tower(settings))
    if settings.kind == "whisper":
        for name in folder.names:
            if name.endswith("embed_positions.weight") and "decoder." not in name:
                own, found = sinusoids(settings.positions, settings.width), folder.tensor(name).float()
                if found.shape != own.shape or not (found - own).abs().max() <= POSITION_ROUNDING:
                    raise OpenModelError(
                        f"{folder.path}: {name} are not the sinusoids of Whisper, which are computed here; a model "
                        "with learnt positions cannot be read"
                    )
    return stored


def ignored_by_tower(settings: OpenEncoderConfig) -> tuple[str, ...]:
    """Return patterns of the tensors of a tower's folder that are not read."""
    return (*BUFFERS, *unused_by_tower(settings))


def ignored_tensors(opened: OpenModel) -> tuple[str, ...]:
    """Return patterns of the tensors of a folder that its model computes nothing with."""
    ignored: tuple[str, ...] = BUFFERS
    if opened.model["tie_embeddings"]:  # some folders store the matrix twice
        ignored = (*ignored, r"(^|\.)lm_head\.weight$")
    if opened.family == "llava":
        ignored = (*ignored, *unused_by_llava(opened.encoders["image"]))
    return ignored


def entries_of(family: str, config: ModelConfig) -> list[Entry]:
    """Return the table of a whole model."""
    if family == "llava":
        decoder = decoder_entries(config, model=LLAVA_DECODER, head="")
        encoder = config.open_encoders["image"]
        return decoder + clip_entries(encoder) + projector_entries(encoder)
    decoder = decoder_entries(config, model="model.", head="")
    return decoder + (qwen_entries(config.open_encoders["image"]) if family == "qwen2_5_vl" else [])


def check_same(opened: OpenModel, config: ModelConfig, where: str) -> None:
    """Raise OpenModelError for the first setting in which a config differs from what an open model needs."""
    needed = opened.model_config()
    for key in (*opened.model, "open_encoders", "ffn_width", "sections"):
        if key in ("ffn_multiple", "rope_sections", "open_encoders"):
            continue
        if key == "sections" and needed.layout.positions == "sequential":
            continue  # all axes are equal
        if getattr(config, key) != getattr(needed, key):
            raise OpenModelError(
                f"{where} needs model.{key}={getattr(needed, key)}, the config has {getattr(config, key)}; take the "
                "model section that `triweave import` writes"
            )
    for modality, encoder in opened.encoders.items():
        if config.open_encoders.get(modality) != encoder:
            raise OpenModelError(
                f"{where} needs model.open_encoders.{modality}={encoder}; take the model section that `triweave "
                "import` writes"
            )
