"""Remove all checkpoints but the newest ones, and those of multiples of --keep-every-steps.

examples:
  triweave checkpoint prune runs/demo/train --keep 1 --dry-run
  triweave checkpoint prune s3://bucket/runs/one --keep 2 --keep-every-steps 10000

The same rule as checkpoint.keep and checkpoint.keep_every_steps of a run, which prunes after every save. Not while the
run is training.
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", help="run_dir of a training, or s3://bucket/prefix of its checkpoints")
    parser.add_argument("--keep", type=int, required=True, metavar="N", help="newest checkpoints that stay, at least 1")
    parser.add_argument("--keep-every-steps", type=int, default=0, metavar="N", help="multiples of N stay too")
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    parser.add_argument("--json", action="store_true", help="print what went and what stays as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prune and say what went."""
    from triweave.launch.errors import LaunchError
    from triweave.pretrain.checkpoints.checkpoint import checkpoint_root, existing_checkpoints, step_of
    from triweave.pretrain.checkpoints.retention import kept_steps
    from triweave.pretrain.checkpoints.stores import open_store

    if arguments.keep < 1 or arguments.keep_every_steps < 0:
        raise LaunchError(
            f"--keep {arguments.keep} --keep-every-steps {arguments.keep_every_steps}: keep at least 1, and 0 or more"
        )
    steps = [step_of(folder) for folder in existing_checkpoints(arguments.run)]
    kept = kept_steps(steps, arguments.keep, arguments.keep_every_steps)
    gone = [step for step in steps if step not in kept]
    store = open_store(checkpoint_root(arguments.run))
    for step in gone if not arguments.dry_run else ():
        store.discard(step)
    if arguments.json:
        print(json.dumps({"removed": gone, "kept": kept, "dry_run": arguments.dry_run}))
    else:
        verb = "would remove" if arguments.dry_run else "removed"
        print(f"{verb} {_said(gone)}; {'would keep' if arguments.dry_run else 'kept'} {_said(kept)}")
    return 0


def _said(steps: list[int]) -> str:
    return f"steps {', '.join(f'{step:,}' for step in steps)}" if steps else "none"
