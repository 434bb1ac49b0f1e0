"""Read a run's metrics.jsonl while it is being written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS_NAME = "metrics.jsonl"
TAIL_BYTES = 1 << 16
"""More than any line of metrics."""


def read_metrics(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Return step -> its metrics, the latest line of each step; empty before the first.

    A step that was repeated after a resume stands there twice; a last line without its end is one being written.
    """
    try:
        text = (run_dir / METRICS_NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    lines = text.split("\n")[:-1]
    entries = (json.loads(line) for line in lines if line)
    return {int(entry["step"]): entry for entry in entries}


def newest_metrics(run_dir: Path) -> dict[str, Any] | None:
    """Return the last whole line, None before the first; looks at the end of the file only."""
    try:
        with open(run_dir / METRICS_NAME, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    entry: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
    return entry


def mean_loss_by_modality(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Return modality -> mean loss over the supervised tokens of some steps."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for entry in entries:
        for modality, loss in entry["loss_by_modality"].items():
            weight = float(entry["supervised_by_modality"].get(modality, 0))
            if weight:
                sums[modality] = sums.get(modality, 0.0) + weight * float(loss)
                weights[modality] = weights.get(modality, 0.0) + weight
    return {modality: sums[modality] / weights[modality] for modality in sums}
