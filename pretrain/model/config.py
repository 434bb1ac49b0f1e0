"""The architecture of the model as plain numbers; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from triweave.pretrain.encoders.config import EncoderConfig
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.fusion.config import FusionConfig
from triweave.pretrain.objectives.config import (
    OBJECTIVES,
    ClassificationConfig,
    JointLossConfig,
    MaskedConfig,
    MatchingConfig,
    RegressionConfig,
)
from triweave.pretrain.open_models.config import OpenEncoderConfig

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
class RopeScalingConfig:
    """Rotary frequencies of a model that was first trained on shorter rows (Llama 3.1, Grattafiori et al. 2024).

    A pair whose wavelength is above positions / slow is slowed down by `factor`, one below positions / fast is left as
    it is, and between them the two are mixed.
    """

    factor: float
    """How many times slower the slow pairs turn."""
    slow: float
    """Waves over all `positions` below which a pair is slowed down fully."""
    fast: float
    """Waves over all `positions` above which a pair is left as it is."""
    positions: int
    """Length of the rows the model was first trained on, tokens."""

    def __post_init__(self) -> None:
        if not self.factor >= 1 or not 0 < self.slow < self.fast or self.positions < 1:
            raise PretrainError(
                f"model.rope_scaling is {self}; factor must be at least 1, 0 < slow < fast, and positions at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Where the tokens of a packed row stand and what media tokens see; what a row holds does not depend on it."""

    positions: Literal["grid", "sequential"] = "grid"
    """grid: a picture's tokens stand on its (height, width) grid at one time; sequential: every token is one beyond the
    token before it in its document, on all three axes, which makes the rotation one-dimensional."""
    media_attention: Literal["item", "causal"] = "item"
    """item: a media token sees the whole of its own item; causal: nothing after itself, as imported models have it.
    One-span segments of the contrastive objective see the whole of themselves either way."""


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
    input_norm: bool = True
    """Bring token and media embeddings to one size before the first block; imported models have no such norm."""
    qk_norm: bool = True
    """RMS-normalise every query and key head before its rotation; Llama and Qwen2 do not, Qwen3 does."""
    qkv_bias: bool = False
    """Add a learnt bias to queries, keys and values, as Qwen2 does."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """Positions and reach of the tokens of a packed row."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig | None = None
    """Stretches the slow frequencies, as Llama 3.1 and later do; only without qk_norm."""
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
    """Head name -> weight w of its mean over the step: language_model per supervised token, contrastive per positive
    pair, matching per document, masked_* per hidden token, classification and regression per label."""
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Settings of the objective `contrastive`, where objectives names it."""
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    """Settings of the objective `matching`."""
    masked: MaskedConfig = field(default_factory=MaskedConfig)
    """Settings of the objectives `masked_tokens` and `masked_media`."""
    classification: ClassificationConfig = field(default_factory=ClassificationConfig)
    """Settings of the objective `classification`."""
    regression: RegressionConfig = field(default_factory=RegressionConfig)
    """Settings of the objective `regression`."""
    joint_loss: JointLossConfig = field(default_factory=JointLossConfig)
    """How the objectives' losses become one."""
    open_encoders: dict[str, OpenEncoderConfig] = field(default_factory=dict)
    """Modality -> encoder of an open model, as `triweave import` writes it; takes the place of encoders."""
    encoders: dict[str, EncoderConfig] = field(default_factory=dict)
    """Modality -> its encoder and connector, such as {image: {kind: vit, merge: 2, connector: pixel_shuffle}}; a
    modality that is not named has a linear patch embedder."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    """How media reach the text: in the sequence, by cross-attention, or in a softmax of their own."""

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
        if self.rope_scaling is not None and self.qk_norm:
            raise PretrainError("model.rope_scaling needs model.qk_norm=false; set it to null, or turn qk_norm off")
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
        if twice := sorted(set(self.encoders) & set(self.open_encoders)):
            raise PretrainError(
                f"model.encoders and model.open_encoders both name {twice[0]!r}; remove one of the two, an imported "
                "tower brings its own connector"
            )
        self._check_fusion()
        self._check_objectives()
        if "language_model" not in self.objectives:
            raise PretrainError("model.objectives leaves out language_model; name it, with weight 0 to train without")

    def _check_objectives(self) -> None:
        """Raise PretrainError where an objective lacks what it is about, or cannot be had with the other settings."""
        for name, settings in (("classification", self.classification), ("regression", self.regression)):
            if name in self.objectives and not settings.label:
                raise PretrainError(
                    f"model.objectives has {name} but model.{name}.label is empty; name the document label to learn"
                )
        if "classification" in self.objectives and len(self.classification.classes) < 2:
            raise PretrainError(
                f"model.classification.classes has {len(self.classification.classes)} entries; name two or more, "
                "`triweave stats` lists the values of every label"
            )
        if "masked_media" in self.objectives:
            if self.fusion.kind == "cross":
                raise PretrainError(
                    "model.objectives has masked_media but with model.fusion.kind=cross no media stand in the text; "
                    "use masked_tokens, or model.fusion.kind=sequence"
                )
            shown = [f"model.open_encoders.{name}" for name in self.open_encoders]
            shown += [
                f"model.encoders.{name}" for name, encoder in self.encoders.items() if not encoder.shows_one_token
            ]
            if shown:
                raise PretrainError(
                    f"model.objectives has masked_media but {shown[0]} shows a token its neighbours, hidden ones too; "
                    "use kind=patch with connector=linear or mlp, or the objective masked_tokens"
                )

    def _check_fusion(self) -> None:
        """Raise PretrainError where the kind of fusion cannot work with the other settings."""
        fusion = self.fusion
        self._check_late()
        if fusion.kind == "cross" and fusion.cross_every > self.layers:
            raise PretrainError(
                f"model.fusion.cross_every is {fusion.cross_every} but model.layers is {self.layers}, so no block "
                f"would look at media; use at most {self.layers}"
            )
        if fusion.kind == "cross" and self.layout != LayoutConfig():
            raise PretrainError(
                f"model.layout is {self.layout} but with model.fusion.kind=cross no media stand in the text, whose "
                "positions are sequential and causal already; remove model.layout"
            )
        if fusion.kind in ("cross", "mmca") and self.attention in ("flex", "flash"):
            raise PretrainError(
                f"model.attention is {self.attention!r}, which serves self-attention over intervals only; with "
                f"model.fusion.kind={fusion.kind} use auto, reference, sdpa or triton"
            )

    def _check_late(self) -> None:
        """Raise PretrainError unless late fusion and objectives over items go together."""
        labelled = {"classification": self.classification.over, "regression": self.regression.over}
        over_items = [name for name in labelled if name in self.objectives and labelled[name] == "items"]
        if over_items and self.fusion.kind != "late":
            raise PretrainError(
                f"model.{over_items[0]}.over is items, which model.fusion.late joins, but model.fusion.kind is "
                f"{self.fusion.kind}; set model.fusion.kind=late, or model.{over_items[0]}.over=documents"
            )
        if self.fusion.kind == "late" and not over_items:
            raise PretrainError(
                "model.fusion.kind is late, which joins parts for objectives over items, but model.objectives has "
                "none; add classification with model.classification.over=items, or regression likewise"
            )

    @property
    def sections(self) -> tuple[int, ...]:
        """Runs of rotary frequency pairs for time, height, width, time, ..."""
        # Alternating, as in Qwen3-VL: with blocks of narrow heads a model without positions of its own in the patch
        # embedder cannot tell the columns of an image apart (tests/pretrain/test_learning.py).
        return (1,) * (self.head_width // 2) if self.rope_sections is None else tuple(self.rope_sections)

    @property
    def objective_names(self) -> tuple[str, ...]:
        """The objectives in one order, whatever that of the YAML, so that learnt weights keep their places."""
        return tuple(name for name in OBJECTIVES if name in self.objectives)

    @property
    def masks(self) -> bool:
        """Whether an objective hides tokens."""
        return not {"masked_tokens", "masked_media"}.isdisjoint(self.objectives)

    @property
    def cross_layers(self) -> int:
        """Gated cross-attention layers among the blocks."""
        return self.layers // self.fusion.cross_every if self.fusion.kind == "cross" else 0

    @property
    def ffn_width(self) -> int:
        """Width of the SwiGLU's two branches."""
        return -(-round(self.ffn_multiple * self.d_model) // FFN_WIDTH_MULTIPLE) * FFN_WIDTH_MULTIPLE
