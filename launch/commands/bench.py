"""Benchmarks: what is compared takes turns in one run, and medians count.

examples:
  triweave bench loader --json
  triweave bench generate --tokens 256
  triweave bench kernels --mask interleaved,causal
"""

from __future__ import annotations

import argparse

from triweave.launch.actions import add_actions, run_action

ACTIONS = {
    "loader": "measure the loader against webdataset and the bare functions, in one run",
    "generate": "measure generation with its cache and without, in turns",
    "kernels": "measure the ops against torch, FlexAttention, flash-attn and Liger, in turns",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions."""
    add_actions(parser, "bench_actions", ACTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Run one action."""
    return run_action(arguments)
