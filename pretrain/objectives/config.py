"""What the objectives beside language modelling are about, how their losses are joined, and when each is trained.

Plain numbers and names; loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from triweave.pretrain.errors import PretrainError

OBJECTIVES = (
    "language_model",
    "contrastive",
    "matching",
    "masked_tokens",
    "masked_media",
    "classification",
    "regression",
)
"""Names of the heads registry, known here without torch."""
SEGMENT_OBJECTIVES = ("contrastive", "masked_tokens", "masked_media")
"""Objectives over one-span segments, which data.packing.contrastive_share makes."""


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """The objective `classification`: which class a document label names."""

    label: str = ""
    """Document label that is predicted, such as category; data.labels must name it. Documents without take no part."""
    classes: list[str] = field(default_factory=list)
    """The values it can have, in any order; another value in the data ends the run. `triweave stats` lists them."""
    over: Literal["documents", "segments", "items"] = "documents"
    """documents: from the last state of each document, which has seen all of it. segments: from the mean state of each
    one-span segment, so from a picture or a caption alone. items: from all segments of a document, joined by the
    operator of model.fusion.late; wants model.fusion.kind=late."""
    modality: str | None = None
    """With over=segments, only those of this modality (text, image, audio); null: all of them."""

    def __post_init__(self) -> None:
        if len(set(self.classes)) != len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise PretrainError(f"model.classification.classes names {twice!r} twice; name each class once")
        _check_spans("classification", self.over, self.modality)


@dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """The objective `regression`: a number that a document label holds, by half the squared error of
    (label - centre) / scale."""

    label: str = ""
    """Document label that is predicted; data.labels must name it. Documents without it take no part."""
    centre: float = 0.0
    """Subtracted from the label; its mean over the data is a good choice."""
    scale: float = 1.0
    """What the label is divided by then; its standard deviation is a good choice."""
    over: Literal["documents", "segments", "items"] = "documents"
    """As in model.classification.over."""
    modality: str | None = None
    """As in model.classification.modality."""

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise PretrainError(f"model.regression.scale is {self.scale}; it must be above 0")
        _check_spans("regression", self.over, self.modality)


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """The objective `matching`: whether the media of a document are its own (the image-text matching of ALBEF)."""

    exchanged: float = 0.25
    """Share of the documents with text and media whose media are exchanged for those of another document of the same
    pack, where one has media of the same size and another content. Their tokens are no targets of other objectives."""

    def __post_init__(self) -> None:
        if not 0 < self.exchanged < 1:
            raise PretrainError(f"model.matching.exchanged is {self.exchanged}; it must be above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class MaskedConfig:
    """The objectives `masked_tokens` and `masked_media`: what stood at hidden places of one-span segments."""

    items: float = 0.5
    """Share of the documents with segments whose segments are masked; these take no part in the contrastive loss."""
    tokens: float = 0.15
    """Share of a text segment's tokens that are hidden, at least one (BERT)."""
    media: float = 0.5
    """Share of a medium's tokens that are hidden, at least one (MAE hides 0.75 of larger pictures)."""

    def __post_init__(self) -> None:
        for name in ("items", "tokens", "media"):
            if not 0 < getattr(self, name) <= 1:
                raise PretrainError(f"model.masked.{name} is {getattr(self, name)}; it must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class JointLossConfig:
    """How the means L of the objectives become one loss, with w their weights of `model.objectives`."""

    weighting: Literal["fixed", "uncertainty", "loss_rate"] = "fixed"
    """fixed: sum w L. uncertainty: sum w (exp(-s) L + s) with learnt s (Kendall et al. 2018). loss_rate: sum w r L,
    where r is larger for objectives whose loss falls slower (Liu et al. 2019)."""
    temperature: float = 2.0
    """loss_rate: the larger, the more equal the factors."""
    window_steps: int = 20
    """loss_rate: steps whose mean losses are compared with those of as many steps before."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise PretrainError(f"model.joint_loss.temperature is {self.temperature}; it must be above 0")
        if self.window_steps < 1:
            raise PretrainError(f"model.joint_loss.window_steps is {self.window_steps}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Which objectives a step trains. Those it leaves out take part with gradients of exactly 0.

    What a step reads is not decided here: `data.schedule` changes the sources, and its steps are known in advance.
    """

    schedule: Literal["all", "loss", "gap", "curriculum"] = "all"
    """all: every step trains all. loss, gap: each step draws `per_step` objectives; with loss the likelier, the higher
    its recent loss is of what it was at first, with gap the further it is above its target. curriculum: each from its
    step in `from_step` on."""
    per_step: int = 1
    """loss, gap: objectives that a step draws, beside those of `always`."""
    always: list[str] = field(default_factory=list)
    """loss, gap: objectives that every step trains."""
    window_steps: int = 20
    """loss, gap: steps over which an objective's loss is averaged; until each has so many, every step trains all."""
    temperature: float = 0.5
    """loss, gap: the larger, the more equal the chances."""
    targets: dict[str, float] = field(default_factory=dict)
    """gap: loss that each drawn objective should come to, above 0."""
    from_step: dict[str, int] = field(default_factory=dict)
    """curriculum: first step that trains an objective; 1 for those that are not named."""

    def __post_init__(self) -> None:
        for name in ("per_step", "window_steps"):
            if getattr(self, name) < 1:
                raise PretrainError(f"tasks.{name} is {getattr(self, name)}; it must be at least 1")
        if not self.temperature > 0:
            raise PretrainError(f"tasks.temperature is {self.temperature}; it must be above 0")
        for name, target in self.targets.items():
            if not target > 0:
                raise PretrainError(f"tasks.targets.{name} is {target}; it must be above 0")
        for name, step in self.from_step.items():
            if step < 1:
                raise PretrainError(f"tasks.from_step.{name} is {step}; steps are counted from 1")

    def check(self, objectives: dict[str, float]) -> None:
        """Raise PretrainError where a setting names an objective that the model has not, or one that it needs lacks."""
        trained = [name for name, weight in objectives.items() if weight]
        named = {"always": self.always, "targets": list(self.targets), "from_step": list(self.from_step)}
        for key, names in named.items():
            for name in names:
                if name not in trained:
                    raise PretrainError(
                        f"tasks.{key} names {name!r}, which model.objectives does not train; it trains "
                        f"{', '.join(trained) or 'none'}"
                    )
        drawn = [name for name in trained if name not in self.always]
        if self.schedule in ("loss", "gap") and len(drawn) <= self.per_step:
            raise PretrainError(
                f"tasks.schedule={self.schedule} draws {self.per_step} of the objectives {', '.join(drawn) or 'none'} "
                "at a step, which leaves none out; lower tasks.per_step, or set tasks.schedule=all"
            )
        if self.schedule == "gap" and (missing := [name for name in drawn if name not in self.targets]):
            raise PretrainError(
                f"tasks.schedule=gap needs the loss that {missing[0]} should come to; set tasks.targets.{missing[0]}, "
                "or name it in tasks.always"
            )
        if self.schedule == "curriculum" and all(self.from_step.get(name, 1) > 1 for name in trained):
            raise PretrainError("tasks.from_step leaves step 1 without an objective; let one of them start at 1")


def _check_spans(objective: str, over: str, modality: str | None) -> None:
    if modality is not None and over != "segments":
        raise PretrainError(
            f"model.{objective}.modality is {modality} but only segments have one modality; set "
            f"model.{objective}.over=segments, or model.{objective}.modality to null"
        )
