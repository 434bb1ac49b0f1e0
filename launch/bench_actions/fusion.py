"""Train every fusion on one task from the same start and with the same budget; print the table.

examples:
  triweave bench fusion --out fusion.json
  triweave bench fusion --only sequence,late\\ lmf --seeds 1 --steps 60
  triweave bench fusion --shards /data/shards/tuxpaint --tokenizer /data/tokenizer.model --json

The task: the category of Tux Paint's stamps by picture, speech and caption, and the caption by picture and speech. It
needs shards of Tux Paint and a tokenizer; `triweave demo` leaves both below runs/demo. Beside the fusions stand every
modality alone, and classical floors. A full table takes about half an hour of one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from triweave.launch.errors import LaunchError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--shards", default="runs/demo/shards/tuxpaint", help="shards of Tux Paint (default: %(default)s)"
    )
    parser.add_argument("--tokenizer", default="runs/demo/tokenizer.model", help="default: %(default)s")
    parser.add_argument("--only", default="", metavar="NAMES", help="fusions, comma-separated (default: all)")
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of each training (default 240)")
    parser.add_argument("--batch", type=int, default=32, help="documents of one step (default 32)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep every training's answers here, to continue from")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a Markdown table")


def run(arguments: argparse.Namespace) -> int:
    """Train, ask, print."""
    for name in ("steps", "batch", "seeds", "threads"):
        if getattr(arguments, name) < 1:
            raise LaunchError(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    if arguments.batch < 2:
        raise LaunchError(f"--batch is {arguments.batch}; retrieval needs at least 2 documents to tell apart")
    import torch

    from triweave.data_pipeline.shards.manifest import write_atomically
    from triweave.pretrain.bench.fusion.bench import bench_fusion, markdown, select_contenders
    from triweave.pretrain.bench.fusion.task import read_task
    from triweave.pretrain.bench.fusion.training import Budget

    torch.set_num_threads(arguments.threads)
    chosen = select_contenders([name.strip() for name in arguments.only.split(",") if name.strip()])
    task = read_task(arguments.shards, arguments.tokenizer, batch=arguments.batch)
    budget = Budget(steps=arguments.steps, batch=arguments.batch)
    result = bench_fusion(task, chosen, budget, seeds=arguments.seeds, work=arguments.work, tell=_tell)
    text = json.dumps(result, indent=1)
    if arguments.out is not None:
        try:
            write_atomically(arguments.out, text.encode() + b"\n")
        except OSError as error:
            raise LaunchError(f"{arguments.out}: {error.strerror}; choose a file that can be written") from None
    print(text if arguments.json else markdown(result))
    return 0


def _tell(message: str) -> None:
    print(f"triweave bench fusion: {message}", file=sys.stderr, flush=True)
