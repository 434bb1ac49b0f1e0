"""Look at, check, thin out and export the checkpoints of a run, in its folder or in an object store.

examples:
  triweave checkpoint list runs/demo/train
  triweave checkpoint verify s3://bucket/runs/one
  triweave checkpoint prune runs/demo/train --keep 1 --dry-run
  triweave checkpoint export runs/demo/train --out exported/demo
"""

from __future__ import annotations

import argparse

from triweave.launch.actions import add_actions, run_action

ACTIONS = {
    "list": "list the complete checkpoints: step, size, ranks",
    "verify": "read every byte of the checkpoints and compare it with its checksum",
    "prune": "remove all checkpoints but the newest ones",
    "export": "write the weights of a checkpoint as a folder of safetensors",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions."""
    add_actions(parser, "checkpoint_actions", ACTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Run one action."""
    return run_action(arguments)
