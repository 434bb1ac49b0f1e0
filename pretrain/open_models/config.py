"""Encoders of open models as plain numbers; loads no torch. `triweave import` fills them in from a config.json.

clip         CLIP's vision tower (Radford et al. 2021) behind LLaVA's projector (Liu et al. 2023)
siglip       SigLIP's vision tower (Zhai et al. 2023), all blocks and the norm at the end, behind the same projector
qwen2_5_vl   Qwen2.5-VL's vision tower with its windows and its merger (Bai et al. 2025)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.pretrain.errors import PretrainError

COLOURS = 3
INIT_PARTS = ("model", "image")
"""Keys of a run's `init_from`."""
OPEN_ENCODER_MODALITIES = ("image",)
"""Modalities for which there are encoders of open models."""


@dataclass(frozen=True, kw_only=True)
class OpenEncoderConfig:
    """The encoder of an open model and the projector behind it, in place of `model.encoders` for its modality."""

    kind: Literal["clip", "siglip", "qwen2_5_vl"]
    """Architecture; all read pictures."""
    width: int
    """Width W of the encoder."""
    layers: int
    """Blocks that are computed; what a model stores beyond them it does not use."""
    heads: int
    """Attention heads, over the whole item (clip, siglip) or its windows (qwen2_5_vl)."""
    ffn_width: int
    """Width between the two products of a block."""
    patch_px: int
    """Side of the square of pixels that is one position."""
    norm_eps: float = 1e-5
    """Added to the variance (clip, siglip) or the mean square (qwen2_5_vl) in every norm."""
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"] = "quick_gelu"
    """Between the products of a block; qwen2_5_vl has silu with a gate."""
    projector_activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"] = "gelu"
    """Between the two products of the projector."""
    projector_bias: bool = True
    """Add a learnt bias in both products of the projector."""
    positions: int = 0
    """clip, siglip: side of the learnt grid of positions, which other grids are interpolated from."""
    merge: int = 1
    """qwen2_5_vl: positions per side of a token; the merger joins merge x merge of them."""
    frames: int = 1
    """qwen2_5_vl: frames of one position; a picture is its own copy in each."""
    window: int = 0
    """qwen2_5_vl: side of a window of attention, in tokens."""
    full_attention: list[int] = field(default_factory=list)
    """qwen2_5_vl: numbers of the blocks that attend to the whole item."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "ffn_width", "patch_px", "norm_eps", "merge", "frames"):
            if not getattr(self, name) > 0:
                raise PretrainError(f"model.open_encoders: {name} is {getattr(self, name)}; it must be above 0")
        needed = "window" if self.kind == "qwen2_5_vl" else "positions"
        if getattr(self, needed) < 1:
            raise PretrainError(f"model.open_encoders: {needed} is {getattr(self, needed)}; kind {self.kind} needs it")
        multiple = 4 if self.kind == "qwen2_5_vl" else 1  # half of each head turns by height, half by width
        if self.width % (multiple * self.heads):
            raise PretrainError(
                f"model.open_encoders: heads is {self.heads}; width {self.width} must be a multiple of "
                f"{multiple * self.heads}"
            )

    @property
    def token_px(self) -> int:
        """Side of the square of pixels that is one token, what data.geometry.image_patch_px must be."""
        return self.patch_px * self.merge

    @property
    def features(self) -> int:
        """Numbers of one token."""
        return self.token_px**2 * COLOURS


def check_open_encoders(encoders: Mapping[str, OpenEncoderConfig], geometry: MediaGeometry) -> None:
    """Raise PretrainError where an encoder cannot read what `data.geometry` makes of its modality."""
    for modality, encoder in encoders.items():
        if modality not in OPEN_ENCODER_MODALITIES:
            raise PretrainError(f"model.open_encoders names {modality!r}; known: {', '.join(OPEN_ENCODER_MODALITIES)}")
        if geometry.image_patch_px != encoder.token_px:
            raise PretrainError(
                f"data.geometry.image_patch_px is {geometry.image_patch_px}, but a token of "
                f"model.open_encoders.{modality} is {encoder.token_px} pixels a side; set it to that"
            )
