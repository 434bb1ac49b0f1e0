"""The plots of a report's runs: which series, which yardsticks, under which title."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from triweave.launch.report.evaluation_file import Retrieval
from triweave.launch.report.plots import CHANCE, Bar, BarGroup, Series, curve_plot, interval_plot
from triweave.launch.report.run_files import ReportRun
from triweave.launch.report.wording import readable

if TYPE_CHECKING:
    from markupsafe import Markup

MODALITY_COLOURS = {"text": 0, "trunk": 0, "image": 1, "audio": 2}
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure of the page. svg: markup of our own making, all text in it escaped."""

    title: str
    svg: Markup
    note: str = ""


def loss_plots(runs: Sequence[ReportRun]) -> list[Plot]:
    """Return the losses by modality (all in one plot for one run, one plot each for several) and the whole loss."""
    names = list(dict.fromkeys(name for run in runs for entry in run.entries for name in entry["loss_by_modality"]))
    by_modality: list[Plot] = []
    if len(runs) > 1:
        for name in names:
            series = [
                _series(run, f"loss_by_modality/{name}", at, label=run.name, level=run.unigram.get(name))
                for at, run in enumerate(runs)
            ]
            by_modality += _curves(f"Loss after {name}", series, "nats per token")
    else:
        series = [
            _series(
                runs[0],
                f"loss_by_modality/{name}",
                MODALITY_COLOURS.get(name, at),
                label=f"after {name}",
                level=runs[0].unigram.get(name),
            )
            for at, name in enumerate(names)
        ]
        by_modality += _curves("Loss by modality", series, "nats per token")
    by_source = _by_part(runs, "loss_by_source", "Loss by source", "nats per token")
    return by_modality + by_source + _curves("Training objective", _per_run(runs, "loss"), "per supervised token")


def tower_plots(runs: Sequence[ReportRun]) -> list[Plot]:
    """Return the norms of gradients and updates by tower, nothing where no run has told them."""
    return [
        *_by_part(runs, "tower_grad_norm", "Gradient norm", "L2, before clipping"),
        *_by_part(runs, "tower_update_norm", "Update norm", "L2 of a step's change of the weights"),
    ]


def _by_part(runs: Sequence[ReportRun], figure: str, title: str, unit: str) -> list[Plot]:
    """Return one plot of a figure that is told by part, a curve for each part of each run."""
    parts = [
        (run, name)
        for run in runs
        for name in dict.fromkeys(name for entry in run.entries for name in entry.get(figure, {}))
    ]
    several = len(runs) > 1
    return _curves(
        title,
        [
            _series(
                run,
                f"{figure}/{name}",
                place if several else MODALITY_COLOURS.get(name, place),
                label=f"{run.name}: {name}" if several else name,
            )
            for place, (run, name) in enumerate(parts)
        ],
        unit,
    )


def contrastive_plots(runs: Sequence[ReportRun]) -> list[Plot]:
    """Return contrastive loss and accuracy, nothing where no run has the objective."""
    return [
        *_curves("Contrastive loss", _per_run(runs, "contrastive_loss"), "nats"),
        *_curves("Contrastive accuracy", _per_run(runs, "contrastive_accuracy"), "share of pairs", from_zero=True),
    ]


def task_plots(runs: Sequence[ReportRun]) -> list[Plot]:
    """Return loss, accuracy and weight of every objective, nothing where no run has several."""
    names = list(dict.fromkeys(name for run in runs for entry in run.entries for name in entry.get("tasks", {})))
    units = {
        "loss": "mean over its rows",
        "accuracy": "share of rows",
        "weight": "factor of the mean; 0: learnt nothing",
    }
    several = len(runs) > 1
    return [
        plot
        for key, unit in units.items()
        for plot in _curves(
            f"Objectives, {key}",
            [
                _series(run, f"tasks/{name}/{key}", colour, label=f"{run.name}: {name}" if several else name)
                for colour, (run, name) in enumerate((run, name) for run in runs for name in names)
                if run.values(f"tasks/{name}/{key}")[1]
            ],
            unit,
            smooth=key != "weight",
        )
    ]


def efficiency_plots(runs: Sequence[ReportRun]) -> list[Plot]:
    """Return throughput, step time, data wait, pack fill and memory over the steps."""
    fill = [
        _series(run, "tokens", at, label=run.name, scale=100 / run.pack_tokens)
        for at, run in enumerate(runs)
        if run.pack_tokens
    ]
    return [
        *_curves("Throughput", _per_run(runs, "tokens_per_s"), "tokens per second", from_zero=True),
        *_curves("Step time", _per_run(runs, "step_s"), "seconds, data wait included", from_zero=True),
        *_curves("Waiting for data", _per_run(runs, "data_wait_fraction", 100), "% of the step", from_zero=True),
        *_curves("Pack fill", fill, "% of all positions", smooth=False),
        *_curves("Memory", _per_run(runs, "memory_bytes", 1 / _MIB), "MiB, peak of rank 0", from_zero=True),
    ]


def retrieval_plots(runs: Sequence[ReportRun]) -> list[Plot]:
    """Return R@10 and R@1 of all tasks beside chance, floors and control."""
    plots = []
    for index, name in ((1, "R@10"), (0, "R@1")):
        groups: dict[str, BarGroup] = {}
        for colour, run in enumerate(runs):
            for task in run.evaluation.retrieval if run.evaluation else ():
                bounds = task.r10_interval if index else task.r1_interval
                bar = Bar(value=task.recalls[index], interval=bounds, colour=colour)
                group = groups.get(task.task)
                bars = [*(group.bars if group else ()), bar]
                marks = (group.marks if group else {}) | _marks(task, index)
                groups[task.task] = BarGroup(label=task.title, bars=bars, marks=marks)
        title = f"Retrieval, {name}"
        svg = interval_plot(
            *("plot-" + name.replace("@", "").lower(), list(groups.values())),
            title=title,
            unit=f"{name} in %; lines: 95 % intervals",
            bar_labels=[run.name for run in runs] if len(runs) > 1 else ["model"],
            scale=100,
        )
        plots.append(Plot(title=title, svg=_markup(svg)))
    return plots


def caption_plots(runs: Sequence[ReportRun]) -> list[Plot]:
    """Return the gap of the caption's NLL by modality, around 0."""
    evaluated = [(colour, run) for colour, run in enumerate(runs) if run.evaluation and run.evaluation.caption_nll]
    groups: dict[str, list[Bar]] = {}
    for colour, run in evaluated:
        assert run.evaluation is not None
        for item in run.evaluation.caption_nll:
            bar = Bar(value=item.gap, interval=item.interval, colour=colour)
            groups.setdefault(f"captions by {item.name}", []).append(bar)
    if not groups:
        return []
    svg = interval_plot(
        "plot-caption-gap",
        [BarGroup(label=label, bars=bars) for label, bars in groups.items()],
        title="Gap of the caption's NLL",
        unit="nats per token: shuffled minus true; lines: 95 % intervals",
        bar_labels=[run.name for run in runs] if len(runs) > 1 else (),
        as_points=True,
    )
    return [Plot(title="Gap of the caption's NLL", note="above 0: the medium is used", svg=_markup(svg))]


def _marks(task: Retrieval, index: int) -> dict[str, float]:
    floors = {f"{readable(name, 20)} floor": recalls[index] for name, recalls in sorted(task.floors.items())}
    marks = {CHANCE: task.chance[index]} | floors
    return marks if task.control is None else marks | {"control": task.control[index]}


def _per_run(runs: Sequence[ReportRun], name: str, scale: float = 1.0) -> list[Series]:
    return [_series(run, name, at, label=run.name, scale=scale) for at, run in enumerate(runs)]


def _series(
    run: ReportRun, name: str, colour: int, *, label: str, level: float | None = None, scale: float = 1.0
) -> Series:
    steps, values = run.values(name)
    return Series(label=label, steps=steps, values=[scale * value for value in values], colour=colour, level=level)


def _curves(
    title: str, series: Sequence[Series], unit: str, *, from_zero: bool = False, smooth: bool = True
) -> list[Plot]:
    """Return one plot, none where no run has the figure."""
    if not any(item.values for item in series):
        return []
    name = "plot-" + title.lower().replace(" ", "-")
    svg = curve_plot(name, series, title=title, unit=unit, from_zero=from_zero, smooth=smooth)
    return [Plot(title=title, svg=_markup(svg))]


def _markup(svg: str) -> Markup:
    from markupsafe import Markup

    return Markup(svg)
