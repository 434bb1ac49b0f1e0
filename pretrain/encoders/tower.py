"""Towers: the payload rows of one modality in, one vector of the residual stream per media token out.

A payload row is the raw numbers of one token, and all items of a micro-batch lie one after the other. Where tokens
stand in time and space is the business of the trunk's (t, h, w) positions; what attends or convolves within an item
takes its places from the item's own grid, so a packed item is encoded exactly as it is alone.

N tokens of all items, M items, c positions a token, P = N c, W the encoder's width, D the model's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from triweave.pretrain.encoders.config import COLOURS, EncoderConfig
from triweave.pretrain.model.config import ModelConfig

EncoderTiles = Mapping[str, Mapping[str, Tensor]] | None
"""Attention's tables of one modality by who reads them, `encoder` and `perceiver`; None lets the kernels make them."""


class Items(NamedTuple):
    """Where the N tokens of M items are. lengths: int [M], grids: int [M, 3] (t, h, w), as in the payload.

    item: int64 [N] the item of each token. within: int64 [N] its number in the item. first: int64 [M] of each item.
    """

    lengths: Tensor
    grids: Tensor
    item: Tensor
    within: Tensor
    first: Tensor

    @classmethod
    def of(cls, lengths: Tensor, grids: Tensor, tokens: int) -> Items:
        """Return the places of `tokens` tokens, without waiting for the device."""
        lengths = lengths.long()
        first = lengths.cumsum(0) - lengths
        numbers = torch.arange(len(lengths), device=lengths.device)
        item = torch.repeat_interleave(numbers, lengths, output_size=tokens)
        within = torch.arange(tokens, device=lengths.device) - first[item]
        return cls(lengths, grids, item, within, first)

    def intervals(self, queries: int, keys: int) -> tuple[Tensor, Tensor]:
        """Return (kv_lo, kv_hi), int32 [1, N queries], with which positions see the whole of their own item.

        queries, keys: positions a token that ask, and that are seen.
        """
        lo = (self.first * keys)[self.item]
        hi = ((self.first + self.lengths) * keys)[self.item]
        repeated = torch.stack([lo, hi]).repeat_interleave(queries, dim=1).int()
        return repeated[:1], repeated[1:]

    def edges(self, frames: int) -> tuple[Tensor, Tensor]:
        """Return bool [N frames] each: whether a frame is the first, or the last, of its item."""
        steps = torch.arange(frames, device=self.within.device)
        starts = (self.within.unsqueeze(1) == 0) & (steps == 0)
        ends = ((self.within + 1 == self.lengths[self.item]).unsqueeze(1)) & (steps == frames - 1)
        return starts.flatten(), ends.flatten()

    def coordinates(self, rows: int, columns: int, times: int = 1) -> Tensor:
        """Return int64 [1, N c, 3], the (t, h, w) places of the c = times x rows x columns positions of each token."""
        wide = self.grids[:, 2].long()[self.item]
        high = self.grids[:, 1].long()[self.item]
        token = torch.stack([self.within // (high * wide), self.within // wide % high, self.within % wide], dim=-1)
        steps = [torch.arange(size, device=token.device) for size in (times, rows, columns)]
        inner = torch.stack(torch.meshgrid(*steps, indexing="ij"), dim=-1).view(-1, 3)
        sizes = torch.tensor([times, rows, columns], device=token.device)
        return (token.unsqueeze(1) * sizes + inner).view(1, -1, 3)


class Tower(nn.Module, ABC):
    """What the model calls for one modality.

    A subclass says what the numbers of its payload are and computes `forward`. Normalising happens in fp32, products
    in the weights' dtype.
    """

    offset: ClassVar[float]
    """Value of a payload number that becomes 0."""
    scale: ClassVar[float]
    """Distance from the offset that becomes 1."""
    payload_dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, features: int, settings: EncoderConfig, config: ModelConfig) -> None:  # noqa: ARG002 - made alike
        """Make a tower for tokens of `features` numbers; `settings` of the encoder, `config` of the model."""
        super().__init__()
        self.features = features

    @abstractmethod
    def forward(self, values: Tensor, lengths: Tensor, grids: Tensor, tiles: EncoderTiles = None) -> Tensor:
        """Return the embeddings [N, D] of payload rows `values` [N, features]; lengths [M], grids [M, 3]."""

    def normalise(self, values: Tensor) -> Tensor:
        """Return (values - offset) / scale, computed in fp32, in the weights' dtype."""
        return ((values.float() - self.offset) / self.scale).to(next(self.parameters()).dtype)

    def zero_payload(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return (values, lengths, grids) of one token of zeros, for a rank that guards an absent modality."""
        return (
            torch.zeros(1, self.features, dtype=self.payload_dtype, device=device),
            torch.ones(1, dtype=torch.int32, device=device),
            torch.ones(1, 3, dtype=torch.int32, device=device),
        )


class Pixels(Tower):
    """Pixels of one square, uint8 in [0, 255] in (y, x, channel) order, mapped to [-1, 1]."""

    offset = 127.5
    scale = 127.5
    payload_dtype = torch.uint8


def cut_squares(squares: Tensor, merge: int, side: int) -> Tensor:
    """Return [N merge^2, side^2 3], the merge x merge patches of squares [N, (merge side)^2 3], in raster order."""
    cut = squares.view(-1, merge, side, merge, side, COLOURS).permute(0, 1, 3, 2, 4, 5)
    return cut.reshape(-1, side * side * COLOURS)


class LogMel(Tower):
    """Log-mel frames of one token, frame-major.

    The spoken descriptions of Tux Paint have mean -6.0 and deviation 4.5 in the nats of `data_pipeline.mel`.
    """

    offset = -6.0
    scale = 4.5
