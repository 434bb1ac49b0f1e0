"""The architecture of the model as plain numbers; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from triweave.pretrain.errors import PretrainError

OBJECTIVES = ("language_model", "contrastive")
"""Names of the heads registry, known here without torch."""
FFN_WIDTH_MULTIPLE = 32
"""The feed-forward width is rounded up to a multiple of this, so that matrix units are filled."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """The objective `contrastive`: documents' parts, each encoded alone, find each other by cosine."""

    loss: Literal["sigmoid", "infonce"] = "sigmoid"
    """sigmoid judges every pair by itself (SigLIP); infonce picks the partner among all candidates (CLIP)."""
    width: int = 128
    """Numbers E of one embedding."""
    scale: float | None = None
    """Initial factor of the cosines, learnt; null: 10 for sigmoid, 1 / 0.07 for infonce, which is cut at 100."""
    bias: float | None = None
    """Initial number added to the scaled cosines, learnt; null: -10 for sigmoid, 0 for infonce, which ignores it."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise PretrainError(f"model.contrastive.width is {self.width}; it must be at least 1")
        if self.scale is not None and not self.scale > 0:
            raise PretrainError(f"model.contrastive.scale is {self.scale}; it must be above 0, or null")

    @property
    def initial_scale(self) -> float:
        """Factor of the cosines at the start."""
        if self.scale is not None:
            return self.scale
        return 10.0 if self.loss == "sigmoid" else 1 / 0.07

    @property
    def initial_bias(self) -> float:
        """What is added to the scaled cosines at the start."""
        if self.bias is not None:
            return self.bias
        return -10.0 if self.loss == "sigmoid" else 0.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder over one packed interleaved sequence, with a patch embedder per media modality."""

    d_model: int = 512
    """Width D of the residual stream."""
    layers: int = 8
    """Number of decoder blocks."""
    heads: int = 8
    """Query heads H."""
    kv_heads: int = 4
    """Key/value heads G; must divide heads (grouped-query attention)."""
    head_width: int = 64
    """Width K of one head, even; H * K need not equal d_model."""
    ffn_multiple: float = 8 / 3
    """SwiGLU width over d_model, rounded up to a multiple of 32."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_sections: list[int] | None = None
    """Runs of rotary frequency pairs, fastest first, for time, height, width, time, ...; they sum to head_width / 2.
    null alternates the axes pair by pair; three numbers are blocks, in which width only has the slowest pairs."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMS norm, those of queries and keys included."""
    tie_embeddings: bool = False
    """Use one matrix for token lookup and for the language-model head."""
    softcap: float | None = None
    """Squash logits to (-softcap, softcap) by tanh; null leaves them."""
    z_loss: float = 1e-4
    """Weight of the squared log-partition per supervised token, which keeps logits from drifting."""
    init_std: float = 0.02
    """Standard deviation of initial matrices; those that write to the residual stream get it / sqrt(2 layers)."""
    attention: Literal["auto", "reference", "sdpa", "triton", "flex", "flash"] = "auto"
    """Attention backend; auto picks and says why, a named one that cannot serve is an error."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: least memory, about a third more compute."""
    objectives: dict[str, float] = field(default_factory=lambda: {"language_model": 1.0})
    """Head name -> weight w of its loss: language_model per supervised token + w * contrastive per positive pair."""
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Settings of the objective `contrastive`, where objectives names it."""

    def __post_init__(self) -> None:
        for name in ("d_model", "layers", "heads", "kv_heads", "head_width", "ffn_multiple", "rope_theta"):
            if not getattr(self, name) > 0:
                raise PretrainError(f"model.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("norm_eps", "init_std", "z_loss"):
            if not getattr(self, name) >= 0:
                raise PretrainError(f"model.{name} is {getattr(self, name)}; it must be 0 or above")
        if self.softcap is not None and not self.softcap > 0:
            raise PretrainError(f"model.softcap is {self.softcap}; it must be above 0, or null for none")
        if self.heads % self.kv_heads:
            divisors = [number for number in range(1, self.heads + 1) if self.heads % number == 0]
            raise PretrainError(
                f"model.kv_heads is {self.kv_heads} and does not divide model.heads={self.heads}; use one of {divisors}"
            )
        if self.head_width % 2:
            raise PretrainError(f"model.head_width is {self.head_width}; rotary positions need an even width")
        if sum(self.sections) != self.head_width // 2 or min(self.sections) < 0:
            raise PretrainError(
                f"model.rope_sections is {list(self.sections)}; numbers >= 0 must sum to head_width / 2 = "
                f"{self.head_width // 2}, or leave it null to alternate the axes"
            )
        if not self.objectives:
            raise PretrainError("model.objectives is empty; name at least one head, as in {language_model: 1.0}")
        for name in self.objectives:
            if name not in OBJECTIVES:
                raise PretrainError(f"model.objectives names {name!r}; known: {', '.join(OBJECTIVES)}")
        if "language_model" not in self.objectives:
            raise PretrainError("model.objectives leaves out language_model; name it, with weight 0 to train without")

    @property
    def sections(self) -> tuple[int, ...]:
        """Runs of rotary frequency pairs for time, height, width, time, ..."""
        # Alternating, as in Qwen3-VL: with blocks of narrow heads a model without positions of its own in the patch
        # embedder cannot tell the columns of an image apart (tests/pretrain/test_learning.py).
        return (1,) * (self.head_width // 2) if self.rope_sections is None else tuple(self.rope_sections)

    @property
    def ffn_width(self) -> int:
        """Width of the SwiGLU's two branches."""
        return -(-round(self.ffn_multiple * self.d_model) // FFN_WIDTH_MULTIPLE) * FFN_WIDTH_MULTIPLE
