"""Small folders of open models with random weights, made by transformers, and what transformers computes with them.

transformers is a requirement of tests only; nothing of ours imports it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

TOLERANCE = 1e-5
START, PLACEHOLDER = 3, 4
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
CLIP_PX, QWEN_PX = 7, 8
"""Pixels a side of a token of the two."""


def make(family: str, vocab_size: int = 96, image: tuple[int, int] = (START, PLACEHOLDER)) -> Any:
    """Return a model of transformers in which every number is random, biases and norms too."""
    transformers = pytest.importorskip("transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    text = {**TEXT, "vocab_size": vocab_size}
    if family == "llava":
        vision = {
            "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 2, "image_size": 4 * CLIP_PX, "patch_size": CLIP_PX, "projection_dim": 16,
        }  # fmt: skip
        config = transformers.LlavaConfig(
            vision_config=vision, text_config={"model_type": "llama", **text}, image_token_index=image[1]
        )
        model = transformers.LlavaForConditionalGeneration(config)
    elif family == "qwen2_5_vl":
        vision = {
            "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": QWEN_PX // 2, "window_size": 2 * QWEN_PX, "fullatt_block_indexes": [1],
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        }  # fmt: skip
        rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
        config = transformers.Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope}, vision_config=vision, image_token_id=image[1],
            video_token_id=vocab_size - 1, vision_start_token_id=image[0], vision_end_token_id=vocab_size - 2,
        )  # fmt: skip
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    else:
        name = {"llama": "Llama", "llama3": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
        scaling = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
        more = {
            "qwen2": {"tie_word_embeddings": True},
            "qwen3": {"head_dim": 16},
            "llama3": {"rope_parameters": scaling, "head_dim": 16},
        }.get(family, {})
        config = getattr(transformers, f"{name}Config")(**text, **more)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def clip_scale() -> tuple[torch.Tensor, torch.Tensor]:
    """Return transformers' own mean and deviation of CLIP's pixels, [3, 1, 1] each."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    return torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1), torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)


def pixels(values: np.ndarray, grid: Sequence[int], px: int) -> torch.Tensor:
    """Return one picture [3, height, width] in CLIP's scale from payload rows."""
    _, h, w = grid
    picture = torch.from_numpy(values.copy()).view(h, w, px, px, 3).permute(4, 0, 2, 1, 3).reshape(3, h * px, w * px)
    mean, deviation = clip_scale()
    return (picture.float() / 255 - mean) / deviation


def their_logits(model: Any, ids: np.ndarray, pictures: Sequence[tuple[np.ndarray, Sequence[int]]]) -> torch.Tensor:
    """Return what transformers computes for one document."""
    tokens = torch.from_numpy(ids.copy()).long().unsqueeze(0)
    kind = model.config.model_type
    with torch.no_grad():
        if kind == "llava" and pictures:
            shown = [pixels(values, grid, CLIP_PX).unsqueeze(0) for values, grid in pictures]
            if all(tuple(grid) == (1, 4, 4) for _, grid in pictures):
                return model(input_ids=tokens, pixel_values=torch.cat(shown)).logits[0]
            return model(inputs_embeds=_with_pictures(model, tokens, shown)).logits[0]
        if kind == "qwen2_5_vl" and pictures:
            squares, grids = [], []
            for values, grid in pictures:
                picture, p = pixels(values, grid, QWEN_PX), QWEN_PX // 2
                _, h, w = grid
                cut = picture.expand(1, 2, 3, -1, -1).reshape(1, 2, 3, h, 2, p, w, 2, p)
                squares.append(cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(4 * h * w, 6 * p * p))
                grids.append([1, 2 * h, 2 * w])
            kinds = (tokens == model.config.image_token_id).int()
            return model(
                input_ids=tokens, pixel_values=torch.cat(squares), image_grid_thw=torch.tensor(grids),
                mm_token_type_ids=kinds,
            ).logits[0]  # fmt: skip
        return model(input_ids=tokens).logits[0]


def _with_pictures(model: Any, tokens: torch.Tensor, pictures: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the embeddings [1, S, D] of a document whose pictures have other grids than the one CLIP has learnt."""
    features = []
    for picture in pictures:
        found = model.model.get_image_features(
            pixel_values=picture, vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy="default", interpolate_pos_encoding=True,
        )  # fmt: skip
        features += list(found.pooler_output)
    embedded = model.get_input_embeddings()(tokens)
    places = (tokens == model.config.image_token_id).unsqueeze(-1)
    return embedded.masked_scatter(places, torch.cat(features))


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes, with the ids 0, 1 and 2 as special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    special = ["<|endoftext|>", "<|image_start|>", "<|image_pad|>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["a bird sings"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def make_tower(kind: str) -> tuple[Any, Any]:
    """Return (a model of transformers that holds a tower on its own, its encoder); random but for Whisper's sinusoids.

    A window of the Whisper is one second.
    """
    transformers = pytest.importorskip("transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2}
    vision = {**sizes, "num_hidden_layers": 3, "image_size": 4 * CLIP_PX, "patch_size": CLIP_PX}
    if kind == "clip":
        config = transformers.CLIPConfig(vision_config=vision, text_config={**sizes, "num_hidden_layers": 1})
        whole = transformers.CLIPModel(config)
    elif kind == "siglip":
        whole = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision))
    else:
        config = transformers.WhisperConfig(
            d_model=24, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48, decoder_layers=1,
            decoder_attention_heads=2, decoder_ffn_dim=48, num_mel_bins=80, max_source_positions=50, vocab_size=60,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, max_target_positions=16,
        )  # fmt: skip
        whole = transformers.WhisperForConditionalGeneration(config)
    torch.manual_seed(6)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "embed_positions" not in name:
                parameter.normal_(0, 0.2)
    return whole.eval(), encoder_of(whole)


def encoder_of(whole: Any) -> Any:
    """Return the encoder of what `make_tower` makes."""
    return whole.model.encoder if whole.config.model_type == "whisper" else getattr(whole, "vision_model", whole)
