"""What a report reads of a run's folder: metrics, config, evaluation, and the demo's result beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml

from triweave.launch.errors import ReportError
from triweave.launch.metrics import METRICS_NAME, mean_loss_by_modality, read_metrics
from triweave.launch.report.evaluation_file import EVALUATION_NAME, Evaluation, parse_evaluation
from triweave.launch.report.wording import readable
from triweave.pretrain.health.events import read_events

CONFIG_NAME = "config.yaml"
RESULT_NAME = "result.json"
Content = TypeVar("Content")
MEAN_STEPS = 10
"""Last steps over which the page's final losses are averaged, as the demo does."""


@dataclass(frozen=True, kw_only=True)
class ReportRun:
    """One run as the page shows it.

    name: short and different for every run of the page.
    entries: lines of metrics.jsonl in the order of their steps.
    config_text: config.yaml as it stands there, None without one; config: the same as a tree.
    unigram: modality -> loss of the best unigram model on the last steps; empty where no demo has computed it.
    parameters: of the model, None where neither an evaluation nor a demo's result says it.
    events: what happened to the run's health, oldest first.
    """

    name: str
    folder: Path
    entries: list[dict[str, Any]]
    config_text: str | None
    config: dict[str, Any]
    evaluation: Evaluation | None
    unigram: dict[str, float]
    parameters: int | None
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Return the last step."""
        return int(self.entries[-1]["step"])

    @cached_property
    def final_losses(self) -> dict[str, float]:
        """Modality -> mean loss of the last steps, nats per supervised token that follows it."""
        return mean_loss_by_modality(self.entries[-MEAN_STEPS:])

    @property
    def pack_tokens(self) -> int | None:
        """Return the positions of a step's packs, None where the config does not say it or a schedule changes it."""
        try:
            data = self.config["data"]
            if any(entry.get("sequence_length") for entry in data.get("schedule") or ()):
                return None
            return int(self.config["train"]["global_batch_rows"]) * int(data["sequence_length"])
        except (AttributeError, KeyError, TypeError, ValueError):
            return None

    def values(self, name: str) -> tuple[list[int], list[float]]:
        """Return (steps, values) of a figure over the steps that have it; `outer/inner` looks into mappings."""
        steps, values = [], []
        for entry in self.entries:
            value: Any = entry
            for key in name.split("/"):
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                steps.append(int(entry["step"]))
                values.append(float(value))
        return steps, values


def read_runs(folders: list[Path]) -> list[ReportRun]:
    """Return the runs of a page.

    Raises ReportError for a folder without metrics and for files that cannot be read, naming them.
    """
    names = short_names(folders)
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str) -> ReportRun:
    """Return one run."""
    entries = _read_entries(folder)
    config_text = _read_text(folder / CONFIG_NAME)
    evaluation = _read_json(folder / EVALUATION_NAME, parse_evaluation)
    result = _read_json(folder.parent / RESULT_NAME, dict) or {}
    if result.get("loss_first") != entries[0]["loss"] or result.get("steps") != entries[-1]["step"]:
        result = {}  # of another run
    parameters = evaluation.parameters if evaluation else result.get("parameters")
    return ReportRun(
        name=name,
        folder=folder,
        entries=entries,
        config_text=config_text,
        config=_tree(folder / CONFIG_NAME, config_text),
        evaluation=evaluation,
        unigram={key: float(value) for key, value in result.get("unigram_by_modality", {}).items()},
        parameters=parameters,
        events=_read_events(folder),
    )


def short_names(folders: list[Path]) -> list[str]:
    """Return the last components of each path, two or as many as it takes to tell the runs apart."""
    parts = [Path(folder).absolute().parts for folder in folders]
    for length in range(2, max(2, *map(len, parts)) + 1):
        names = [readable("/".join(own[-length:]), 80) for own in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(folder for number, folder in enumerate(folders) if parts[number] in parts[:number])
    raise ReportError(f"{twice} is named twice; name each run once")


def _read_entries(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS_NAME
    try:
        metrics = read_metrics(folder)
        # a step whose loss was not finite has none
        entries = [metrics[step] for step in sorted(metrics) if metrics[step]["loss"] is not None]
        for entry in entries:
            mean_loss_by_modality([entry])
            float(entry["loss"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path}: not the metrics of a run ({_reason(error)})") from None
    if not entries:
        raise ReportError(
            f"{folder}: no steps in {METRICS_NAME}; name the run_dir of a run that has trained at least one step"
        )
    return entries


def _read_events(folder: Path) -> list[dict[str, Any]]:
    try:
        events = read_events(folder)
        for event in events:
            int(event["step"]), str(event["event"]), str(event["text"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{folder / 'health'}: not the events of a run ({_reason(error)}); remove it") from None
    return events


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: cannot be read ({_reason(error)})") from None


def _read_json(path: Path, parse: Callable[[Any], Content]) -> Content | None:
    text = _read_text(path)
    if text is None:
        return None
    try:
        return parse(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        advice = "run `triweave evaluate` again" if path.name == EVALUATION_NAME else "make it again or remove it"
        raise ReportError(f"{path}: cannot be read ({_reason(error)}); {advice}") from None


def _tree(path: Path, text: str | None) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text) if text else {}
    except yaml.YAMLError as error:
        raise ReportError(f"{path}: not YAML ({_reason(error)})") from None
    return tree if isinstance(tree, dict) else {}


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"no {text}" if isinstance(error, KeyError) else text or type(error).__name__
