"""What the page says, as plain values for the template: tiles, tables and the groups of plots."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from triweave.launch.report.evaluation_file import METHODS, CaptionNll, Evaluation, Retrieval
from triweave.launch.report.machine_facts import machine_facts, version_facts
from triweave.launch.report.run_files import MEAN_STEPS, ReportRun
from triweave.launch.report.wording import (
    ABSENT,
    bracketed,
    count,
    duration,
    interval,
    number,
    percent,
    readable,
    recall_pair,
)

_MIB = 1 << 20
_METHOD_WORDS = {"prompt": "By prompt", "probe": "Probe, embedding", "probe_hidden": "Probe, hidden state"}
NAMED_TASKS = 3
"""Retrieval tasks among the key figures."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A key figure with the note that makes sense of it."""

    name: str
    value: str
    note: str = ""

    @property
    def line(self) -> str:
        """Return value and note in one line."""
        return f"{self.value} ({self.note})" if self.note else self.value


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table. The first `headers` columns name the row, the others are figures, or `words` after `figures` of them."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    headers: int = 1
    words: bool = False
    figures: int = 0


def key_facts(run: ReportRun) -> list[Fact]:
    """Return the figures that come first."""
    facts = [Fact(name="Steps", value=f"{run.steps:,}", note=duration(sum(run.values("step_s")[1])) + " of training")]
    if run.parameters is not None:
        facts.append(Fact(name="Parameters", value=count(run.parameters)))
    losses = run.final_losses
    facts += [
        Fact(
            name=f"Loss after {name}",
            value=number(loss),
            note=f"best unigram model {number(run.unigram[name])}" if name in run.unigram else "nats per token",
        )
        for name, loss in losses.items()
    ]
    if run.evaluation is not None:
        facts += _evaluation_facts(run.evaluation)
    facts.append(Fact(name="Throughput", value=f"{_last_mean(run, 'tokens_per_s'):,.0f}", note="tokens per second"))
    facts.append(Fact(name="Waiting for data", value=percent(_data_wait(run)), note=_wait_note(run)))
    if (fill := pack_fill(run)) is not None:
        facts.append(Fact(name="Pack fill", value=percent(fill), note="of all positions hold a token"))
    return facts


def _evaluation_facts(evaluation: Evaluation) -> list[Fact]:
    facts = [
        Fact(
            name=f"Gap by {item.name}",
            value=number(item.gap, 3, sign=True),
            note=f"nats per caption token, {interval(item.interval, 3)}",
        )
        for item in evaluation.caption_nll
    ]
    return facts + [
        Fact(name=task.title, value=percent(task.recalls[1]), note=_task_note(task))
        for task in _named_tasks(evaluation.retrieval)
    ]


def key_table(runs: Sequence[ReportRun]) -> Table:
    """Return the key figures of several runs side by side."""
    facts = [{fact.name: fact for fact in key_facts(run)} for run in runs]
    names = list(dict.fromkeys(name for own in facts for name in own))
    return Table(
        caption="Key figures.",
        words=True,
        columns=("", *(run.name for run in runs)),
        rows=[[name, *(own[name].line if name in own else ABSENT for own in facts)] for name in names],
    )


def _named_tasks(tasks: Sequence[Retrieval]) -> list[Retrieval]:
    """Return the first tasks, of every corpus in turn."""
    place = {task.task: sum(other.corpus == task.corpus for other in tasks[:at]) for at, task in enumerate(tasks)}
    return sorted(tasks, key=lambda task: place[task.task])[:NAMED_TASKS]


def _task_note(task: Retrieval) -> str:
    best = max(task.floors.items(), key=lambda item: item[1][1], default=None)
    floor = "" if best is None else f", {best[0]} floor {percent(best[1][1])}"
    return f"R@10; chance {percent(task.chance[1])}{floor}"


def loss_table(runs: Sequence[ReportRun]) -> Table:
    """Return the losses of the first step and of the last ones, per modality, beside the unigram model."""
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.final_losses):
        for run in (run for run in runs if name in run.final_losses):
            loss = run.final_losses[name]
            first = run.values(f"loss_by_modality/{name}")[1][0]
            unigram = run.unigram.get(name)
            below = number(None if unigram is None else loss - unigram, 3, sign=True)
            rows.append([f"after {name}", run.name, number(first, 3), number(loss, 3), number(unigram, 3), below])
    return _by_run(
        Table(
            caption=f"Loss in nats per supervised token; last: mean of the last {MEAN_STEPS} steps.",
            columns=("Targets", "Run", "First step", "Last", "Best unigram model", "Difference"),
            rows=rows,
            headers=2,
        ),
        runs,
    )


def retrieval_table(runs: Sequence[ReportRun]) -> Table | None:
    """Return all retrieval tasks of all runs; None without any."""
    pairs = [(task, run) for run in runs if run.evaluation for task in run.evaluation.retrieval]
    if not pairs:
        return None
    floors = sorted({name for task, _ in pairs for name in task.floors})
    order = list(dict.fromkeys(task.task for task, _ in pairs))
    pairs.sort(key=lambda pair: order.index(pair[0].task))
    floor_columns = (f"{readable(name, 20)} floor" for name in floors)
    table = Table(
        caption="Retrieval in %, 95 % intervals in brackets. Pairs of figures are R@10 / R@1. The difference is R@10 "
        "minus that of the best floor, by paired bootstrap; the best is chosen on these queries, which favours it. "
        "Without symbols: R@10 without letters and digits, and what chance gives in those smaller pools.",
        columns=(
            *("Task", "Run", "R@10", "Difference", "Control", "Chance", *floor_columns),
            *("R@1", "Without symbols", "Median rank", "Queries / pool"),
        ),
        rows=[_retrieval_row(task, run.name, floors) for task, run in pairs],
        headers=2,
    )
    return _by_run(table, runs)


def _retrieval_row(task: Retrieval, run: str, floors: Sequence[str]) -> list[str]:
    difference = task.difference
    return [
        *(task.title, run),
        number(100 * task.recalls[1], 1) + bracketed(task.r10_interval, 1, scale=100),
        ABSENT if difference is None
        else number(100 * difference[1], 1, sign=True) + bracketed(difference[2], 1, scale=100),
        recall_pair(task.control),
        recall_pair(task.chance),
        *(recall_pair(task.floors.get(name)) for name in floors),
        number(100 * task.recalls[0], 1),
        ABSENT if task.without_symbols is None
        else f"{number(100 * task.without_symbols[0], 1)}, chance {number(100 * task.without_symbols[1], 1)}",
        *(number(task.median_rank, 1), f"{task.n:,} / {task.pool:,.0f}"),
    ]  # fmt: skip


def caption_table(runs: Sequence[ReportRun]) -> Table | None:
    """Return caption NLL with true and shuffled media; None without any."""
    rows = []
    for modality in ("image", "audio"):
        for run in runs:
            for item in run.evaluation.caption_nll if run.evaluation else ():
                if item.name == modality:
                    rows.append(_caption_row(f"by {modality}", run.name, item))
                    rows += [_caption_row(f"by {modality}, {part.name}", run.name, part) for part in item.corpora]
    if not rows:
        return None
    columns = ("Captions", "Run", "True", "Shuffled", "Gap (95 % interval)", "Text alone", "Documents")
    caption = "Nats per token of the caption, given the true picture or sound, and given that of another document."
    return _by_run(Table(caption=caption, columns=columns, rows=rows, headers=2), runs)


def _caption_row(what: str, run: str, item: CaptionNll) -> list[str]:
    return [
        *(readable(what, 80), run, number(item.true, 3), number(item.shuffled, 3)),
        number(item.gap, 3, sign=True) + bracketed(item.interval, 3),
        *(number(item.language_only, 3), f"{item.n:,}"),
    ]


def classification_table(runs: Sequence[ReportRun]) -> Table | None:
    """Return the accuracies by prompt and by probe beside their floors; None without any."""
    results = [(run, item) for run in runs if run.evaluation for item in run.evaluation.classification]
    if not results:
        return None
    floors = sorted({name for _, item in results for name in item.floors})
    methods = [name for name in METHODS if any(name in item.methods for _, item in results)]
    rows = []
    for run, item in results:
        row = [readable(item.label, 40), run.name, f"{item.n:,}", f"{item.classes:,}"]
        for method in methods:
            accuracy, bounds = item.methods.get(method, (None, None))
            row.append(number(None if accuracy is None else 100 * accuracy, 1) + bracketed(bounds, 1, scale=100))
        row += [number(100 * item.floors[name], 1) if name in item.floors else ABSENT for name in floors]
        rows.append(row)
    columns = ("Label", "Run", "Queries", "Classes", *(_METHOD_WORDS[name] for name in methods))
    table = Table(
        caption="Accuracy in %, 95 % intervals in brackets.",
        columns=(*columns, *(f"{readable(name, 20)} floor" for name in floors)),
        rows=rows,
        headers=2,
    )
    return _by_run(table, runs)


def efficiency_table(runs: Sequence[ReportRun]) -> Table:
    """Return how the runs used their machine."""
    rows = [
        [
            run.name,
            f"{_last_mean(run, 'tokens_per_s'):,.0f}",
            number(_median(run.values("step_s")[1]), 2),
            percent(_data_wait(run)),
            percent(pack_fill(run)),
            f"{max(run.values('memory_bytes')[1], default=0) / _MIB:,.0f}",
            duration(sum(run.values("step_s")[1])),
        ]
        for run in runs
    ]
    columns = ("Run", "Tokens/s, last steps", "Median step, s", "Waiting for data", "Pack fill", "Peak memory, MiB")
    return Table(caption="How the time and the packs were used.", columns=(*columns, "Training time"), rows=rows)


def machine_table(runs: Sequence[ReportRun]) -> Table:
    """Return machine and versions: of each evaluation, and of the making of this page."""
    sources = [(run.name, run.evaluation.machine | run.evaluation.versions) for run in runs if run.evaluation]
    named = [(f"evaluation of {name}", facts) for name, facts in sources]
    named.append(("this page", machine_facts() | version_facts()))
    names = list(dict.fromkeys(name for _, facts in named for name in facts))
    return Table(
        caption="Where the figures were made.",
        words=True,
        columns=("", *(name for name, _ in named)),
        rows=[[readable(name, 40), *(_plain(facts.get(name)) for _, facts in named)] for name in names],
    )


def differing_settings(runs: Sequence[ReportRun]) -> Table | None:
    """Return the config keys whose values are not the same in all runs; None where there are none."""
    if len(runs) < 2:
        return None
    flat = [_flat(run.config) for run in runs]
    names = sorted({name for settings in flat for name in settings})
    rows = [
        [readable(name, 80), *(_plain(settings.get(name)) for settings in flat)]
        for name in names
        if name != "run_dir" and len({_plain(settings.get(name)) for settings in flat}) > 1
    ]
    if not rows:
        return None
    columns = ("Setting", *(run.name for run in runs))
    return Table(caption="Settings that differ.", columns=columns, rows=rows, words=True)


def pack_fill(run: ReportRun) -> float | None:
    """Return the share of all packed positions that hold a token, None where the config does not say their number."""
    tokens = run.values("tokens")[1]
    if run.pack_tokens is None or not tokens:
        return None
    return sum(tokens) / (len(tokens) * run.pack_tokens)


def _by_run(table: Table, runs: Sequence[ReportRun]) -> Table:
    """Return the table without columns that say nothing: the run where there is one only, figures that no row has."""
    kept = [
        at
        for at in range(len(table.columns))
        if (at != 1 or len(runs) > 1) and any(row[at] not in ("", ABSENT) for row in table.rows)
    ]
    return Table(
        caption=table.caption,
        columns=[table.columns[at] for at in kept],
        rows=[[row[at] for at in kept] for row in table.rows],
        headers=min(len(runs), 2),
    )


def _data_wait(run: ReportRun) -> float | None:
    seconds = sum(run.values("step_s")[1])
    return sum(run.values("data_wait_s")[1]) / seconds if seconds else None


def _wait_note(run: ReportRun) -> str:
    """Name the rank that waited most and what for, where some did; the commonest of the run's verdicts."""
    stalls = Counter((entry["stall"]["rank"], entry["stall"]["bound"]) for entry in run.entries if "stall" in entry)
    if not stalls:
        return "of the time"
    rank, bound = stalls.most_common(1)[0][0]
    return f"of the time, most on rank {rank}: {bound} bound"


def _last_mean(run: ReportRun, name: str) -> float:
    values = run.values(name)[1][-MEAN_STEPS:]
    return sum(values) / len(values) if values else float("nan")


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value of everything in a config; entries of lists by their number."""
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        items = [(str(position), value) for position, value in enumerate(tree)]
    else:
        return {prefix: tree}
    return {
        name: value
        for key, inner in items
        for name, value in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
    }


def _plain(value: Any) -> str:
    if value is None or value == "":
        return ABSENT
    return readable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), 120)
