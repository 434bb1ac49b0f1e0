"""How figures and foreign texts are written on the page: one place, so that equal things look equal."""

from __future__ import annotations

import math
from collections.abc import Sequence

ABSENT = "–"
LONGEST_TEXT = 400
"""Characters of a corpus text that are shown."""

Interval = tuple[float, float]


def number(value: float | None, digits: int = 2, *, sign: bool = False) -> str:
    """Return a figure with `digits` decimals and a typographic minus; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def percent(share: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """Return a share of 1 as `12.3 %`; what is not all of it never reads 100 %, it gets up to three decimals more."""
    for more in range(4):
        text = number(None if share is None else 100 * share, digits + more, sign=sign)
        if share is None or share >= 1 or not text.removeprefix("+").startswith("100"):
            break
    return text if text == ABSENT else f"{text} %"


def interval(bounds: Interval | None, digits: int = 2, *, scale: float = 1.0) -> str:
    """Return `0.10 to 0.20`, empty where there are no bounds."""
    if bounds is None:
        return ""
    return f"{number(scale * bounds[0], digits)} to {number(scale * bounds[1], digits)}"


def bracketed(bounds: Interval | None, digits: int = 2, *, scale: float = 1.0) -> str:
    """Return ` (0.10 to 0.20)`, to stand behind a figure; empty where there are no bounds."""
    return f" ({interval(bounds, digits, scale=scale)})" if bounds else ""


def recall_pair(recalls: tuple[float, float] | None) -> str:
    """Return (R@1, R@10) as `10.0 / 1.0`, in % and the larger first; a dash where there are none."""
    if recalls is None:
        return ABSENT
    return f"{number(100 * recalls[1], 1)} / {number(100 * recalls[0], 1)}"


def duration(seconds: float) -> str:
    """Return `45 s`, `3.4 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def count(value: float) -> str:
    """Return a number of things: `812`, `11,877`, `4.82 M`, `1.30 G`."""
    for limit, letter in ((1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.2f} {letter}"
    return f"{value:,.0f}"


def listing(names: Sequence[str]) -> str:
    """Return `a`, `a and b` or `a, b and c`."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def readable(text: str, longest: int = LONGEST_TEXT) -> str:
    """Return foreign text as one line that any file can hold.

    Control characters, line breaks among them, become spaces; half characters (lone surrogates, as JSON and file names
    can hold them) become question marks; what is longer than `longest` ends in an ellipsis. Escaping is the template's.
    """
    whole = text.encode("utf-8", "replace").decode("utf-8")
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in whole).split())
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "…"
