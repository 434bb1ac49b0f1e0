"""Measure how many pictures a build resizes and encodes per second of processor time, beside img2dataset.

examples:
  python -m venv peers && peers/bin/pip install img2dataset
  triweave bench build --python peers/bin/python --json

Generated JPEGs of 1024 x 768 px, scaled to 448 px and encoded at quality 90 into WebDataset tars, one process each, in
turns; processor time without start-up, so that a busy machine makes little difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from triweave.data_pipeline.errors import BuildError

LEAST_PICTURES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--python", required=True, type=Path, metavar="FILE", help="interpreter that has img2dataset")
    parser.add_argument("--pictures", type=int, default=600, help="pictures of a measurement (default 600)")
    parser.add_argument("--repeats", type=int, default=3, help="turns, of which the median counts (default 3)")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    from rich.console import Console
    from rich.table import Table

    from triweave.data_pipeline.bench.build_speed import measure_builders
    from triweave.data_pipeline.bench.subset import machine

    for name, least in (("pictures", LEAST_PICTURES), ("repeats", 1)):
        if getattr(arguments, name) < least:
            raise BuildError(f"--{name} {getattr(arguments, name)}: must be at least {least}")
    with Console(stderr=True).status("starting") as status, tempfile.TemporaryDirectory() as folder:
        rows = measure_builders(
            Path(folder),
            pictures=arguments.pictures,
            repeats=arguments.repeats,
            peer_python=arguments.python,
            progress=status.update,
        )
    if arguments.json:
        print(json.dumps({"machine": machine(), "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
        return 0
    table = Table("builder", "pictures per CPU second", "over img2dataset", "CPU s")
    for row in rows:
        table.add_row(
            row.builder, f"{row.pictures_per_cpu_s:,.1f}", f"{row.ratio_to_img2dataset:.2f}", f"{row.cpu_s:.2f}"
        )
    Console().print(table)
    return 0
