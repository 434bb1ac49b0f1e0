"""What a text encoder of its own is asked to be; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from triweave.pretrain.errors import PretrainError


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """An encoder of texts; both directions are read."""

    kind: Literal["transformer", "lstm", "gru"] = "transformer"
    """transformer: bidirectional attention (Devlin et al. 2019); lstm: Hochreiter and Schmidhuber 1997; gru: Cho et al.
    2014."""
    width: int = 256
    """Width W of the states; half of it is each direction's of an LSTM or GRU."""
    layers: int = 2
    """Blocks of the Transformer, or layers of the recurrence."""
    heads: int = 4
    """Attention heads of the Transformer; a recurrence has none."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads"):
            if getattr(self, name) < 1:
                raise PretrainError(f"text encoder: {name} is {getattr(self, name)}; it must be at least 1")
        if self.kind == "transformer" and self.width % (2 * self.heads):
            raise PretrainError(
                f"text encoder: heads is {self.heads}; width {self.width} must be a multiple of 2 x heads"
            )
        if self.width % 2:
            raise PretrainError(f"text encoder: width is {self.width}; it must be even, half for each direction")
