"""Verify shards by hashing every byte again, and repair them. Exit code 0: whole; 1: damaged; 2: not a shard folder.

examples:
  triweave verify shards/tuxpaint
  triweave verify shards/tuxpaint --json
  triweave verify s3://bucket/tuxpaint
  triweave verify shards/pages --repair --source html --input pages --language en --image-max-side 448

--repair comes last and is followed by what the shards were built with: the options of their `triweave build` without
--out. Damaged samples are made again from the source, whole ones are copied; a file is replaced only by one with the
hash that the manifest names, at once. It refuses where source or options are not those of the build.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from triweave.data_pipeline.shards.verify import VerifyReport, verify
from triweave.data_pipeline.storage.location import shown
from triweave.launch.progress import work_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="shard folder, or s3://bucket/prefix")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--repair",
        nargs=argparse.REMAINDER,
        metavar="OPTION",
        help="make damaged shards again; the options of their `triweave build` follow: --source NAME --input PATH ...",
    )


def run(arguments: argparse.Namespace) -> int:
    """Verify, repair where asked, name every damaged shard, key and member, and return 1 when there is any."""
    if arguments.repair is not None:
        return _repair(arguments)
    with work_progress("verifying shards") as on_progress:
        report = verify(arguments.shards, on_progress)
    if arguments.json:
        print(json.dumps(_content(report), ensure_ascii=False))
    else:
        _print(arguments.shards, report)
    return 1 if report.damage else 0


def _repair(arguments: argparse.Namespace) -> int:
    from triweave.data_pipeline.shards.repair import repair
    from triweave.launch.commands import build

    parser = argparse.ArgumentParser(prog="triweave verify SHARDS --repair", allow_abbrev=False)
    build.add_arguments(parser)
    asked = parser.parse_args([*arguments.repair, "--out", str(arguments.shards)])
    source, options = build.source_and_options(asked)
    with work_progress("repairing shards") as on_progress:
        result = repair(source, arguments.shards, options, on_progress)
    if arguments.json or asked.json:
        content: dict[str, Any] = {
            "repaired": result.repaired,
            "refused": result.refused,
            "samples_copied": result.samples_copied,
            "samples_encoded": result.samples_encoded,
        }
        print(json.dumps(_content(result.report) | content, ensure_ascii=False))
        return 1 if result.report.damage else 0
    for name in result.repaired:
        print(f"repaired {name}")
    for name, why in result.refused.items():
        print(f"not repaired {name}: {why}")
    print(f"{result.samples_copied} samples copied, {result.samples_encoded} made again from {asked.input}")
    _print(arguments.shards, result.report)
    return 1 if result.report.damage else 0


def _content(report: VerifyReport) -> dict[str, Any]:
    return {
        "shards": report.shards,
        "samples": report.samples,
        "tar_bytes": report.tar_bytes,
        "whole": not report.damage,
        "damage": [vars(damage) for damage in report.damage],
    }


def _print(shards: Path, report: VerifyReport) -> None:
    for damage in report.damage:
        print(damage)
    verdict = f"{len(report.damage)} damaged" if report.damage else "whole"
    print(f"{shown(shards)}: {verdict}; {report.shards} shards, {report.samples} samples looked at")
