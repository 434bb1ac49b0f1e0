"""Measure making and checking the indices of existing tars, beside `energon prepare` on the same tars.

examples:
  triweave bench index --json
  triweave bench index --peers energon --python peers/bin/python --shards shards/tuxpaint --json

Ours hashes every sample and member and must come out with the manifest's bytes; energon lists members and hashes
nothing. One process each, in turns; ratios are of processor time. energon is in the extra `bench`; docs/planning.md
says how to give the peers an environment of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from triweave.data_pipeline.errors import ConfigError

DEMO_SHARDS = Path("runs/demo/shards/tuxpaint")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--shards", type=Path, default=DEMO_SHARDS, help=f"shard folder (default {DEMO_SHARDS})")
    parser.add_argument("--peers", default="", help="energon, or nothing (default)")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the peers (default: this one)")
    parser.add_argument("--repeats", type=int, default=5, help="turns, of which the median counts (default 5)")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    from rich.console import Console
    from rich.table import Table

    from triweave.data_pipeline.bench.index_speed import measure_indexers
    from triweave.data_pipeline.bench.subset import machine

    if arguments.repeats < 1:
        raise ConfigError(f"--repeats {arguments.repeats}: must be at least 1")
    with Console(stderr=True).status("starting") as status, tempfile.TemporaryDirectory() as folder:
        rows = measure_indexers(
            arguments.shards,
            Path(folder),
            peers=tuple(peer for peer in arguments.peers.split(",") if peer),
            python=arguments.python,
            repeats=arguments.repeats,
            progress=status.update,
        )
    if arguments.json:
        print(json.dumps({"machine": machine(), "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
        return 0
    table = Table("indexer", "samples/s", "per CPU s", "over energon")
    console = Console()
    for row in rows:
        if row.error is None:
            ratio = "" if row.ratio_to_energon is None else f"{row.ratio_to_energon:.2f}"
            rates = (f"{row.samples_per_s:,.0f}", f"{row.samples_per_cpu_s:,.0f}")
            table.add_row(f"{row.indexer} {row.version}".strip(), *rates, ratio)
    console.print(table)
    for row in rows:
        if row.error is not None:
            console.print(f"{row.indexer}: {row.error}", highlight=False, markup=False)
    return 0
