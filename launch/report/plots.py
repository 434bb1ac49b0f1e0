"""The plots of the page: curves over steps, and shares with intervals beside their yardsticks.

Figures are measured in CSS pixels at their natural width; the page scales them down to the column.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from triweave.launch.report.svg import SERIES_COLOURS, STAND_INS, figure_svg
from triweave.launch.report.wording import readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_PX, HEIGHT_PX = 440, 250
FONT_PX = 12
MOST_POINTS = 300
"""Longer curves are averaged in bins, so that a page does not grow with the run."""
LEGEND_LETTERS = 28
_PX_PER_INCH = 72
_LEFT_PX, _RIGHT_PX, _BOTTOM_PX = 44, 10, 38
_LEGEND_ROW_PX = 18
_BAR_PX, _LABEL_PX = 13, 22
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_MARKERS = ("^", "v", "s", "D", "o")
CHANCE = "chance"
"""The mark that is drawn as a line."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A curve. colour: number of the series' colour. level: a horizontal yardstick of the same colour, dotted."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: int
    level: float | None = None


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A value with its interval; colour as of a series."""

    value: float
    interval: tuple[float, float] | None
    colour: int


@dataclass(frozen=True, kw_only=True)
class BarGroup:
    """Bars under one label, and marks (name -> value) that are drawn across all of them."""

    label: str
    bars: Sequence[Bar]
    marks: dict[str, float] = field(default_factory=dict)


def curve_plot(
    name: str, series: Sequence[Series], *, title: str, unit: str, from_zero: bool = False, smooth: bool = True
) -> str:
    """Return curves over optimizer steps: the values thin, their running mean strong.

    The running mean is over a twentieth of the steps. smooth: False draws the values alone.
    """
    series = [item for item in series if item.values]
    legend_rows = math.ceil(len(series) / 3) if len(series) > 1 or any(item.level is not None for item in series) else 0
    with measured_figure(HEIGHT_PX, top_px=26 + legend_rows * _LEGEND_ROW_PX) as (figure, axes):
        for item in series:
            colour, dash = STAND_INS[f"c{item.colour % SERIES_COLOURS}"], _dash(item.colour)
            steps, values = _binned(item.steps, item.values)
            if smooth and len(values) > 20:
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
                values = _running_mean(values, max(2, len(values) // 20))
            label = readable(item.label, LEGEND_LETTERS)
            axes.plot(steps, values, color=colour, linewidth=1.8, linestyle=dash, label=label, marker=_dot(values))
            if item.level is not None:
                axes.axhline(item.level, color=colour, linewidth=1.3, linestyle=(0, (1, 2)))
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("optimizer step", color=STAND_INS["muted"], fontsize=FONT_PX, loc="right")
        say_unit(axes, unit)
        if legend_rows:
            put_legend(figure, axes)
        about = "; ".join(_describe(item) for item in series)
        return figure_svg(figure, name=name, title=title, description=about)


def interval_plot(
    name: str,
    groups: Sequence[BarGroup],
    *,
    title: str,
    unit: str,
    bar_labels: Sequence[str] = (),
    scale: float = 1.0,
    as_points: bool = False,
) -> str:
    """Return horizontal bars (or points) with intervals, grouped under labels, with marks as legend entries.

    bar_labels: what the bars' colours mean; left out for one. scale: factor from the values to `unit`.
    """
    marks = list(dict.fromkeys(mark for group in groups for mark in group.marks))
    legend_rows = math.ceil((len(marks) + len(bar_labels)) / 3)
    rows = sum(len(group.bars) for group in groups)
    height = 30 + legend_rows * _LEGEND_ROW_PX + rows * _BAR_PX + len(groups) * _LABEL_PX + _BOTTOM_PX
    with measured_figure(height, top_px=30 + legend_rows * _LEGEND_ROW_PX, left_px=10) as (figure, axes):
        y = 0.0
        for group in groups:
            axes.text(
                *(0, y + _LABEL_PX - 6, readable(group.label, 64)),
                transform=axes.get_yaxis_transform(),
                color=STAND_INS["ink"],
                fontsize=FONT_PX,
            )
            y += _LABEL_PX
            top = y
            for bar in group.bars:
                _draw_bar(axes, bar, y + _BAR_PX / 2, scale, as_points=as_points)
                y += _BAR_PX
            for mark, value in group.marks.items():
                _draw_mark(axes, marks.index(mark), mark, scale * value, top, y)
            if as_points:
                axes.plot([0, 0], [top - 2, y + 2], color=STAND_INS["muted"], linewidth=1)
        axes.set_ylim(y + 4, 0)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x", color=STAND_INS["rule"], linewidth=0.8)
        if not as_points:
            axes.set_xlim(left=0)
        say_unit(axes, unit)
        for label, colour in zip(bar_labels, range(len(bar_labels)), strict=True):
            colour_name = STAND_INS[f"c{colour % SERIES_COLOURS}"]
            axes.plot([], [], color=colour_name, linewidth=6, label=readable(label, LEGEND_LETTERS))
        for number, mark in enumerate(marks):
            axes.plot([], [], linestyle="none", label=readable(mark, LEGEND_LETTERS), **_mark_style(number, mark))
        if legend_rows:
            put_legend(figure, axes)
        about = "; ".join(_describe_group(group, scale, unit) for group in groups)
        return figure_svg(figure, name=name, title=title, description=about)


@contextmanager
def measured_figure(height_px: float, *, top_px: float, left_px: float = _LEFT_PX) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure with one axes, drawn with matplotlib's defaults whatever this user has configured."""
    import logging
    import warnings

    import matplotlib
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font of the measurements lacks; the page's font draws them
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"text.parse_math": False, "axes.unicode_minus": True, "font.size": FONT_PX})
        figure = Figure(figsize=(WIDTH_PX / _PX_PER_INCH, height_px / _PX_PER_INCH), dpi=_PX_PER_INCH)
        figure.subplots_adjust(
            left=left_px / WIDTH_PX,
            right=1 - _RIGHT_PX / WIDTH_PX,
            bottom=_BOTTOM_PX / height_px,
            top=1 - top_px / height_px,
        )
        axes = figure.add_subplot()
        axes.set_facecolor("none")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(STAND_INS["muted"])
        axes.tick_params(color=STAND_INS["muted"], labelcolor=STAND_INS["muted"], labelsize=FONT_PX, length=3)
        axes.grid(visible=True, axis="y", color=STAND_INS["rule"], linewidth=0.8)
        axes.set_axisbelow(True)
        yield figure, axes


def _draw_bar(axes: Axes, bar: Bar, y: float, scale: float, *, as_points: bool) -> None:
    colour = STAND_INS[f"c{bar.colour % SERIES_COLOURS}"]
    if as_points:
        axes.plot([scale * bar.value], [y], "o", color=colour, markersize=6)
    else:
        axes.barh(y, scale * bar.value, height=_BAR_PX - 3, color=colour, alpha=0.55, linewidth=0)
    if bar.interval is not None:
        axes.plot([scale * bound for bound in bar.interval], [y, y], color=colour, linewidth=2)


def _draw_mark(axes: Axes, number: int, mark: str, value: float, top: float, bottom: float) -> None:
    if mark == CHANCE:
        axes.plot([value, value], [top, bottom], color=STAND_INS["ink"], linewidth=1.6)
    else:
        axes.plot([value], [(top + bottom) / 2], **_mark_style(number, mark))


def _mark_style(number: int, mark: str) -> dict[str, Any]:
    if mark == CHANCE:
        return {"marker": "|", "color": STAND_INS["ink"], "markersize": 10, "markeredgewidth": 1.6}
    marker = _MARKERS[(number - 1) % len(_MARKERS)]
    return {"marker": marker, "color": STAND_INS["ink"], "markersize": 5, "markerfacecolor": "none"}


def say_unit(axes: Axes, unit: str) -> None:
    axes.set_title(unit, loc="left", fontsize=FONT_PX, color=STAND_INS["muted"], pad=6)


def put_legend(figure: Figure, axes: Axes, *, columns: int = 3) -> None:
    """Put the legend into the strip above the unit, `columns` entries a row."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        *(handles, labels),
        loc="upper left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        frameon=False,
        fontsize=FONT_PX,
        labelcolor=STAND_INS["ink"],
        handlelength=1.8,
        columnspacing=1.4,
        borderaxespad=0.2,
        labelspacing=0.4,
    )


def _dash(colour: int) -> Any:
    return _DASHES[colour // SERIES_COLOURS % len(_DASHES)]


def _dot(values: Sequence[float]) -> str:
    return "o" if len(values) == 1 else ""


def _binned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return at most MOST_POINTS points, each the mean of consecutive ones."""
    size = math.ceil(len(steps) / MOST_POINTS)
    starts = range(0, len(steps), size)
    return tuple([_mean(column[at : at + size]) for at in starts] for column in (steps, values))  # type: ignore[return-value]


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the last `window` values at every place, of fewer at the beginning."""
    return [_mean(values[max(0, at + 1 - window) : at + 1]) for at in range(len(values))]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _describe(series: Series) -> str:
    first, last = _mean(series.values[:10]), _mean(series.values[-10:])
    level = "" if series.level is None else f", yardstick {series.level:.4g}"
    return f"{readable(series.label, 80)}: first ten steps {first:.4g}, last ten {last:.4g}{level}"


def _describe_group(group: BarGroup, scale: float, unit: str) -> str:
    bars = ", ".join(f"{scale * bar.value:.3g}" for bar in group.bars)
    marks = "".join(f", {name} {scale * value:.3g}" for name, value in group.marks.items())
    return f"{readable(group.label, 80)}: {bars}{marks} ({unit})"
