"""Start a model from open models: `init_from` in a run's config.

    init_from: {model: FOLDER}      a whole model: Llama, Qwen2, Qwen3, LLaVA, Qwen2.5-VL
init_from: {image: FOLDER}      the vision tower of a CLIP or SigLIP; its projector starts anew

What a folder does not hold (a tower for sounds, tokens of ours) starts as `seed` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from triweave.pretrain.errors import OpenModelError
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.open_models.folder import CONFIG, OpenFolder
from triweave.pretrain.open_models.mapping import Entry, copy_in, decoder_entries
from triweave.pretrain.open_models.settings import OpenModel, read_settings, read_tower
from triweave.pretrain.open_models.tower_mapping import (
    LLAVA_DECODER,
    canonical,
    clip_entries,
    projector_entries,
    qwen_entries,
    unused_by_llava,
    unused_by_tower,
)

BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Tensors that some folders store although nothing in them is learnt."""


def start_from(model: nn.Module, config: ModelConfig, folders: Mapping[str, str]) -> list[str]:
    """Overwrite the model's weights with those of the folders; return the names of parameters that stay as they were.

    Raises OpenModelError where a folder is not what `config` describes, naming the setting or the tensor.
    """
    parameters = dict(model.named_parameters())
    filled: set[str] = set()
    for part, path in folders.items():
        folder = OpenFolder(path)
        if part == "image":
            filled |= _start_tower(parameters, config, folder)
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


def _start_tower(parameters: Mapping[str, Tensor], config: ModelConfig, folder: OpenFolder) -> set[str]:
    """Fill the encoder of pictures; the settings of its projector are the user's."""
    needed, found = read_tower(folder.config, f"{folder.path / CONFIG}"), config.open_encoders.get("image")
    if found is not None:
        needed = replace(needed, projector_activation=found.projector_activation, projector_bias=found.projector_bias)
    if found != needed or "towers.image.encoder.positions" not in parameters:
        raise OpenModelError(
            f"{folder.path} needs model.open_encoders.image={needed} and a tokenizer with markers of pictures; take "
            "the tokenizer and the model section that `triweave import --vision` writes"
        )
    name, ignored = partial(canonical, needed.kind), (*BUFFERS, *unused_by_tower(needed))
    return copy_in(parameters, folder, clip_entries(needed), canonical=name, ignored=ignored)


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
