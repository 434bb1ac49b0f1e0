"""Measure reading shards from an object store: with an empty cache, from the cache, and from a local folder beside it.

examples:
  triweave bench storage s3://corpora/tuxpaint --local shards/tuxpaint
  triweave bench storage s3://corpora/tuxpaint --samples 50000 --json

Indices and then samples in one shuffled order, every sample checked, nothing decoded. docs/storage.md has the settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from triweave.data_pipeline.bench.subset import machine
from triweave.data_pipeline.storage.location import shown
from triweave.data_pipeline.storage.measure import FIRST_SAMPLES, StorageRow, measure_storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("url", metavar="URL", help="s3://BUCKET/PREFIX that `triweave push` wrote")
    parser.add_argument("--local", type=Path, metavar="SHARDS", help="the same shards here, to compare with")
    parser.add_argument("--samples", type=int, default=20_000, help="samples to read, at most (default 20000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of their order (default 0)")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        rows = measure_storage(
            arguments.url,
            local=arguments.local,
            samples=arguments.samples,
            seed=arguments.seed,
            progress=status.update,
        )
    if arguments.json:
        about = machine() | {"storage": shown(arguments.url)}
        print(json.dumps({"machine": about, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
    else:
        _show(rows)
    return 0


def _show(rows: list[StorageRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    size = f"{rows[0].samples:,} samples, {rows[0].sample_bytes / 1e6:,.0f} MB"
    table = Table(title=f"{size}; first: the first {FIRST_SAMPLES} after the indices")
    table.add_column("reader")
    for heading in ("index s", "first s", "samples/s", "MB/s", "CPU s", "requests", "retries"):
        table.add_column(heading, justify="right")
    for row in rows:
        figures = (f"{row.index_s:.2f}", f"{row.first_s:.2f}", f"{row.samples_per_s:,.0f}", f"{row.mb_per_s:,.0f}")
        table.add_row(row.reader, *figures, f"{row.cpu_s:.2f}", str(row.counts.requests), str(row.counts.retries))
    Console().print(table)
