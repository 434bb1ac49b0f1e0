"""Why a step was slow: what its line of metrics.jsonl has more of than the run's median step.

    excess    seconds of the step above the median step
    waiting   data wait above the median's
    work      compute time of the median step x (FLOPs / median FLOPs - 1)
    uneven    compute time of the median step x (rank imbalance - median imbalance)

What the three do not explain is put down to the start of the process or to a save that was under way, where there was
one; else nothing in the figures explains it. A share below NAMED_SHARE of the excess is not named.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from triweave.launch.report.content import Section
from triweave.launch.report.run_files import ReportRun
from triweave.launch.report.sections import Table
from triweave.launch.report.wording import number

SLOW = 1.5
"""A step is slow from this multiple of the median on."""
NAMED_SHARE = 0.2
"""Causes below this share of the excess are left out."""
SHOWN = 12
"""Slow steps of one run that are spelled out, the slowest ones."""
STAGE_SUFFIX = "_ms_p99"


@dataclass(frozen=True, kw_only=True)
class SlowStep:
    """A step that took `times` the median. causes: (what, seconds), the largest first; empty where none is known."""

    step: int
    seconds: float
    times: float
    causes: tuple[tuple[str, float], ...]


def slow_steps(entries: Sequence[dict[str, Any]]) -> list[SlowStep]:
    """Return the steps that took at least SLOW medians, the slowest first. entries: lines of metrics.jsonl."""
    if not entries:
        return []
    usual = {name: _median(entries, name) for name in ("step_s", "data_wait_s", "flops", "rank_imbalance")}
    found = []
    for place, entry in enumerate(entries):
        if usual["step_s"] and entry["step_s"] >= SLOW * usual["step_s"]:
            saving = any("checkpoint" in other for other in entries[place : place + 2])
            found.append(
                SlowStep(
                    step=int(entry["step"]),
                    seconds=entry["step_s"],
                    times=entry["step_s"] / usual["step_s"],
                    causes=_causes(entry, usual, starting=not entry.get("loader"), saving=saving),
                )
            )
    return sorted(found, key=lambda slow: (-slow.times, slow.step))


def _causes(
    entry: dict[str, Any], usual: dict[str, float], *, starting: bool, saving: bool
) -> tuple[tuple[str, float], ...]:
    excess = entry["step_s"] - usual["step_s"]
    compute = usual["step_s"] - usual["data_wait_s"]
    known = [(_waiting(entry), entry.get("data_wait_s", 0.0) - usual["data_wait_s"])]
    if usual["flops"]:
        known.append(("more to compute", compute * (entry.get("flops", 0.0) / usual["flops"] - 1)))
    if usual["rank_imbalance"]:
        uneven = entry.get("rank_imbalance", 0.0) - usual["rank_imbalance"]
        known.append(("ranks with uneven work", compute * uneven))
    known = [(what, seconds) for what, seconds in known if seconds >= NAMED_SHARE * excess]
    rest = excess - sum(seconds for _, seconds in known)
    if rest >= NAMED_SHARE * excess and (starting or saving):
        known.append(("the process had just started" if starting else "a checkpoint was being written", rest))
    return tuple(sorted(known, key=lambda cause: -cause[1]))


def _waiting(entry: dict[str, Any]) -> str:
    stages = {
        name.removesuffix(STAGE_SUFFIX): value
        for name, value in entry.get("loader", {}).items()
        if name.endswith(STAGE_SUFFIX)
    }
    slowest = max(stages, key=lambda stage: stages[stage], default="")
    return f"waiting for data, of which {slowest} takes longest" if slowest else "waiting for data"


def _median(entries: Sequence[dict[str, Any]], name: str) -> float:
    values = [entry[name] for entry in entries if entry.get(name) is not None]
    return statistics.median(values) if values else 0.0


def slow_section(runs: Sequence[ReportRun]) -> Section | None:
    """Return why the slowest steps of the runs were slow, None where none was."""
    rows, left_out = [], []
    for run in runs:
        slow = slow_steps(run.entries)
        rows += [
            [run.name, f"{item.step:,}", f"{number(item.seconds)} s", f"{number(item.times, 1)} ×", _words(item)]
            for item in slow[:SHOWN]
        ]
        if len(slow) > SHOWN:
            left_out.append(f"{run.name}: {len(slow) - SHOWN} more steps took {SLOW} medians or more.")
    if not rows:
        return None
    table = Table(
        caption=f"Steps that took {SLOW} times the median or more, the slowest first.",
        columns=("Run", "Step", "Took", "Of the median", "Why"),
        rows=rows,
        words=True,
    )
    words = "Seconds that a step has more than the median step, by what its figures say of them."
    return Section(id="slow", title="Why steps were slow", paragraphs=(words, *left_out), tables=(table,))


def _words(item: SlowStep) -> str:
    if not item.causes:
        return "nothing in the figures: look for another process on a machine, or a slow network"
    return "; ".join(f"{what} ({number(seconds)} s)" for what, seconds in item.causes)
