"""Measure the loader against its peers and the bare functions, in one run.

examples:
  triweave bench loader --json
  triweave bench loader --peers webdataset,energon,litdata,streaming --python peers/bin/python --json
  triweave bench loader --shards shards/tuxpaint --tokenizer tuxpaint.model --samples 4000
  triweave bench loader --store s3://corpora/bench --json       (docs/storage.md starts a store to try it on)

The defaults are the shards and the tokenizer that `triweave demo` leaves behind. `raw` reads and checksums samples,
`full` also tokenises, decodes, resizes, makes log-mel spectrograms and packs; every loader does it in one process of
its own. The peers are the extra `bench`; where they cannot live beside this environment's packages, install them in
another one and name its interpreter (docs/planning.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from triweave.data_pipeline.bench.contenders.registry import PEERS
from triweave.data_pipeline.bench.loader_bench import BenchOptions, BenchRow, bench_loader
from triweave.data_pipeline.bench.subset import machine

DEMO_SHARDS = Path("runs/demo/shards/tuxpaint")
DEMO_TOKENIZER = Path("runs/demo/tokenizer.model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--shards", type=Path, default=DEMO_SHARDS, help=f"shard folder (default {DEMO_SHARDS})")
    parser.add_argument("--tokenizer", type=Path, default=DEMO_TOKENIZER, help=f"default {DEMO_TOKENIZER}")
    parser.add_argument("--peers", default="webdataset", help=f"of {','.join(PEERS)}, by comma (default webdataset)")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the loaders (default: this one)")
    parser.add_argument("--raw-samples", type=int, default=50_000, help="samples of the raw work (default 50000)")
    parser.add_argument("--samples", type=int, default=2000, help="samples of the full work (default 2000)")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats; the median counts (default 7)")
    parser.add_argument("--sequence-length", type=int, default=4096, help="tokens of a pack (default 4096)")
    parser.add_argument(
        "--store", metavar="URL", help="s3://BUCKET/PREFIX: also the time to the first pack from there, uncached"
    )
    parser.add_argument("--json", action="store_true", help="print figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    from rich.console import Console

    options = BenchOptions(
        peers=tuple(peer for peer in arguments.peers.split(",") if peer),
        raw_samples=arguments.raw_samples,
        full_samples=arguments.samples,
        repeats=arguments.repeats,
        sequence_length=arguments.sequence_length,
        python=arguments.python,
        store=arguments.store,
    )
    with Console(stderr=True).status("starting") as status:
        rows = bench_loader(arguments.shards, arguments.tokenizer, options, status.update)
    if arguments.json:
        print(json.dumps({"machine": machine(), "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
    else:
        _show(rows)
    return 0


def _show(rows: list[BenchRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    about = machine()
    table = Table(title=f"{about['cpu']}, one process each, {about['storage']}")
    table.add_column("work")
    table.add_column("loader")
    for heading in ("samples/s", "per CPU s", "of bare", "first pack, s", "from the store", "resume at 0, 50, 99 %, s"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row.error is None:
            resumes = (row.resume_s_at_0, row.resume_s_at_50, row.resume_s_at_99)
            table.add_row(
                row.work,
                f"{row.loader} {row.version}",
                f"{row.samples_per_s:,.0f}",
                f"{row.samples_per_cpu_s:,.0f}",
                f"{row.ratio_to_bare_decode:.3f}",
                "" if row.first_batch_s is None else f"{row.first_batch_s:.3f}",
                "" if row.first_batch_from_store_s is None else f"{row.first_batch_from_store_s:.3f}",
                "" if row.first_batch_s is None else "  ".join(f"{seconds:.3f}" for seconds in resumes),
            )
    console.print(table)
    for row in rows:
        if row.error is not None:
            console.print(f"{row.work} {row.loader}: {row.error}", highlight=False, markup=False)
