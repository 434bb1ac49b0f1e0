"""Benchmarks: what is compared takes turns in one run, and medians count.

examples:
  triweave bench loader --json
  triweave bench build --python peers/bin/python
  triweave bench index --peers energon --python peers/bin/python
  triweave bench storage s3://corpora/tuxpaint --local shards/tuxpaint
  triweave bench generate --tokens 256
  triweave bench checkpoint --json
  triweave bench fusion --out fusion.json
  triweave bench step --stages 1,3
  triweave bench kernels --mask interleaved,causal
"""

from __future__ import annotations

import argparse

from triweave.launch.actions import add_actions, run_action

ACTIONS = {
    "loader": "measure the loader against its peers and the bare functions, in one run",
    "build": "measure the pictures a build encodes per second beside img2dataset, in turns",
    "index": "measure making the indices of existing tars beside energon prepare, in turns",
    "storage": "measure reading shards from an object store, its cache and a local folder",
    "generate": "measure generation with its cache and without, in turns",
    "checkpoint": "measure what a save costs the training, beside DeepSpeed and torch DCP, in turns",
    "fusion": "train every fusion on one task, beside single modalities and classical floors",
    "step": "measure a training step over a bare DeepSpeed loop and FSDP2, and the memory of its state",
    "kernels": "measure the ops against torch, FlexAttention, flash-attn and Liger, in turns",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions."""
    add_actions(parser, "bench_actions", ACTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Run one action."""
    return run_action(arguments)
