"""List the complete checkpoints of a run, oldest first. Only manifests are read; `verify` reads the rest.

examples:
  triweave checkpoint list runs/demo/train
  triweave checkpoint list s3://bucket/runs/one --json

RUN is a run_dir, whose config.yaml names another checkpoint.location where there is one, or an s3:// location itself.
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", help="run_dir of a training, or s3://bucket/prefix of its checkpoints")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def run(arguments: argparse.Namespace) -> int:
    """List; return 1 where a manifest is damaged."""
    from triweave.data_pipeline.storage.location import shown
    from triweave.pretrain.checkpoints.checkpoint import existing_checkpoints, read_checkpoint, step_of
    from triweave.pretrain.errors import CheckpointError

    rows, damaged = [], False
    for folder in existing_checkpoints(arguments.run):
        row: dict[str, object] = {"step": step_of(folder), "folder": shown(folder)}
        try:
            found = read_checkpoint(folder)
        except CheckpointError as error:
            damaged = True
            rows.append(row | {"error": str(error)})
            continue
        sizes = {"bytes": found.bytes, "files": len(found.manifest["files"])}
        rows.append(row | sizes | {"ranks": found.manifest["world_size"], "elements": found.elements})
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return int(damaged)
    for row in rows:
        if "error" in row:
            print(row["error"])
        else:
            print(
                f"step {row['step']:>9,}  {row['bytes'] / 1e6:>11,.1f} MB in {row['files']} file(s) of "  # type: ignore[operator]
                f"{row['ranks']} rank(s), {row['elements']:,} parameters  {row['folder']}"
            )
    return int(damaged)
