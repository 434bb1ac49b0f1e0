"""Make a report: read the runs, caption the samples, render, write the page in one act."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from triweave.launch.errors import ReportError
from triweave.launch.report.content import write_page
from triweave.launch.report.page import render_page
from triweave.launch.report.run_files import read_runs
from triweave.launch.report.samples import run_samples
from triweave.launch.report.verdict import judge

MOST_PICTURES = 100
DEFAULT_PICTURES = 12


def write_report(
    folders: Sequence[Path], out: Path, *, pictures: int = DEFAULT_PICTURES, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Write the page of the runs in `folders` to `out` and return {"out", "bytes", "verdicts": {name: ...}}.

    pictures: most sample pictures, 0 to MOST_PICTURES; half as many sounds. tell: called with lines about slow work.

    Raises ReportError where a run cannot be read or the page cannot be written.
    """
    if not 0 <= pictures <= MOST_PICTURES:
        raise ReportError(f"--samples {pictures}: must be 0 to {MOST_PICTURES}")
    runs = read_runs(list(folders))
    page = render_page(runs, [run_samples(run, pictures, tell=tell) for run in runs]).encode()
    write_page(out, page)
    verdicts = {run.name: asdict(judge(run)) for run in runs}
    return {"out": str(out), "bytes": len(page), "verdicts": verdicts}
