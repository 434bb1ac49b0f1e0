"""Transformers over the positions of media items: `vit` for pictures, `transformer` for spectrograms.

Blocks as in the trunk, over all items of a micro-batch in one sequence; every position attends to the whole of its own
item, said as key intervals, and its place enters by rotation, so that any size of picture is read at its own resolution
(NaViT, Dehghani et al. 2023; Qwen2-VL). ViT: Dosovitskiy et al. 2021; spectrogram Transformer: Gong et al. 2021.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triweave.pretrain.encoders.config import EncoderConfig
from triweave.pretrain.encoders.tower import EncoderTiles, Items, LogMel, Pixels, Tower, cut_squares
from triweave.pretrain.encoders.transformer_config import sections_of, transformer_config
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.connectors import Perceiver, project
from triweave.pretrain.model.decoder import Block
from triweave.pretrain.model.layers import RMSNorm


class PackedTransformer(nn.Module):
    """embed the features of each position, norm, blocks within items, norm."""

    def __init__(self, features: int, config: ModelConfig, *, recompute: bool) -> None:
        """Make it for positions of `features` numbers; `config` in the terms of the trunk (`transformer_config`)."""
        super().__init__()
        self.recompute = recompute
        self.embed = nn.Linear(features, config.d_model)
        self.input_norm = RMSNorm(config.d_model, config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(
        self, x: Tensor, places: Tensor, kv_lo: Tensor, kv_hi: Tensor, tiles: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Map x [1, P, features] to states [1, P, W]; places [1, P, 3], kv_lo and kv_hi [1, P]."""
        x = self.input_norm(self.embed(x))
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, places, kv_lo, kv_hi, tiles, use_reentrant=False)
            else:
                x = block(x, places, kv_lo, kv_hi, tiles)
        states: Tensor = self.final_norm(x)
        return states


class EncoderTower(Tower):
    """connector(encode(normalised positions)): what the encoders of pictures and sounds share.

    A subclass makes `self.encoder` and implements `encode`.
    """

    modality: ClassVar[str]

    def __init__(self, features: int, settings: EncoderConfig, config: ModelConfig) -> None:
        """Make the connector; raises PretrainError where the tokens do not divide into the encoder's positions."""
        super().__init__(features, settings, config)
        settings.check(self.modality, features)
        self.merge = settings.merge
        self.positions = settings.positions_per_token(self.modality)
        self.stride = settings.stride(self.modality, features)
        self.connector = (
            Perceiver(settings, config, sections_of(self.modality, settings.head_width))
            if settings.connector == "perceiver"
            else project(settings.width, settings, config, self.positions)
        )

    def forward(self, values: Tensor, lengths: Tensor, grids: Tensor, tiles: EncoderTiles = None) -> Tensor:
        """Return the embeddings [N, D] of payload rows `values` [N, features]; lengths [M], grids [M, 3]."""
        items = Items.of(lengths, grids, len(values))
        states = self.encode(self.normalise(values), items, tiles)
        if not isinstance(self.connector, Perceiver):
            connected: Tensor = self.connector(states)
            return connected
        places = self.places(items)
        seen = items.intervals(1, self.positions)
        table = tiles.get("perceiver") if tiles else None
        latents: Tensor = self.connector(states.unsqueeze(0), places[:, :: self.positions], places, seen, table)
        return latents

    @abstractmethod
    def encode(self, values: Tensor, items: Items, tiles: EncoderTiles) -> Tensor:
        """Return the states [N c, W] of normalised rows [N, features], the c positions of a token together."""

    def places(self, items: Items) -> Tensor:
        """Return int [1, N c, 3], the place of every position in its item."""
        if self.modality == "image":
            return items.coordinates(self.merge, self.merge)
        return items.coordinates(1, 1, times=self.merge)


class _AttentionTower(EncoderTower):
    def __init__(self, features: int, settings: EncoderConfig, config: ModelConfig) -> None:
        """Make a Transformer over the patches of a token's numbers."""
        super().__init__(features, settings, config)
        own = transformer_config(
            settings, config, sections_of(self.modality, settings.head_width), layers=settings.layers
        )
        self.encoder = PackedTransformer(features // self.positions, own, recompute=config.activation_checkpointing)

    def encode(self, values: Tensor, items: Items, tiles: EncoderTiles) -> Tensor:
        """Return the states [N c, W] of normalised rows [N, features]."""
        seen = items.intervals(self.positions, self.positions)
        table = tiles.get("encoder") if tiles else None
        states: Tensor = self.encoder(self.patches(values).unsqueeze(0), self.places(items), *seen, table)
        return states.squeeze(0)

    @abstractmethod
    def patches(self, values: Tensor) -> Tensor:
        """Return the numbers of every position, [N c, features / c]."""


class VisionTransformer(Pixels, _AttentionTower):
    """A token's square is cut into m x m patches, which attend to all patches of their picture."""

    modality = "image"

    def patches(self, values: Tensor) -> Tensor:
        """Return the patches [N m m, side^2 3], those of a token in raster order."""
        return cut_squares(values, self.merge, self.stride)


class SpectrogramTransformer(LogMel, _AttentionTower):
    """A token's frames are cut into m runs, all mel bands each, which attend to all runs of their sound."""

    modality = "audio"

    def patches(self, values: Tensor) -> Tensor:
        """Return the runs [N m, frames / m * bins]."""
        return values.reshape(-1, self.features // self.positions)
