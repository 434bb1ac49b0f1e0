"""The report on ranks that stand still: where each of them is, by its heartbeat, its process and its Python stack."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from triweave.pretrain.health.heartbeat import Beat, read_stacks

STATES = {"R": "running", "S": "waiting", "D": "waiting for a disk", "T": "stopped", "t": "traced", "Z": "dead"}
"""Process states of Linux in words."""
FRAME = re.compile(r'^  File "(?P<path>[^"]*)", line (?P<line>\d+) in (?P<function>\S+)', re.MULTILINE)
THREAD = re.compile(r"^(?:Current thread|Thread) 0x", re.MULTILINE)
OURS = re.compile(r"/(?:data_pipeline|kernels|pretrain)/(?!health/heartbeat\.py)")
SHOWN_FRAMES = 6
COLUMNS = ("rank", "host", "pid", "step", "phase", "last collective", "moved", "process")


def stall_report(run_dir: Path, beats: Mapping[int, Beat], *, ranks: int, still_s: float) -> str:
    """Return the report as lines of text; read from beats of this launch alone. still_s: since anything has moved."""
    lines = [f"no rank has moved for {still_s:.0f} s; where each stands:"]
    lines += ["  " + line.rstrip() for line in _aligned([COLUMNS, *(_row(beats[rank]) for rank in sorted(beats))])]
    missing = sorted(set(range(ranks)) - set(beats))
    if missing:
        lines.append(
            f"  no sign yet of rank {', '.join(map(str, missing))}: still importing, or waiting for the others"
        )
    if suspects := behind(beats):
        named = ", ".join(map(str, suspects))
        lines.append(f"  behind the others, who wait for it in a collective: rank {named}")
    for rank in sorted(beats):
        frames = main_frames(read_stacks(run_dir, rank))
        if frames:
            lines.append(f"  rank {rank} is in {' < '.join(frames)}")
    lines.append(f"whole stacks: {run_dir / 'health'}/rank-*.stacks")
    return "\n".join(lines)


def main_frames(stacks: str) -> list[str]:
    """Return where the main thread was when faulthandler wrote last, as `function (file:line)`.

    The innermost frame, then those of ours, which say what it was there for.
    """
    whole = [dump for dump in THREAD.split(stacks) if "train.py" in dump]
    if not whole:
        return []
    frames = list(FRAME.finditer(whole[-1]))
    kept = [frame for at, frame in enumerate(frames) if at == 0 or OURS.search(frame["path"])][:SHOWN_FRAMES]
    return [f"{frame['function']} ({Path(frame['path']).name}:{frame['line']})" for frame in kept]


def behind(beats: Mapping[int, Beat]) -> list[int]:
    """Return the ranks that have entered fewer collectives than others: these wait for them."""
    counts = {rank: beat.collectives for rank, beat in beats.items()}
    if len(set(counts.values())) < 2:
        return []
    fewest = min(counts.values())
    return [rank for rank in sorted(counts) if counts[rank] == fewest]


def _row(beat: Beat) -> tuple[str, ...]:
    collective = f"{beat.collective or 'none'} (number {beat.collectives}{', in it' if beat.waiting else ''})"
    moved = f"{max(0.0, time.time() - beat.time_s):.0f} s ago"
    return (
        str(beat.rank),
        beat.host,
        str(beat.pid),
        str(beat.step),
        beat.phase,
        collective,
        moved,
        process_state(beat),
    )


def process_state(beat: Beat) -> str:
    """Return what the process is doing in a word, `gone` or `dead` when it has ended; empty on another machine."""
    if beat.host != socket.gethostname():
        return ""
    try:
        letter = Path(f"/proc/{beat.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return STATES.get(letter, letter)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
