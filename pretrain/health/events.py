"""What happened to a run's health, one line of JSON each: skipped steps, roll-backs, stops, stalls, restarts.

    RUN/health/events.jsonl     {"time_s", "event", "step", "text", ...}

Rank 0 and the supervisor append to it, a whole line at a time. Nothing is ever taken out: a step that a restart did
again may stand there twice.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Literal

FOLDER = "health"
EVENTS = "events.jsonl"
Event = Literal["skip", "roll_back", "stop", "preempted", "stall", "restart"]


def record_event(run_dir: str | Path, event: Event, *, step: int, text: str, **fields: Any) -> None:
    """Append an event; step: the last one begun. fields: what else JSON can hold."""
    folder = Path(run_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time_s": time.time(), "event": event, "step": step, "text": text, **fields}) + "\n"
    descriptor = os.open(folder / EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the events, oldest first; a line that a kill cut off is left out."""
    try:
        text = (Path(run_dir) / FOLDER / EVENTS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1] if line]
