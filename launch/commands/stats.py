"""Count what shards hold: samples, parts, bytes, durations, labels, and what became of the input rows.

examples:
  triweave stats shards/tuxpaint
  triweave stats shards/tuxpaint --json
  triweave stats shards/tuxpaint --html tuxpaint.html

The page is one HTML file that loads nothing and runs no script: what became of the input rows and why, how fast the
build was, histograms of texts, pictures and clips with the build's thresholds, and how evenly languages, categories,
corpora and licences are represented. It reads a sample of the documents and leaves the shards as they are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from triweave.data_pipeline.shards.quality import DOCUMENTS, MEDIA_DOCUMENTS
from triweave.data_pipeline.shards.stats import ShardStats, shard_stats
from triweave.data_pipeline.storage.location import shown
from triweave.launch.errors import ReportError

_BYTES_PER_MB = 1 << 20
_MS_PER_HOUR = 3_600_000
_SHOWN_VALUES = 12
_AS_IS: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
"""How rich prints names that are not ours: a folder or label with `[/]` is no markup."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="shard folder")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page about the shards and their build")
    parser.add_argument(
        "--documents",
        type=int,
        default=DOCUMENTS,
        metavar="N",
        help=f"documents that the page's histograms look at (default: {DOCUMENTS})",
    )
    parser.add_argument(
        "--decoded",
        type=int,
        default=MEDIA_DOCUMENTS,
        metavar="N",
        help=f"documents whose pictures and clips they decode (default: {MEDIA_DOCUMENTS})",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the statistics, or write the page."""
    if arguments.html is not None:
        return _write_page(arguments)
    stats = shard_stats(arguments.shards)
    if arguments.json:
        print(json.dumps(stats.to_json(), ensure_ascii=False))
    else:
        _print(shown(arguments.shards), stats)
    return 0


def _write_page(arguments: argparse.Namespace) -> int:
    from triweave.launch.report.shard_page import write_shard_page

    for name in ("documents", "decoded"):
        if getattr(arguments, name) < 0:
            raise ReportError(f"--{name} {getattr(arguments, name)}: must be 0 or more")
    limits = {"documents": arguments.documents, "media_documents": arguments.decoded}
    written = write_shard_page(arguments.shards, arguments.html, **limits)
    print(json.dumps(written) if arguments.json else f"{written['out']}: {written['bytes']:,} bytes")
    return 0


def _print(folder: str, stats: ShardStats) -> None:
    console = Console()
    size = f"{stats.tar_bytes / _BYTES_PER_MB:.1f} MiB"
    console.print(f"{folder}: {stats.samples} samples, {stats.shards} shards, {size}", **_AS_IS)
    table = Table("modality", "documents", "parts", "MiB", "hours", "megapixels")
    for name, modality in stats.modalities.items():
        figures = (
            str(modality.documents),
            str(modality.parts),
            f"{modality.part_bytes / _BYTES_PER_MB:.1f}",
            f"{modality.ms / _MS_PER_HOUR:.2f}" if modality.ms else "",
            f"{modality.pixels / 1e6:.1f}" if modality.pixels else "",
        )
        table.add_row(name, *figures)
    console.print(table)
    _print_counts(console, "documents", stats.combinations)
    for label, values in stats.labels.items():
        if values:
            _print_counts(console, f"label {label}", values)
        else:
            console.print(f"label {label}: {stats.label_values[label]} values", **_AS_IS)
    _print_counts(console, "input rows", stats.rows)


def _print_counts(console: Console, title: str, counts: dict[str, int]) -> None:
    shown = [f"{name} {number}" for name, number in list(counts.items())[:_SHOWN_VALUES]]
    more = [f"and {len(counts) - _SHOWN_VALUES} more"] if len(counts) > _SHOWN_VALUES else []
    console.print(f"{title}: {', '.join(shown + more)}", **_AS_IS)
