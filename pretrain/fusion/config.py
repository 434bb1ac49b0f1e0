"""How media reach the text: the setting `model.fusion`; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from triweave.pretrain.errors import PretrainError
from triweave.pretrain.late.config import LateConfig

FusionKind = Literal["sequence", "cross", "mmca", "late"]
Scope = Literal["immediate", "preceding"]
CROSS_ONLY = ("cross_every", "scope", "resampler_latents", "resampler_layers")
"""Settings that only `cross` reads."""


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """Where media meet text; every kind reads the same plan rows and batches."""

    kind: FusionKind = "sequence"
    """sequence: media tokens stand in the text (early fusion). cross: the trunk holds text and one tag a medium, and
    looks at media by gated cross-attention (Flamingo). mmca: as sequence, but text gives text and media a softmax each
    and media see themselves only (DeepSpeed-VisualChat). late: as sequence, and objectives over items read the
    features of a document's parts, each encoded alone, joined by an operator (settings in `late`)."""
    cross_every: int = 2
    """cross: a gated cross-attention layer stands before every so-manieth block."""
    scope: Scope = "immediate"
    """cross: a token sees the latest medium of its document, or all media before it."""
    resampler_latents: int | None = None
    """cross: a Perceiver resampler makes this many tokens of every medium; null leaves the media tokens as they are."""
    resampler_layers: int = 2
    """cross: layers of the resampler."""
    late: LateConfig = field(default_factory=LateConfig)
    """late: the operator, and what it joins."""

    def __post_init__(self) -> None:
        for name in ("cross_every", "resampler_layers"):
            if getattr(self, name) < 1:
                raise PretrainError(f"model.fusion.{name} is {getattr(self, name)}; it must be at least 1")
        if self.resampler_latents is not None and self.resampler_latents < 1:
            raise PretrainError(
                f"model.fusion.resampler_latents is {self.resampler_latents}; it must be at least 1, or null for none"
            )
        for name in CROSS_ONLY:
            if self.kind != "cross" and getattr(self, name) != getattr(type(self), name):
                raise PretrainError(
                    f"model.fusion.{name} is {getattr(self, name)} but only kind cross reads it; "
                    f"set model.fusion.kind=cross, or remove {name}"
                )
        if self.kind != "late" and self.late != LateConfig():
            raise PretrainError(
                f"model.fusion.late is set but model.fusion.kind is {self.kind}; set model.fusion.kind=late, or remove "
                "late"
            )

    @property
    def arrangement(self) -> tuple[str | int | None, ...]:
        """What of this changes how a batch is laid out; empty where the model reads it as it was packed."""
        if self.kind == "cross":
            return (self.kind, self.scope, self.resampler_latents)
        return (self.kind,) if self.kind == "mmca" else ()
