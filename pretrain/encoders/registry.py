"""The registry of encoders: modality -> kind -> tower. A new modality is one entry with at least the kind `patch`.

A kind of another name also needs its line in `config.OPTIONS`, which says what options it takes.
"""

from __future__ import annotations

from triweave.pretrain.encoders.config import EncoderConfig
from triweave.pretrain.encoders.convolution import ImageConvolution, SpectrogramConvolution
from triweave.pretrain.encoders.mfcc import CepstralEmbedder
from triweave.pretrain.encoders.patch import ImagePatchEmbedder, LogMelEmbedder
from triweave.pretrain.encoders.tower import Tower
from triweave.pretrain.encoders.transformer import SpectrogramTransformer, VisionTransformer
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.open_models.clip import ClipTower
from triweave.pretrain.open_models.qwen_vision import QwenVisionTower
from triweave.pretrain.open_models.vision import OpenVisionTower
from triweave.pretrain.open_models.whisper import WhisperTower

ENCODERS: dict[str, dict[str, type[Tower]]] = {
    "image": {"patch": ImagePatchEmbedder, "vit": VisionTransformer, "cnn": ImageConvolution},
    "audio": {
        "patch": LogMelEmbedder,
        "transformer": SpectrogramTransformer,
        "conv": SpectrogramConvolution,
        "mfcc": CepstralEmbedder,
    },
}
"""Modality name -> kind -> tower class."""
OPEN_ENCODERS: dict[str, type[OpenVisionTower | WhisperTower]] = {
    "clip": ClipTower,
    "siglip": ClipTower,
    "qwen2_5_vl": QwenVisionTower,
    "whisper": WhisperTower,
}
"""Kind in `model.open_encoders` -> tower class."""


def build_tower(modality: str, features: int, config: ModelConfig) -> Tower:
    """Return the tower that the model asks for, for tokens of `features` numbers; patch where it is silent.

    Raises PretrainError for a modality or kind without an encoder, and for tokens that the encoder cannot read.
    """
    if modality in config.open_encoders:
        open_encoder = config.open_encoders[modality]
        return OPEN_ENCODERS[open_encoder.kind](features, open_encoder, config)
    kinds = ENCODERS.get(modality)
    if kinds is None:
        raise PretrainError(f"there is no encoder for modality {modality!r}; known: {', '.join(ENCODERS)}")
    settings = config.encoders.get(modality, EncoderConfig())
    if settings.kind not in kinds:
        raise PretrainError(f"model.encoders.{modality}: kind is {settings.kind!r}; known: {', '.join(kinds)}")
    return kinds[settings.kind](features, settings, config)
