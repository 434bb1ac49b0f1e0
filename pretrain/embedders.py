"""Patch embedders: one media token's raw features in, one vector of the residual stream out.

A modality joins the model by an entry in EMBEDDERS; where its tokens stand in time and space is the business of their
(t, h, w) positions, so an embedder has no position table.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class PatchEmbedder(nn.Module):
    """project((values - offset) / scale): a linear map from the features of one token (patch) to D.

    The trunk normalises its input, so the map needs no norm of its own. Normalising happens in fp32, the product in
    the weight's dtype.
    """

    offset: ClassVar[float]
    """Value of a feature that becomes 0."""
    scale: ClassVar[float]
    """Distance from the offset that becomes 1."""
    payload_dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, features: int, d_model: int) -> None:
        """Make an embedder from `features` numbers a token to width `d_model`."""
        super().__init__()
        self.features = features
        self.project = nn.Linear(features, d_model)

    def forward(self, values: Tensor, lengths: Tensor, grids: Tensor) -> Tensor:  # noqa: ARG002 - encoders need them
        """Return the embeddings [sum(lengths), D] of payload rows `values` [sum(lengths), features]."""
        normalised = (values.float() - self.offset) / self.scale
        embedded: Tensor = self.project(normalised.to(self.project.weight.dtype))
        return embedded

    def zero_payload(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return (values, lengths, grids) of one token of zeros, for a rank that guards an absent modality."""
        return (
            torch.zeros(1, self.features, dtype=self.payload_dtype, device=device),
            torch.ones(1, dtype=torch.int32, device=device),
            torch.ones(1, 3, dtype=torch.int32, device=device),
        )


class ImagePatchEmbedder(PatchEmbedder):
    """Pixels of one patch, uint8 in [0, 255], mapped to [-1, 1] before the product."""

    offset = 127.5
    scale = 127.5
    payload_dtype = torch.uint8


class LogMelEmbedder(PatchEmbedder):
    """The log-mel frames of one token, frame-major; a convolution over time with its own length as stride.

    The spoken descriptions of Tux Paint have mean -6.0 and deviation 4.5 in the nats of `data_pipeline.mel`.
    """

    offset = -6.0
    scale = 4.5


EMBEDDERS: dict[str, type[PatchEmbedder]] = {
    "image": ImagePatchEmbedder,
    "audio": LogMelEmbedder,
}
"""Modality name -> embedder class."""
