"""Exact matrix FLOPs of the encoders and connectors, from the lengths of the media items alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from triweave.pretrain.encoders.config import COLOURS, EncoderConfig
from triweave.pretrain.encoders.mfcc import DERIVATIVES
from triweave.pretrain.encoders.transformer_config import sections_of, transformer_config
from triweave.pretrain.model.config import ModelConfig


class TowerFlops(NamedTuple):
    """forward: floating-point operations of the forward pass; one multiply-add is two.

    spared: what the backward pass needs less than twice as many; the payload gets no gradient.
    """

    forward: int
    spared: int


def tower_flops(
    modality: str, lengths: npt.NDArray[Any], features: int, settings: EncoderConfig, config: ModelConfig
) -> TowerFlops:
    """Return the FLOPs of one tower for items of `lengths` tokens of `features` numbers.

    N tokens, c positions a token, P = N c, W the encoder's width, F its feed-forward width, D the model's.

        vit, transformer  2 P features / c W + 2 P layers (4 W^2 + 3 W F) + 4 layers W sum (c length)^2
        cnn, conv         2 outputs x kernel x channels in x channels out, of every convolution
        mfcc              2 N frames bins coefficients
        linear, mlp, pixel_shuffle    2 N x the numbers of their matrices
        perceiver         2 layers (N (2 W^2 + 3 W F) + 2 P W^2) + 4 layers W sum c length^2 + 2 N W D
    """
    sizes = lengths.astype(np.int64)
    tokens, c = int(sizes.sum()), settings.positions_per_token(modality)
    if settings.kind == "patch":
        first = 2 * tokens * features * _first_width(settings, config)
        return TowerFlops(_connector(sizes, features, 1, settings, config), first)
    if settings.kind == "mfcc":
        frames = features // settings.mel_bins
        cepstra = frames * settings.coefficients
        transform, width = 2 * tokens * cepstra * settings.mel_bins, DERIVATIVES * cepstra
        first = 2 * tokens * width * _first_width(settings, config)
        return TowerFlops(transform + _connector(sizes, width, 1, settings, config), 2 * transform + first)
    connected = _connector(sizes, settings.width, c, settings, config)
    if settings.kind in ("cnn", "conv"):
        stem, blocks = _convolutions(modality, tokens, features, settings)
    else:
        stem = 2 * tokens * features * settings.width
        blocks = _blocks(sizes * c, settings, config)
    return TowerFlops(stem + blocks + connected, stem)


def _first_width(settings: EncoderConfig, config: ModelConfig) -> int:
    return config.d_model if settings.connector == "linear" else settings.connector_width or config.d_model


def _connector(
    sizes: npt.NDArray[np.int64], width: int, positions: int, settings: EncoderConfig, config: ModelConfig
) -> int:
    tokens, D = int(sizes.sum()), config.d_model
    if settings.connector == "linear":
        return 2 * tokens * width * D
    if settings.connector != "perceiver":
        hidden = settings.connector_width or D
        return 2 * tokens * (positions * width * hidden + hidden * D)
    layers, F = settings.connector_layers, _ffn_width(settings, config)
    products = tokens * (2 * width**2 + 3 * width * F) + 2 * tokens * positions * width**2
    attention = 4 * layers * width * int((sizes**2).sum()) * positions
    return 2 * layers * products + attention + 2 * tokens * width * D


def _blocks(positions: npt.NDArray[np.int64], settings: EncoderConfig, config: ModelConfig) -> int:
    W, layers = settings.width, settings.layers
    per_position = 4 * W**2 + 3 * W * _ffn_width(settings, config)
    return 2 * layers * int(positions.sum()) * per_position + 4 * layers * W * int((positions**2).sum())


def _ffn_width(settings: EncoderConfig, config: ModelConfig) -> int:
    sections = sections_of("text", settings.head_width)
    return transformer_config(settings, config, sections, layers=settings.layers).ffn_width


def _convolutions(modality: str, tokens: int, features: int, settings: EncoderConfig) -> tuple[int, int]:
    """Return the FLOPs of the first convolution, and of all others."""
    stem, blocks = settings.resolutions(modality, features)
    whole, last = settings.merge * settings.stride(modality, features), len(blocks) - 1
    if modality != "image":
        rates = [tokens * (whole >> stage) for stage in range(len(blocks))]
        products = sum(2 * count * rate for count, rate in zip(blocks, rates, strict=True))
        return 2 * rates[0] * 3 * settings.mel_bins * settings.width, 2 * products * 3 * settings.width**2
    widths = [settings.width >> (last - stage) for stage in range(len(blocks))]
    pixels = [tokens * (whole // stem >> stage) ** 2 for stage in range(len(blocks))]
    rest = 0
    for stage, count in enumerate(blocks):
        out, into = widths[stage], widths[max(stage - 1, 0)]
        shortcut = into * out if stage else 0
        rest += 2 * pixels[stage] * (9 * into * out + (2 * count - 1) * 9 * out * out + shortcut)
    return 2 * pixels[0] * stem**2 * COLOURS * widths[0], rest
