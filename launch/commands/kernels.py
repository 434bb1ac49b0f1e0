"""What can be done with the Triton kernels themselves.

examples:
  triweave kernels compile --arch sm_80,sm_90 --op attention
  triweave kernels roofline --chip h100,b200 --op attention --head-dim 128
  triweave kernels selftest                          on a machine with a GPU; kernels/README.md says what it decides
  triweave kernels tiles
"""

from __future__ import annotations

import argparse

from triweave.launch.actions import add_actions, run_action

ACTIONS = {
    "compile": "compile every shipped kernel ahead of time, for chips that are not here, and show what it costs",
    "selftest": "compare every Triton kernel with fp64 on this machine's device, and remember which may serve",
    "roofline": "model how fast ops and compiled kernels can be on a chip, beside the figures that others published",
    "tune": "pin the attention kernels' tiles for the GPU of this machine, by measuring",
    "tiles": "count what tiles cost on packed documents: live-tile work against the exact mask area",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions."""
    add_actions(parser, "kernel_actions", ACTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Run one action."""
    return run_action(arguments)
