"""Count the text tokens of every sample once, so that planning and packing never tokenise.

Writes `SHARD.tokens-HASH.parquet` beside every shard. A second run reuses what is whole; a killed one is continued.

examples:
  triweave tokenize shards/tuxpaint --tokenizer tokenizer.model
  triweave tokenize shards/tuxpaint --tokenizer tokenizer.model --workers 8 --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

from triweave.data_pipeline.errors import DataError
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.text.token_counts import write_token_counts
from triweave.launch.progress import sample_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("shards", metavar="SHARDS", type=Path, help="folder made by `triweave build`")
    parser.add_argument("--tokenizer", metavar="FILE", type=Path, required=True, help="model file to count with")
    parser.add_argument(
        "--workers", metavar="N", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Write the sidecars and print their sums."""
    if arguments.workers < 1:
        raise DataError(f"--workers={arguments.workers}: must be at least 1")
    manifest = Manifest.load(arguments.shards)
    started = time.monotonic()
    with sample_progress("counting tokens", manifest.samples) as advance:
        report = write_token_counts(manifest, arguments.tokenizer, workers=arguments.workers, progress=advance)
    seconds = round(time.monotonic() - started, 3)
    tokens_per_text = round(report.tokens / max(1, report.texts), 3)
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(report), "tokens_per_text": tokens_per_text, "seconds": seconds}))
    else:
        print(
            f"{report.samples} samples: {report.tokens} tokens in {report.texts} texts ({tokens_per_text} a text); "
            f"{report.written} shards written, {report.reused} reused, {seconds:.1f} s"
        )
    return 0
