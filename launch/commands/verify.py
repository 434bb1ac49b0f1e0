"""Verify shards by hashing every byte again. Exit code 0: whole; 1: damaged; 2: not a shard folder.

examples:
  triweave verify shards/tuxpaint
  triweave verify shards/tuxpaint --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from triweave.data_pipeline.shards.verify import verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="shard folder")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Verify, name every damaged shard, key and member, and return 1 when there is any."""
    with _progress_bar() as on_progress:
        report = verify(arguments.shards, on_progress)
    if arguments.json:
        content = {
            "shards": report.shards,
            "samples": report.samples,
            "tar_bytes": report.tar_bytes,
            "whole": not report.damage,
            "damage": [vars(damage) for damage in report.damage],
        }
        print(json.dumps(content, ensure_ascii=False))
    else:
        for damage in report.damage:
            print(damage)
        verdict = f"{len(report.damage)} damaged" if report.damage else "whole"
        print(f"{arguments.shards}: {verdict}; {report.shards} shards, {report.samples} samples looked at")
    return 1 if report.damage else 0


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:

        def show(done: int, total: int) -> None:
            if not progress.tasks:
                progress.add_task("verifying shards")
            progress.update(progress.tasks[0].id, completed=done, total=total)

        yield show
