"""Encoders of open models as plain numbers; loads no torch. `triweave import` fills them in from a config.json.

clip         CLIP's vision tower (Radford et al. 2021) behind LLaVA's projector (Liu et al. 2023)
siglip       SigLIP's vision tower (Zhai et al. 2023), all blocks and the norm at the end, behind the same projector
qwen2_5_vl   Qwen2.5-VL's vision tower with its windows and its merger (Bai et al. 2025)
whisper      Whisper's encoder with its log-mel spectrogram (Radford et al. 2022) behind a two-layer projector
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.pretrain.errors import PretrainError

COLOURS = 3
OPEN_ENCODER_KINDS: dict[str, tuple[str, ...]] = {
    "image": ("clip", "siglip", "qwen2_5_vl"),
    "audio": ("whisper",),
}
"""Modality -> the kinds of encoder of open models that it has."""
INIT_PARTS = ("model", *OPEN_ENCODER_KINDS)
"""Keys of a run's `init_from`."""
WHISPER_RATE_HZ = 16_000
WHISPER_HOP_MS = 10
WHISPER_HOP = WHISPER_RATE_HZ * WHISPER_HOP_MS // 1000
"""Samples from one log-mel frame of Whisper to the next."""
WHISPER_TRANSFORM = 400
"""Samples of one window of Whisper's Fourier transform."""
WHISPER_STRIDE = 2
"""Log-mel frames of one position of Whisper."""


@dataclass(frozen=True, kw_only=True)
class OpenEncoderConfig:
    """The encoder of an open model and the projector behind it, in place of `model.encoders` for its modality."""

    kind: Literal["clip", "siglip", "qwen2_5_vl", "whisper"]
    """Architecture; whisper reads sounds, the others pictures."""
    width: int
    """Width W of the encoder."""
    layers: int
    """Blocks that are computed; what a model stores beyond them it does not use."""
    heads: int
    """Attention heads, over the whole item (clip, siglip) or its windows (qwen2_5_vl, whisper)."""
    ffn_width: int
    """Width between the two products of a block."""
    patch_px: int = 0
    """Pictures: side of the square of pixels that is one position."""
    norm_eps: float = 1e-5
    """Added to the variance (clip, siglip, whisper) or the mean square (qwen2_5_vl) in every norm."""
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"] = "quick_gelu"
    """Between the products of a block; qwen2_5_vl has silu with a gate."""
    projector_activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"] = "gelu"
    """Between the two products of the projector."""
    projector_bias: bool = True
    """Add a learnt bias in both products of the projector."""
    positions: int = 0
    """clip, siglip: side of the learnt grid of positions, which other grids are interpolated from; whisper: positions
    of one window, 20 ms each, 1500 in the published models."""
    merge: int = 1
    """qwen2_5_vl: positions per side of a token; the merger joins merge x merge of them. whisper: positions of a
    token, which the projector reads side by side; must divide `positions`."""
    frames: int = 1
    """qwen2_5_vl: frames of one position; a picture is its own copy in each."""
    window: int = 0
    """qwen2_5_vl: side of a window of attention, in tokens."""
    full_attention: list[int] = field(default_factory=list)
    """qwen2_5_vl: numbers of the blocks that attend to the whole item."""
    mel_bins: int = 0
    """whisper: bands of its spectrogram, 80 or 128 in the published models."""
    whole_window: bool = True
    """whisper: compute the silence up to the end of a window too, as the model was trained; false leaves it out of the
    blocks, which costs less and is another function."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "ffn_width", "norm_eps", "merge", "frames"):
            if not getattr(self, name) > 0:
                raise PretrainError(f"model.open_encoders: {name} is {getattr(self, name)}; it must be above 0")
        needs = {"qwen2_5_vl": ("patch_px", "window"), "whisper": ("mel_bins", "positions")}
        for needed in needs.get(self.kind, ("patch_px", "positions")):
            if getattr(self, needed) < 1:
                raise PretrainError(
                    f"model.open_encoders: {needed} is {getattr(self, needed)}; kind {self.kind} needs it"
                )
        if self.kind == "whisper" and self.positions % self.merge:
            raise PretrainError(
                f"model.open_encoders: merge is {self.merge}, which does not divide the {self.positions} positions of "
                "a window; use a divisor"
            )
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
        if self.kind == "whisper":
            return self.merge * WHISPER_STRIDE * WHISPER_HOP
        return self.token_px**2 * COLOURS

    @property
    def geometry(self) -> dict[str, Any]:
        """What `data.geometry` must be for this encoder, key by key."""
        if self.kind != "whisper":
            return {"image_patch_px": self.token_px}
        return {
            "audio_features": "samples",
            "audio_rate_hz": WHISPER_RATE_HZ,
            "audio_hop_ms": WHISPER_HOP_MS,
            "audio_frames_per_token": self.merge * WHISPER_STRIDE,
        }


def check_open_encoders(encoders: Mapping[str, OpenEncoderConfig], geometry: MediaGeometry) -> None:
    """Raise PretrainError where an encoder cannot read what `data.geometry` makes of its modality."""
    for modality, encoder in encoders.items():
        if modality not in OPEN_ENCODER_KINDS:
            raise PretrainError(f"model.open_encoders names {modality!r}; known: {', '.join(OPEN_ENCODER_KINDS)}")
        if encoder.kind not in OPEN_ENCODER_KINDS[modality]:
            raise PretrainError(
                f"model.open_encoders.{modality}: kind is {encoder.kind!r}; known: "
                f"{', '.join(OPEN_ENCODER_KINDS[modality])}"
            )
        for key, needed in encoder.geometry.items():
            if getattr(geometry, key) != needed:
                raise PretrainError(
                    f"data.geometry.{key} is {getattr(geometry, key)}, but model.open_encoders.{modality} "
                    f"({encoder.kind}) reads tokens of {key}={needed}; set it to that"
                )
    if geometry.audio_features == "samples" and "audio" not in encoders:
        raise PretrainError(
            "data.geometry.audio_features is samples, which only model.open_encoders.audio reads; set it to log_mel"
        )
