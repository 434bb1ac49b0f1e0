"""Write shards in a layout that other tools read; what it has no place for is counted.

examples:
  triweave export shards/gimp-help --to obelics --out exported/gimp-help
  triweave export shards/vqa --to llava --out exported/vqa --json

layouts:
  obelics   Parquet of interleaved text and pictures, which lie in OUT/media by the sha256 of their URL; read back with
            triweave build --source interleaved --input OUT --media OUT/media
  llava     one JSON array of conversations, media in OUT/media; read back with
            triweave build --source chat --input OUT/conversations.json

Damaged samples are left out and named; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from triweave.data_pipeline.errors import ExportError
from triweave.data_pipeline.export.documents import read_documents
from triweave.data_pipeline.export.registry import LAYOUTS
from triweave.data_pipeline.new_folder import new_folder
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.schema import Document
from triweave.launch.progress import sample_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("shards", metavar="SHARDS", type=Path, help="folder made by `triweave build`")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="layout to write")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="new folder to write it to")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Export and print."""
    manifest = Manifest.load(arguments.shards)
    damaged: list[str] = []
    with (
        new_folder(arguments.out, ExportError) as (folder, _),
        sample_progress("exporting", manifest.samples) as advance,
    ):
        documents = _advancing(read_documents(manifest, damaged.append), advance)
        exported = LAYOUTS[arguments.to](documents, folder)
    for line in damaged:
        print(f"triweave export: left out, damaged: {line}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"out": str(arguments.out), **dataclasses.asdict(exported), "damaged": len(damaged)}))
    else:
        print(
            f"{arguments.out}: {exported.documents:,} documents, {exported.media:,} media, "
            f"{exported.total_bytes / 1e6:,.1f} MB"
        )
        for what, count in exported.left_out.items():
            print(f"  left out: {count:,} {what}")
    return 1 if damaged else 0


def _advancing(
    documents: Iterator[tuple[str, Document]], advance: Callable[[int], None]
) -> Iterator[tuple[str, Document]]:
    for item in documents:
        yield item
        advance(1)
