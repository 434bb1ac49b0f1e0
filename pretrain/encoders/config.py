"""What each modality's encoder is, as plain numbers; loads no torch.

    kind         modality  positions it computes                                              options
    patch        any       none: the token's numbers, normalised                              -
    vit          image     m x m patches of a token's square, a Transformer over the item     width layers heads ...
    cnn          image     m x m of a token's square, a residual network of stride side / m   width layers merge
    transformer  audio     m runs of frames of a token, a Transformer over the item           width layers heads ...
    conv         audio     m of a token, convolutions over the frames of stride frames / m    width layers merge
    mfcc         audio     one: cepstra of a token's frames and their two differences         coefficients

m is `merge`. The plan counts tokens after merging, so nothing here changes the plan: the connector makes one vector of
the m x m (images) or m (sounds) positions of a token.

    linear, mlp    of the one position of a token (m = 1)
    pixel_shuffle  of all positions of a token side by side (m > 1)
    perceiver      of a learnt query per token that attends to all positions of its item
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.pretrain.errors import PretrainError

ENCODER_KINDS: dict[str, tuple[str, ...]] = {
    "image": ("patch", "vit", "cnn"),
    "audio": ("patch", "transformer", "conv", "mfcc"),
}
"""Modality -> the kinds of encoder it has, known here without torch; other modalities have those of the registry."""
OPTIONS: dict[str, tuple[str, ...]] = {
    "patch": (),
    "vit": ("width", "layers", "heads", "ffn_multiple", "merge"),
    "cnn": ("width", "layers", "merge"),
    "transformer": ("width", "layers", "heads", "ffn_multiple", "merge", "mel_bins"),
    "conv": ("width", "layers", "merge", "mel_bins"),
    "mfcc": ("mel_bins", "coefficients"),
}
"""Kind -> the options it takes beside the connector's."""
CONNECTOR_OPTIONS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "mlp": ("connector_width",),
    "pixel_shuffle": ("connector_width",),
    "perceiver": ("connector_layers", "heads", "ffn_multiple"),
}
"""Connector -> the options it takes."""
ITEM_KINDS = ("vit", "cnn", "transformer", "conv")
"""Kinds that compute positions of one width, which a Perceiver can attend to."""
COLOURS = 3
STEM_STRIDE = 4
"""Largest stride of the first convolution over pixels; halvings do the rest."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The encoder of one modality and the connector behind it. An option that the kind does not take is refused."""

    kind: str = "patch"
    """patch, vit or cnn for images; patch, transformer, conv or mfcc for sounds."""
    width: int = 256
    """Width W of the encoder."""
    layers: int = 6
    """Blocks of a Transformer, or residual blocks of a convolution over all its resolutions."""
    heads: int = 4
    """Attention heads of a Transformer and of a Perceiver; width / heads must be even."""
    ffn_multiple: float = 8 / 3
    """SwiGLU width over the encoder's, rounded up to a multiple of 32."""
    merge: int = 1
    """Positions m of the encoder that make one token: per side of an image's square (m x m), in time for sounds."""
    mel_bins: int = 80
    """Mel bands of one frame; must be data.geometry.audio_mel_bins."""
    coefficients: int = 20
    """Cepstral coefficients of one frame, the zeroth included."""
    connector: Literal["linear", "mlp", "pixel_shuffle", "perceiver"] = "linear"
    """What makes one vector of the model's width of a token's positions."""
    connector_width: int | None = None
    """Width between the two products of mlp and pixel_shuffle; null: the model's."""
    connector_layers: int = 2
    """Rounds of attention and feed-forward of a Perceiver."""

    def __post_init__(self) -> None:
        if self.kind not in OPTIONS:
            raise PretrainError(f"model.encoders: kind is {self.kind!r}; known: {', '.join(OPTIONS)}")
        taken = {*OPTIONS[self.kind], *CONNECTOR_OPTIONS[self.connector]}
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in ("kind", "connector") or value is None:
                continue
            if not value > 0:
                raise PretrainError(f"model.encoders: {option.name} is {value}; it must be above 0")
            if option.name not in taken and value != option.default:
                raise PretrainError(
                    f"model.encoders: {option.name} is {value}, but kind {self.kind} with connector {self.connector} "
                    f"takes {', '.join(sorted(taken)) or 'none'} of the options; remove it"
                )
        if "heads" in taken and self.width % (2 * self.heads):
            raise PretrainError(
                f"model.encoders: heads is {self.heads}; width {self.width} must be a multiple of 2 x heads"
            )
        if self.kind == "mfcc" and self.coefficients > self.mel_bins:
            raise PretrainError(
                f"model.encoders: coefficients is {self.coefficients}; {self.mel_bins} mel bands have at most as many"
            )
        self._check_connector()

    @property
    def shows_one_token(self) -> bool:
        """Whether what a token becomes depends on its own numbers only."""
        return self.kind == "patch"  # the slopes of mfcc reach over four frames of its neighbours

    def _check_connector(self) -> None:
        if self.connector in ("linear", "mlp") and self.merge > 1:
            raise PretrainError(
                f"model.encoders: merge is {self.merge}, but connector {self.connector} takes one position a token; "
                "use connector pixel_shuffle or perceiver, or merge 1"
            )
        if self.connector == "pixel_shuffle" and self.merge == 1:
            raise PretrainError(
                f"model.encoders: connector pixel_shuffle joins the positions of a token, but kind {self.kind} has "
                "one (merge 1); set merge to 2 or more where the kind takes it, or use connector mlp"
            )
        if self.connector == "perceiver" and self.kind not in ITEM_KINDS:
            raise PretrainError(
                f"model.encoders: connector perceiver attends to positions, and kind {self.kind} has none; use "
                f"kind {', '.join(ITEM_KINDS)}, or connector mlp"
            )

    @property
    def head_width(self) -> int:
        """Width K of one head."""
        return self.width // self.heads

    def positions_per_token(self, modality: str) -> int:
        """Return the positions that the encoder computes for one token."""
        return self.merge**2 if modality == "image" else self.merge

    def stride(self, modality: str, features: int) -> int:
        """Return the pixels of a side, or the frames, that one position stands for.

        features: numbers of one token. Raises PretrainError where a token does not divide into the positions.
        """
        if modality == "image":
            side = math.isqrt(features // COLOURS)
            if side * side * COLOURS != features:
                raise PretrainError(
                    f"model.encoders.image: kind {self.kind} cannot read {features} numbers a token, which are no "
                    "square of RGB pixels; use kind patch"
                )
            whole, unit = side, "pixels a side (data.geometry.image_patch_px)"
        else:
            whole, unit = features // self.mel_bins, "frames (data.geometry.audio_frames_per_token)"
            if whole * self.mel_bins != features:
                raise PretrainError(
                    f"model.encoders.{modality}: mel_bins is {self.mel_bins}, but a token has {features} numbers; set "
                    "it to data.geometry.audio_mel_bins"
                )
        if whole % self.merge:
            raise PretrainError(
                f"model.encoders.{modality}: merge is {self.merge}, but a token has {whole} {unit}; use a divisor"
            )
        return whole // self.merge

    def resolutions(self, modality: str, features: int) -> tuple[int, tuple[int, ...]]:
        """Return the stride of a convolution's first layer and its residual blocks at each resolution, finest first.

        Every resolution but the first halves the one before. Raises PretrainError where the stride is no power of two,
        or there are fewer layers than resolutions.
        """
        stride = self.stride(modality, features)
        if stride & (stride - 1):
            raise PretrainError(
                f"model.encoders.{modality}: kind {self.kind} with merge {self.merge} has a stride of {stride}, which "
                "is no power of two; choose another merge or data.geometry"
            )
        stem = min(STEM_STRIDE, stride) if modality == "image" else 1
        count = (stride // stem).bit_length()
        if self.layers < count:
            raise PretrainError(
                f"model.encoders.{modality}: layers is {self.layers}, but a stride of {stride} has {count} resolutions "
                f"and each needs a block; set layers to {count} or more"
            )
        least, rest = divmod(self.layers, count)
        return stem, tuple(least + (number >= count - rest) for number in range(count))

    def check(self, modality: str, features: int) -> None:
        """Raise PretrainError unless the kind is one of the modality's and can read tokens of `features` numbers."""
        kinds = ENCODER_KINDS.get(modality)
        if kinds is not None and self.kind not in kinds:
            raise PretrainError(f"model.encoders.{modality}: kind is {self.kind!r}; known: {', '.join(kinds)}")
        if self.kind in ("vit", "transformer", "mfcc"):
            self.stride(modality, features)
        elif self.kind in ("cnn", "conv"):
            _, blocks = self.resolutions(modality, features)
            narrowest = 2 ** (len(blocks) - 1) if modality == "image" else 1
            if self.width % narrowest:
                raise PretrainError(
                    f"model.encoders.{modality}: width is {self.width}; kind cnn halves it {len(blocks) - 1} times "
                    f"towards the pixels, so it must be a multiple of {narrowest}"
                )


def check_encoders(encoders: Mapping[str, EncoderConfig], geometry: MediaGeometry) -> None:
    """Raise PretrainError where an encoder cannot read what `data.geometry` makes of its modality."""
    for modality, encoder in encoders.items():
        if modality not in MODALITIES:
            raise PretrainError(f"model.encoders names {modality!r}; known: {', '.join(MODALITIES)}")
        if "mel_bins" in OPTIONS[encoder.kind] and encoder.mel_bins != geometry.audio_mel_bins:
            raise PretrainError(
                f"model.encoders.{modality}: mel_bins is {encoder.mel_bins}, but data.geometry.audio_mel_bins is "
                f"{geometry.audio_mel_bins}; set them to one number"
            )
        encoder.check(modality, MODALITIES[modality].features(geometry))
