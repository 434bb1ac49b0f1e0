"""The result of `triweave evaluate` as plots: retrieval beside floors and chance, caption likelihood gaps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from triweave.launch.errors import LaunchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODEL, FLOOR, CONTROL, CHANCE = "#2266aa", "#999999", "#cc7722", "#222222"
FORMATS = ("png", "svg")
DPI = 150


def write_plots(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots that the result has figures for and return their paths. Raises LaunchError."""
    figures = {}
    if result["retrieval"]:
        figures["retrieval"] = retrieval_figure(result["retrieval"])
    if result["caption_nll"]:
        figures["caption_nll"] = nll_figure(result["caption_nll"])
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            for form in FORMATS:
                path = folder / f"{name}.{form}"
                figure.savefig(path, dpi=DPI, metadata={"Date": None} if form == "svg" else None)
                written.append(path)
    except OSError as error:
        raise LaunchError(f"--plots {folder}: {error.strerror}; choose a folder that can be written") from None
    return written


def retrieval_figure(tasks: dict[str, Any]) -> Figure:
    """Return bars of R@1 and R@10 with their intervals; floors as bars below, chance as a line, control as a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.4 + 0.55 * len(tasks)), layout="constrained")
    for number, axes in enumerate(figure.subplots(1, 2, sharey=True)):
        _recall_bars(axes, tasks, ("r1", "r10")[number])
        axes.set_title(("R@1", "R@10")[number])
    handles, labels = figure.axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _recall_bars(axes: Axes, tasks: dict[str, Any], which: str) -> None:
    places = list(range(len(tasks)))
    entries = list(tasks.values())
    values = [100 * task[which] for task in entries]
    ends = [task["ci"][which] for task in entries]
    errors = [
        [max(0.0, value - 100 * low) for value, (low, _) in zip(values, ends, strict=True)],
        [max(0.0, 100 * high - value) for value, (_, high) in zip(values, ends, strict=True)],
    ]
    best = [100 * max(floor[which] for floor in task["floors"].values()) for task in entries]
    chance = [100 * task["chance"][which] for task in entries]
    upper, lower = [place - 0.18 for place in places], [place + 0.18 for place in places]
    axes.barh(upper, values, 0.34, xerr=errors, color=MODEL, ecolor=CHANCE, capsize=2, label="model, 95 % interval")
    axes.barh(lower, best, 0.34, color=FLOOR, label="best floor")
    axes.vlines(chance, [place - 0.4 for place in places], [place + 0.4 for place in places], CHANCE, label="chance")
    trained = [(place, task["control"]) for place, task in zip(upper, entries, strict=True) if task["control"]]
    if trained:
        axes.plot([100 * c[which] for _, c in trained], [p for p, _ in trained], "o", color=CONTROL, label="control")
    axes.set_yticks(places, list(tasks))
    axes.set_ylim(len(tasks) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of queries")
    axes.spines[["top", "right"]].set_visible(False)


def nll_figure(media: dict[str, Any]) -> Figure:
    """Return the gap between shuffled and true media with its interval, in all and per language."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.24 * sum(1 + len(entry["languages"]) for entry in media.values())))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(
        len(media), 1, squeeze=False, gridspec_kw={"height_ratios": [1 + len(e["languages"]) for e in media.values()]}
    )
    for axes, (name, entry) in zip(panels[:, 0], media.items(), strict=True):
        rows = {"all": entry, **entry["languages"]}
        gaps = [row["gap"] for row in rows.values()]
        ends = [[max(0.0, row["gap"] - row["ci"][0]) for row in rows.values()]]
        ends.append([max(0.0, row["ci"][1] - row["gap"]) for row in rows.values()])
        places = list(range(len(rows)))
        colours = [MODEL] + [FLOOR] * (len(rows) - 1)
        axes.barh(places, gaps, 0.6, xerr=ends, color=colours, ecolor=CHANCE, capsize=2)
        axes.axvline(0, color=CHANCE, linewidth=0.8)
        axes.set_yticks(places, list(rows))
        axes.invert_yaxis()
        axes.set_title(f"{name}: nats per caption token, shuffled minus true", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
