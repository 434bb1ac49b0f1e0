"""Copy shards to an object store; whatever reads a shard folder then reads `s3://bucket/prefix` as well.

examples:
  triweave push shards/tuxpaint s3://corpora/tuxpaint
  triweave stats s3://corpora/tuxpaint
  triweave plan run.yaml --json                    with `shards: s3://corpora/tuxpaint` in it

The manifest goes last, so a prefix that has one is whole. Called again it sends only what is not there, for example the
rest after an interruption, or the counts of another `triweave tokenize`.

Keys, region and endpoint: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, or AWS_PROFILE and
the files in ~/.aws. docs/storage.md has the cache, the retries and the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from triweave.data_pipeline.storage.location import shown
from triweave.data_pipeline.storage.push import push
from triweave.launch.progress import work_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("shards", metavar="SHARDS", type=Path, help="folder made by `triweave build`")
    parser.add_argument("url", metavar="URL", help="s3://BUCKET/PREFIX")
    parser.add_argument("--overwrite", action="store_true", help="replace other shards that are there")
    parser.add_argument("--json", action="store_true", help="print what was sent as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Push and print."""
    with work_progress("sending") as progress:
        report = push(arguments.shards, arguments.url, overwrite=arguments.overwrite, progress=progress)
    if arguments.json:
        print(json.dumps({"url": shown(arguments.url), **dataclasses.asdict(report)}))
        return 0
    print(
        f"{shown(arguments.url)}: {report.sent} files sent ({report.sent_bytes / 1e6:,.1f} MB), "
        f"{report.kept} were there ({report.kept_bytes / 1e6:,.1f} MB)"
        + (f", {report.removed} of other shards removed" if report.removed else "")
    )
    return 0
