"""A Transformer's settings out of an encoder's, in the terms of the trunk's blocks; loads no torch."""

from __future__ import annotations

from triweave.pretrain.encoders.config import EncoderConfig
from triweave.pretrain.model.config import ModelConfig


def sections_of(modality: str, head_width: int) -> list[int]:
    """Return the runs of rotary pairs: time only for sounds; height and width pair by pair for images.

    Runs go time, height, width, time, ..., so that an image's time has runs of 0.
    """
    pairs = head_width // 2
    if modality != "image":
        return [pairs]
    return [run for _ in range(pairs // 2) for run in (0, 1, 1)] + [0, 1] * (pairs % 2)


def transformer_config(
    settings: EncoderConfig, config: ModelConfig, sections: list[int], *, layers: int
) -> ModelConfig:
    """Return the config of `layers` blocks W wide in the trunk's manner: RMSNorm, QK-norm, rotary places, SwiGLU."""
    return ModelConfig(
        d_model=settings.width,
        layers=layers,
        heads=settings.heads,
        kv_heads=settings.heads,
        head_width=settings.head_width,
        ffn_multiple=settings.ffn_multiple,
        rope_theta=config.rope_theta,
        rope_sections=sections,
        norm_eps=config.norm_eps,
        attention=config.attention,
    )
