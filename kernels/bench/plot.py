"""The benchmark's rows as bars: a panel for each op and direction, a group for each shape, a bar for each contender."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from triweave.kernels.bench.rows import MEASURED, OURS, BenchRow
from triweave.kernels.errors import KernelInputError, KernelUnavailableError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 150
OUR_COLOURS = ("#2266aa", "#66a3d9", "#99c4e8")
PEER_COLOURS = ("#999999", "#cc7722", "#558b2f", "#8e5ea2", "#c2a83e", "#444444")
_GROUP_WIDTH = 0.8


def write_plot(rows: Sequence[BenchRow], path: Path) -> None:
    """Write the measured rows as a picture; a cell that was not measured is marked, not left out.

    Raises KernelUnavailableError without matplotlib, KernelInputError if the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KernelUnavailableError(f"--plot needs matplotlib ({error}); pip install matplotlib") from error
    shown = [row for row in rows if row.compiled is None]
    panels = list(dict.fromkeys((row.op, row.direction) for row in shown))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 0.9 + 3.2 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    colours = _colours(shown)
    for axes, (op, direction) in zip(grid, panels, strict=False):
        _panel(axes, [row for row in shown if (row.op, row.direction) == (op, direction)], colours)
        axes.set_title(f"{op}, {direction}")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles = [figure.axes[0].bar(0, 0, color=colour, label=impl) for impl, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    figure.suptitle(f"{shown[0].device}, {shown[0].dtype}; medians; × marks what cannot run", fontsize=10)
    try:
        figure.savefig(path, dpi=DPI)
    except (OSError, ValueError) as error:
        raise KernelInputError(f"--plot {path}: {error}; choose a .png that can be written") from error


def _colours(rows: Sequence[BenchRow]) -> dict[str, str]:
    """Return a colour for every contender: blues for ours, others for the peers."""
    names = list(dict.fromkeys(row.impl for row in rows))
    ours, peers = [[name for name in names if name.startswith(OURS) == own] for own in (True, False)]
    return {
        **{name: OUR_COLOURS[number % len(OUR_COLOURS)] for number, name in enumerate(ours)},
        **{name: PEER_COLOURS[number % len(PEER_COLOURS)] for number, name in enumerate(peers)},
    }


def _panel(axes: Axes, rows: Sequence[BenchRow], colours: dict[str, str]) -> None:
    """Draw TFLOP/s, or GB/s for an op without matrix products, over the shapes."""
    shapes = list(dict.fromkeys(_label(row) for row in rows))
    impls = list(dict.fromkeys(row.impl for row in rows))
    products = any(row.tflops for row in rows)
    unit, scale = (
        ("GB/s", 1)
        if not products
        else ("TFLOP/s", 1)
        if max(row.tflops or 0 for row in rows) >= 1
        else ("GFLOP/s", 1000)
    )
    width = _GROUP_WIDTH / len(impls)
    for row in rows:
        place = shapes.index(_label(row)) + (impls.index(row.impl) - (len(impls) - 1) / 2) * width
        speed = row.tflops if products else row.gb_per_s
        if row.status == MEASURED and speed is not None:
            speed *= scale
            axes.bar(place, speed, 0.9 * width, color=colours[row.impl])
            axes.annotate(f"{speed:.3g}", (place, speed), ha="center", va="bottom", fontsize=6)
        else:
            axes.annotate("×", (place, 0), ha="center", va="bottom", color=colours[row.impl], fontsize=9)
    axes.set_xticks(range(len(shapes)), shapes, fontsize=7)
    axes.set_xlim(-0.5, len(shapes) - 0.5)
    axes.margins(y=0.12)
    axes.set_ylabel(f"{unit} on the mask's area" if products and rows[0].mask else unit)
    axes.spines[["top", "right"]].set_visible(False)


def _label(row: BenchRow) -> str:
    """Return mask and shape in a few short lines."""
    return "\n".join(filter(None, (row.mask, *row.shape.split(", "))))
