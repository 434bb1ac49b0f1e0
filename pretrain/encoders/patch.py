"""Patch embedders: one media token's raw features in, one vector of the residual stream out, nothing between tokens."""

from __future__ import annotations

from torch import Tensor

from triweave.pretrain.encoders.config import EncoderConfig
from triweave.pretrain.encoders.tower import EncoderTiles, LogMel, Pixels, Tower
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.connectors import project


class PatchEmbedder(Tower):
    """project((values - offset) / scale): a map (linear, or an MLP) from the features of one token (patch) to D.

    The trunk normalises its input, so the map needs no norm of its own.
    """

    def __init__(self, features: int, settings: EncoderConfig, config: ModelConfig) -> None:
        """Make an embedder from `features` numbers a token."""
        super().__init__(features, settings, config)
        self.project = project(features, settings, config)

    def forward(self, values: Tensor, lengths: Tensor, grids: Tensor, tiles: EncoderTiles = None) -> Tensor:  # noqa: ARG002
        """Return the embeddings [N, D] of payload rows `values` [N, features]."""
        embedded: Tensor = self.project(self.normalise(values))
        return embedded


class ImagePatchEmbedder(Pixels, PatchEmbedder):
    """A convolution over the picture with its own size as stride."""


class LogMelEmbedder(LogMel, PatchEmbedder):
    """A convolution over the frames of a sound with its own length as stride."""
