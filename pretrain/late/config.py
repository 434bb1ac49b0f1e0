"""What the late family is asked to do, as plain numbers; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from triweave.pretrain.encoders.text_config import TextEncoderConfig
from triweave.pretrain.errors import PretrainError

OPERATORS = ("concatenation", "vote", "hybrid", "attention", "mfb", "mutan", "lmf", "tfn", "graph")
"""Names of the registry of operators, known here without torch."""
LARGEST_TENSOR = 1 << 24
"""Elements of TFN's outer product over all modalities, above which it is refused: LMF is made for those."""


@dataclass(frozen=True, kw_only=True)
class LateConfig:
    """Late fusion: every part of a document is encoded alone, an operator joins the pooled features."""

    operator: Literal["concatenation", "vote", "hybrid", "attention", "mfb", "mutan", "lmf", "tfn", "graph"] = (
        "concatenation"
    )
    """How the features of a document's modalities become one vector: formulas in pretrain/late/operators.py."""
    modalities: list[str] = field(default_factory=lambda: ["text", "image", "audio"])
    """Modalities that are fused, `text` or media of the registry; parts of others are left out."""
    width: int = 16
    """Width of one modality's projection inside mfb, mutan, lmf and tfn."""
    rank: int = 4
    """Terms that mfb pools for one number, and of the sums of mutan and lmf."""
    layers: int = 2
    """Rounds of message passing of graph."""
    text_encoder: Literal["trunk", "transformer", "lstm", "gru"] = "trunk"
    """What encodes a text that stands alone: the trunk, as it encodes media, or an encoder of its own; both directions
    are read."""
    text_width: int = 256
    """Width of the text encoder's states."""
    text_layers: int = 2
    """Blocks of the text Transformer, or layers of the recurrence."""
    text_heads: int = 4
    """Attention heads of the text Transformer."""

    def __post_init__(self) -> None:
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise PretrainError(
                f"model.fusion.late.modalities is {self.modalities}; name each modality once, as in [text, image]"
            )
        for name in ("width", "rank", "layers"):
            if getattr(self, name) < 1:
                raise PretrainError(f"model.fusion.late.{name} is {getattr(self, name)}; it must be at least 1")
        assert self.text is None or self.text.kind == self.text_encoder  # its own values are checked as it is made
        outer = (self.width + 1) ** len(self.modalities)
        if self.operator == "tfn" and outer > LARGEST_TENSOR:
            raise PretrainError(
                f"model.fusion.late.width is {self.width}: tfn's tensor over {len(self.modalities)} modalities has "
                f"{outer:,} elements, more than {LARGEST_TENSOR:,}; lower the width, or take operator=lmf"
            )

    @property
    def text(self) -> TextEncoderConfig | None:
        """Settings of the text encoder, None where the trunk encodes texts."""
        if self.text_encoder == "trunk":
            return None
        return TextEncoderConfig(
            kind=self.text_encoder, width=self.text_width, layers=self.text_layers, heads=self.text_heads
        )
