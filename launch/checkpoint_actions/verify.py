"""Read every byte of the checkpoints of a run and compare it with its checksum. Exit code 0: whole; 1: damaged.

examples:
  triweave checkpoint verify runs/demo/train
  triweave checkpoint verify s3://bucket/runs/one --step 2000
"""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", help="run_dir of a training, or s3://bucket/prefix of its checkpoints")
    parser.add_argument("--step", type=int, metavar="N", help="only the checkpoint of step N (default: all)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Verify, and print one line a checkpoint."""
    from triweave.pretrain.checkpoints.checkpoint import existing_checkpoints, read_checkpoint, step_of
    from triweave.pretrain.errors import CheckpointError

    rows: list[dict[str, Any]] = []
    for folder in existing_checkpoints(arguments.run, arguments.step):
        row: dict[str, Any] = {"step": step_of(folder), "whole": True, "bytes": 0, "damage": ""}
        try:
            found = read_checkpoint(folder)
            found.verify()
            row["bytes"] = found.bytes
        except CheckpointError as damage:
            row |= {"whole": False, "damage": str(damage)}
        rows.append(row)
        if not arguments.json:
            verdict = f"whole, {row['bytes'] / 1e6:,.1f} MB" if row["whole"] else row["damage"]
            print(f"step {row['step']:,}: {verdict}", flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    return int(not all(row["whole"] for row in rows))
