"""Measure the loader against webdataset and the bare functions, in one run.

examples:
  triweave bench loader --json
  triweave bench loader --shards shards/tuxpaint --tokenizer tuxpaint.model --samples 4000

The defaults are the shards and the tokenizer that `triweave demo` leaves behind. `raw` reads and checksums samples,
`full` also tokenises, decodes, resizes, makes log-mel spectrograms and packs; one process does it all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from triweave.data_pipeline.bench import BenchRow, bench_loader, machine

DEMO_SHARDS = Path("runs/demo/shards/tuxpaint")
DEMO_TOKENIZER = Path("runs/demo/tokenizer.model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--shards", type=Path, default=DEMO_SHARDS, help=f"shard folder (default {DEMO_SHARDS})")
    parser.add_argument("--tokenizer", type=Path, default=DEMO_TOKENIZER, help=f"default {DEMO_TOKENIZER}")
    parser.add_argument("--raw-samples", type=int, default=50_000, help="samples of the raw work (default 50000)")
    parser.add_argument("--samples", type=int, default=2000, help="samples of the full work (default 2000)")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats; the median counts (default 7)")
    parser.add_argument("--sequence-length", type=int, default=4096, help="tokens of a pack (default 4096)")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        rows = bench_loader(
            arguments.shards,
            arguments.tokenizer,
            raw_samples=arguments.raw_samples,
            full_samples=arguments.samples,
            repeats=arguments.repeats,
            sequence_length=arguments.sequence_length,
            progress=status.update,
        )
    if arguments.json:
        print(json.dumps({"machine": machine(), "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
    else:
        _show(rows)
    return 0


def _show(rows: list[BenchRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    about = machine()
    table = Table(title=f"{about['cpu']}, one process, {about['storage']}")
    for heading in ("work", "loader", "samples/s", "ratio to bare", "ratio to webdataset"):
        table.add_column(heading, justify="right" if "a" in heading and heading != "loader" else "left")
    webdataset = {row.work: row.samples_per_s for row in rows if row.loader == "webdataset"}
    for row in rows:
        ratio = row.samples_per_s / webdataset[row.work]
        table.add_row(
            row.work, row.loader, f"{row.samples_per_s:,.0f}", f"{row.ratio_to_bare_decode:.3f}", f"{ratio:.2f}"
        )
    Console().print(table)
