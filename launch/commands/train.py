"""Train inside one rank; `triweave launch` starts many.

examples:
  triweave train runs/demo/config.yaml
  triweave train configs/demo_cpu.yaml train.steps=20 train.zero_stage=3
  triweave train configs/demo_cpu.yaml --resume
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `triweave train`."""
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint in run_dir")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings, such as train.steps=100")


def run(arguments: argparse.Namespace) -> int:
    """Train this rank's part of the run."""
    from triweave.pretrain.train import main

    resume = ["--resume"] if arguments.resume else []
    return main([arguments.config, *resume, *arguments.overrides])
