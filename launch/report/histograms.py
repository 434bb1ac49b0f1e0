"""Histograms of a page: how many values lie where, with the thresholds that they were compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from triweave.launch.report.plots import FONT_PX, HEIGHT_PX, measured_figure, put_legend, say_unit
from triweave.launch.report.svg import STAND_INS, figure_svg
from triweave.launch.report.wording import number, readable

BINS = 40
_LOG_SPAN = 50
"""Positive values that span more than this factor are shown on a logarithmic axis."""


def histogram_plot(
    name: str, values: Sequence[float], *, title: str, unit: str, limits: Mapping[str, float] | None = None
) -> str:
    """Return a histogram of at most BINS equal bins (equal ratios on a logarithmic axis) as `<svg>`.

    values: at least one. limits: rule -> threshold, drawn as lines where they are among the values.
    """
    import numpy as np

    column = np.asarray(values, float)
    lowest, highest = float(column.min()), float(column.max())
    logarithmic = lowest > 0 and highest / lowest > _LOG_SPAN
    shown = {rule: limit for rule, limit in (limits or {}).items() if _is_near(limit, lowest, highest, logarithmic)}
    ends = [lowest, highest, *shown.values()]
    whole = bool(np.all(column == np.rint(column)))
    edges = bin_edges(min(ends), max(ends), logarithmic=logarithmic, whole=whole)
    counts, _ = np.histogram(np.clip(column, edges[0], edges[-1]), bins=edges)
    top_px = 26 + (18 if shown else 0)
    with measured_figure(HEIGHT_PX, top_px=top_px) as (figure, axes):
        axes.bar(*(edges[:-1], counts, np.diff(edges)), align="edge", color=STAND_INS["c0"], alpha=0.6, linewidth=0)
        if logarithmic:
            from matplotlib.ticker import FuncFormatter, NullFormatter

            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        for at, (rule, limit) in enumerate(shown.items()):
            dash: Any = ("solid", (0, (4, 2)))[at % 2]
            label = f"{readable(rule, 40)} {limit:g}"
            axes.axvline(limit, color=STAND_INS["c1"], linewidth=1.6, linestyle=dash, label=label, clip_on=False)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel(unit, color=STAND_INS["muted"], fontsize=FONT_PX, loc="right")
        say_unit(axes, "how many")
        if shown:
            put_legend(figure, axes, columns=2)
        return figure_svg(figure, name=name, title=title, description=describe(column.tolist(), unit))


def _is_near(limit: float, lowest: float, highest: float, logarithmic: bool) -> bool:
    """Return whether an axis that shows the threshold is at most twice as long as one that shows the values."""
    if logarithmic:
        if limit <= 0:
            return False
        limit, lowest, highest = math.log(limit), math.log(lowest), math.log(highest)
    return max(limit, highest) - min(limit, lowest) <= 2 * (highest - lowest)


def bin_edges(lowest: float, highest: float, *, logarithmic: bool = False, whole: bool = False) -> list[float]:
    """Return the edges of the bins; those of whole values have a whole width, a single value has a bin of its own."""
    if lowest == highest:
        return [lowest - 0.5, highest + 0.5]
    if logarithmic:
        step = math.log(highest / lowest) / BINS
        return [lowest * math.exp(step * at) for at in range(BINS)] + [highest]
    if whole:
        lowest, highest = math.floor(lowest), math.ceil(highest)
        width = math.ceil((highest - lowest + 1) / BINS)
        bins = math.ceil((highest - lowest + 1) / width)
        return [lowest + width * at for at in range(bins + 1)]
    return [lowest + (highest - lowest) * at / BINS for at in range(BINS + 1)]


def describe(values: Sequence[float], unit: str) -> str:
    """Return number, quartiles and extremes in words."""
    ordered = sorted(values)
    marks = [ordered[round(share * (len(ordered) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)]
    names = ("least", "quarter below", "median", "quarter above", "most")
    figures = ", ".join(
        f"{name} {number(value, 0 if abs(value) >= 100 else 2)}" for name, value in zip(names, marks, strict=True)
    )
    return f"{len(ordered):,} values: {figures} ({unit})"
