"""The health of runs on the page: steps left out, roll-backs, stalls, restarts."""

from __future__ import annotations

from collections.abc import Sequence

from triweave.launch.report.content import Section
from triweave.launch.report.run_files import ReportRun
from triweave.launch.report.sections import Table
from triweave.launch.report.wording import readable

EVENT_WORDS = {
    "skip": "step left out",
    "roll_back": "roll-back",
    "stop": "ended",
    "preempted": "stopped and saved",
    "stall": "stood still",
    "restart": "started again",
}
SHOWN = 50
"""Events of one run that are spelled out, the latest ones."""


def health_section(runs: Sequence[ReportRun]) -> Section | None:
    """Return what happened to the runs' health, None where nothing did."""
    rows = [
        [run.name, f"{int(event['step']):,}", EVENT_WORDS.get(str(event["event"]), ""), readable(str(event["text"]))]
        for run in runs
        for event in run.events[-SHOWN:]
    ]
    if not rows:
        return None
    left_out = [f"{run.name}: {len(run.events) - SHOWN} earlier ones" for run in runs if len(run.events) > SHOWN]
    table = Table(
        caption="What happened, in order; whole in health/events.jsonl of the run.",
        columns=("Run", "Step", "Event", "What and where"),
        rows=rows,
        words=True,
    )
    words = "A step that is left out or rolled back changes no weight; `triweave audit` counts its rows as skipped."
    return Section(id="health", title="Health", paragraphs=(words, *left_out), tables=(table,))
