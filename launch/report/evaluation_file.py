"""evaluation.json as the page needs it: parsed once, so that a file of another shape is one error and not many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triweave.launch.report.wording import readable

EVALUATION_NAME = "evaluation.json"
EVALUATION_VERSION = 1
METHODS = ("prompt", "probe", "probe_hidden")
"""How a picture's label can be found, in the order of the page."""

_LANGUAGE_WORDS = {"other": "other languages"}
"""Language of a task -> how the page calls it; others by their code."""

Interval = tuple[float, float]
Recalls = tuple[float, float]
"""(R@1, R@10), shares of 1."""


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """One retrieval task.

    n queries over pools of so many candidates on average; recalls with their 95 % intervals; floors: name -> recalls;
    difference: (floor, mean, interval) of R@10 minus that of the best floor, by paired bootstrap; control: a model
    trained on shuffled pairs; without_symbols: (R@10, chance of it) without letters and digits, in smaller pools.
    """

    task: str
    language: str
    corpus: str
    n: int
    pool: float
    recalls: Recalls
    r1_interval: Interval
    r10_interval: Interval
    median_rank: float
    chance: Recalls
    floors: dict[str, Recalls]
    difference: tuple[str, float, Interval] | None
    control: Recalls | None
    control_r10_interval: Interval | None
    without_symbols: tuple[float, float] | None

    @property
    def title(self) -> str:
        """Return the task's name as the page writes it."""
        words, _, last = self.task.rpartition(" ")
        named = f"{words} ({_LANGUAGE_WORDS.get(last, last)})" if words and last == self.language else self.task
        return readable(named.replace("->", " → "), 80)

    @property
    def beats_chance(self) -> bool:
        """Return whether the interval of R@10 lies above chance."""
        return self.r10_interval[0] > self.chance[1]

    @property
    def beats_floor(self) -> bool:
        """Return whether the interval of the difference to the best floor lies above 0."""
        return self.difference is not None and self.difference[2][0] > 0

    @property
    def below_floor(self) -> bool:
        """Return whether the interval of the difference to the best floor lies below 0."""
        return self.difference is not None and self.difference[2][1] < 0

    @property
    def control_above_chance(self) -> bool:
        """Return whether the interval of the control's R@10 lies above chance."""
        return self.control_r10_interval is not None and self.control_r10_interval[0] > self.chance[1]

    @property
    def control_at_chance(self) -> bool:
        """Return whether the control's interval of R@10 holds chance."""
        bounds = self.control_r10_interval
        return bounds is not None and bounds[0] <= self.chance[1] <= bounds[1]


@dataclass(frozen=True, kw_only=True)
class CaptionNll:
    """Nats per caption token with the true and with a shuffled medium, and their difference with its interval.

    name: modality of the medium; of a part of the figures, its corpus. corpora: the parts, where there are several.
    """

    name: str
    n: int
    true: float
    shuffled: float
    gap: float
    interval: Interval
    language_only: float | None
    corpora: tuple[CaptionNll, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Accuracy on a label by each of METHODS that was tried, with 95 % intervals, and its floors."""

    label: str
    n: int
    classes: int
    methods: dict[str, tuple[float, Interval | None]]
    floors: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The whole file."""

    step: int
    parameters: int
    split: str | None
    folds: int | None
    machine: dict[str, Any]
    versions: dict[str, Any]
    seconds: float | None
    retrieval: tuple[Retrieval, ...]
    classification: tuple[Classification, ...]
    caption_nll: tuple[CaptionNll, ...]


def parse_evaluation(content: Any) -> Evaluation:
    """Return the evaluation; raises KeyError, TypeError, ValueError or AttributeError where it has another shape."""
    if content["version"] != EVALUATION_VERSION:
        raise ValueError(f"version is {content['version']!r}, this Triweave reads {EVALUATION_VERSION}")
    seconds = content.get("seconds")
    return Evaluation(
        step=int(content["step"]),
        parameters=int(content["parameters"]),
        split=None if content.get("split") is None else str(content["split"]),
        folds=None if content.get("folds") is None else int(content["folds"]),
        machine=dict(content.get("machine") or {}),
        versions=dict(content.get("versions") or {}),
        seconds=float(seconds) if isinstance(seconds, int | float) else None,
        retrieval=tuple(_retrieval(task, item) for task, item in content["retrieval"].items()),
        classification=tuple(_classification(label, item) for label, item in content["classification"].items()),
        caption_nll=tuple(_caption_nll(name, item) for name, item in content["caption_nll"].items()),
    )


def _retrieval(task: str, item: dict[str, Any]) -> Retrieval:
    difference, control, without = item.get("difference"), item.get("control"), item.get("without_symbols")
    found = None
    if difference:
        found = (str(difference["floor"]), float(difference["r10"]["mean"]), _interval(difference["r10"]["ci"]))
    return Retrieval(
        task=task,
        language=str(item.get("language", "")),
        corpus=str(item.get("corpus", "")),
        n=int(item["n"]),
        pool=float(item["pool"]),
        recalls=_recalls(item),
        r1_interval=_interval(item["ci"]["r1"]),
        r10_interval=_interval(item["ci"]["r10"]),
        median_rank=float(item["median_rank"]),
        chance=_recalls(item["chance"]),
        floors={name: _recalls(floor) for name, floor in (item.get("floors") or {}).items()},
        difference=found,
        control=_recalls(control) if control else None,
        control_r10_interval=_interval(control["ci"]["r10"]) if control else None,
        without_symbols=(float(without["r10"]), float(without["chance"]["r10"])) if without else None,
    )


def _classification(label: str, item: dict[str, Any]) -> Classification:
    methods = {}
    for name in METHODS:
        if method := item.get(name):
            bounds = method.get("ci")
            methods[name] = (float(method["accuracy"]), _interval(bounds) if bounds else None)
    floors = {name: _accuracy(value) for name, value in (item.get("floors") or {}).items()}
    return Classification(label=label, n=int(item["n"]), classes=int(item["classes"]), methods=methods, floors=floors)


def _caption_nll(name: str, item: dict[str, Any]) -> CaptionNll:
    language_only, corpora = item.get("language_only"), item.get("corpora") or {}
    return CaptionNll(
        name=name,
        n=int(item["n"]),
        true=float(item["true"]),
        shuffled=float(item["shuffled"]),
        gap=float(item["gap"]),
        interval=_interval(item["ci"]),
        language_only=None if language_only is None else float(language_only),
        corpora=tuple(_caption_nll(*part) for part in corpora.items()) if len(corpora) > 1 else (),
    )


def _accuracy(value: Any) -> float:
    return float(value["accuracy"] if isinstance(value, dict) else value)


def _recalls(item: dict[str, Any]) -> Recalls:
    return float(item["r1"]), float(item["r10"])


def _interval(bounds: Any) -> Interval:
    low, high = bounds
    return float(low), float(high)
